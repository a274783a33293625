"""Windows over a text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pared.errors import ConfigError
from pared.evaluation.windows import cut


@given(st.data())
def test_every_token_is_scored_once_with_the_context_that_was_asked_for(data: st.DataObject) -> None:
    prefix = data.draw(st.integers(0, 3))
    context = data.draw(st.integers(max(prefix, 1) + 1, 20))
    stride = data.draw(st.none() | st.integers(1, context - max(prefix, 1)))
    count = data.draw(st.integers(2, 100))
    windows = cut(count, context, stride, prefix)
    scored = [token for window in windows for token in range(window.first, window.end)]
    assert scored == list(range(0 if prefix else 1, count))
    for window in windows:
        assert prefix + window.end - window.begin <= context
        assert prefix or window.first > window.begin  # there is a token before the first that is scored
    goes_on = stride or context - max(prefix, 1)
    for window in windows[1:]:
        assert window.end - window.first <= goes_on
        assert prefix + window.first - window.begin >= context - goes_on  # tokens before
    if count > context - prefix:
        assert {prefix + window.end - window.begin for window in windows} == {context}  # all read as many


@pytest.mark.parametrize(
    ("context", "stride", "message"),
    [
        (1, None, "context=1 is not an integer of at least 2"),
        (2.5, None, "context=2.5 is not an integer"),
        (8, 0, "stride=0 is not an integer of at least 1"),
        (8, 8, "stride=8 leaves tokens without context in windows of 8\n  Pass at most stride=7"),
    ],
)
def test_windows_that_make_no_sense(context: int, stride: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cut(100, context, stride)
