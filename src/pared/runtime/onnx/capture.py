"""The float model as an ONNX graph whose weights still stand under their names, unfolded."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import nn

from pared.errors import ConfigError, ModelError
from pared.runtime.graphs.capturing.capture import PREFIX, Example, FlatModel, ValuesDecideError, capturing, doubled
from pared.runtime.onnx.signature import GraphInput, Signature, output_names, signature_of, tensors_of

log = logging.getLogger(__name__)

OPSET: Final = 21  # the first whose DequantizeLinear takes int16

Dynamic = bool | Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class OnnxGraph:
    """An ONNX graph and how it is called.

    Args:
        model: an `onnx_ir.Model` whose initializers have the names of the model's tensors.
        signature: the calling convention.
        call: the call that was captured.
    """

    model: Any
    signature: Signature
    call: Example


def capture(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic: Dynamic, weights: Container[str]
) -> OnnxGraph:
    """Export a float model through torch.export, without the rewriting that would change its weights.

    Args:
        model: as for `program_of`.
        args: as for `program_of`.
        kwargs: as for `program_of`.
        dynamic: as for `program_of`.
        weights: the names of the tensors that codes replace later: nothing that is computed from them is folded.

    Raises:
        ModelError: the model does not run on the example, or cannot be exported; the exporter's message is included.
    """
    program, call, signature = program_of(model, args, kwargs, dynamic)
    graph_model = _translated(program, signature)
    _tidy(graph_model, weights)
    tensors = zip(graph_model.graph.inputs, tensors_of(call), strict=True)
    inputs = {value.name: GraphInput.of(tensor, shape_of(value) or ()) for value, tensor in tensors}
    return OnnxGraph(graph_model, replace(signature, inputs=inputs), call)


def program_of(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic: Dynamic
) -> tuple[Any, Example, Signature]:
    """A call of a float model as a program of `torch.export`, the call that was captured, and how it is called.

    Args:
        model: a model in eval mode, with the weights that the graph is to hold.
        args: the positional arguments of an example call.
        kwargs: its keyword arguments.
        dynamic: which dimensions may vary. True: all that `torch.export` leaves free; False: none; or
            what `torch.export.export` takes as `dynamic_shapes`, by argument.

    Raises:
        ModelError: as for `capture`.
    """
    call = _ordered(model, args, kwargs)
    if dynamic is True:
        call = _two_samples(model, call)
    outputs = _outputs(model, call)
    signature = signature_of(model, *call, outputs)
    if not tensors_of(outputs):
        raise ModelError(
            "returned no tensors for the example inputs",
            where=type(model).__name__,
            remedy="Only a model that returns tensors can be exported.",
        )
    return _program(FlatModel(model, call, tensors_of), dimensions_of(call, dynamic, signature)), call, signature


def shape_of(value: Any) -> tuple[int | str, ...] | None:
    """The shape of a graph's value, with names for dimensions that may vary; None if it is unknown."""
    if value.shape is None:
        return None
    sizes = (str(n) if n is not None else "?" for n in value.shape)  # a fixed size may stand there as text
    return tuple(int(size) if size.isdecimal() else size for size in sizes)


def _ordered(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Example:
    """The call with its keyword arguments in the order of `forward`, which is the order of the graph's inputs."""
    place = {name: i for i, name in enumerate(inspect.signature(model.forward).parameters)}
    return args, {name: kwargs[name] for name in sorted(kwargs, key=lambda name: place.get(name, len(place)))}


def _outputs(model: nn.Module, call: Example) -> Any:
    with torch.no_grad():
        try:
            return model(*call[0], **call[1])
        except Exception as error:
            raise ModelError(
                f"raised {type(error).__name__} on the example inputs: {error}",
                where=type(model).__name__,
                remedy="Check that the float model runs on them; the traceback above shows where it stopped.",
            ) from error


def _two_samples(model: nn.Module, call: Example) -> Example:
    """The call with its only sample twice, if the model takes that."""
    twice = doubled(call)
    if twice is not call:
        try:
            _outputs(model, twice)
        except ModelError as error:  # the first dimension does not count samples
            log.info(
                "the model cannot take the example's only sample twice (%s): the first dimension is fixed", error.what
            )
            return call
    return twice


def dimensions_of(call: Example, dynamic: Dynamic, signature: Signature) -> list[Any]:
    """The dimensions that may vary, for each tensor an entry of torch.export's `dynamic_shapes`.

    Raises:
        ConfigError: `dynamic` names an argument that has no tensors here.
    """
    tensors = tensors_of(call)
    auto = torch.export.Dim.AUTO
    if isinstance(dynamic, bool):
        return [dict.fromkeys(range(tensor.dim()), auto) if dynamic else None for tensor in tensors]
    known = [argument.name for argument in signature.arguments if argument.inputs]
    unknown = sorted(set(dynamic) - set(known))
    if unknown:
        raise ConfigError(
            f"names {', '.join(unknown)}, which the example inputs do not have",
            where="dynamic",
            remedy=f"Use the names of forward's arguments that are tensors here: {', '.join(known)}.",
        )
    found: list[Any] = []
    for argument in signature.arguments:
        own = dynamic.get(argument.name)
        if len(argument.inputs) == 1:
            found.append(own)
        elif argument.inputs:
            found += [None] * len(argument.inputs) if own is None else list(own)
    return found


def _program(flat: FlatModel, dimensions: list[Any]) -> Any:
    shapes = {"tensors": tuple(dimensions)} if any(one is not None for one in dimensions) else None
    with capturing():
        try:
            return torch.export.export(flat, flat.tensors, dynamic_shapes=shapes, strict=False)
        except Exception as error:
            raise _refusal(flat.model, error) from error


def names_of(signature: Signature) -> tuple[list[str], list[str]]:
    """The names of a graph's inputs and of its outputs."""
    names = [name for argument in signature.arguments for name in argument.inputs]
    return names, [name if name not in names else f"{name}_out" for name in output_names(signature.outputs)]


def _translated(program: Any, signature: Signature) -> Any:
    names, outputs = names_of(signature)
    with capturing():
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
    assert len(found.graph.outputs) == len(outputs), "FlatModel returns only tensors"
    for value in list(found.graph.initializers.values()):
        value.name = (value.name or "").removeprefix(PREFIX)
    return found


def _refusal(model: nn.Module | None, error: Exception) -> ModelError:
    reason = str(error).strip().split("\n\n")[0].strip()
    cause = error.__cause__ if isinstance(error, ValuesDecideError) else error
    return ModelError(
        f"cannot be exported: {type(cause).__name__}: {reason}",
        where=type(model).__name__ if model is not None else "torch.onnx",
        remedy="torch.export has to capture the float model: the traceback above shows what it cannot. If it names a "
        "dimension that must be fixed, pass dynamic=False, or say which dimensions may vary.",
    )


def _tidy(model: Any, weights: Container[str]) -> None:
    """Fold constants, except those that are computed from a weight: codes take the place of weights later."""
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
    """Split a product with a bias in two: runtimes have int8 kernels for `MatMul`, and hardly any for `Gemm`."""
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
    for part in made:
        part.outputs[0].type = old.type
    new.shape, new.name = old.shape, old.name
    node.prepend(made)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    node.graph.remove(node, safe=True)
