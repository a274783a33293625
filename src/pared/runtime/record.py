"""What a quantized model knows about itself, beside its numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

from torch import nn

from pared.artifact.outcome import Curve, Outcome
from pared.errors import CorruptError, ModelError
from pared.model.contents import Decision
from pared.runtime.placement import Memory, StoredForm
from pared.runtime.profile import Profile, Running

RECORD: Final = "_pared"  # the attribute of a model that holds it


@dataclass(eq=False)
class Record:
    """What a quantized model knows about itself.

    Args:
        tensors: of each tensor its names, kind and decision; its numbers are in the modules.
        stored_forms: for each tensor that is held as floats, by first name.
        activations, provenance: as they stand in the artifact.
        profile: which kernels are fastest here.
        running: what each module that may run in int8 runs in.
        memory: "fast" or "small", see `pared.load`.
        outcome: how the search went.
        curve: the trade-off curve of the same calibration, where there was one.
        engine_ms: the milliseconds of each engine, where `pared.load(..., engine="auto")` chose this one.
    """

    tensors: tuple[tuple[tuple[str, ...], Literal["parameter", "buffer"], Decision], ...]
    stored_forms: Mapping[str, StoredForm]
    activations: Mapping[str, Any]
    provenance: Mapping[str, Any]
    profile: Profile
    running: Mapping[str, Running]
    memory: Memory
    outcome: Outcome
    curve: Curve | None = None
    engine_ms: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> str:
        """What a pickle holds beside the artifact: what was measured on this machine, and how the search went."""
        state = {"profile": self.profile.to_json(), "outcome": asdict(self.outcome), "memory": self.memory}
        return json.dumps(state)


def state_from_json(text: str) -> tuple[Profile, Outcome, Memory]:
    """The inverse of `Record.to_json`.

    Raises:
        CorruptError: it is something else.
    """
    try:
        state = json.loads(text)
        outcome = Outcome.from_state(state["outcome"])
        return Profile.from_json(state["profile"]), outcome, state["memory"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptError(
            f"the pickle of a quantized model makes no sense ({error})",
        ) from error


def record_of(model: nn.Module) -> Record:
    """The record of a quantized model.

    Raises:
        ModelError: the model was not made by `fit` or `load`.
    """
    record = model.__dict__.get(RECORD)
    if not isinstance(record, Record):
        raise ModelError(
            f"{type(model).__name__} is not a quantized model",
            remedy="Pass what pared.fit or pared.load returned.",
        )
    return record


def set_outcome(model: nn.Module, outcome: Outcome) -> None:
    """Say how the search went."""
    record_of(model).outcome = outcome


def curve_of(model: nn.Module) -> Curve:
    """The trade-off curve that `fit` found on the way: bytes against damage, and the scores of the trials.

    Raises:
        ModelError: the model was loaded, or made without measuring what steps cost.
    """
    found = record_of(model).curve
    if found is None:
        raise ModelError(
            "has no trade-off curve: it was loaded, or made at 8 bits without a search",
            where=type(model).__name__,
            remedy="Use pared.trade_off(model, conf, calib_dataloader, eval_func) with the float model.",
        )
    return found
