"""The float model as an ONNX graph whose weights still stand under their names, unfolded."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from pared.errors import ConfigError, ModelError
from pared.runtime.onnx.signature import GraphInput, Signature, output_names, signature_of, tensors_of
from pared.switches import CAPTURING, ignoring, quiet_loggers

log = logging.getLogger(__name__)

OPSET: Final = 21  # the first whose DequantizeLinear takes int16
_PREFIX: Final = "model."  # what `_Flat` puts before the names of tensors and modules

# What the exporter says of packages that are not installed, and of sizes that are fixed, which the file's inputs show.
_SPEAKERS: Final = (
    "torch.onnx",
    "torch.onnx._internal.exporter._registration",
    "torch._export.non_strict_utils",
)
_QUIETLY: Final = quiet_loggers(_SPEAKERS, logging.ERROR)

Dynamic = bool | Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class OnnxGraph:
    """A graph, and how it is called.

    Args:
        model: an `onnx_ir.Model`; initializers have the names of the model's tensors.
        signature: the calling convention.
    """

    model: Any
    signature: Signature


class _Flat(nn.Module):
    """The model as a function of tensors that gives tensors: only these are inputs and outputs of a graph."""

    def __init__(self, model: nn.Module, call: Any) -> None:
        super().__init__()
        self.model = model
        self._leaves, self._spec = tree_flatten(call)

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        args, kwargs = tree_unflatten(leaves, self._spec)
        return tensors_of(self.model(*args, **kwargs))


def capture(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic: Dynamic, weights: Container[str]
) -> OnnxGraph:
    """Export a float model through torch.export, without the rewriting that would change its weights.

    Args:
        model: in eval mode, weights as the graph shall hold them.
        args: of an example call.
        kwargs: of the same call.
        dynamic: True: every dimension of the inputs that the model allows; False: none; or what
            `torch.export.export` takes as `dynamic_shapes`, by argument.
        weights: the names of the tensors whose codes take their place later: nothing that comes from them is folded.

    Raises:
        ModelError: it does not run on the example, or cannot be exported; the exporter's own words are told.
    """
    call = _ordered(model, args, kwargs)
    if dynamic is True:
        call = _doubled(model, call)
    outputs = _outputs(model, call)
    signature = signature_of(model, *call, outputs)
    if not tensors_of(outputs):
        raise ModelError("gives no tensors", where=type(model).__name__, remedy="Export a model that does.")
    program = _program(_Flat(model, call), tensors_of(call), _dimensions(call, dynamic, signature))
    graph_model = _translated(program, signature)
    _tidy(graph_model, weights)
    tensors = zip(graph_model.graph.inputs, tensors_of(call), strict=True)
    inputs = {value.name: GraphInput.of(tensor, shape_of(value) or ()) for value, tensor in tensors}
    return OnnxGraph(graph_model, replace(signature, inputs=inputs))


def shape_of(value: Any) -> tuple[int | str, ...] | None:
    """The shape of a graph's value, with names for what may vary; None where it is not known."""
    if value.shape is None:
        return None
    sizes = (str(n) if n is not None else "?" for n in value.shape)  # a fixed size may stand there as text
    return tuple(int(size) if size.isdecimal() else size for size in sizes)


def _ordered(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Keyword arguments in the order of `forward`: graphs have their inputs in this order."""
    order = list(inspect.signature(model.forward).parameters)
    return args, dict(sorted(kwargs.items(), key=lambda one: order.index(one[0]) if one[0] in order else len(order)))


def _outputs(model: nn.Module, call: Any) -> Any:
    with torch.no_grad():
        try:
            return model(*call[0], **call[1])
        except Exception as error:
            raise ModelError(
                f"raised {type(error).__name__} on the example inputs: {error}",
                where=type(model).__name__,
                remedy="Check that the model runs on them by itself; the traceback above shows where it stopped.",
            ) from error


def _doubled(model: nn.Module, call: Any) -> Any:
    """The same call of two samples where it has one: a dimension of size 1 is taken for a constant."""
    first = [tensor for tensor in tensors_of(call) if tensor.dim()]
    if not first or any(len(tensor) != 1 for tensor in first):
        return call
    twice = tree_map(lambda one: torch.cat([one, one]) if isinstance(one, Tensor) and one.dim() else one, call)
    try:
        _outputs(model, twice)
    except ModelError as error:  # its first dimension counts no samples
        log.info(
            "the example has one sample, and the model takes no two (%s): the first dimension is fixed", error.what
        )
        return call
    return twice


def _dimensions(call: Any, dynamic: Dynamic, signature: Signature) -> list[Any]:
    """What may vary, for each tensor."""
    tensors = tensors_of(call)
    auto = torch.export.Dim.AUTO
    if isinstance(dynamic, bool):
        return [dict.fromkeys(range(tensor.dim()), auto) if dynamic else None for tensor in tensors]
    unknown = sorted(set(dynamic) - {one.name for one in signature.arguments if one.inputs})
    if unknown:
        raise ConfigError(
            f"names {', '.join(unknown)}, which the example inputs do not have",
            where="dynamic",
            remedy="Name arguments of the model's forward that hold tensors.",
        )
    found: list[Any] = []
    for argument in signature.arguments:
        own = dynamic.get(argument.name)
        if len(argument.inputs) == 1:
            found.append(own)
        elif argument.inputs:
            found += [None] * len(argument.inputs) if own is None else list(own)
    return found


def _program(flat: _Flat, tensors: list[Tensor], dimensions: list[Any]) -> Any:
    shapes = {"tensors": tuple(dimensions)} if any(one is not None for one in dimensions) else None
    with CAPTURING, ignoring(), _QUIETLY, torch.no_grad():
        try:
            return torch.export.export(flat, tuple(tensors), dynamic_shapes=shapes, strict=False)
        except Exception as error:
            raise _refusal(flat.model, error) from error


def _translated(program: Any, signature: Signature) -> Any:
    names = [name for argument in signature.arguments for name in argument.inputs]
    outputs = [name if name not in names else f"{name}_out" for name in output_names(signature.outputs)]
    with CAPTURING, ignoring(), _QUIETLY, torch.no_grad():
        try:
            made = torch.onnx.export(
                program,
                dynamo=True,
                optimize=False,
                verbose=False,
                opset_version=OPSET,
                input_names=names,
                output_names=outputs,
            )
        except Exception as error:
            raise _refusal(None, error) from error
    assert made is not None, "it is given no file to write to"
    found: Any = made.model
    assert len(found.graph.outputs) == len(outputs), "_Flat gives tensors only"
    for value in list(found.graph.initializers.values()):
        value.name = (value.name or "").removeprefix(_PREFIX)
    return found


def _refusal(model: nn.Module | None, error: Exception) -> ModelError:
    reason = str(error).strip().split("\n\n")[0].strip()
    return ModelError(
        f"cannot be exported: {type(error).__name__}: {reason}",
        where=type(model).__name__ if model is not None else "torch.onnx",
        remedy="torch.export must capture the float model: see the traceback above. If it names a dimension that must "
        "be fixed, pass dynamic=False, or say which dimensions vary.",
    )


def _tidy(model: Any, weights: Container[str]) -> None:
    """Fold what is constant, but nothing that comes from a weight: codes take the place of weights later."""
    from onnx_ir.passes import PassManager
    from onnx_ir.passes import common as passes
    from onnxscript.optimizer import fold_constants_ir

    def should_fold(node: Any) -> bool | None:
        return False if any(value is not None and value.name in weights for value in node.inputs) else None

    PassManager([passes.InlinePass()])(model)
    for node in list(model.graph):
        if node.op_type == "Gemm" and node.inputs[1].name in weights:
            _as_matmul(node)
    fold_constants_ir(model, onnx_shape_inference=True, should_fold=should_fold)
    PassManager(
        [
            passes.RemoveUnusedNodesPass(),
            passes.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]  # onnx_ir's
            passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            passes.LiftSubgraphInitializersToMainGraphPass(),
            passes.CommonSubexpressionEliminationPass(),
            passes.OutputFixPass(),
            passes.NameFixPass(),
        ]
    )(model)


def _as_matmul(node: Any) -> None:
    """A product with a bias as two nodes: runtimes have int8 products for `MatMul`, and hardly any for `Gemm`."""
    import onnx_ir as ir

    options = {name: attribute.value for name, attribute in node.attributes.items()}
    if options.get("transA") or options.get("alpha", 1.0) != 1.0 or options.get("beta", 1.0) != 1.0:
        return
    data, weight, *bias = node.inputs
    made = []
    if options.get("transB"):
        made.append(ir.node("Transpose", [weight], {"perm": [1, 0]}))
        weight = made[-1].outputs[0]
    made.append(ir.node("MatMul", [data, weight], metadata_props=dict(node.metadata_props)))
    if bias and bias[0] is not None:
        made.append(ir.node("Add", [made[-1].outputs[0], bias[0]]))
    old, new = node.outputs[0], made[-1].outputs[0]
    for one in made:
        one.outputs[0].type = old.type
    new.shape, new.name = old.shape, old.name
    node.prepend(made)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    node.graph.remove(node, safe=True)
