"""How many threads work on calls that `fit` makes: as many as the user allows, or one where steps are small.

What a recurrent layer computes for one step waits for the step before it. Several threads share the work of a step, of
less than a millisecond, and wait for each other at its end; where another process has one of their processors, that
takes as long as the system lets it have it, at every step. With one thread a process gets its share of the time.
"""

from __future__ import annotations

import contextlib

import torch
from torch import nn

from pared.model.calls import Call
from pared.model.checks import check_nesting
from pared.runtime.stopwatch import Spent
from pared.switches import threads, threads_asked


def takes_small_steps(model: nn.Module) -> bool:
    """Whether a model has layers that compute one small step after the other."""
    return any(isinstance(module, (nn.RNNBase, nn.RNNCellBase)) for module in model.modules())


def suited(model: object) -> contextlib.AbstractContextManager[None]:
    """As many threads as a model's steps are large enough for.

    Raises:
        ModelError: its modules nest too deep for torch to walk through them.
    """
    if not isinstance(model, nn.Module):
        return contextlib.nullcontext()
    check_nesting(model)
    return threads(1) if takes_small_steps(model) else contextlib.nullcontext()


def timed_with(model: nn.Module, call: Call) -> contextlib.AbstractContextManager[None]:
    """As many threads as the user allows; or those of now, if there are fewer and other processes are at work.

    Args:
        model: is called.
        call: one of the calls that will be timed.
    """
    if torch.get_num_threads() < threads_asked():
        spent = Spent()
        with torch.no_grad(), spent.adding():
            call.on(model)
        if spent.is_disturbed:
            return contextlib.nullcontext()
    return threads(threads_asked())
