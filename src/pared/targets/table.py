"""The runtimes that models can be written for. To add one: a file with its `Target` and its writer, and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from pared.errors import ConfigError
from pared.scalars import check_choice
from pared.targets.folders import compressed_tensors, gptq, mlx
from pared.targets.gguf import target as gguf
from pared.targets.graphs import onnx, openvino
from pared.targets.target import Target

OWN: Final = "pared"  # the target that is pared itself, with formats and a file of its own

TARGETS: Final[Mapping[str, Target]] = {
    one.name: one
    for one in (
        gguf.TARGET,
        compressed_tensors.TARGET,
        compressed_tensors.ANY_BITS,
        compressed_tensors.INT8,
        gptq.TARGET,
        gptq.V2,
        mlx.TARGET,
        onnx.TARGET,
        openvino.TARGET,
    )
}


def check_other(where: str, to: str, remedy: str) -> None:
    """Refuse to write a model for anything but another runtime.

    Args:
        where: the function that was asked.
        to: the name of the target.
        remedy: how to get pared's own file.

    Raises:
        ConfigError: nobody knows the target, or it is pared itself.
    """
    check_choice(where, "to", to, (OWN, *TARGETS))
    if to == OWN:
        raise ConfigError(
            "is the target that an artifact is written for already",
            where=f"{where} to={to!r}",
            remedy=f"{remedy}, or choose another target: {', '.join(TARGETS)}.",
        )
