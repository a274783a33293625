"""A model's calls answered by graphs, each checked against the modules before it is trusted."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Final, Protocol

from torch import Tensor, nn

from pared.errors import reason_of
from pared.model.recorded.state import Attributes
from pared.runtime.graphs.call_kinds import Argument, Bound, arguments_of, caches_of, kind_of
from pared.runtime.graphs.capturing.capture import capture
from pared.runtime.graphs.capturing.kept import Checks, Ones
from pared.runtime.graphs.containers import container_of
from pared.runtime.graphs.graph import Graph
from pared.runtime.kernels.activation import NotFiniteError
from pared.runtime.serving.agreement import TOLERANCE, Agreement, differences, of_containers
from pared.runtime.serving.server import Capture, KindServer, ModelSnapshot, Sizes, Skeleton, has_listeners

log = logging.getLogger(__name__)

_OTHERWISE: Final = "the graph does not give what the modules give"

# Call kinds that differ from a wanted one in constants only, and get a graph: each costs seconds.
_MOST_OTHERS: Final = 2

# The calls that change the model before its graph is given up.
_MOST_CHANGES: Final = 2

# The bytes that an example call may take in any case, and as a multiple of those of the call at hand.
_FREE: Final = 1 << 26
_TIMES: Final = 4


class Executable(Protocol):
    """What answers calls of one kind: a graph of PyTorch's operators, or the same in another runtime."""

    note: str
    checks: Checks

    def fits(self, bound: Bound) -> bool:
        """Whether it takes a call of these sizes."""

    def __call__(self, bound: Bound) -> Any:
        """The model's output. Raises NotFiniteError where only the modules give what they give."""


class GraphServer(KindServer):
    """Answers calls with graphs, each made at the first call of its kind.

    A call with the tensors of a wanted kind and other constants, such as a flag, gets a graph of its own as long as
    there are few of these. At the first call of each kind, and at the first with other dimensions of size 1, the
    modules run as well, or at a few of them where that leaves doubt, unless an earlier process has compared. A graph
    whose output differs from theirs is dropped, and so is one of a model whose calls change its attributes, as nobody
    would change them while a graph answers, or whose attributes others change.

    Args:
        skeleton: makes a float model of the same architecture and class, whose numbers are not read.
        wanted: an example call for every call kind that is to be served.
        captured: turns a float model's call into a graph.
        sizes: the sizes of these calls that are served; default: any.

    Attributes:
        tolerance: the share of the output's energy by which that and the modules may differ.
    """

    tolerance: ClassVar[float] = TOLERANCE

    def __init__(
        self,
        skeleton: Skeleton,
        wanted: Sequence[Sequence[Argument]] = (),
        captured: Capture = capture,
        sizes: Sequence[Sizes] = (),
    ) -> None:
        super().__init__(skeleton, wanted, sizes)
        self._captured = captured
        self._graphs: dict[object, _CheckedGraph] = {}
        self._lock = threading.RLock()

    def _answer(self, model: nn.Module, bound: Bound, modules: Callable[[], Any]) -> Any:
        kind = kind_of(bound)
        graph = self._graphs.get(kind)
        if graph is None and kind not in self._kinds and len(self._graphs) >= len(self._kinds) + _MOST_OTHERS:
            return NotImplemented
        if graph is None or not graph.is_current():
            if has_listeners(model):
                return NotImplemented  # nor is a graph made: capturing would call the hooks with fake tensors
            example = self._example(kind, arguments_of(bound))
            if example is None:
                return NotImplemented
            graph = self._made(model, kind, example, self._captured)
        return graph.run(bound, modules)

    def warm(self, model: nn.Module, captured: Capture | None = None) -> None:
        """Make the graphs; the first call of each is still compared with the modules."""
        if has_listeners(model):
            return  # as for a call
        for kind in self._kinds:
            example = self._example(kind, ())
            if example is not None:
                self._made(model, kind, example, captured or self._captured)

    def _example(self, kind: tuple[object, ...], given: Sequence[Argument]) -> Sequence[Argument] | None:
        """The call to capture: the wanted one; None if it would take far more memory than the call at hand.

        Where it is read from a file, anyone may have written it.
        """
        wanted = self._kinds.get(kind)
        most = max(_FREE, _TIMES * sum(one.nbytes for one in given))
        if wanted is None:
            return given
        return wanted if sum(one.nbytes for one in wanted) <= most else None

    def _made(self, model: nn.Module, kind: object, arguments: Sequence[Argument], captured: Capture) -> _CheckedGraph:
        with self._lock:
            graph = self._graphs.get(kind)
            if graph is None or not graph.is_current():
                graph = _CheckedGraph(
                    model,
                    lambda: self._executable(model, arguments, captured),
                    self.tolerance,
                )
                self._graphs[kind] = graph
        return graph

    def _executable(self, model: nn.Module, arguments: Sequence[Argument], captured: Capture) -> Executable:
        """What answers calls, from the quantized model and an example call."""
        return Graph(model, captured(self._skeleton(model), arguments))

    def reason(self, bound: Bound) -> str:
        """Why no graph serves a call of a wanted kind, in words; empty if one does."""
        graph = self._graphs.get(kind_of(bound))
        if graph is None:
            return "a module inside has hooks"
        if graph.graph is not None and not graph.graph.fits(bound):
            return "; ".join(["it takes no inputs of these sizes", *filter(None, [graph.graph.note])])
        return graph.reason or graph.doubt(bound)

    def note(self, bound: Bound) -> str:
        """Which sizes the graph that serves a call does not take, and why; empty if there are none, or no graph."""
        graph = self._graphs.get(kind_of(bound))
        return graph.graph.note if graph is not None and graph.graph is not None else ""


class _CheckedGraph:
    """A graph and what is known of its outputs; no graph, and the reason, if none can be made."""

    def __init__(self, model: nn.Module, made: Callable[[], Executable], tolerance: float) -> None:
        self.graph: Executable | None = None
        self.reason = ""
        self._tolerance = tolerance
        self._snapshot = ModelSnapshot(model)
        self._attributes = Attributes(model.modules())
        self._changes = 0
        self._agreements: dict[Ones, Agreement] = {}
        self._lock = threading.Lock()
        try:
            self.graph = made()
        except Exception as error:  # noqa: BLE001  # a call that no graph can be made of is answered by the modules
            self.reason = reason_of(error)
            log.debug("no graph: %s", error)

    def is_current(self) -> bool:
        return self.graph is None or self._snapshot.is_current()

    def run(self, bound: Bound, modules: Callable[[], Any]) -> Any:
        graph = self.graph
        if graph is None or not graph.fits(bound) or not self._snapshot.is_undisturbed():
            return NotImplemented
        ones = _ones(bound)
        if ones in graph.checks:
            return self._answer(graph, bound)
        with self._lock:
            if name := self._attributes.changed():
                self._drop(f"its attribute {name} was changed")
                return NotImplemented
            expected, name = self._attributes.changed_by(modules)
            if name:
                return self._unsure(expected, name)
            return self._check(graph, bound, ones, expected)

    def _answer(self, graph: Executable, bound: Bound) -> Any:
        if name := self._attributes.changed():  # what was captured may depend on it
            self._drop(f"its attribute {name} was changed")
            return NotImplemented
        try:
            return graph(bound)
        except NotFiniteError:
            return NotImplemented
        except Exception as error:  # noqa: BLE001  # as in `_check`: the modules may well take this call
            self._drop(f"the graph cannot take such inputs ({reason_of(error)})")
            return NotImplemented

    def _unsure(self, expected: Any, name: str) -> Any:
        """Give up the graph if calls change the model; its first one may: it may prepare something for all others."""
        self._changes += 1
        self._attributes.renew()
        if self._changes == _MOST_CHANGES or not self._snapshot.is_current():
            self._drop(f"its forward changes {name}")
        return expected

    def _check(self, graph: Executable, bound: Bound, ones: Ones, expected: Any) -> Any:
        # The modules wrote to the caches of the call; the graph starts from what was in them, and writes to them, too.
        caches = [one.held for one in caches_of(bound).values()]
        theirs = [one for one in map(container_of, caches) if one is not None]
        if len(theirs) < len(caches):
            self._drop("what its forward makes of a cache is not known")
            return expected
        try:
            found = graph(bound)
        except NotFiniteError:
            return expected
        except Exception as error:  # noqa: BLE001  # of operators, for instance for a wrong shape
            self._drop(f"the graph cannot take such inputs ({reason_of(error)})")
            return expected
        ours = map(container_of, caches)
        agreement = self._agreements.setdefault(ones, Agreement(self._tolerance))
        verdict = agreement.verdict([differences(found, expected), *map(of_containers, ours, theirs)])
        if verdict == "right":
            graph.checks.add(ones)
            return found  # as at every later call
        for one in theirs:
            one.restore()
        if verdict == "wrong":
            self._drop(_OTHERWISE)
        return expected

    def doubt(self, bound: Bound) -> str:
        """Why the modules answer calls like this one, although there is a graph; empty where they do not."""
        ones = _ones(bound)
        return _OTHERWISE if self.graph and ones in self._agreements and ones not in self.graph.checks else ""

    def _drop(self, reason: str) -> None:
        self.graph, self.reason = None, reason
        log.warning("the modules run from now on: %s", reason)


def _ones(bound: Bound) -> Ones:
    """Which dimensions of a call's tensors have size 1: operators take other paths there."""
    return tuple(size == 1 for value in bound.values() if type(value) is Tensor for size in value.shape)
