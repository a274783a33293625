"""What modules keep of their weights until `train` is called: LeViT its table of biases, for instance."""

from __future__ import annotations

import logging

import torch
from torch import nn

from pared.errors import reason_of
from pared.model.copying.reach import Reach
from pared.model.tensors import registered, version_of

log = logging.getLogger(__name__)


def drop_caches(reach: Reach[nn.Module], clone: nn.Module) -> None:
    """Let modules of a copy in eval mode forget what they computed from the weights of the model.

    A class that keeps such tensors drops them in its own `train`, since training changes the weights. Whatever else
    that does, such as adding adapters to weights, is undone.

    Args:
        reach: the objects of the model, which is left as it is.
        clone: the copy of it, in place.
    """
    places = {reach.places[key].rpartition(".") for key in reach.tensors if key not in reach.registered}
    owners = {owner for owner, _, attribute in places if not attribute.startswith("_pared")}
    for name, module in clone.named_modules() if owners else ():
        if name in owners and type(module).train is not nn.Module.train and not module.training:
            _trained_and_back(module, name)


def _trained_and_back(module: nn.Module, name: str) -> None:
    inside = [(one, one.training, dict(one._parameters), dict(one._buffers)) for one in module.modules()]
    with torch.no_grad():
        numbers = [(tensor, version_of(tensor), tensor.clone()) for one, *_ in inside for _, tensor in registered(one)]
        try:
            module.train(True)
            module.train(False)
        except Exception as error:  # noqa: BLE001  # whatever a class does in it: what copies read is checked later
            log.info("%s keeps what it computed before, as it cannot be trained: %s", name, reason_of(error))
        for one, training, parameters, buffers in inside:
            one.training = training
            one._parameters.update(parameters)
            one._buffers.update(buffers)
        for tensor, version, number in numbers:
            # Graphs are made again after a write, and the model may share this tensor.
            if tensor.is_inference() or version_of(tensor) != version:
                tensor.copy_(number)
