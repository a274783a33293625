"""Whatever holds text or tokens becomes windows of tokens, as the folder's own tokenizer and template say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pared import CalibrationError, ConfigError, FileError, calibration
from pared.evaluation.evaluate import context_for
from pared.fitting.hugging_face.sources import is_batches
from pared.fitting.hugging_face.texts import Limits, limits_in, limits_of, windows
from tests.targets.gguf.folders import TEXTS, folder_with

WINDOW = 16
TEXT = " ".join(TEXTS) * 3
TALK = [{"role": "user", "content": TEXTS[0]}, {"role": "assistant", "content": TEXTS[1]}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    folder_with(place, "smollm", {"vocab_size": 320, "max_position_embeddings": WINDOW})
    return place


@pytest.fixture(scope="module")
def tokenize(folder: Path) -> Callable[[str], list[int]]:
    from tokenizers import Tokenizer

    return lambda text: Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids


def told(found: list[dict[str, torch.Tensor]]) -> list[list[int]]:
    assert all(set(one) == {"input_ids"} and one["input_ids"].dtype == torch.int64 for one in found)
    assert all(one["input_ids"].shape[0] == 1 for one in found)
    return [one["input_ids"][0].tolist() for one in found]


def cut(ids: list[int]) -> list[list[int]]:
    return [ids[start : start + WINDOW] for start in range(0, len(ids) - WINDOW + 1, WINDOW)]


def test_texts(folder: Path, tokenize: Callable[[str], list[int]], tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    assert told(calibration(file, folder)) == told(calibration(str(file), folder)) == cut(tokenize(TEXT))
    apart = [number for text in TEXTS for number in tokenize(text)]
    assert told(calibration(TEXTS, folder)) == told(calibration(iter(TEXTS), folder)) == cut(apart)
    assert told(calibration(TEXTS, folder, samples=2)) == cut(apart)[:2]


IDS = [list(range(1, 21)), [7, 8, 9], []]
STREAM = list(range(100))
FORMS: dict[str, tuple[Any, list[list[int]]]] = {
    "one list": (STREAM, cut(STREAM)),
    "a tensor": (torch.tensor(STREAM), cut(STREAM)),
    "an array": (np.arange(100, dtype=np.uint16), cut(STREAM)),
    "rows of a tensor": (torch.tensor(STREAM).reshape(5, 20), [STREAM[i : i + WINDOW] for i in range(0, 100, 20)]),
    "lists": (IDS, [IDS[0][:WINDOW], IDS[1]]),
    "tuples": ([tuple(one) for one in IDS], [IDS[0][:WINDOW], IDS[1]]),
    "rows with a column": ([{"input_ids": one, "text": "not this"} for one in IDS], [IDS[0][:WINDOW], IDS[1]]),
}


@pytest.mark.parametrize("form", FORMS)
def test_token_ids(form: str, folder: Path) -> None:
    source, expected = FORMS[form]
    assert told(calibration(source, folder)) == expected


@pytest.mark.parametrize("shape", [(100,), (5, 20)])
def test_token_ids_in_a_file(shape: tuple[int, ...], folder: Path, tmp_path: Path) -> None:
    ids = np.arange(100).reshape(shape)
    np.save(tmp_path / "ids.npy", ids)
    assert told(calibration(tmp_path / "ids.npy", folder)) == told(calibration(ids, folder))


@given(st.lists(st.lists(st.integers(0, 9), max_size=40), max_size=6), st.integers(1, 4))
def test_windows_are_the_tokens_in_order(pieces: list[list[int]], most: int) -> None:
    ids = [one for piece in pieces for one in piece]
    if len(ids) < WINDOW:
        with pytest.raises(CalibrationError, match=f"has {len(ids)} tokens, and a window has {WINDOW}"):
            windows(pieces, Limits(WINDOW, 10), most, "here")
        return
    assert told(windows(pieces, Limits(WINDOW, 10), most, "here")) == cut(ids)[:most]


def template_of(tokenize: Callable[[str], list[int]], talk: list[dict[str, str]]) -> list[int]:
    return tokenize("".join(one["content"] for one in talk))[:WINDOW]  # what the folder's template gives


@pytest.mark.parametrize("kind", ["dataset", "streamed", "rows"])
def test_datasets(kind: str, folder: Path, tokenize: Callable[[str], list[int]]) -> None:
    datasets: Any = pytest.importorskip("datasets") if kind != "rows" else None

    def made(column: str, values: list[Any]) -> Any:
        if kind == "rows":
            return [{"id": i, column: value} for i, value in enumerate(values)]
        found = datasets.Dataset.from_dict({"id": list(range(len(values))), column: values})
        return found.to_iterable_dataset() if kind == "streamed" else found

    apart = [number for text in TEXTS for number in tokenize(text)]
    assert told(calibration(made("text", list(TEXTS)), folder)) == cut(apart)
    assert told(calibration(made("input_ids", [[1, 2, 3], [4, 5]]), folder)) == [[1, 2, 3], [4, 5]]
    assert told(calibration(made("messages", [TALK, TALK[:1]]), folder)) == [
        template_of(tokenize, talk) for talk in (TALK, TALK[:1])
    ]
    assert not is_batches(made("text", list(TEXTS)))
    with pytest.raises(
        CalibrationError, match="has no column input_ids, messages, text; it has id, content\n  Rename one"
    ):
        calibration(made("content", ["a"]), folder)
    if kind != "streamed":
        with pytest.raises(CalibrationError, match="is empty"):
            calibration(made("text", []), folder)


def test_limits_of_a_configuration(tmp_path: Path) -> None:
    def limits(config: object) -> Limits:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return limits_in(tmp_path)

    assert limits({"vocab_size": 9, "n_positions": 8}) == Limits(8, 9)
    assert limits({"text_config": {"vocab_size": 9, "max_position_embeddings": 1 << 20}}) == Limits(1 << 20, 9)
    assert limits({"text_config": None}) == Limits()
    assert limits({"max_seq_len": 8, "max_position_embeddings": -1}) == Limits(8)
    assert limits({"n_positions": 64, "max_position_embeddings": 32}) == Limits(32)
    assert Limits(1 << 20).window == Limits().window == 512


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("LlamaConfig", {"max_position_embeddings": 24}),
        ("GPT2Config", {"n_positions": 24}),
        ("MptConfig", {"max_seq_len": 24}),
        ("LlavaConfig", {"text_config": {"model_type": "llama", "vocab_size": 96, "max_position_embeddings": 24}}),
    ],
)
def test_models_and_folders_have_the_same_limits(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    transformers: Any = pytest.importorskip("transformers")
    config = getattr(transformers, name)(**{"vocab_size": 96, **options})
    config.save_pretrained(tmp_path)
    assert limits_of(config) == limits_in(tmp_path) == Limits(24, 96)
    model = nn.Module()
    model.config = config
    assert context_for(model, wanted=None) == 24


def test_configurations_of_other_classes() -> None:
    assert limits_of(SimpleNamespace(max_position_embeddings=5, text_config=SimpleNamespace(vocab_size=9))) == Limits(
        5, 9
    )
    assert limits_of(None) == limits_of(5) == Limits()


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "short": (["Hi."], CalibrationError, r"has \d tokens, and a window has 16\n  Pass a longer text"),
    "no row": (
        [319, 320] * 20,
        CalibrationError,
        "has token 320, and the model's table has 320 rows\n  Use the tokenizer",
    ),
    "negative": ([[1, -1]], CalibrationError, "has token -1"),
    "nothing": ([], CalibrationError, "is empty"),
    "only empty": ([[], []], CalibrationError, "has no sample with a token in it"),
    "floats": (torch.ones(40), ConfigError, "is an array of float32 with 1 dimensions, not of token ids"),
    "three dimensions": (torch.ones(2, 3, 4, dtype=torch.long), ConfigError, "with 3 dimensions"),
    "lists of floats": ([[0.5, 1.5]], CalibrationError, "a sample is float64 with 1 dimensions, not token ids"),
    "a missing text": ([{"text": "a"}, {"text": None}], CalibrationError, "text 1 is a NoneType\n  Leave out rows"),
    "a template's error": ([{"messages": 5}], CalibrationError, "the chat template does not take a row"),
    "a number": (5, ConfigError, "cannot make calibration data of a int\n  Pass the path of a text"),
    "objects": ([object()], ConfigError, "cannot make calibration data of a object"),
    "no file": ("nowhere.txt", FileError, "nowhere.txt: cannot be read"),
    "no array": ("nowhere.npy", FileError, "nowhere.npy: cannot be read"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_calibrate(case: str, folder: Path) -> None:
    source, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        calibration(source, folder)


def test_an_empty_array_cannot_calibrate(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.npy").write_bytes(b"")
    with pytest.raises(FileError, match="empty.npy: cannot be read: it is empty"):
        calibration(tmp_path / "empty.npy", folder)


def test_folders_that_cannot_read(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no config.json"):
        calibration(TEXTS, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileError, match="has no tokenizer that transformers can read"):
        calibration(TEXTS, tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    with pytest.raises(ConfigError, match="its tokenizer has no chat template"):
        calibration([{"messages": TALK}], tmp_path)
    with pytest.raises(ConfigError, match="samples=0 is not an integer of at least 1"):
        calibration(TEXTS, folder, samples=0)


def test_batches_and_functions_are_left_alone() -> None:
    batch = {"input_ids": torch.ones(1, 4, dtype=torch.long)}
    loader: Any = torch.utils.data.DataLoader([1, 2])
    ready = [
        [batch],
        (one for one in [batch]),
        lambda model: model,
        [(batch["input_ids"],)],
        [batch["input_ids"]],
        loader,
    ]
    assert all(map(is_batches, ready))
    assert not any(map(is_batches, [TEXTS, STREAM, IDS, torch.ones(4), "text.txt", [{"text": "a"}], 5]))
