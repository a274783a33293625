"""Whisper tiny.en: encoder and greedy decoding with a cache; joined recordings calibrate, prompts judge.

As graphs it has three parts: the encoder, the keys and values of the cross attention, and one step of the decoder.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from bench.peers.subjects.subject import Judgement, Part, Run, Subject, randomized
from bench.zoo import whisper as zoo

_SEED = 0
_LAYERS = 4
_PAST = [f"past_{kind}_{i}" for i in range(_LAYERS) for kind in ("key", "value")]
_NEW = [f"new_{kind}_{i}" for i in range(_LAYERS) for kind in ("key", "value")]
_CROSS = [f"cross_{kind}_{i}" for i in range(_LAYERS) for kind in ("key", "value")]
_HEADS, _HEAD = 6, 64
_RECORDINGS = 8  # that calibrate a decoder's step, each with its whole transcript but for the last token
_JUDGED = 40  # prompts
_PREFIX = 4  # tokens that a step has read before, in calibration


class _Encoder(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.encoder = model.get_encoder()

    def forward(self, input_features: Tensor) -> Tensor:
        hidden: Tensor = self.encoder(input_features).last_hidden_state
        return hidden


class _Cross(nn.Module):
    """Keys and values of what was heard, of every layer."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([layer.encoder_attn for layer in model.model.decoder.layers])

    def forward(self, hidden: Tensor) -> tuple[Tensor, ...]:
        projected = [p(hidden) for attention in self.attentions for p in (attention.k_proj, attention.v_proj)]
        return tuple(x.unflatten(-1, (_HEADS, _HEAD)).transpose(1, 2) for x in projected)


def _cache(tensors: Sequence[Tensor]) -> DynamicCache:
    cache = DynamicCache()
    for i in range(_LAYERS):
        cache.update(tensors[2 * i], tensors[2 * i + 1], i)
    return cache


class _Decoder(nn.Module):
    """Logits of the tokens, and keys and values of all tokens so far."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.decoder, self.output = model.model.decoder, model.proj_out

    def forward(self, tokens: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        hidden, past, cross = rest[0], rest[1 : 1 + 2 * _LAYERS], rest[1 + 2 * _LAYERS :]
        caches = EncoderDecoderCache(_cache(past), _cache(cross))
        caches.is_updated = dict.fromkeys(range(_LAYERS), True)
        out = self.decoder(input_ids=tokens, encoder_hidden_states=hidden, past_key_values=caches, use_cache=True)
        layers = caches.self_attention_cache.layers
        return (self.output(out.last_hidden_state), *(x for layer in layers for x in (layer.keys, layer.values)))


class _Joined(nn.Module):
    """What `bench.zoo.whisper` calls."""

    def __init__(self, runs: Mapping[str, Run]) -> None:
        super().__init__()
        self.runs = runs

    def get_encoder(self) -> Callable[[Tensor], SimpleNamespace]:
        return lambda features: SimpleNamespace(last_hidden_state=self.runs["encoder"](features)[0])

    def forward(
        self,
        input_features: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: tuple[Tensor, ...] | None = None,
        use_cache: bool = False,  # noqa: ARG002  # the signature of the model
    ) -> SimpleNamespace:
        assert decoder_input_ids is not None
        hidden = self.runs["encoder"](input_features)[0] if encoder_outputs is None else encoder_outputs[0]
        past, cross = past_key_values or ((), ())
        cross = cross or self.runs["cross"](hidden)
        past = past or (torch.zeros(len(hidden), _HEADS, 0, _HEAD),) * (2 * _LAYERS)
        logits, *past = self.runs["decoder"](decoder_input_ids, hidden, *past, *cross)
        return SimpleNamespace(logits=logits, past_key_values=(tuple(past), cross))


@functools.cache
def _transcripts() -> list[dict[str, Any]]:
    return zoo.calibration(_SEED)


def calls() -> Callable[[Any], None]:
    """Reads whole transcripts, and decodes one recording step by step."""

    def calibrate(model: Any) -> None:
        for call in _transcripts():
            model(**call)
        zoo.decode(model, zoo.prompts("calibration", _SEED)[0])

    return calibrate


@torch.no_grad()
def _parts(model: nn.Module) -> Mapping[str, Part]:
    encoder, cross, decoder = _Encoder(model), _Cross(model), _Decoder(model)
    empty = (torch.zeros(1, _HEADS, 0, _HEAD),) * (2 * _LAYERS)
    heard = [encoder(call["input_features"]) for call in _transcripts()[:_RECORDINGS]]
    steps = []
    for hidden, call in zip(heard, _transcripts(), strict=False):
        tokens, known = call["decoder_input_ids"], cross(hidden)
        past = decoder(tokens[:, :_PREFIX], hidden, *empty, *known)[1:]
        steps.append((tokens[:, _PREFIX:], hidden, *past, *known))
    names = ("tokens", "hidden", *_PAST, *_CROSS)
    grows = {"tokens": {1: "read"}, **{name: {2: "past"} for name in _PAST}}
    return {
        "encoder": Part(
            encoder, ("input_features",), ("hidden",), [(c["input_features"],) for c in _transcripts()], {}
        ),
        "cross": Part(cross, ("hidden",), tuple(_CROSS), [(hidden,) for hidden in heard], {}),
        "decoder": Part(decoder, names, ("logits", *_NEW), steps, grows),
    }


@functools.cache
def shapes() -> Mapping[str, Callable[[nn.Module], Tensor]]:
    short, long = zoo.clips(_SEED)
    return {
        f"encoder and decoding, {clip.seconds:.0f} s": functools.partial(zoo.decode, clip=clip)
        for clip in (short, long)
    }


def watch(model: nn.Module) -> Tensor:
    return zoo.hear(model, _SEED, _JUDGED)


def judge(got: Tensor, expected: Tensor) -> Judgement:
    nats = nn.functional.nll_loss(got, zoo.said(_SEED, _JUDGED))
    divergence = nn.functional.kl_div(got, expected, reduction="batchmean", log_target=True)
    return Judgement(float(nats), float(divergence))


SUBJECT = Subject(
    title="Whisper tiny.en",
    load=zoo.load,
    blank=lambda: randomized(zoo.load()),
    calls=calls,
    parts=_parts,
    joined=_Joined,
    shapes=shapes,
    watch=watch,
    judge=judge,
    score="nats per token",
    higher_is_better=False,
    fidelity="KL, nat",
    transformer=True,
    entries=lambda model: (model, model.get_encoder()),  # type: ignore[operator]  # it has one
)
