"""The weights of a counterpart: codes and steps, or the bytes of a file; as floats, in state dicts, on devices."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pared.formats.activation import Activation
from pared.formats.coded import Coded, Grid
from pared.formats.encoded.codes import EncodedCodes, Undecoded
from pared.formats.streams import STEPS
from pared.formats.views import View
from pared.runtime.layers.subclasses import Mixin

log = logging.getLogger(__name__)


def codes_name(attribute: str) -> str:
    """The name of the buffer with a weight's codes."""
    return f"pared_{attribute}_codes"


def step_name(attribute: str, part: str = "step") -> str:
    """The name of the parameter with a weight's steps, or with the scales of its columns."""
    return f"pared_{attribute}_{part}"


class Weights(Mixin):
    """Mixed in before a module's own class: weights on grids, which read as floats.

    The codes of a weight are a non-persistent buffer (int8 or int16, of the weight's shape), or they stay the bytes of
    a file, and are decoded whenever they are read. Its steps, and the scales of its columns if they have some, are
    parameters (float32, one per row or column) that `.half()` and `.to(dtype)` do not cast.

    Attributes:
        pared_views: by attribute, the weight as rows and columns.
        pared_dtypes: by attribute, the type that the weight reads as.
        pared_encoded: by attribute, the codes that stay bytes.
        pared_activation: how the input is treated; None: the module runs on floats, decoded whenever they are read.
    """

    pared_views: dict[str, View]
    pared_dtypes: dict[str, torch.dtype]
    pared_encoded: dict[str, EncodedCodes]
    pared_activation: Activation | None
    _pared_packed: dict[object, object]

    def _pared_hold(self, coded: Mapping[str, Coded]) -> None:
        """Take over weights, by attribute, whose float parameters are gone."""
        self.pared_views, self.pared_dtypes, self.pared_encoded = {}, {}, {}
        for attribute, weight in coded.items():
            assert weight.view is not None
            self.pared_views[attribute], self.pared_dtypes[attribute] = weight.view, weight.dtype
            if isinstance(weight.parts, Undecoded):
                self.pared_encoded[attribute] = weight.parts.codes
            else:
                self.register_buffer(codes_name(attribute), weight.parts["codes"], persistent=False)
            for part in STEPS:
                if part in weight.parts:
                    tensor = weight.parts[part]  # already a parameter where the weight is tied
                    tensor = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
                    self.register_parameter(step_name(attribute, part), tensor)

    def _pared_release(self, attribute: str) -> None:
        """Forget a weight: the parameter that it was is on the meta device."""
        shape, dtype = self.pared_shape(attribute), self.pared_dtypes[attribute]
        for part in self._pared_steps(attribute):
            del self._parameters[step_name(attribute, part)]
        self._buffers.pop(codes_name(attribute), None)
        self._non_persistent_buffers_set.discard(codes_name(attribute))
        self._parameters[attribute] = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)

    def pared_codes(self, attribute: str) -> Tensor:
        """The codes of a weight, decoded now if they are bytes."""
        return self.pared_coded(attribute).parts["codes"]

    def pared_shape(self, attribute: str) -> torch.Size:
        """The shape of a weight."""
        encoded = self.pared_encoded.get(attribute)
        return torch.Size(encoded.shape) if encoded is not None else self._pared_plain_codes(attribute).shape

    def pared_rows(self, attribute: str, indices: Tensor) -> Tensor:
        """The codes of some rows of a table, in the order of the indices; no others are decoded, or only neighbours."""
        encoded = self.pared_encoded.get(attribute)
        return (
            encoded.rows(indices) if encoded is not None else F.embedding(indices, self._pared_plain_codes(attribute))
        )

    def pared_step(self, attribute: str) -> Tensor:
        """The steps of a weight's rows."""
        return cast(Tensor, self._parameters[step_name(attribute)]).detach()

    def pared_scale(self, attribute: str) -> Tensor | None:
        """The scales of a weight's columns; None if they have none."""
        scale = self._parameters.get(step_name(attribute, "scale"))
        return None if scale is None else scale.detach()

    def pared_decode(self, attribute: str) -> Tensor:
        """A weight as floats: `step[row] * code`, times `scale[column]` if columns have scales."""
        return self.pared_coded(attribute).decode()

    def pared_coded(self, attribute: str) -> Coded:
        """A weight's codes and steps as one value."""
        encoded, steps = self.pared_encoded.get(attribute), self._pared_steps(attribute)
        parts: Mapping[str, Tensor]
        if encoded is not None:
            kind, parts = encoded.kind, Undecoded(encoded, steps)
        else:
            plain = self._pared_plain_codes(attribute)
            kind, parts = plain.dtype, {"codes": plain, **steps}
        fmt = Grid("int8" if kind == torch.int8 else "int16", scaled="scale" in steps)
        shape = tuple(self.pared_shape(attribute))
        return Coded(fmt, shape, self.pared_dtypes[attribute], parts, self.pared_views[attribute])

    def pared_row_steps(self, attribute: str, outputs: int = 0) -> Tensor:
        """One step per output, given the weight's dimension that counts outputs; a single step is repeated."""
        return self.pared_step(attribute).reshape(-1).expand(self.pared_shape(attribute)[outputs]).contiguous()

    def _pared_plain_codes(self, attribute: str) -> Tensor:
        return cast(Tensor, self._buffers[codes_name(attribute)])

    def _pared_steps(self, attribute: str) -> dict[str, Tensor]:
        """What a weight has beside its codes, by part."""
        parts = {part: self._parameters.get(step_name(attribute, part)) for part in STEPS}
        return {part: tensor.detach() for part, tensor in parts.items() if tensor is not None}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for attribute in self.pared_views:
            destination[f"{prefix}{attribute}"] = self.pared_codes(attribute)
            for part, tensor in self._pared_steps(attribute).items():
                shown = self._parameters[step_name(attribute, part)] if keep_vars else tensor
                destination[f"{prefix}{attribute}_{part}"] = shown
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for attribute in self.pared_views:
            for part in self._pared_steps(attribute):
                del destination[f"{prefix}{step_name(attribute, part)}"]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        missing, _, error_messages = rest[-3:]
        for attribute in self.pared_views:
            name, shape = f"{prefix}{attribute}", self.pared_shape(attribute)
            encoded = self.pared_encoded.get(attribute)
            dtype = encoded.kind if encoded is not None else self._pared_plain_codes(attribute).dtype
            codes = state_dict.pop(name, None)
            for part in self._pared_steps(attribute):
                given = state_dict.pop(f"{name}_{part}", None)
                if given is not None:
                    state_dict[f"{prefix}{step_name(attribute, part)}"] = given
            if codes is None:
                missing.append(name)
            elif codes.dtype != dtype or codes.shape != shape:
                kind, found = str(dtype).removeprefix("torch."), f"{codes.dtype} {list(codes.shape)}"
                error_messages.append(f"{name}: expected {kind} codes {list(shape)}, found {found}")
            else:
                if encoded is not None:
                    encoded.take(codes)
                else:
                    with torch.no_grad():
                        self._pared_plain_codes(attribute).copy_(codes)
                self._pared_packed = {}
        super()._load_from_state_dict(state_dict, prefix, *rest)
        shown = {
            f"{prefix}{step_name(attribute, part)}": f"{prefix}{attribute}_{part}"
            for attribute in self.pared_views
            for part in STEPS
        }
        missing[:] = [shown.get(name, name) for name in missing]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move to a device, or change the types that weights read as; codes and steps keep their types."""
        steps = {attribute: self._pared_steps(attribute) for attribute in self.pared_views}
        dtypes = {a: fn(torch.empty(0, dtype=dtype)).dtype for a, dtype in self.pared_dtypes.items()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's
        for attribute, parts in steps.items():
            for part, tensor in parts.items():
                moved = cast(Tensor, self._parameters[step_name(attribute, part)])
                if moved.dtype != tensor.dtype:
                    moved.data = tensor.to(moved.device)
            if self.pared_activation is not None and not moved.is_cpu:
                _tell_of_device(moved.device)
        self.pared_dtypes, self._pared_packed = dtypes, {}
        return self


@functools.cache  # once, not for every layer
def _tell_of_device(device: torch.device) -> None:
    log.warning("int8 kernels run on the CPU only: on %s the layers run on floats, decoded from the codes", device)
