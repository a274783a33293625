"""Float models of the original class, made from a quantized model or from the contents of an artifact."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pared.model.contents import Contents, match
from pared.model.copies import clone_structure, refresh_recurrent
from pared.model.tensors import ModelTensors, ModuleT
from pared.runtime.layers.attention import rejoin_fast_paths
from pared.runtime.layers.counterpart import Counterpart, restore
from pared.runtime.layers.holding.weights import step_name
from pared.runtime.placement import detach
from pared.runtime.record import RECORD, record_of
from pared.runtime.serving.served import release


def decoded(tensors: ModelTensors[ModuleT], contents: Contents) -> ModuleT:
    """A float model in eval mode, of the model's architecture, whose weights are decoded from the contents."""
    numbers: dict[int, Tensor] = {}
    for stored, objects in match(tensors, contents):
        numbers |= dict.fromkeys(map(id, objects), like(stored.coded.decode(), objects[0]))  # tied ones stay tied
    return clone_structure(tensors.model, numbers).eval()


def skeleton_of(model: nn.Module) -> nn.Module:
    """An empty float model of the original class, on the meta device but for buffers that artifacts leave out."""
    made = {
        id(model.get_buffer(names[0]))
        for names, _, decision in record_of(model).tensors
        if decision.treatment == "made"
    }
    return _float_form(model, lambda one: one.detach() if id(one) in made else torch.empty_like(one, device="meta"))


def outline_of(model: nn.Module) -> nn.Module:
    """A float model of the original class with the same tensors, except that those held in codes are meta tensors."""
    return _float_form(model, lambda tensor: tensor)


def floats_of(model: nn.Module) -> nn.Module:
    """A float model of the original class: weights held in codes are decoded, and the other tensors are shared."""
    floats = outline_of(model)
    known: dict[int, nn.Parameter] = {}  # what is tied, and so has the same steps, stays so
    for name, module in model.named_modules():
        for attribute in module.pared_views if isinstance(module, Counterpart) else ():
            steps = id(module._parameters[step_name(attribute)])
            if steps not in known:
                known[steps] = nn.Parameter(module.pared_decode(attribute), requires_grad=False)
            floats.get_submodule(name)._parameters[attribute] = known[steps]
    refresh_recurrent(floats)
    return floats


def _float_form(model: nn.Module, content: Callable[[Tensor], Tensor]) -> nn.Module:
    floats = clone_structure(model, content)
    floats.__dict__.pop(RECORD, None)
    for module in floats.modules():
        release(module)
        detach(module)
        if isinstance(module, Counterpart):
            restore(module)
    rejoin_fast_paths(floats)
    return floats


def like(new: Tensor, tensor: Tensor) -> Tensor:
    """New numbers with the strides of a tensor; a frozen parameter where that is one: codes cannot follow training."""
    if new.stride() != tensor.stride() and 0 not in tensor.stride() and not new.is_meta:
        new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=new.dtype).copy_(new)
    return nn.Parameter(new, requires_grad=False) if isinstance(tensor, nn.Parameter) else new
