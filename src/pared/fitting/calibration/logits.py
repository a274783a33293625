"""Which outputs hold logits: those of which that is known, never those that only have the name."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from pared.errors import ConfigError, reason_of
from pared.model.calls import Call
from pared.model.copies import shadow
from pared.model.outputs import Leaf, leaves_of, may_be_logits
from pared.switches import ignoring

log = logging.getLogger(__name__)

# Functions that make probabilities of their first argument; the last one along dimension 1.
_SOFTMAX: Final = (F.softmax, torch.softmax, Tensor.softmax, F.log_softmax, torch.log_softmax, Tensor.log_softmax)
_LOSS: Final = F.cross_entropy
# How the names of classes of transformers end whose logits are scores of a vocabulary's tokens.
_LANGUAGE: Final = (
    *("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration", "ForSpeechSeq2Seq", "MTModel"),
    "ForCTC",
)


def find_logits(
    model: nn.Module, call: Call, wanted: Literal["auto"] | Sequence[str], paths: Collection[str]
) -> frozenset[str]:
    """The paths of the outputs that hold logits along their last dimension.

    Args:
        model: it is left as it is; a copy runs.
        call: a call of it, which is repeated.
        wanted: "auto": an output that goes through a softmax or a cross entropy within the call, that a configuration
            with `problem_type="single_label_classification"` describes, or that scores the vocabulary of a language
            model of transformers; else the paths themselves.
        paths: the paths of all floating outputs that calibration saw.

    Raises:
        ConfigError: a path that is wanted is none of these.
    """
    named = _named(wanted, paths)
    if named is not None:
        return named
    sizes, watch = _known_sizes(model), _SoftmaxWatch()
    try:
        leaves = _watched(model, call, watch)
    except Exception as error:  # noqa: BLE001  # a function that no mode may watch, or one that is made once only
        log.info("no softmax of the model can be watched: %s", reason_of(error))
        leaves = _outputs(model, call) if sizes else []
    return frozenset(
        leaf.path
        for leaf in leaves
        if may_be_logits(leaf.value) and (leaf.value.shape[-1] in sizes or watch.saw(leaf.value))
    )


def known_logits(model: nn.Module, leaves: Sequence[Leaf], wanted: Literal["auto"] | Sequence[str]) -> frozenset[str]:
    """The same of outputs that are there already, where a softmax within the model is not looked for.

    Args:
        model: whose class and configuration say what its outputs are.
        leaves: its floating outputs.
        wanted: see `find_logits`.

    Raises:
        ConfigError: a path that is wanted is none of these.
    """
    named = _named(wanted, [leaf.path for leaf in leaves])
    if named is not None:
        return named
    sizes = _known_sizes(model)
    return frozenset(leaf.path for leaf in leaves if may_be_logits(leaf.value) and leaf.value.shape[-1] in sizes)


def _named(wanted: Literal["auto"] | Sequence[str], paths: Collection[str]) -> frozenset[str] | None:
    """The paths that the user names; None if they are to be found."""
    if wanted == "auto":
        return None
    unknown = [path for path in wanted if path not in paths]
    if unknown:
        raise ConfigError(
            f"the model has no floating output {unknown[0]!r}",
            where="PostTrainingQuantConfig.logits",
            remedy=f"Its floating outputs are: {', '.join(map(repr, sorted(paths))) or 'none'}.",
        )
    return frozenset(wanted)


def _watched(model: nn.Module, call: Call, watch: _SoftmaxWatch) -> list[Leaf]:
    copied = shadow(model)
    with torch.no_grad(), ignoring(), watch:
        return leaves_of(call.on(copied))


def _outputs(model: nn.Module, call: Call) -> list[Leaf]:
    """The outputs of a call that cannot be watched; none if it cannot be made again either."""
    copied = shadow(model)
    try:
        with torch.no_grad(), ignoring():
            return leaves_of(call.on(copied))
    except Exception as error:  # noqa: BLE001  # it is told of where its errors are measured
        log.info("no outputs are known to be logits: %s", reason_of(error))
        return []


def _known_sizes(model: nn.Module) -> set[int]:
    """How many classes the model's outputs are known to tell apart, from its class and its configuration."""
    config = getattr(model, "config", None)
    kind = getattr(config, "problem_type", None)
    if kind == "single_label_classification":
        return {getattr(config, "num_labels", 0)}
    names = [cls.__name__ for cls in type(model).__mro__ if cls.__module__.startswith("transformers.")]
    if kind is not None or not any(name.endswith(_LANGUAGE) for name in names):
        return set()
    texts = (config, getattr(config, "text_config", None), getattr(config, "decoder", None))
    sizes = (getattr(text, name, None) for text in texts for name in ("vocab_size", "decoder_vocab_size"))
    return {size for size in sizes if isinstance(size, int)}


class _SoftmaxWatch(TorchFunctionMode):
    """While it is entered, remembers what softmax and cross entropy were computed of, without keeping it alive."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: list[tuple[StorageWeakRef, int]] = []  # with the number of classes

    def __torch_function__(
        self, func: Callable[..., Any], _types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the function, and remember its input if it makes probabilities along the last dimension."""
        kwargs = kwargs or {}
        x = args[0] if args else kwargs.get("input")
        if (func in _SOFTMAX or func is _LOSS) and isinstance(x, Tensor) and x.layout is torch.strided and x.dim():
            along = 1 if func is _LOSS and x.dim() > 1 else args[1] if len(args) > 1 else kwargs.get("dim", -1)
            if func is _LOSS and x.dim() == 1:
                along = 0
            if along in (-1, x.dim() - 1):
                self._seen.append((StorageWeakRef(x.untyped_storage()), x.shape[-1]))
        return func(*args, **kwargs)

    def saw(self, value: Tensor) -> bool:
        """Whether probabilities were made of a tensor, or of a view of it with the same last dimension."""
        if value.layout is not torch.strided:
            return False
        storage = StorageWeakRef(value.untyped_storage())
        return any(seen.cdata == storage.cdata and classes == value.shape[-1] for seen, classes in self._seen)
