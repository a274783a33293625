"""Language models over some windows of a text: what the tokens of each window add up to.

Each window has sums of its own, which are added in the order of the text: so it makes no difference to any bit how
windows are divided among workers.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from pared.errors import EvaluationError
from pared.evaluation.scoring import Sums, score
from pared.evaluation.tokens import Tokens
from pared.evaluation.windows import Window
from pared.executors.executor import Executor, LocalExecutor, Task
from pared.executors.sendable import Opener
from pared.switches import DRAWING, in_eval_mode

_TURNS: Final = 4  # tasks of each worker: the last of them are done at about the same time
# The memory that scoring takes beside the models: bytes as such, and for each number of a window's logits: of both
# models in float32, and in double once more.
_MEMORY: Final = 640 << 20
_OF_LOGITS: Final = 4 * 4


@dataclass(frozen=True)
class Here:
    """A model of this process."""

    model: nn.Module
    memory: int = 0

    def __call__(self) -> AbstractContextManager[nn.Module]:
        """See `Opener`."""
        return contextlib.nullcontext(self.model)


@dataclass(frozen=True, eq=False)
class WindowRuns:
    """Scores windows. It can be pickled if its models can be opened elsewhere.

    Args:
        tokens: the text.
        model: opens the model.
        reference: opens the reference; None without one.
        rows: the vocabulary, as far as it is known.
    """

    tokens: Tokens
    model: Opener[nn.Module]
    reference: Opener[nn.Module] | None = None
    rows: int | None = None

    def __call__(self, windows: Sequence[Window]) -> tuple[list[Sums], str]:
        """The sums of each window, and the type of the logits."""
        with ExitStack() as stack:
            model = stack.enter_context(self.model())
            reference = None if self.reference is None else stack.enter_context(self.reference())
            stack.enter_context(torch.no_grad())
            stack.enter_context(_evaluating(*(one for one in (model, reference) if one is not None)))
            found, dtype = [], ""
            for window in windows:
                theirs = None if reference is None else _logits(reference, self.tokens, window, "the reference")
                own = _logits(model, self.tokens, window, "the model")
                if theirs is not None and theirs.shape != own.shape:
                    raise EvaluationError(
                        f"the model has logits for {own.shape[-1]} tokens, the reference for {theirs.shape[-1]}",
                        where="pared.evaluate",
                        remedy="Compare models with one vocabulary; bits per byte compare any two.",
                    )
                found.append(score(own, self.tokens.ids[window.first : window.end].to(own.device), theirs))
                dtype = str(own.dtype).removeprefix("torch.")
                del own, theirs  # before the next ones are made
            return found, dtype

    def memory(self, windows: Sequence[Window]) -> int:
        """The bytes of memory that this takes."""
        longest = max(window.end - window.begin for window in windows) + len(self.tokens.prefix)
        models = self.model.memory + (0 if self.reference is None else self.reference.memory)
        return _MEMORY + models + _OF_LOGITS * longest * (self.rows or 0)

    def all(self, windows: Sequence[Window], executor: Executor) -> tuple[list[Sums], str]:
        """The sums of all windows, in order, and the type of the logits."""
        size = len(windows)
        if not isinstance(executor, LocalExecutor):
            size = -(-size // (_TURNS * executor.workers))
        groups = [windows[first : first + size] for first in range(0, len(windows), size)]
        parts = list(executor.map(Task("scoring windows", self, self.memory), groups))
        return [one for sums, _ in parts for one in sums], parts[0][1]


@contextlib.contextmanager
def _evaluating(*models: nn.Module) -> Iterator[None]:
    """Models in eval mode; nothing is changed, nor anyone waited for, where they are."""
    if not any(module.training for model in models for module in model.modules()):
        yield
        return
    with DRAWING, in_eval_mode(*models):
        yield


def _logits(model: nn.Module, tokens: Tokens, window: Window, name: str) -> Tensor:
    """The logits that predict the scored tokens of a window, floating (tokens, vocabulary)."""
    prefix = torch.tensor(tokens.prefix, dtype=torch.int64)
    ids = torch.cat([prefix, tokens.ids[window.begin : window.end]])[None]
    first = next(model.parameters(), None)
    if first is not None:
        ids = ids.to(first.device)
    named = "input_ids" in inspect.signature(model.forward).parameters  # as calibration calls it
    output = model(input_ids=ids) if named else model(ids)
    logits = output[0] if isinstance(output, tuple) and output else getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.shape[:-1] != ids.shape:
        found = f"of {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"but a {type(output).__name__}"
        raise EvaluationError(
            f"{name} returned no logits of (1, {ids.shape[1]}, vocabulary), {found}",
            where="pared.evaluate",
            remedy="Pass a causal language model: one that returns scores of the next token at every position.",
        )
    scored = window.end - window.first
    return logits[0, -scored - 1 : -1]
