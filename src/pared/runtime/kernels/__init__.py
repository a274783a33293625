"""Int8 arithmetic on plain tensors, one operation a module: a fast path on oneDNN and a plain reference.

`machine` says whether the fast path exists here, and how many activation levels it can take. `activation`
turns floats into unsigned codes. `linear` and `conv` each offer

* `pack(codes, step, ...)`: the weight as the kernel wants it. A pack can be neither copied nor pickled nor
  exported: keep the plain codes, and pack where the model runs;
* `static(x, packed, bias, span)`: activations on one grid, made of a calibrated `Range`;
* `dynamic(x, packed, bias)`: activations on grids taken from the call itself;
* `reference(x, codes, step, bias, ...)`: the same arithmetic with ordinary operations, for tests and export.

Everything is a pure function, so threads need no lock; all that is kept are the cached answers of `machine`
and the grids of ranges. Nothing here carries gradients.
"""
