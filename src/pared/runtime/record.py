"""What a quantized model knows about itself: its record, `q.pared`, and the contents of its artifact."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, Literal, cast, get_args

import torch
from torch import nn

from pared.artifact.outcome import Curve, Damage, Outcome, Trial
from pared.errors import CorruptError, ModelError
from pared.files.checks import Place
from pared.formats.activation import Activation
from pared.formats.coded import RAW_TYPES, dtype_name
from pared.model import storage
from pared.model.contents import Contents, Decision, Kind, Stored
from pared.model.state import extra
from pared.model.tensors import named_tensors, registered_as
from pared.runtime import summary
from pared.runtime.layers.counterpart import Counterpart
from pared.runtime.placement import Memory, StoredForm
from pared.runtime.profile.profile import Profile, Running

RECORD: Final = "_pared"  # the attribute of a model that holds it


@dataclass(eq=False)
class Record:
    """What a quantized model knows about itself in addition to its numbers, which are in its modules.

    Args:
        tensors: the names, the kind and the decision of each tensor.
        stored_forms: the stored form of each tensor that is held as floats, by the tensor's first name.
        activations: how each module that may run in int8 treats its input, by the module's name.
        provenance: where the artifact comes from, as plain data.
        profile: which kernels are fastest on this machine.
        running: the kernel of each module that may run in int8, by the module's name.
        memory: "fast" or "small", see `pared.load`.
        outcome: how the search went.
        dtype: the type in which the model runs, if that is not the one in which it was fitted, see `pared.load`.
        curve: the trade-off curve of the same calibration; None if none was measured.
        engine_ms: the milliseconds of each engine if `pared.load(..., engine="auto")` chose this one, else empty.
    """

    tensors: tuple[tuple[tuple[str, ...], Kind, Decision], ...]
    stored_forms: Mapping[str, StoredForm]
    activations: Mapping[str, Activation]
    provenance: Mapping[str, Any]
    profile: Profile
    running: Mapping[str, Running]
    memory: Memory
    outcome: Outcome
    dtype: torch.dtype | None = None
    curve: Curve | None = None
    engine_ms: Mapping[str, float] = field(default_factory=dict)

    @property
    def outcome_here(self) -> Outcome:
        """How the search went, with the score of the model as it runs on this machine."""
        score = self.profile.score if self.memory == "fast" and self.dtype is None else None  # else modules answer
        return self.outcome if score is None else replace(self.outcome, score=score)

    def __deepcopy__(self, memo: dict[int, Any]) -> Record:
        """A copy that shares what is known of the tensors, which nothing changes."""
        clone = copy.copy(self)
        known = {name: value for name, value in vars(self).items() if name != "tensors"}
        vars(clone).update(copy.deepcopy(known, memo))
        return clone

    def to_json(self) -> str:
        """What a pickle holds in addition to the artifact: the times measured on this machine, and the search."""
        state = {"profile": self.profile.to_json(), "outcome": asdict(self.outcome), "memory": self.memory}
        return json.dumps(state | ({} if self.dtype is None else {"dtype": dtype_name(self.dtype)}))


def state_from_json(text: str) -> tuple[Profile, Outcome, Memory, torch.dtype | None]:
    """The inverse of `Record.to_json`.

    Raises:
        CorruptError: the text is something else.
    """
    try:
        state = json.loads(text)
        outcome = Outcome.from_state(state["outcome"])
        memory = Place("a pickle").one_of(state["memory"], get_args(Memory), "its memory")
        dtype = RAW_TYPES[state["dtype"]] if "dtype" in state else None
        return Profile.from_json(state["profile"]), outcome, cast("Memory", memory), dtype
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptError(
            f"the record in the pickle of a quantized model cannot be read ({error!r})",
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
    """Set how the search went."""
    record_of(model).outcome = outcome


def curve_of(model: nn.Module) -> Curve:
    """The trade-off curve that `fit` measured: bytes against damage, and the scores of the trials.

    Raises:
        ModelError: there is none: the model was loaded, or compressed at 8 bits without a search.
    """
    curve = record_of(model).curve
    if curve is None:
        raise ModelError(
            "has no trade-off curve: it was loaded, or compressed at 8 bits without a search",
            where=type(model).__name__,
            remedy="Use pared.trade_off(model, conf, calib_dataloader, eval_func) with the float model.",
        )
    return curve


def contents_of(model: nn.Module) -> Contents:
    """Everything that the artifact of a quantized model holds.

    Raises:
        ModelError: a weight was changed, or a layer was added or removed, after compression.
    """
    record = record_of(model)
    _refuse_edited(model, record)
    tensors = []
    for names, kind, decision in record.tensors:
        module_name, _, attribute = names[0].rpartition(".")
        module = model.get_submodule(module_name)
        if isinstance(module, Counterpart) and attribute in module.pared_views:
            coded = module.pared_coded(attribute)
        else:
            coded = record.stored_forms[names[0]].coded(names[0], registered_as(module, attribute))
        tensors.append(Stored(names, kind, coded, decision))
    provenance = {**record.provenance, "outcome": record.outcome.to_json()}
    return Contents(tuple(tensors), record.activations, provenance, extra.collect(model))


def _refuse_edited(model: nn.Module, record: Record) -> None:
    """Refuse a model with layers that were added, removed or replaced: its record no longer describes it."""
    known = {name for names, _, _ in record.tensors for name in names}
    codes = {
        f"{name}.{attribute}"
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, Counterpart)
        for attribute in module.pared_views
    }
    floats = {name for name, _ in named_tensors(model) if not name.rpartition(".")[2].startswith("pared_")}
    changed = sorted(known ^ (floats | {name.removeprefix(".") for name in codes}))
    if changed:
        raise ModelError(
            "was added to the model, or removed from it, after it was compressed",
            where=changed[0],
            remedy="Change the float model, and compress it again with pared.fit.",
        )


@dataclass(frozen=True, eq=False, repr=False)
class Result:
    """The result of compressing a model: `q.pared`. It is read-only, and always describes the model as it is now.

    Args:
        model: the quantized model.
    """

    model: nn.Module

    def __repr__(self) -> str:
        """How it went, in one line."""
        return f"<pared: met={self.met}, score={self.score}, baseline={self.baseline}, {len(self.trials)} trials>"

    @property
    def met(self) -> bool | None:
        """Whether the accuracy criterion was met; None if nothing was evaluated."""
        return record_of(self.model).outcome.met

    @property
    def score(self) -> float | None:
        """What `eval_func` gave for the quantized model as it runs on this machine; None if nothing was evaluated.

        Where a graph, OpenVINO or a copy in bfloat16 answers its calls, the result of the search was scored once more,
        so. On a machine where it was not measured it is the score of the search, in which layers run in int8.
        """
        return record_of(self.model).outcome_here.score

    @property
    def baseline(self) -> float | None:
        """What `eval_func` gave for the float model; None if nothing was evaluated."""
        return record_of(self.model).outcome.baseline

    @property
    def damage(self) -> Damage:
        """What the model loses, predicted and measured on calibration calls; empty for a model that was loaded."""
        return record_of(self.model).outcome.damage or Damage()

    @property
    def trials(self) -> tuple[Trial, ...]:
        """Every model that the search evaluated, in order; empty for a model that was loaded."""
        return record_of(self.model).outcome.trials

    @property
    def plan(self) -> tuple[summary.TensorSummary, ...]:
        """What each tensor became, in the model's order."""
        return summary.tensor_summaries(contents_of(self.model), record_of(self.model).running)

    @property
    def curve(self) -> Curve:
        """The trade-off curve of `fit`: bytes against damage, and the scores of the trials.

        Raises:
            ModelError: there is none: the model was loaded, or compressed at 8 bits without a search.
        """
        return curve_of(self.model)

    def nbytes(self) -> int:
        """The size in bytes of the `best_model.pt` that `save` writes.

        The whole model is entropy-coded to find out, which takes as long as `save` without writing: keep the number.
        """
        return len(storage.to_bytes(contents_of(self.model)))

    @property
    def engine(self) -> Literal["torch"]:
        """What runs the model; see `engine` of `pared.load`."""
        return "torch"

    @property
    def engine_ms(self) -> Mapping[str, float]:
        """The milliseconds of each engine if `pared.load(..., engine="auto")` chose this one, else empty."""
        return record_of(self.model).engine_ms
