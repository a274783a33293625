"""What calibration saw: one pass over the data records the calls of the model and the inputs of its layers."""

from __future__ import annotations

import functools
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from pared.errors import CalibrationError, reason_of
from pared.fitting.calibration.ranges import without_outliers
from pared.formats.activation import Outliers
from pared.model import calls
from pared.model.calls import Call
from pared.model.copies import shadow
from pared.model.outputs import EVERY, Key, Leaf, leaves_of
from pared.model.recorded import draws, values
from pared.runtime.layers.table import has_columns, layer_of, weights_of
from pared.switches import WITHOUT_FAST_PATHS

log = logging.getLogger(__name__)

_MOST_BYTES: Final = 1 << 29  # of what recorded calls change: their arguments, and the state of the model
_MOST_NUMBERS: Final = 1 << 23  # of outputs that are kept


@dataclass(frozen=True, eq=False)
class InputStats:
    """The inputs of one layer in calibration.

    Args:
        low: the smaller of 0 and the least value.
        high: the larger of 0 and the greatest value.
        shape: the input with the median number of elements has this shape; timing uses it.
        call: the largest call, for layers that take more than one tensor; timing repeats it.
        lows: float32, the least value of each column (number along the last dimension), for layers whose range may
            leave columns out; else None.
        highs: the greatest value of each column, likewise.
    """

    low: float
    high: float
    shape: tuple[int, ...]
    call: Call | None = None
    lows: Tensor | None = None
    highs: Tensor | None = None

    @functools.cached_property
    def without_outliers(self) -> tuple[float, float, Outliers]:
        """The ends of the narrowest range that leaves a few columns out, and these columns."""
        if self.lows is None or self.highs is None:
            return self.low, self.high, ()
        return without_outliers(self.lows, self.highs)


@dataclass(frozen=True, eq=False)
class Statistics:
    """What one pass over the calibration data recorded.

    Args:
        samples: the number of samples seen.
        inputs: the inputs of each layer that was called, by module name.
        calls: the calls of the model, in order, until the limit of samples was reached.
        energies_of_calls: for each call the energy of each floating output, as numbers and as logits where it could
            be these, see `Leaf.energy`; empty where the model returns no floats.
        samples_of_calls: the number of samples in each call.
        outputs_of_calls: the floating outputs of each call, as numbers and as logits where they could be these; empty
            where they are large, or where random numbers were drawn meanwhile, so that they may not come again.
        logits: the paths of the outputs that are known to hold logits.
    """

    samples: int
    inputs: Mapping[str, InputStats]
    calls: tuple[Call, ...] = ()
    energies_of_calls: tuple[Mapping[Key, float], ...] = ()
    samples_of_calls: tuple[int, ...] = ()
    outputs_of_calls: tuple[tuple[Leaf, ...], ...] = ()
    logits: frozenset[str] = frozenset()

    @property
    def energies(self) -> dict[Key, float]:
        """The energy of each floating output, summed over all calls; of logits both energies."""
        totals: dict[Key, float] = {}
        for energies in self.energies_of_calls:
            for key, energy in energies.items():
                if not key[1] or key[0] in self.logits:
                    totals[key] = totals.get(key, 0.0) + energy
        return totals

    def some(self, samples: int) -> Statistics:
        """The same with fewer calls, evenly spaced, that have about this number of samples."""
        usual = sorted(self.samples_of_calls)[len(self.calls) // 2] if self.calls else 1  # the last may have fewer
        wanted = min(len(self.calls), math.ceil(samples / max(usual, 1)))
        places = [i * len(self.calls) // wanted for i in range(wanted)]
        return replace(
            self,
            samples=sum(self.samples_of_calls[i] for i in places),
            calls=tuple(self.calls[i] for i in places),
            energies_of_calls=tuple(self.energies_of_calls[i] for i in places),
            samples_of_calls=tuple(self.samples_of_calls[i] for i in places),
            outputs_of_calls=tuple(self.outputs_of_calls[i] for i in places if self.outputs_of_calls),
        )


def collect(model: nn.Module, calibration: calls.Calibration, limit: int) -> Statistics:
    """Run the calibration data through the model once; record its calls, and the inputs of layers that can run in int8.

    Args:
        model: it is left as it is; a copy runs, in eval mode.
        calibration: see `calls.run`.
        limit: the number of samples after which reading stops.

    Raises:
        CalibrationError: see `calls.run`; or an input of a layer holds NaN or infinity.
    """
    copied = shadow(model)
    collectors = {
        name: _Collector(
            name,
            whole=layer.forward is not None,
            builtin=type(module).__module__.startswith("torch.nn."),
            columns=has_columns(module),
        )
        for name, module in copied.named_modules()
        if weights_of(module) and (layer := layer_of(module))
    }
    for name, collector in collectors.items():
        copied.get_submodule(name).register_forward_hook(collector, with_kwargs=True)
    recorder = _Recorder()
    with WITHOUT_FAST_PATHS:
        samples = calls.run(copied, calibration, limit, listener=recorder)
    if not recorder.calls:
        raise CalibrationError(
            "the model was called only inside functions that are being transformed, such as `torch.func.vmap`",
            where="calib_dataloader",
            remedy="Call the model itself at least once, or pass an iterable of batches.",
        )
    found = {id(copied.get_submodule(name)): c.result() for name, c in collectors.items() if c.seen}
    every_name = copied.named_modules(remove_duplicate=False)  # a shared module goes by each of its names
    inputs = {name: found[id(module)] for name, module in every_name if id(module) in found}
    return Statistics(
        samples,
        inputs,
        recorder.made(),
        tuple(recorder.energies_of_calls),
        tuple(recorder.samples_of_calls),
        recorder.outputs(),
    )


class _Recorder:
    """Keeps calls of the model, and the energies of their outputs.

    What calls change, such as the cache of a model that generates text, is kept once for each call. Where that takes
    too much, every other call is forgotten, but never the first.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.energies_of_calls: list[dict[Key, float]] = []
        self.samples_of_calls: list[int] = []
        self._bytes: list[int] = []  # of what calls change
        self._outputs: list[tuple[Leaf, ...]] = []
        self._left = _MOST_NUMBERS
        self._drawn = draws.drawn()
        self._every = 1  # each call whose number is a multiple of this is kept
        self._count = 0

    def __call__(self, call: Call, output: Any) -> None:
        number, self._count = self._count, self._count + 1
        if number % self._every:
            return
        self.calls.append(call)
        self.samples_of_calls.append(calls.samples_of(call.args, call.kwargs))
        leaves = leaves_of(output, EVERY, call.task)
        self.energies_of_calls.append({leaf.key: leaf.energy() for leaf in leaves})
        self._keep(leaves)
        changing = values.nbytes((call.args, dict(call.kwargs))) if call.writes else 0
        self._bytes.append(changing + (call.state.nbytes if call.state is not None else 0))
        while sum(self._bytes) > _MOST_BYTES and len(self.calls) > 2:
            self._every *= 2
            for kept in (self.calls, self.energies_of_calls, self.samples_of_calls, self._bytes):
                del kept[1::2]
            self._left = -1

    def _keep(self, leaves: Sequence[Leaf]) -> None:
        """Keep the outputs of a call."""
        self._left -= sum(leaf.value.numel() for leaf in leaves if not leaf.is_logits) if leaves else self._left + 1
        if self._left < 0:
            self._outputs.clear()
            return
        values_by_path = {leaf.path: leaf.value.detach().clone() for leaf in leaves if not leaf.is_logits}
        self._outputs.append(tuple(replace(leaf, value=values_by_path[leaf.path]) for leaf in leaves))

    def outputs(self) -> tuple[tuple[Leaf, ...], ...]:
        """Those of every call; none if some are missing, or if something drew random numbers."""
        return tuple(self._outputs) if self._left >= 0 and draws.drawn() == self._drawn else ()

    def made(self) -> tuple[Call, ...]:
        """The calls; without a state where none of them changed anything in the model."""
        return tuple(
            replace(call, state=None) if call.state is not None and not call.state.changed else call
            for call in self.calls
        )


class _Collector:
    """A forward hook that records the range and the shapes of one layer's inputs.

    Args:
        name: the layer's name.
        whole: record its largest call, too.
        builtin: the class is one of PyTorch's, so the first tensor is the input, however the layer is called.
        columns: record the range of each column, too.
    """

    def __init__(self, name: str, whole: bool, builtin: bool, columns: bool) -> None:
        self._builtin = builtin
        self._columns = columns
        self.name = name
        self.low = self.high = 0.0
        self.lows: Tensor | None = None
        self.highs: Tensor | None = None
        self.plain = True
        self.shapes: Counter[tuple[int, ...]] = Counter()
        self._whole = whole
        self._largest: Call | None = None
        self._most = 0

    @property
    def seen(self) -> bool:
        return bool(self.shapes) and self.plain

    def __call__(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not self.plain or values.is_transformed():
            return  # kernels do not run within `torch.func.vmap`, and its tensors have no numbers
        try:
            self._look(args, kwargs, output)
        except CalibrationError:
            raise
        except Exception as error:  # noqa: BLE001  # tensors of any class; the model itself has run
            log.info("%s stays in float: its input cannot be observed: %s", self.name, reason_of(error))
            self.plain = False

    def _look(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = (leaf for _, leaf in values.leaves((args, kwargs), whole=(PackedSequence,)))
        found = [leaf for leaf in given if isinstance(leaf, (Tensor, PackedSequence))]
        if not self._whole and (len(args) != 1 or kwargs or type(args[0]) is not Tensor or type(output) is not Tensor):
            # A subclass with a signature of its own cannot be run alone.
            self.plain, self._whole = self._builtin, self._builtin
        if not self.plain or not found or found[0].data.numel() == 0:
            return
        x = found[0].data.detach()
        self.shapes[tuple(x.shape)] += 1
        size = sum(tensor.data.numel() for tensor in found)
        if self._whole and size > self._most:
            self._largest, self._most = Call(*values.copied((args, kwargs))), size
        if not x.is_floating_point():
            return
        ends = self._ends(x)
        low, high = float(ends[0].min()), float(ends[1].max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise CalibrationError(
                f"its input holds {'NaN' if math.isnan(low) else 'Inf'} during calibration",
                where=self.name,
                remedy="Check the calibration data, and that the float model gives finite outputs on them.",
            )
        self.low, self.high = min(self.low, low), max(self.high, high)

    def _ends(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The least and the greatest value; of each column, where columns are recorded."""
        if not self._columns:
            return torch.aminmax(x)
        rows = x.reshape(-1, x.shape[-1]) if x.dim() else x.reshape(1, 1)
        lows, highs = rows.amin(0).float(), rows.amax(0).float()
        self.lows = lows if self.lows is None else torch.minimum(self.lows, lows)
        self.highs = highs if self.highs is None else torch.maximum(self.highs, highs)
        return lows, highs

    def result(self) -> InputStats:
        by_size = sorted(self.shapes.elements(), key=lambda shape: (math.prod(shape), shape))
        return InputStats(self.low, self.high, by_size[len(by_size) // 2], self._largest, self.lows, self.highs)
