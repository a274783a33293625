"""Scores of a text for `fit`: one for each window, the higher the better."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from pared.evaluation.evaluate import Model, Text, context_for, evaluated
from pared.evaluation.opening import FolderModel, found
from pared.evaluation.shards.runs import WindowRuns
from pared.evaluation.tokens import Tokens, tokens_of
from pared.executors.executor import Executor
from pared.executors.sendable import opener_of
from pared.fitting.hugging_face.texts import limits_of

log = logging.getLogger(__name__)

Scores = np.ndarray[tuple[int], np.dtype[np.float64]]


@dataclass(frozen=True, eq=False)
class TextScore:
    """What `text_score` returns.

    Args:
        tokens: the text.
        context: see there; so are the others.
        stride: how many tokens a window goes on.
        reference: the float model.
        opener: opens it elsewhere; None if it is in the memory of this process alone.
        executor: runs models that others can open; None: this process does.
    """

    tokens: Tokens
    context: int | None
    stride: int | None
    reference: nn.Module | None = None
    opener: FolderModel | None = None
    executor: Executor | None = None

    def over(self, executor: Executor) -> TextScore:
        """The same score, found by an executor where models can be opened by others; see `Divided`."""
        if self.reference is not None and self.opener is None:
            log.warning("the reference is in the memory of this process, and so workers do not score")
            return self
        if self.opener is not None:
            executor.check_files(self.opener.paths)
        return replace(self, executor=executor)

    def __call__(self, model: nn.Module) -> Scores | float:
        """The score of a model."""
        context, opener = context_for(model, self.reference, wanted=self.context), opener_of(model)
        elsewhere = None
        if self.executor is not None and opener is not None:
            rows = limits_of(getattr(model, "config", None)).rows
            elsewhere = WindowRuns(self.tokens, opener, self.opener, rows), self.executor
        result = evaluated(model, self.tokens, self.reference, context, self.stride, elsewhere)
        lost = np.array([part.loss if part.kl is None else part.kl for part in result.windows])
        each: Scores = -lost * len(lost) / result.tokens
        return each if len(each) >= 4 else float(each.mean())


def text_score(
    text: Text,
    tokenizer: Any = None,
    *,
    reference: Model | None = None,
    context: int | None = None,
    stride: int | None = None,
) -> TextScore:
    """An `eval_func` for `fit`: how well a language model predicts a text, one score for each window.

    The score of a window is its share of the mean log-likelihood of a token, in nats, times the number of windows: so
    the mean of all scores is -loss of `pared.evaluate`. Higher is better. With the default criterion one percent of
    the loss may be lost; `AccuracyCriterion(criterion="absolute", tolerable_loss=0.01)` lets the perplexity grow by one
    percent, which is the same for every text and model. From four windows on `fit` searches on the even windows and
    confirms the result on the odd ones.

    Args:
        text: the text, the path of a file of text, or token ids, as for `pared.evaluate`.
        tokenizer: one of transformers; only for texts.
        reference: the float model, or its folder. Then the score is -KL(reference || model), of which the float model
            has 0: it needs an absolute criterion, in nats per token.
        context: the most tokens that are read at once, as for `pared.evaluate`.
        stride: how many tokens a window goes on, as for `pared.evaluate`.

    Returns:
        a function of a model that returns float64 (windows,), or one number for fewer than four windows: the mean.
        Where a fit of a folder has workers, they score shards of the windows.

    Raises:
        ConfigError, EvaluationError, FileError: the text or the reference cannot be used, as `pared.evaluate` says.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 8))
    >>> text_score([1, 2, 3, 4, 5, 6, 7, 0, 1], context=3)(model).shape
    (4,)
    """
    tokens = tokens_of(text, tokenizer)
    if reference is None:
        return TextScore(tokens, context, stride)
    opener = found(reference, "reference", others=1)
    model = reference if opener is None else opener.opened()
    assert isinstance(model, nn.Module)
    return TextScore(tokens, context, stride, model, opener)
