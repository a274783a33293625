"""What runs is measured again at a model's first calls, where it was measured on a busy machine."""

from __future__ import annotations

import copy
import logging
import math
import statistics
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from pared.model.recorded.state import Attributes
from pared.model.tensors import version_of
from pared.runtime.graphs.call_kinds import Argument, Bound, arguments_of, caches_of, describe_kind
from pared.runtime.profile.timings import WORTH, Form, Served
from pared.runtime.serving.server import Capture, KindServer, Skeleton
from pared.runtime.stopwatch import Spent

log = logging.getLogger(__name__)

MODULES: Final = "modules"
_TURNS: Final = 2  # of all forms on a call, of which the second counts: the first makes graphs, or warms caches
_ENOUGH: Final = 3  # undisturbed calls
_MOST: Final = 8  # calls; then what `fit` has chosen stays


@dataclass(eq=False)
class _Kind:
    """What is known of the calls of one kind, from a size to another.

    Args:
        form: what answers.
        ratios: by form, its times as shares of those of the modules.
        calls: how many were measured.
        is_settled: whether nothing more is measured.
    """

    form: str
    ratios: dict[str, list[float]] = field(default_factory=dict)
    calls: int = 0
    is_settled: bool = False


class SettlingServer(KindServer):
    """Answers the calls of a model that was timed on a busy machine.

    `load` has no calls to measure with, and should be fast. So the first calls of each kind are made in all forms, and
    answered by the one that `fit` chose, until three undisturbed calls have told which is fastest; that one answers
    from then on. If the machine stays busy for eight calls, the choice of `fit` stays. It stays, too, for calls
    that cannot be made twice: those that write to a cache; and modules answer where a call writes to another argument,
    or changes the model's attributes.

    Args:
        skeleton: makes a float model of the same architecture and class from the quantized model.
        wanted: an example call for every call kind.
        forms: the servers of the forms besides the modules, by name.
        served: what answers calls at first; default: the modules.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        wanted: Sequence[Sequence[Argument]],
        forms: Mapping[Form, KindServer],
        served: Sequence[Served] = (),
    ) -> None:
        super().__init__(skeleton, wanted)
        self._forms = dict(forms)
        self._served = tuple(served)
        self._found: dict[tuple[str, float], _Kind] = {}
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> SettlingServer:
        """The same for the copied model, which is measured on its own."""
        forms = {name: copy.deepcopy(server, memo) for name, server in self._forms.items()}
        return SettlingServer(self._skeleton, self.wanted, forms, self._served)

    def warm(self, model: nn.Module, captured: Capture | None = None) -> None:
        """Make all forms."""
        for server in self._forms.values():
            server.warm(model, captured)

    def _answer(self, model: nn.Module, bound: Bound, modules: Callable[[], Any]) -> Any:
        kind = self._kind(bound)
        if caches_of(bound):
            return self._by(kind.form, model, bound, modules)
        if not kind.is_settled and self._lock.acquire(blocking=False):  # other threads do not wait for it
            try:
                return self._measured(kind, model, bound, modules)
            finally:
                self._lock.release()
        return self._by(kind.form, model, bound, modules)

    def _kind(self, bound: Bound) -> _Kind:
        name = describe_kind(arguments_of(bound))
        size = sum(value.numel() for value in bound.values() if type(value) is Tensor)
        alike = (one for one in self._served if describe_kind(one.example) == name and one.least <= size < one.below)
        served = next(alike, None)
        form, least = (MODULES, -1.0) if served is None else (served.form, served.least)
        return self._found.setdefault((name, least), _Kind(form))

    def _by(self, form: str, model: nn.Module, bound: Bound, modules: Callable[[], Any]) -> Any:
        if form == MODULES:
            return NotImplemented
        return self._forms[cast("Form", form)]._answer(model, bound, modules)

    def _measured(self, kind: _Kind, model: nn.Module, bound: Bound, modules: Callable[[], Any]) -> Any:
        """The output, of one more call on which all forms are timed."""
        if not kind.calls:
            given = [(value, version_of(value)) for value in bound.values() if type(value) is Tensor]
            output, name = Attributes(model.modules()).changed_by(modules)
            if name or any(version_of(value) != version for value, version in given):
                kind.form, kind.is_settled = MODULES, True
                return output
        outputs: dict[str, Any] = {}
        times: dict[str, Spent] = {}
        for _ in range(_TURNS):
            for form in (MODULES, *self._forms):
                if outputs.get(form) is NotImplemented:
                    continue
                with (spent := Spent()).adding():
                    outputs[form] = modules() if form == MODULES else self._by(form, model, bound, modules)
                times[form] = spent
        kind.calls += 1
        known = {form: times[form] for form, output in outputs.items() if output is not NotImplemented}
        if torch.get_num_threads() == 1 or not any(spent.is_disturbed for spent in known.values()):
            for form, spent in known.items():
                kind.ratios.setdefault(form, []).append(spent.seconds / max(known[MODULES].seconds, 1e-9))
        answer = outputs[kind.form] if outputs[kind.form] is not NotImplemented else outputs[MODULES]
        if len(kind.ratios.get(MODULES, ())) >= _ENOUGH:
            self._settle(kind, set(known))
        elif kind.calls >= _MOST:
            kind.is_settled = True
            log.info("the machine is still busy: what runs is not measured again")
        return answer

    def _settle(self, kind: _Kind, available: set[str]) -> None:
        """Choose the form that is fastest, by at least a tenth where it is not the modules."""
        shares = {form: math.exp(statistics.mean(map(math.log, kind.ratios[form]))) for form in available}
        best = min(shares, key=shares.__getitem__)
        kind.form = best if shares[best] <= WORTH else MODULES
        kind.is_settled = True
        log.info("calls are answered by the %s from now on: %s", kind.form, shares)
