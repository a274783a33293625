"""Modules with parametrizations of torch, which refuse to be pickled: here they are, with what makes them again."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import is_parametrized, register_parametrization

import pared
from pared.runtime.layers.subclasses import Mixin, class_below, subclass_of


class Parametrized(Mixin):
    """Mixed in before the class that torch makes for a module with parametrizations; that one cannot be imported."""

    def __reduce_ex__(self, _protocol: Any) -> tuple[Any, ...]:
        """Pickle as an empty module of the class below torch's, and all that is in this one."""
        own = class_below(type(self)).__bases__[0]
        names = tuple(self.parametrizations)  # type: ignore[arg-type]  # a ModuleDict
        return pared._revive_part, (own, names), dict(vars(self))


def let_be_pickled(model: nn.Module) -> nn.Module:
    """Let every module with parametrizations be pickled, in place."""
    for module in model.modules():
        if is_parametrized(module):
            module.__class__ = subclass_of(type(module), Parametrized)
            hooks = module._load_state_dict_pre_hooks
            for key in [key for key, hook in hooks.items() if _is_of_torch(hook)]:
                del hooks[key]
    return model


def _is_of_torch(hook: object) -> bool:
    """Whether a hook is that by which torch reads the names of old weight norms: a local function, without a name."""
    function = getattr(hook, "hook", hook)
    return getattr(function, "__module__", "") == parametrizations.__name__


def revive_part(own: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    """An empty module of a class, to which torch has added properties for its parametrized tensors."""
    module = own.__new__(own)
    nn.Module.__init__(module)
    for name in names:
        module.register_parameter(name, nn.Parameter(torch.empty(0)))
        register_parametrization(module, name, nn.Identity(), unsafe=True)  # the real ones come with the state
    return module
