"""Int8 arithmetic on plain tensors, one operation a module, on the kernels of oneDNN, FBGEMM and ONNX Runtime.

`machine` says whether the kernels run here, and how many activation levels they can take. `activation` turns floats
into unsigned codes. `linear` and `conv` each offer

* `pack(codes, step, ...)`: the weight as the kernel wants it. It can be neither copied nor pickled: keep the plain
  codes, and pack where the model runs;
* `static(x, packed, bias, span)`: activations on one grid, made from a calibrated `Range`;
* `dynamic(x, packed, bias)`: activations on grids taken from the call.

`fbgemm` has what FBGEMM computes faster than oneDNN: recurrent layers, and products of a few rows. `onnxruntime` has
LSTMs with calibrated inputs, where it is installed.

Everything is a pure function and needs no lock; only the answers of `machine` and the grids of ranges are cached.
Nothing here carries gradients. The tests compare each function with a plain reference.
"""
