"""The object that transformers made becomes a quantized model, whose numbers come from an artifact."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from pared.checkpoints.pretrained.folder import NOTE, element_type
from pared.errors import MismatchError
from pared.model.copies import clone_structure
from pared.runtime.load import check_model, opened
from pared.terminal import Stages

log = logging.getLogger(__name__)

# What an empty model has in the place of its own while transformers looks for numbers to read: none.
_HOLLOW: Final[Mapping[str, Any]] = {
    "_modules": {},
    "_parameters": {},
    "_buffers": {},
    "all_tied_weights_keys": {},
    "_keys_to_ignore_on_load_unexpected": {".*"},
    "_is_hf_initialized": True,  # there is nothing to initialize
    "_tp_plan": {},
    "_ep_plan": {},
}
_OF_TRANSFORMERS: Final = ("is_quantized", "quantization_method", "hf_quantizer")


class Opening:
    """A model that `from_pretrained` is opening.

    Args:
        file: the artifact, or the index of its shards.
        model: the empty model, which is hollow from now on, until `finish`.

    Raises:
        CorruptError, FileError, UnsafeError, VersionError: the artifact cannot be read.
        MismatchError: it is of another class.
    """

    def __init__(self, file: Path, model: Any) -> None:
        self._file = file
        self._type: torch.dtype = getattr(torch, element_type(file))
        named = [name for name in model.config.architectures or () if isinstance(name, str)]
        if named and type(model).__name__ not in named:
            raise MismatchError(
                f"holds a {named[0]}, and {type(model).__name__} was asked for",
                where=str(file),
                remedy=f"Open it with the Auto class of its task, or with transformers.{named[0]}.",
            )
        self._own = {name: vars(model)[name] for name in _HOLLOW if name in vars(model)}
        vars(model).update({name: type(value)(value) for name, value in _HOLLOW.items()})

    def finish(self, model: Any, note: Mapping[str, Any], device: object, dtype: torch.dtype) -> None:
        """Turn the object into the quantized model that `pared.load` gives, where and in what type it was wanted.

        Args:
            model: the hollow model.
            note: what config.json says of the weights.
            device: where; off the CPU, or in a type that `pared.load` does not take, it runs on decoded weights.
            dtype: the type.

        Raises:
            CorruptError, FileError, UnsafeError, VersionError: the artifact cannot be read.
            MismatchError: it does not fit the configuration.
        """
        for name in (*_HOLLOW, *_OF_TRANSFORMERS):
            vars(model).pop(name, None)
        vars(model).update(self._own)
        model.tie_weights()
        del model.config.transformers_weights
        setattr(model.config, NOTE, dict(note))
        empty = clone_structure(check_model(model, "from_pretrained"), _on_meta)
        where = torch.device(device)  # type: ignore[call-overload]  # whatever transformers was given
        given = torch.bfloat16 if where.type == "cpu" and self._type != dtype == torch.bfloat16 else None
        opened(self._file, empty, note["memory"], given, stages=Stages(quiet=True), into=model)
        if where.type == "cpu" and dtype in (self._type, given):
            return
        log.warning(
            "%s: int8 kernels run on the CPU in %s, as the model was fitted; in %s on %s it runs on decoded weights, "
            "which are larger and slower: leave device_map out, and dtype unless it is torch.bfloat16",
            *(self._file, self._type, dtype, where),
        )
        model.to(device=where, dtype=dtype)


def _on_meta(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta")
