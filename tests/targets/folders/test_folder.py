"""What all folders have in common: shards, files beside the weights, refusals, nothing half-written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from pared.errors import ConfigError, FileError
from pared.formats.dtypes import ELEMENTS
from pared.targets.folders import compressed_tensors, gptq, mlx
from pared.targets.folders.folder import dtype_of, patterns
from pared.targets.folders.shards import Stored, index_of, nbytes_of, shards, write_shards
from pared.targets.pieces import Outline
from pared.targets.table import TARGETS
from pared.targets.target import Offer, Role
from pared.targets.writers import WRITERS, writer_of
from tests.targets.sources import CONFIG, Random, llama_shapes, named

W4 = named(compressed_tensors.TARGET.offers, "W4A16 g64")


def choose(name: str, role: Role) -> Offer | None:
    return W4 if role == "linear" else None


GROUPS = [
    [Stored("a.words", "int32", (3, 5)), Stored("a.scale", "bfloat16", (3, 1)), Stored("a.shape", "int64", (2,))],
    [Stored("b", "uint8", (7,))],
    [Stored("c", "float64", (2, 2))],
]


@pytest.mark.parametrize(("most", "files"), [(10_000, 1), (100, 2), (1, 3)])
def test_shards_hold_what_was_announced(most: int, files: int, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    arrays = [
        [(100 * random.random(tensor.shape)).astype(ELEMENTS[tensor.dtype]) for tensor in group] for group in GROUPS
    ]
    planned = shards(GROUPS, {"format": "pt"}, most)
    written = write_shards(tmp_path, planned, iter(arrays))
    assert len(written) == files + (files > 1)
    assert sum(file.stat().st_size for file in written) == nbytes_of(planned)
    held = {name: value for file in written[:files] for name, value in load_file(file).items() if "scale" not in name}
    for group, numbers in zip(GROUPS, arrays, strict=True):
        for tensor, array in zip(group, numbers, strict=True):
            if tensor.name in held:
                assert np.array_equal(held[tensor.name], array)
    with safe_open(written[0], "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    if files > 1:
        index = json.loads(index_of(planned))
        assert index["weight_map"]["c"] == f"model-0000{files}-of-0000{files}.safetensors"
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for group in GROUPS for tensor in group)


def test_every_tensor_is_aligned() -> None:
    (shard,) = shards(GROUPS, {})
    for group in GROUPS:
        assert all(shard.offsets[tensor.name] % ELEMENTS[tensor.dtype].itemsize == 0 for tensor in group)


def test_the_tensors_of_one_weight_stay_in_one_file() -> None:
    first, *_ = shards(GROUPS, {}, 20)
    assert first.groups == [GROUPS[0]]


def test_companions_come_along(tmp_path: Path) -> None:
    given = tmp_path / "given"
    given.mkdir()
    for name in ("tokenizer.json", "generation_config.json", "config.json", "model.safetensors"):
        (given / name).write_text("{}")
    random = Random(llama_shapes(), choose)
    compressed_tensors.write(replace(random.source, folder=given), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    assert "quantization_config" in json.loads((tmp_path / "out/config.json").read_text())


def test_one_tensor_is_read_at_a_time_and_once(tmp_path: Path) -> None:
    random = Random(llama_shapes(), choose)
    compressed_tensors.write(random.source, tmp_path / "out")
    assert random.read == [outline.name for outline in random.source.outlines]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    random = Random(llama_shapes(), choose)

    def read(outline: Outline) -> dict[str, np.ndarray]:
        if "norm" in outline.name:
            raise KeyboardInterrupt
        return random.parts[outline.name]

    with pytest.raises(KeyboardInterrupt):
        compressed_tensors.write(replace(random.source, read=read), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_replaced(tmp_path: Path) -> None:
    random = Random(llama_shapes(), choose)
    (tmp_path / "out").mkdir()
    compressed_tensors.write(random.source, tmp_path / "out")  # an empty folder may be there
    for place in ("out", "out/config.json"):
        with pytest.raises(FileError, match=f"{place}: is "):
            compressed_tensors.write(random.source, tmp_path / place)


def test_tied_tensors_are_written_once_unless_the_model_does_not_tie_them(tmp_path: Path) -> None:
    shapes = {"model.embed_tokens.weight": (8, 32)}
    for tied in (True, False):
        random = Random(shapes, choose, {**CONFIG, "tie_word_embeddings": tied})
        (outline,) = random.source.outlines
        outline = replace(outline, names=(outline.name, "lm_head.weight"))
        (file,) = mlx.write(replace(random.source, outlines=[outline]), tmp_path / str(tied))
        with safe_open(file, "numpy") as held:
            assert ("lm_head.weight" in held.keys()) is not tied  # noqa: SIM118  # it is not a dictionary


@pytest.mark.parametrize(
    ("names", "config", "said", "held"),
    [
        (("model.embed_tokens.weight", "lm_head.weight"), {}, True, 1),
        (("model.embed_tokens.weight", "lm_head.weight"), {"text_config": {"tie_word_embeddings": False}}, False, 2),
        (("model.embed_tokens.weight",), {}, None, 1),
    ],
)
def test_whether_the_head_is_tied_is_said_where_the_tensors_tell(
    names: tuple[str, ...], config: dict[str, Any], said: bool | None, held: int, tmp_path: Path
) -> None:
    """Loaders take different things for granted where the configuration is silent."""
    silent = {key: value for key, value in CONFIG.items() if key != "tie_word_embeddings"} | config
    random = Random({"model.embed_tokens.weight": (8, 32)}, choose, silent)
    outlines = [replace(one, names=names) for one in random.source.outlines]
    (file,) = mlx.write(replace(random.source, outlines=outlines), tmp_path / "out")
    with safe_open(file, "numpy") as opened:
        assert len(opened.keys()) == held
    assert json.loads((tmp_path / "out/config.json").read_text()).get("tie_word_embeddings") is said


def test_a_head_of_its_own_is_said_to_be_one(tmp_path: Path) -> None:
    silent = {key: value for key, value in CONFIG.items() if key != "tie_word_embeddings"}
    shapes = {"model.embed_tokens.weight": (8, 32), "pooler_head.weight": (32, 32)}
    mlx.write(Random(shapes, choose, silent).source, tmp_path / "other")
    assert "tie_word_embeddings" not in json.loads((tmp_path / "other/config.json").read_text())
    mlx.write(Random({**shapes, "lm_head.weight": (8, 32)}, choose, silent).source, tmp_path / "own")
    assert json.loads((tmp_path / "own/config.json").read_text())["tie_word_embeddings"] is False


def test_quantized_weights_have_all_their_names_where_the_model_does_not_tie_them(tmp_path: Path) -> None:
    offer = named(mlx.TARGET.offers, "4 bits g32")
    random = Random({"model.embed_tokens.weight": (8, 32)}, lambda name, role: offer, CONFIG)
    (outline,) = random.source.outlines
    outline = replace(outline, names=(outline.name, "lm_head.weight"))
    (file,) = mlx.write(replace(random.source, outlines=[outline]), tmp_path / "out")
    with safe_open(file, "numpy") as held:
        weights = [held.get_tensor(f"{module}.weight") for module in ("model.embed_tokens", "lm_head")]
    assert np.array_equal(*weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": (32, 80)}, "multiple of 64"),
        ({"shape": (2, 32, 64)}, r"a linear of shape \[2, 32, 64\] cannot be W4A16 g64 in compressed-tensors"),
        ({"role": "table"}, "a table of shape"),
        ({"name": "layers.0.attn.q_proj.kernel"}, "cannot be"),
    ],
)
def test_what_the_runtime_cannot_take_is_refused(change: dict[str, object], message: str, tmp_path: Path) -> None:
    outline = replace(Outline("layers.0.attn.q_proj.weight", (32, 64), "linear", W4, "bfloat16"), **change)
    source = replace(Random(llama_shapes(), choose).source, outlines=[outline])
    with pytest.raises(ConfigError, match=message):
        compressed_tensors.write(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_rows_that_words_do_not_fill_are_refused(tmp_path: Path) -> None:
    outline = Outline("layers.0.dense.weight", (40, 64), "linear", gptq.TARGET.offers[0], "bfloat16")
    source = replace(Random(llama_shapes(), choose).source, outlines=[outline])
    with pytest.raises(ConfigError, match="its rows of 32"):
        gptq.write(source, tmp_path / "out")


@pytest.mark.parametrize("odd", ["self_attn.k_proj", "mlp.up_proj"])
def test_weights_that_a_runtime_joins_must_be_alike(odd: str, tmp_path: Path) -> None:
    random = Random(llama_shapes(), lambda name, role: None if odd in name else choose(name, role))
    message = rf"layers.0.{odd}.weight: .*float.*W4A16 g64|layers.0.{odd}.weight: W4A16 g64 and float differ from"
    with pytest.raises(ConfigError, match=message):
        compressed_tensors.write(random.source, tmp_path / "out")


@pytest.mark.parametrize(
    ("config", "message"), [({}, "there is no config.json"), ({**CONFIG, "model_type": "gpt2"}, "transposed")]
)
def test_configurations_are_refused(config: dict[str, object], message: str, tmp_path: Path) -> None:
    random = Random(llama_shapes(), choose, config)
    with pytest.raises(ConfigError, match=message):
        compressed_tensors.write(random.source, tmp_path / "out")


@pytest.mark.parametrize("name", WRITERS)
def test_every_target_has_a_writer(name: str) -> None:
    assert TARGETS[name].name == name
    assert callable(writer_of(name))


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "gguf"])
def test_every_writer_says_for_which_runtime_it_refuses(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"every loader of {name} reads"):
        writer_of(name)(Random(llama_shapes(), choose, {}).source, tmp_path / "out")


def test_a_model_may_stay_in_float(tmp_path: Path) -> None:
    for name, write in (("a", compressed_tensors.write), ("b", gptq.write), ("c", mlx.write)):
        random = Random(llama_shapes(), lambda name, role: None)
        write(random.source, tmp_path / name)
        assert json.loads((tmp_path / name / "config.json").read_text()) == CONFIG


def test_types_are_found_where_configurations_have_them() -> None:
    found = [dtype_of(c) for c in ({}, {"torch_dtype": "torch.float16"}, {"text_config": {"dtype": "bfloat16"}})]
    assert found == ["float32", "float16", "bfloat16"]


def test_patterns_keep_models_apart() -> None:
    assert patterns(["encoder.layers.0.q", "decoder.layers.0.q", "decoder.layers.2.q"]) == [
        r"encoder\.layers\.0\.q$",
        r"decoder\.layers\.(0|2)\.q$",
    ]
