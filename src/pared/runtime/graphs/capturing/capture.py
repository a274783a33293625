"""A model's call captured as a graph of operators by `torch.export`, for inputs of any size that the model allows."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from pared.errors import ModelError, reason_of
from pared.runtime.graphs.call_kinds import Argument
from pared.runtime.graphs.capturing.outputs import Arguments, Outputs
from pared.runtime.graphs.capturing.writes import replace_writes
from pared.runtime.graphs.containers import is_filled
from pared.runtime.stopwatch import Patience, TooSlowError
from pared.switches import CAPTURING, WITHOUT_FAST_PATHS, ignoring, quiet_loggers

log = logging.getLogger(__name__)

PREFIX: Final = "model."  # what `FlatModel` puts before the names of tensors and modules
_REMEDY: Final = "Nothing needs to be done: its modules run instead."
# They report sizes that are fixed or may vary, and packages that are not installed; what cannot be captured is raised.
LOGGERS: Final = ("torch", "onnxscript", "onnx_ir")
_QUIETLY: Final = quiet_loggers(LOGGERS, logging.CRITICAL + 1)

Example = tuple[tuple[Any, ...], dict[str, Any]]  # the positional and the keyword arguments of a call


@dataclass(frozen=True)
class _Attempt:
    """A way to capture.

    Args:
        free: the dimensions of a tensor that may have other sizes, by its rank.
        seconds: what it may take of a processor in any case.
        an_operator: seconds more for each operator.
    """

    free: Callable[[int], Iterable[int]]
    seconds: float
    an_operator: float

    def patience(self) -> Patience:
        """What refuses operators that come too late."""
        return Patience(self.seconds * _slowness(), self.an_operator * _slowness())


# Operators on sizes that may vary usually take 0.006 s of processor (MiniLM), and up to 0.2 s where windows and shifts
# divide these sizes; where only the number of samples may vary, they take 0.005 s. Measured where the capture of a
# small model takes `_SMALL_SECONDS`.
_ATTEMPTS: Final = (_Attempt(range, 1.5, 0.0065), _Attempt(lambda rank: range(min(rank, 1)), 1.0, 0.006))
_SMALL_SECONDS: Final = 0.054

# A step of decoding finds one more token in its cache each time: a graph of one length would never answer again, and
# each layer has a length of its own to capture. It will answer once for each token, which is worth waiting for.
_STEP: Final = (_Attempt(range, 6.0, 0.03),)


@dataclass(frozen=True)
class Size:
    """One dimension of an input: of size `fixed`, or of any size within the bounds; equal for equal symbols.

    Args:
        fixed: the only size; None if there are others.
        symbol: names the size.
        least: the smallest size.
        most: the largest size.
        more: by how much the size exceeds that which the symbol names, as a mask exceeds what is in a cache.
    """

    fixed: int | None
    symbol: str = ""
    least: int = 0
    most: float = float("inf")
    more: int = 0

    def allows(self, given: int) -> bool:
        """Whether a size is allowed; 1 always is, and has to be tried, as only sizes from 2 are captured."""
        if self.fixed is not None:
            return given == self.fixed
        return given == 1 or (given > 0 and self.least <= given <= self.most)


@dataclass(frozen=True, eq=False)
class Captured:
    """A graph of aten operators.

    Args:
        graph: its placeholders are the model's tensors, then the inputs.
        tensors: the dotted names of the model's tensors, by placeholder.
        constants: tensors that the model's code makes, by placeholder.
        inputs: the sizes of each input, by placeholder, in the order of the arguments that are tensors.
        outputs: turns what the graph returns into the model's output.
        note: which sizes may not vary because that would have taken too long to capture; empty if there are none.
    """

    graph: fx.Graph
    tensors: Mapping[str, str]
    constants: Mapping[str, Tensor]
    inputs: Mapping[str, tuple[Size, ...]]
    outputs: Outputs
    note: str = ""


class Captures:
    """`capture` for models of one architecture, with a memory: a capture takes a second or two.

    The models may differ in the numbers of their weights only.

    Args:
        whole: the captures of the model of which this is a part; what takes too long there takes too long here.
        make: captures what is not known yet. Default: that of the whole model, or `capture`.
    """

    def __init__(self, whole: Captures | None = None, make: Callable[..., Captured] | None = None) -> None:
        self._make: Callable[..., Captured] = make or (capture if whole is None else whole._make)
        self._known: dict[object, Captured | ModelError] = {}
        self._slow: list[str] = [] if whole is None else whole._slow

    def __call__(self, model: nn.Module, arguments: Sequence[Argument]) -> Captured:
        """The graph of a call, or the error, of `capture`."""
        places: dict[int, int] = {}  # tied weights are one tensor in a graph
        tied = tuple(
            places.setdefault(id(one), len(places)) for _, one in model.named_parameters(remove_duplicate=False)
        )
        key = (tied, *((one.kind, one.shape) for one in arguments))
        if key not in self._known:
            try:
                self._known[key] = self._make(model, arguments, self._slow)
            except ModelError as error:
                self._known[key] = error
        found = self._known[key]
        if isinstance(found, ModelError):
            raise found
        return found


def module_of(node: fx.Node) -> str:
    """The name of the module in whose forward an operator was captured; empty if it is the model's own."""
    stack = node.meta.get("nn_module_stack") or {}
    path: str = next(reversed(stack.values()))[0] if stack else ""
    # Names begin with "model."; those of modules that are called several times end in "@" and a number.
    return path.removeprefix("model").removeprefix(".").partition("@")[0]


class ValuesDecideError(Exception):
    """A model's forward asks for a number that a capture does not have.

    In place of torch's RuntimeError, for which `torch.export` prints the graph so far to standard error.
    """


class FlatModel(nn.Module):
    """A model as a function of tensors that returns tensors: an exported graph has no other inputs and outputs.

    Args:
        model: the model.
        call: positional and keyword arguments; what is not a tensor keeps its value.
        returned: makes the list that is returned out of the model's output.
        around: makes a context in which the model is called; default: one that does nothing.
        prepared: makes what the model is given out of the call's arguments; default: they are it.
    """

    def __init__(
        self,
        model: nn.Module,
        call: Example,
        returned: Callable[[Any], list[Any]],
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
        prepared: Callable[[tuple[Any, ...], dict[str, Any]], Example] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self._prepared = prepared
        self._around = around
        self._leaves, self._structure = tree_flatten(call)
        self._returned = returned

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The inputs of the example call."""
        return tuple(leaf for leaf in self._leaves if isinstance(leaf, Tensor))

    def forward(self, *tensors: Tensor) -> list[Any]:
        """The model's output for these tensors in place of those of the example call."""
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        args, kwargs = tree_unflatten(leaves, self._structure)
        if self._prepared is not None:
            args, kwargs = self._prepared(args, kwargs)
        try:
            with self._around():
                return self._returned(self.model(*args, **kwargs))
        except RuntimeError as error:
            if "data-dependent" in str(error):
                raise ValuesDecideError(str(error)) from error
            raise


def doubled(call: Example) -> Example:
    """The same call with its only sample twice, because an export takes a dimension of size 1 for a constant."""
    tensors = [leaf for leaf in tree_leaves(call) if isinstance(leaf, Tensor) and leaf.dim()]
    if not tensors or any(len(tensor) != 1 for tensor in tensors):
        return call

    def twice(leaf: Any) -> Any:
        return torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) and leaf.dim() else leaf

    result: Example = tree_map(twice, call)
    return result


@contextmanager
def capturing() -> Iterator[None]:
    """Let one thread at a time capture inside, with attention unfused and without torch's warnings about itself."""
    with CAPTURING, ignoring(), _QUIETLY, WITHOUT_FAST_PATHS, torch.no_grad():
        yield


def capture(model: nn.Module, arguments: Sequence[Argument], slow: list[str] | None = None) -> Captured:
    """Capture a call.

    Args:
        model: a float model in eval mode, which must not be used afterwards. The numbers of its weights are not read;
            weights on the meta device are taken to be on the CPU.
        arguments: an example call, whose sizes may vary where the model allows it. A single sample is doubled, because
            a size of 1 would be taken for a constant.
        slow: why attempts at other calls of this architecture took too long, which are not made here then; what takes
            too long here is added. Default: nothing is known.

    Raises:
        ModelError: the call cannot be captured.
    """
    _materialize(model)
    for hooks in (model._forward_hooks, model._forward_pre_hooks):
        hooks.clear()  # they run around the graph, as they run around the model's forward
    made = Arguments(arguments)  # not an attribute of the flat model: those are set back after an export
    is_step = any(one.holds and is_filled(one.holds) for one in arguments)
    attempts, slow = (_STEP, []) if is_step else (_ATTEMPTS, [] if slow is None else slow)
    try:
        _slowness()  # no model has to be patient for the imports of the first export
        call = doubled(((), {one.name: one.example() for one in arguments if not one.holds}))
        program = _in_time(lambda around: FlatModel(model, call, made.returned, around, made.prepared), slow, attempts)
    except Exception as error:  # torch's exporter raises whatever the model's own code makes of fake tensors
        log.debug("torch.export cannot capture a call: %s", error)
        raise ModelError(
            f"torch.export cannot capture it: {reason_of(error)}", where="graph", remedy=_REMEDY
        ) from error
    note = f"only the number of samples may vary: otherwise {slow[0]}" if slow else ""
    return replace(_checked(program, made, [one.name for one in arguments if one.dtype]), note=note)


def _in_time(flat: Callable[[Callable[[], Patience]], FlatModel], slow: list[str], attempts: Sequence[_Attempt]) -> Any:
    """The exported program of the first attempt that does not take too long."""
    while len(slow) < len(attempts):
        attempt = attempts[len(slow)]
        try:
            return exported(flat(attempt.patience), attempt.free)
        except TooSlowError as error:
            slow.append(str(error))
    raise TooSlowError(slow[-1])


@cache
def _slowness() -> float:
    """How many times longer a capture takes in this process than where the limits were measured; at least 1."""

    def small() -> None:
        plain = nn.Sequential(nn.LayerNorm(2), nn.GELU())  # draws no random numbers
        exported(FlatModel(plain, ((torch.zeros(2, 2),), {}), tree_leaves), range)

    small()  # torch imports what it needs for the first export of a process
    begun = time.thread_time()
    small()
    return max(1.0, (time.thread_time() - begun) / _SMALL_SECONDS)


def _materialize(model: nn.Module) -> None:
    """Replace parameters on the meta device by untouched memory: an export would mix the devices."""
    for module in model.modules():
        for name, tensor in module._parameters.items():
            if tensor is not None and tensor.is_meta:
                module._parameters[name] = nn.Parameter(torch.empty_like(tensor, device="cpu"), requires_grad=False)


def exported(flat: FlatModel, free: Callable[[int], Iterable[int]]) -> Any:
    """The exported program, in which these dimensions of a tensor, by its rank, may have other sizes."""
    dimensions = tuple(dict.fromkeys(free(tensor.dim()), torch.export.Dim.AUTO) for tensor in flat.tensors)
    with capturing():
        program = torch.export.export(flat, flat.tensors, dynamic_shapes={"tensors": dimensions}, strict=False)
        return functional(program)


def functional(program: Any) -> Any:
    """An exported program that writes to nothing that it has made, and joins no empty tensors."""
    if not replace_writes(program.graph):
        program.graph_module.recompile()
        program = program.run_decompositions({})
    _drop_empty(program.graph)
    return program


def _drop_empty(graph: fx.Graph) -> None:
    """Join tensors without the empty ones of one dimension, with which caches begin, and which few runtimes allow."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default):
        parts = [part for part in node.args[0] if tuple(part.meta["val"].shape) != (0,)]
        if parts and len(parts) < len(node.args[0]):
            empty = [part for part in node.args[0] if part not in parts]
            node.args = (parts, *node.args[1:])
            for part in empty:  # nothing else: an operator without users may write to what outlives the call
                if not part.users and part.op == "call_function":
                    graph.erase_node(part)


def _checked(program: Any, made: Arguments, names: Sequence[str]) -> Captured:
    kinds = {spec.kind for spec in program.graph_signature.output_specs}
    if kinds != {OutputKind.USER_OUTPUT} or any(map(_keeps_statistics, program.graph.nodes)):
        raise ModelError("its forward changes buffers or inputs", where="graph", remedy=_REMEDY)
    # Only functions of tensors may remain: control flow that depends on values has modules of its own.
    tied_to_strides = (torch.ops.aten.as_strided.default, torch.ops.aten.as_strided_copy.default)
    nodes = program.graph.nodes
    if any(node.op in ("call_module", "get_attr") or node.target in tied_to_strides for node in nodes):
        raise ModelError("its forward depends on values or on the layout of memory", where="graph", remedy=_REMEDY)
    begin = placeholders(program)
    for name, value in begin.inputs.items():
        if not isinstance(value, Tensor):
            kind = begin.kinds[name].name.lower().replace("_", " ")
            raise ModelError(f"its graph takes a {kind}, which cannot be given", where="graph", remedy=_REMEDY)
    inputs = {
        name: tuple(_size(size, program.range_constraints) for size in value.shape)
        for name, value in begin.inputs.items()
    }
    outputs = made.outputs(program.graph, dict(zip(inputs, names, strict=True)))
    return Captured(program.graph, begin.tensors, begin.constants, inputs, outputs)


@dataclass(frozen=True, eq=False)
class Placeholders:
    """What an exported program begins with, by the names of its placeholders.

    Args:
        tensors: the names of the model's parameters and buffers.
        constants: other tensors.
        inputs: everything that is given at a call: what stands for it.
        kinds: what each of these is to the exporter.
    """

    tensors: dict[str, str]
    constants: dict[str, Tensor]
    inputs: dict[str, Any]
    kinds: dict[str, InputKind]


def placeholders(program: Any) -> Placeholders:
    """What an exported program begins with."""
    found = Placeholders({}, {}, {}, {})
    values = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    for spec in program.graph_signature.input_specs:
        name = spec.arg.name
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            found.tensors[name] = spec.target.removeprefix(PREFIX)
        elif spec.kind is InputKind.CONSTANT_TENSOR:
            found.constants[name] = program.constants[spec.target]
        else:
            given = values[name] if spec.kind is InputKind.USER_INPUT else None
            found.inputs[name], found.kinds[name] = given, spec.kind
    return found


def _keeps_statistics(node: fx.Node) -> bool:
    """Whether an operator writes to running statistics, which no schema says."""
    norms = (torch.ops.aten.batch_norm.default, torch.ops.aten.instance_norm.default)
    return node.target in norms and node.args[3] is not None and node.args[5] is True


def _size(size: Any, bounds: Mapping[Any, Any]) -> Size:
    if isinstance(size, int):
        return Size(size)
    expression = size.node.expr
    if expression.is_Integer:
        return Size(int(expression))
    more, symbol = expression.as_coeff_Add()
    if symbol not in bounds or not more.is_Integer:
        raise ModelError(f"the size of an input must be {expression}", where="graph", remedy=_REMEDY)
    low, high = bounds[symbol].lower, bounds[symbol].upper
    most = int(high) if high.is_Integer else float("inf")
    return Size(None, str(symbol), int(low), most, int(more))
