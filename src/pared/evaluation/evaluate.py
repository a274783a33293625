"""`pared.evaluate`: a language model on a text, window by window, beside a reference if there is one."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from pared.errors import ConfigError, EvaluationError
from pared.evaluation.opening import found, opened
from pared.evaluation.result import Evaluation
from pared.evaluation.scoring import Sums
from pared.evaluation.shards.runs import Here, WindowRuns
from pared.evaluation.tokens import Tokens, tokens_of
from pared.evaluation.windows import cut
from pared.executors.executor import Executor, LocalExecutor
from pared.fitting.hugging_face.loading import architecture_in
from pared.fitting.hugging_face.texts import limits_of, tokenizer_in
from pared.terminal import Stages

_WHERE: Final = "pared.evaluate"
_CONTEXT: Final = 512  # tokens, if the model takes as many

Model = nn.Module | str | os.PathLike[str]
Text = str | os.PathLike[str] | Sequence[int] | Tensor


def evaluate(
    model: Model,
    text: Text,
    reference: Model | None = None,
    *,
    tokenizer: Any = None,
    context: int | None = None,
    stride: int | None = None,
    quiet: bool = False,
    executor: Executor | None = None,
) -> Evaluation:
    """Measure how well a language model predicts a text, and how far it is from a reference.

    Both models read the text window by window, one window each at a time; every token is scored once. Beside the
    models this takes memory for the logits of one window, `context` times the vocabulary, of each. They run in eval
    mode and without gradients; their training flags are restored.

    Args:
        model: a language model that returns logits of (1, tokens, vocabulary): itself, as `output.logits`, or first in
            a tuple. Or a folder, or its URL: of transformers, or one that `pared fit` wrote from such a folder. Code in
            folders is never run. Weights in float are read in float32, or in bfloat16 if float32 would take more than
            half of the memory that is left; those of an artifact stay in codes then. The log says so.
        text: the text; the path of a file in UTF-8 (a `pathlib.Path`); or token ids, integers (tokens,).
        reference: the float model, for instance, with the same vocabulary: a model or a folder as well.
        tokenizer: one of transformers. Default: that of the folder. Not needed for token ids.
        context: the most tokens that are read at once. Default: 512, or fewer where the model takes fewer.
        stride: how many tokens a window goes on, at most `context - 1`. Default: as many as that, where each window
            begins with one token of the one before (or with the token that the tokenizer puts before a text). Half of
            `context` takes twice as long and gives every token at least that much context.
        quiet: True shows no progress. Otherwise it is shown at a terminal.
        executor: `pared.RayExecutor(...)`: workers on many machines score shards of the windows, for which models have
            to be folders that all see. Any number of workers gives the same figures. Default: this machine.

    Returns:
        means over all tokens, in nats per token, and the sums of each window.

    Raises:
        ConfigError: an option has no valid value, there is no tokenizer, or a folder's architecture is unknown.
        EvaluationError: there are fewer than two tokens, a token is beyond a model's table, the vocabularies differ,
            the output has no logits, or they are NaN; or a model is an encoder-decoder, which predicts another text.
        FileError: the text, a folder or its tokenizer cannot be read.
        WorkerError: a worker does not see a folder, or cannot do the work.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 8))
    >>> result = evaluate(model, [1, 2, 3, 4, 5, 6, 7, 0], reference=model, context=4)
    >>> result.tokens, result.kl, result.agreement
    (7, 0.0, 1.0)
    """
    if executor is not None and not isinstance(executor, LocalExecutor):
        return _elsewhere(model, text, reference, tokenizer, context, stride, quiet, executor)
    own, folder = opened(model, "model", others=int(reference is not None))
    other, other_folder = opened(reference, "reference", others=1) if reference is not None else (None, None)
    tokens = _tokens(text, tokenizer, folder, other_folder)
    context = context_for(own, other, wanted=context)
    with Stages(quiet=quiet).stage("reading the text"):
        return evaluated(own, tokens, other, context, stride)


def _elsewhere(
    model: Model,
    text: Text,
    reference: Model | None,
    tokenizer: Any,
    context: int | None,
    stride: int | None,
    quiet: bool,
    executor: Executor,
) -> Evaluation:
    """Let workers open the folders, of whose models there is only the architecture here."""
    own = found(model, "model", others=int(reference is not None))
    other = found(reference, "reference", others=1) if reference is not None else None
    if own is None or (other is None and reference is not None):
        raise ConfigError(
            f"the {'reference' if own is not None else 'model'} is in the memory of this process",
            where="pared.evaluate with workers",
            remedy="Pass the folder that it is saved in, or leave the workers out.",
        )
    folders = [one for one in (own, other) if one is not None]
    tokens = _tokens(text, tokenizer, *(one.folder for one in folders))
    outlined = architecture_in(own.folder), None if other is None else architecture_in(other.folder)
    context = context_for(*outlined, wanted=context)
    executor.check_files([path for one in folders for path in one.paths])
    runs = WindowRuns(tokens, own, other, limits_of(getattr(outlined[0], "config", None)).rows)
    with Stages(quiet=quiet).stage("reading the text"):
        return evaluated(outlined[0], tokens, outlined[1], context, stride, (runs, executor))


def _tokens(text: Text, tokenizer: Any, *folders: Path | None) -> Tokens:
    if isinstance(text, (str, os.PathLike)):
        tokenizer = _tokenizer(tokenizer, *folders)
    return tokens_of(text, tokenizer)


def evaluated(
    model: nn.Module,
    tokens: Tokens,
    reference: nn.Module | None,
    context: int,
    stride: int | None,
    elsewhere: tuple[WindowRuns, Executor] | None = None,
) -> Evaluation:
    """`evaluate` for models and tokens; arguments and errors are the same.

    Args:
        model: the model, or one of its architecture if others run it.
        tokens: the text.
        reference: likewise.
        context: see there.
        stride: see there.
        elsewhere: what opens and runs the models, and who does it; default: they are run as they are, here.
    """
    windows = cut(len(tokens.ids), context, stride, len(tokens.prefix))
    for one, name in ((model, "the model"), (reference, "the reference")):
        if one is not None:
            _check_kind(one, name)
            _check_table(one, tokens, name)
    here = WindowRuns(tokens, Here(model), None if reference is None else Here(reference))
    runs, executor = elsewhere or (here, LocalExecutor())
    sums, dtype = runs.all(windows, executor)
    stride = context - max(len(tokens.prefix), 1) if stride is None else stride
    return _summed(sums, tokens.nbytes, context, stride, dtype)


def _summed(sums: list[Sums], nbytes: int | None, context: int, stride: int, dtype: str) -> Evaluation:
    count = sum(one.tokens for one in sums)
    loss = math.fsum(one.loss for one in sums)

    def mean(parts: list[float | int | None]) -> float | None:
        known = [part for part in parts if part is not None]
        return math.fsum(known) / count if known else None

    return Evaluation(
        tokens=count,
        loss=loss / count,
        bits_per_byte=loss / math.log(2) / nbytes if nbytes else None,
        reference_loss=mean([one.reference_loss for one in sums]),
        kl=mean([one.kl for one in sums]),
        agreement=mean([one.agreed for one in sums]),
        context=context,
        stride=stride,
        dtype=dtype,
        windows=tuple(sums),
    )


def context_for(*models: nn.Module | None, wanted: int | None) -> int:
    """The most tokens that are read at once: as wanted, or the default.

    Raises:
        ConfigError: a model takes fewer.
    """
    limits = [limits_of(getattr(model, "config", None)).longest for model in models]
    longest = min((limit for limit in limits if limit is not None), default=None)
    if wanted is None:
        return min(_CONTEXT, longest or _CONTEXT)
    if longest is not None and isinstance(wanted, int) and wanted > longest:
        raise ConfigError(
            f"context={wanted} is more than the {longest} tokens that the model takes",
            where=_WHERE,
            remedy=f"Pass at most context={longest}.",
        )
    return wanted


def _tokenizer(given: Any, *folders: Path | None) -> Any:
    """The tokenizer that was given, or that of the first folder; those of two folders have to be the same."""
    if given is not None:
        return given
    found = [tokenizer_in(folder) for folder in folders if folder is not None]
    if len(found) == 2 and found[0].get_vocab() != found[1].get_vocab():
        raise EvaluationError(
            "the tokenizers of the two folders have different vocabularies",
            where=f"{folders[0]} and {folders[1]}",
            remedy="Compare models with one vocabulary; bits per byte compare any two.",
        )
    return found[0] if found else None


def _check_kind(model: nn.Module, name: str) -> None:
    """Refuse a model whose output for a text is not what it predicts of it."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) is True:
        raise EvaluationError(
            f"{name} is an encoder-decoder, which reads a text as a whole and predicts another one",
            where=_WHERE,
            remedy="Score it on its own task with an eval_func of yours.",
        )


def _check_table(model: nn.Module, tokens: Tokens, name: str) -> None:
    """Refuse tokens that the model has no row for."""
    embeddings = getattr(model, "get_input_embeddings", None)
    try:
        table = embeddings() if callable(embeddings) else None
    except NotImplementedError:  # what transformers raises for models without one
        table = None
    size = getattr(table, "num_embeddings", None) or limits_of(getattr(model, "config", None)).rows
    prefix = torch.tensor(tokens.prefix, dtype=torch.int64)
    ids = torch.cat([prefix, tokens.ids])
    beyond = ids < 0 if not isinstance(size, int) else (ids < 0) | (ids >= size)
    if bool(beyond.any()):
        place = int(beyond.nonzero()[0])
        raise EvaluationError(
            f"token {int(ids[place])} at position {place - len(prefix)} is not among the {size or 'tokens'} of {name}",
            where=_WHERE,
            remedy="Pass the tokenizer that belongs to the model.",
        )
