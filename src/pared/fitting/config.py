"""What the user asks for: the configuration, the accuracy criterion and the rules."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, Literal, TypeVar, get_args

from torch import nn

from pared.errors import ConfigError
from pared.scalars import check_choice, checked_number, plain
from pared.targets.table import OWN, TARGETS
from pared.terminal import parse_size

T = TypeVar("T")

# Options of Intel Neural Compressor 2.x that have another name or form here.
INC_EQUIVALENTS: Final[Mapping[str, str]] = {
    "op_type_dict": "Use rules=[Rule(torch.nn.Conv2d, keep=True)]: a rule per module type.",
    "op_name_dict": 'Use rules=[Rule("encoder.*.query", bits=8)]: a rule per name pattern.',
    "tuning_criterion": "Use max_trials=... and timeout=... directly.",
    "recipes": "Leave it out: pared chooses by measurement; use rules=[...] to decide by hand.",
    "backend": "Leave it out: models run in plain PyTorch.",
    "domain": "Leave it out: nothing depends on it.",
    "quant_format": "Leave it out: an artifact has one format.",
    "inputs": "Leave it out: modules are found automatically.",
    "outputs": "Leave it out: modules are found automatically.",
    "example_inputs": "Pass calib_dataloader to pared.fit instead.",
    "excluded_precisions": "Use rules=[Rule(..., keep=True)] to keep tensors exactly as they are.",
    "reduce_range": "Leave it out: the range is reduced at load time, on machines that need it.",
    "diagnosis": "Use q_model.report().",
    "ni_workload_name": "Leave it out: nothing depends on it.",
    "objective": "Leave it out: the smallest file that meets the criterion is the objective.",
    "strategy": "Leave it out: there is one search.",
    "strategy_kwargs": "Leave it out: there is one search.",
}


def _strict_options(cls: type[T]) -> type[T]:
    """Make an unknown keyword a ConfigError that names the nearest option, or what replaces an option of INC."""
    plain: Any = cls.__init__
    known = [field.name for field in fields(cls)]  # type: ignore[arg-type]  # applied to dataclasses only

    @functools.wraps(plain)
    def checked(self: object, *args: Any, **options: Any) -> None:
        for option in options:
            if option not in known:
                raise ConfigError(
                    f"unknown option {option!r}", where=cls.__name__, remedy=_remedy_for_option(option, known)
                )
        plain(self, *args, **options)

    setattr(cls, "__init__", checked)  # noqa: B010  # mypy forbids the plain assignment
    return cls


def _remedy_for_option(option: str, known: list[str]) -> str:
    if option in INC_EQUIVALENTS:
        return INC_EQUIVALENTS[option]
    near = difflib.get_close_matches(option, known, n=1)
    return f"Did you mean {near[0]!r}?" if near else f"The options are: {', '.join(known)}."


def _make_plain(options: Any) -> None:
    """Turn scalars of NumPy and torch in the fields into Python's own."""
    for field in fields(options):
        object.__setattr__(options, field.name, plain(getattr(options, field.name)))


@_strict_options
@dataclass(frozen=True)
class AccuracyCriterion:
    """How much worse than the float model's score (the baseline) the quantized model may score.

    Args:
        higher_is_better: True (default) for accuracies; False for losses, error rates and perplexities.
        criterion: "relative" (default): the loss is a share of |baseline|; "absolute": it is in the unit of the score.
        tolerable_loss: the most that may be lost, at least 0. Default 0.01: one percent of |baseline|.

    Raises:
        ConfigError: an option is unknown, or has a value that is not among these.

    >>> AccuracyCriterion(tolerable_loss=0.02).met(score=0.79, baseline=0.80)
    True
    """

    higher_is_better: bool = True
    criterion: Literal["relative", "absolute"] = "relative"
    tolerable_loss: float = 0.01

    def __post_init__(self) -> None:
        _make_plain(self)
        check_choice("AccuracyCriterion", "criterion", self.criterion, ("relative", "absolute"))
        check_choice("AccuracyCriterion", "higher_is_better", self.higher_is_better, (True, False))
        checked_number("AccuracyCriterion", "tolerable_loss", self.tolerable_loss, least=0)

    def loss(self, score: float, baseline: float) -> float:
        """How much was lost, in the unit of `tolerable_loss`; negative if the score is better than the baseline.

        Raises:
            ConfigError: the criterion is relative, and the baseline is 0.
        """
        lost = baseline - score if self.higher_is_better else score - baseline
        if self.criterion == "absolute":
            return lost
        if baseline == 0:
            raise ConfigError(
                "the baseline scores 0, so a relative loss has no meaning",
                where="AccuracyCriterion",
                remedy='Use AccuracyCriterion(criterion="absolute", ...), or --absolute on the command line.',
            )
        return lost / abs(baseline)

    def met(self, score: float, baseline: float) -> bool:
        """Whether at most `tolerable_loss` was lost, up to rounding errors."""
        return self.loss(score, baseline) <= self.tolerable_loss + 1e-12


def _is_rate(bits: object) -> bool:
    if isinstance(bits, bool) or not isinstance(bits, (int, float)):
        return False
    return 0 < bits < 16 or bits in (16, 32)


_RATES: Final = "Use a number above 0 and below 16, or 16 (float16), or 32 (float32)."


@_strict_options
@dataclass(frozen=True)
class Rule:
    """Decides the format of the tensors that it matches. Of several rules for a tensor the first one counts.

    Give either `bits` or `keep=True`.

    Args:
        target: which tensors: a glob pattern for names of tensors ("encoder.*.query.weight") or of modules
            ("encoder.*.query", for everything inside them); a module type, subclasses included; or a function that is
            called with the shape of every tensor, a tuple, and returns True where it matches.
        bits: bits per weight: above 0 and below 16 for a grid, 16 for float16, 32 for float32. With another target than
            "pared" it asks for the finest format whose numbers have at most these bits. A rate on a grid applies
            to weights of two or more dimensions, and to biases and the like where the target matches no such weight.
            Other tensors that match keep their usual format: whole numbers (types of integers, and masks and indices
            kept as floats), complex ones, tables with `max_norm`, and buffers that the state dict leaves out. A rule
            that matches only these is an error. Numbers that lie on a grid already keep it if that takes no more bits.
        keep: True leaves the tensors exactly as they are.
        because: the reason, which reports show.

    Raises:
        ConfigError: the target, the rate or an option is not one of these.

    >>> Rule("encoder.*", bits=4)
    Rule(target='encoder.*', bits=4, keep=False, because='')
    """

    target: str | type[nn.Module] | Callable[[tuple[int, ...]], bool]
    bits: float | None = None
    keep: bool = False
    because: str = ""

    def __post_init__(self) -> None:
        _make_plain(self)
        where = f"Rule({self.label})"
        is_module = isinstance(self.target, type) and issubclass(self.target, nn.Module)
        is_function = callable(self.target) and not isinstance(self.target, (type, nn.Module))
        if not ((isinstance(self.target, str) and self.target) or is_module or is_function):
            raise ConfigError(
                "the target is neither a name pattern, nor a module type, nor a function of a shape",
                where=where,
                remedy='Pass a string such as "encoder.*", a class such as torch.nn.Linear, or a function such as '
                "lambda shape: len(shape) == 4.",
            )
        if not isinstance(self.keep, bool) or (self.bits is None) == (not self.keep):
            raise ConfigError("needs either bits=... or keep=True", where=where, remedy="Give exactly one of them.")
        if self.bits is not None and not _is_rate(self.bits):
            raise ConfigError(f"bits={self.bits!r} is not a rate", where=where, remedy=_RATES)
        if not isinstance(self.because, str):
            raise ConfigError(
                f"because={self.because!r} is not text", where=where, remedy="Give the reason as a string."
            )

    @property
    def label(self) -> str:
        """The target as messages and reports show it."""
        return (
            repr(self.target) if isinstance(self.target, str) else getattr(self.target, "__name__", repr(self.target))
        )


Approach = Literal["auto", "static", "dynamic", "weight_only"]


@_strict_options
@dataclass(frozen=True)
class PostTrainingQuantConfig:
    """What you want from `fit`; every option has a default, and none can be changed afterwards.

    The names are those of Intel Neural Compressor 2.x where the meaning is the same.

    Args:
        approach: whether the inputs of layers are rounded to 8 bits as well, so that the layers can run in int8:
            "static" (in ranges found in calibration), "dynamic" (in the range that each call has), "weight_only" (not
            at all), or "auto" (default): for each layer the fastest of these whose damage is small enough.
            "static" needs calibration data; without any, "auto" is "weight_only".
        accuracy_criterion: how much worse than the float model the result may score. Only for `eval_func`.
            Default: one percent of the float model's score, where higher is better.
        device: where the result runs. Only "cpu".
        quant_level: 0: no tensor is coarser than 8 bits, except by a rule; 1 or "auto" (default): tensors are as
            coarse as the criterion or the size allows.
        max_size: the largest `best_model.pt` allowed: bytes as an int, or a string such as "12MB" (12 * 10^6 bytes) or
            "12MiB" (12 * 2^20 bytes). Default None: no limit.
        rules: your own decisions about tensors; of several rules that match a tensor, the first one counts.
        calibration_sampling_size: the number of samples read from the calibration data. Reading stops after the batch
            that reaches it. Default 100.
        max_trials: the most models that `eval_func` may score, not counting the float model, nor the result as it runs.
            Default 20.
        timeout: seconds after which no new trial begins. Default 0: no limit.
        seed: where the random directions start in which errors are measured; recorded in the artifact. The same seed,
            data and machine give the same file. Default 0.
        logits: which floating outputs hold logits, logarithms of unnormalized probabilities, along their last
            dimension, such as ("logits",): a key, a position ("0"), both joined by dots where outputs are nested
            ("heads.0"), or "output" for a model that returns one tensor. An error in them counts as in every output
            and, in addition, by what it changes in the probabilities. "auto" (default): those that are known to be
            logits, because they go through a softmax or a cross entropy within the model, because its `config` says
            `problem_type="single_label_classification"`, or because it is a language model of transformers. (): none.
        target: the runtime whose formats are chosen among: "pared" (default), or one of `pared.targets.table.TARGETS`,
            such as "gguf". Sizes are then those of the runtime's file, as exact as they can be without its tokenizer,
            and of onnx and openvino without the operators of the graph, which is captured only when it is exported;
            inputs of layers stay in float, and nothing is timed here.
        strict: True makes it an error if a floating tensor of two or more dimensions would stay in float, unless a rule
            says so. Default False.

    Raises:
        ConfigError: an option is unknown (the message names the nearest one), or its value is none of these.

    >>> PostTrainingQuantConfig(max_size="12MB").max_size
    12000000
    """

    approach: Approach = "auto"
    accuracy_criterion: AccuracyCriterion = AccuracyCriterion()
    device: str = "cpu"
    quant_level: Literal["auto", 0, 1] = "auto"
    max_size: int | str | None = None
    rules: tuple[Rule, ...] | list[Rule] = ()
    calibration_sampling_size: int = 100
    max_trials: int = 20
    timeout: float = 0
    seed: int = 0
    logits: Literal["auto"] | tuple[str, ...] | list[str] = "auto"
    target: str = OWN
    strict: bool = False

    def __post_init__(self) -> None:
        _make_plain(self)
        where = "PostTrainingQuantConfig"
        check_choice(where, "target", self.target, (OWN, *TARGETS))
        if self.target != OWN:
            if self.approach not in ("auto", "weight_only"):
                raise ConfigError(
                    f"approach={self.approach!r} is for layers that pared runs, and {self.target!r} runs them itself",
                    where=where,
                    remedy='Leave it out, or take approach="weight_only".',
                )
            object.__setattr__(self, "approach", "weight_only")
        check_choice(where, "approach", self.approach, get_args(Approach))
        check_choice(where, "device", self.device, ("cpu",))
        check_choice(where, "quant_level", self.quant_level, ("auto", 0, 1))
        checked_number(where, "calibration_sampling_size", self.calibration_sampling_size, least=1, whole=True)
        checked_number(where, "max_trials", self.max_trials, least=1, whole=True)
        checked_number(where, "timeout", self.timeout, least=0)
        checked_number(where, "seed", self.seed, least=0, whole=True)
        check_choice(where, "strict", self.strict, (True, False))
        if not isinstance(self.accuracy_criterion, AccuracyCriterion):
            raise ConfigError(
                f"accuracy_criterion is a {type(self.accuracy_criterion).__name__}",
                where=where,
                remedy="Pass an AccuracyCriterion(...).",
            )
        if not isinstance(self.rules, (list, tuple)):
            raise ConfigError(
                f"rules is a {type(self.rules).__name__}", where=where, remedy="Pass a list of Rule(...)."
            )
        for rule in self.rules:
            if not isinstance(rule, Rule):
                raise ConfigError(f"{rule!r} is not a Rule", where=f"{where}.rules", remedy="Pass a list of Rule(...).")
        if self.logits != "auto" and not (
            isinstance(self.logits, (list, tuple)) and all(isinstance(path, str) for path in self.logits)
        ):
            raise ConfigError(
                f"logits={self.logits!r} is neither 'auto' nor a list of names of outputs",
                where=where,
                remedy='Pass a list such as ["logits"], or "auto".',
            )
        object.__setattr__(self, "logits", self.logits if self.logits == "auto" else tuple(self.logits))
        object.__setattr__(self, "rules", tuple(self.rules))
        if self.max_size is not None:
            object.__setattr__(self, "max_size", parse_size(self.max_size))


def configured(conf: PostTrainingQuantConfig | None) -> PostTrainingQuantConfig:
    """The configuration that a caller passed; the default one for None.

    Raises:
        ConfigError: it is something else.
    """
    if conf is None:
        return PostTrainingQuantConfig()
    if not isinstance(conf, PostTrainingQuantConfig):
        raise ConfigError(
            f"conf is a {type(conf).__name__}, not a configuration",
            where="pared.fit",
            remedy="Pass a PostTrainingQuantConfig(...).",
        )
    return conf
