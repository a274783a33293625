"""A text cut into windows: every token is scored exactly once, with as much context as asked for."""

from __future__ import annotations

from dataclasses import dataclass

from pared.errors import ConfigError
from pared.scalars import checked_number


@dataclass(frozen=True)
class Window:
    """Neighbouring tokens that the model reads at once; it is scored on the last of them.

    Args:
        begin: the first token that is read; after the prefix, if there is one.
        first: the first token that is scored.
        end: the token after the last one, which is scored, too.
    """

    begin: int
    first: int
    end: int


def cut(count: int, context: int, stride: int | None = None, prefix: int = 0) -> list[Window]:
    """Windows of at most `context` tokens over a text.

    The first window scores what it holds, each later one the next `stride` tokens, after as many as fit.
    Without a prefix nothing says what the first token of the text should be, and it is not scored.

    Args:
        count: the tokens of the text.
        context: the most tokens that the model reads at once, the prefix included.
        stride: how many tokens a window goes on; so each token but the first ones has `context - stride` before it.
            Default: as many as leave one token of context, or the prefix.
        prefix: how many tokens are put before each window.

    Raises:
        ConfigError: `context` and `stride` are not whole numbers, or leave a token without any context.

    >>> cut(10, 6, 3)
    [Window(begin=0, first=1, end=6), Window(begin=3, first=6, end=9), Window(begin=4, first=9, end=10)]
    """
    before = max(prefix, 1)
    context = checked_number("pared.evaluate", "context", context, least=before + 1, whole=True)
    stride = context - before if stride is None else stride
    stride = checked_number("pared.evaluate", "stride", stride, least=1, whole=True)
    if stride > context - before:
        raise ConfigError(
            f"stride={stride} leaves tokens without context in windows of {context}",
            where="pared.evaluate",
            remedy=f"Pass at most stride={context - before}, or a larger context.",
        )
    room = context - prefix
    end = min(count, room)
    windows = [Window(0, 0 if prefix else 1, end)]
    while end < count:
        first, end = end, min(count, end + stride)
        windows.append(Window(max(0, end - room), first, end))
    return windows
