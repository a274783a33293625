"""SmolLM2-135M-Instruct, dithered: windows of Wikipedia calibrate, others judge; greedy decoding with a cache is timed.

As a graph it is one step of decoding: tokens, and the keys and values of all tokens before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from bench.peers.subjects.subject import Judgement, Part, Run, Subject, randomized
from bench.zoo import smollm2 as zoo

_SEED = 0
_LAYERS, _HEADS, _HEAD = 30, 3, 64
_PAST = [f"past_{kind}_{i}" for i in range(_LAYERS) for kind in ("key", "value")]
_NEW = [f"new_{kind}_{i}" for i in range(_LAYERS) for kind in ("key", "value")]
_CALIBRATED, _BATCH, _TOKENS = 16, 4, 256  # windows, those in a call, and the tokens of one
_STEPPED = 8  # windows that calibrate graphs
_PREFIX = 4  # tokens that a step has read before, in the calibration of graphs
_JUDGED, _READ, _SCORED = 8, 128, 12  # windows, the tokens of one, and the last of these, which are predicted
_STEPS = 8  # of decoding, in calibration
PROMPT, DECODED = 16, 32  # tokens


def _layer(keys: Tensor, values: Tensor) -> DynamicLayer:
    """One with content; `update` would join it to an empty tensor, which not every converter takes."""
    layer = DynamicLayer()
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    return layer


class _Step(nn.Module):
    """Logits of the tokens, and keys and values of all tokens so far."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        before, now = past[0].shape[2], tokens.shape[1]
        cache = DynamicCache()
        cache.layers = [_layer(past[2 * i], past[2 * i + 1]) for i in range(_LAYERS)]
        places = before + torch.arange(now)
        hidden = torch.arange(before + now)[None] > places[:, None]
        mask = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)[None, None]
        out = self.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=places[None],
            past_key_values=cache,
            use_cache=True,
        )
        layers = out.past_key_values.layers
        return (out.logits, *(x for layer in layers for x in (layer.keys, layer.values)))


class _Joined(nn.Module):
    """What `bench.zoo.smollm2` calls."""

    def __init__(self, step: Run) -> None:
        super().__init__()
        self.step = step

    def forward(
        self,
        input_ids: Tensor,
        past_key_values: tuple[Tensor, ...] | None = None,
        use_cache: bool = True,  # noqa: ARG002  # the signature of the model
    ) -> SimpleNamespace:
        past = past_key_values or _empty()
        logits, *past = self.step(input_ids, *past)
        return SimpleNamespace(logits=logits, past_key_values=tuple(past))


def _empty() -> tuple[Tensor, ...]:
    return (torch.zeros(1, _HEADS, 0, _HEAD),) * (2 * _LAYERS)


def _windows() -> Tensor:
    return zoo.windows("calibration", _SEED, _CALIBRATED, _TOKENS)[:, :-1]


def calls() -> Callable[[Any], None]:
    """Reads windows, and decodes after the start of one."""

    def calibrate(model: Any) -> None:
        for batch in _windows().split(_BATCH):
            model(input_ids=batch.contiguous(), use_cache=False)
        zoo.decode(model, _windows()[0, :PROMPT], _STEPS)

    return calibrate


@torch.no_grad()
def _parts(model: nn.Module) -> Mapping[str, Part]:
    step = _Step(model)
    steps = []
    for window in _windows()[:_STEPPED]:
        past = step(window[None, :_PREFIX], *_empty())[1:]
        steps.append((window[None, _PREFIX:].contiguous(), *past))
    grows = {"tokens": {1: "read"}, **{name: {2: "past"} for name in _PAST}}
    return {"step": Part(step, ("tokens", *_PAST), ("logits", *_NEW), steps, grows)}


@functools.cache
def shapes() -> Mapping[str, Callable[[nn.Module], Tensor]]:
    prompt = zoo.windows("test", _SEED, 1, PROMPT)[0, :-1]
    return {f"{DECODED} tokens after {PROMPT}": functools.partial(zoo.decode, prompt=prompt, count=DECODED)}


def _texts() -> Tensor:
    return zoo.windows("test", _SEED, _JUDGED, _READ)


def watch(model: nn.Module) -> Tensor:
    return zoo.read(model, _texts(), _SCORED)


def judge(got: Tensor, expected: Tensor) -> Judgement:
    nats = nn.functional.nll_loss(got, _texts()[:, -_SCORED:].flatten())
    divergence = nn.functional.kl_div(got, expected, reduction="batchmean", log_target=True)
    return Judgement(float(nats), float(divergence))


SUBJECT = Subject(
    title="SmolLM2",
    load=zoo.load,
    blank=lambda: randomized(zoo.load()),
    calls=calls,
    parts=_parts,
    joined=lambda runs: _Joined(runs["step"]),
    shapes=shapes,
    watch=watch,
    judge=judge,
    score="nats per token",
    higher_is_better=False,
    fidelity="KL, nat",
    transformer=True,
)
