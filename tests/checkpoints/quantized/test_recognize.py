"""What other tools have quantized is recognized, kept bit for bit, and said to be."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from typer.testing import CliRunner

import pared
from pared import readers
from pared.checkpoints import compress
from pared.checkpoints.quantized.recognize import recognize
from pared.cli import app
from pared.errors import ConfigError

State = dict[str, Tensor]


def drawn(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))) * 0.01).to(dtype)


def codes(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    info = torch.iinfo(dtype)
    chance = torch.Generator().manual_seed(1)
    return torch.randint(info.min, info.max, shape, dtype=dtype, generator=chance)


def floats() -> State:
    """What quantizers leave in float."""
    return {
        "model.embed_tokens.weight": drawn(200, 96, dtype=torch.bfloat16),
        "model.norm.weight": torch.full((96,), -0.0),
        "lm_head.bias": drawn(200, dtype=torch.float32),
    }


L = "model.layers.0.mlp.down_proj"
SCALES = {f"{L}.scales": drawn(4, 96)}
PACKED = {f"{L}.qweight": codes(64, 96), f"{L}.qzeros": codes(4, 12)}
BYTES: State = {f"{L}.weight": codes(96, 64, dtype=torch.int8)}

# What each tool stores for a weight, and the name that the summary gives it.
TOOLS: dict[str, tuple[State, str]] = {
    "GPTQ": (PACKED | SCALES | {f"{L}.g_idx": torch.arange(512, dtype=torch.int32)}, "GPTQ"),
    "AWQ": (PACKED | SCALES, "AWQ"),
    "bitsandbytes in 4 bits": (
        {
            f"{L}.weight": codes(3072, 1, dtype=torch.uint8),
            f"{L}.weight.absmax": codes(96, dtype=torch.uint8),
            f"{L}.weight.quant_map": drawn(16, dtype=torch.float32),
            f"{L}.weight.nested_absmax": drawn(1, dtype=torch.float32),
            f"{L}.weight.nested_quant_map": drawn(256, dtype=torch.float32),
            f"{L}.weight.quant_state.bitsandbytes__nf4": codes(80, dtype=torch.uint8),
        },
        "bitsandbytes, 4 bits",
    ),
    "bitsandbytes in 8 bits": (BYTES | {f"{L}.SCB": drawn(96, dtype=torch.float32)}, "bitsandbytes, 8 bits"),
    "compressed-tensors": (
        {
            f"{L}.weight_packed": codes(96, 12),
            f"{L}.weight_scale": drawn(96, 4, dtype=torch.bfloat16),
            f"{L}.weight_shape": torch.tensor([96, 96]),
        },
        "compressed-tensors",
    ),
    "int8 with a scale": (BYTES | {f"{L}.weight_scale": drawn(96, 1)}, "codes with scales"),
    "HQQ": (
        {f"{L}.W_q": codes(48, 96, dtype=torch.uint8), f"{L}.scale": drawn(96, 1), f"{L}.zero": drawn(96, 1)},
        "HQQ",
    ),
    "EETQ": (BYTES | {f"{L}.weight_scales": drawn(64)}, "EETQ"),
    "MXFP4": (
        {
            "mlp.experts.gate_up_proj_blocks": codes(4, 96, 3, 16, dtype=torch.uint8),
            "mlp.experts.gate_up_proj_scales": codes(4, 96, 3, dtype=torch.uint8),
        },
        "MXFP4",
    ),
    "torchao": (
        {f"{L}._weight_qdata": codes(96, 64, dtype=torch.int8), f"{L}._weight_scale": drawn(96)},
        "torchao",
    ),
    "quanto": ({f"{L}.weight._data": codes(96, 64, dtype=torch.int8), f"{L}.weight._scale": drawn(96, 1)}, "quanto"),
    "AQLM": ({f"{L}.codes": codes(12, 96, 1, dtype=torch.int16), f"{L}.codebooks": drawn(1, 512, 1, 8)}, "AQLM"),
    "QDQ": ({"w_quantized": codes(96, 64, dtype=torch.int8), "w_scale": drawn(96)}, "ONNX in integers"),
    "pared's own state dict": (BYTES | {f"{L}.weight_step": drawn(96, dtype=torch.float32)}, "pared"),
}


def same(one: State, other: State) -> bool:
    """Bit for bit, so that -0 is not 0."""
    return one.keys() == other.keys() and all(
        (a.dtype, a.shape) == (b.dtype, b.shape) and a.numpy(force=True).tobytes() == b.numpy(force=True).tobytes()
        if a.dtype is not torch.bfloat16
        else torch.equal(a.view(torch.int16), b.view(torch.int16))
        for a, b in ((one[name], other[name]) for name in one)
    )


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("tool", TOOLS)
def test_nothing_of_it_is_rounded(tool: str, bits: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = floats() | TOOLS[tool][0]
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    done = compress.run(tmp_path / "model.safetensors", tmp_path / "small", bits=bits, quiet=True)
    said = [line for line in str(done).splitlines() if line.startswith("nothing was rounded: ")]
    assert len(said) == 1
    assert f"quantized already ({TOOLS[tool][1]}: " in said[0]
    assert "nothing of it is rounded" in caplog.text
    pared.expand(tmp_path / "small", tmp_path / "back.safetensors")
    assert same(safetensors.torch.load_file(tmp_path / "back.safetensors"), state)


@pytest.mark.parametrize("tool", TOOLS)
def test_it_is_a_finding_with_its_remedy(tool: str, tmp_path: Path) -> None:
    safetensors.torch.save_file(floats() | TOOLS[tool][0], tmp_path / "model.safetensors")
    for depth in ("quick", "deep"):
        (finding,) = pared.inspect(tmp_path / "model.safetensors", depth=depth).findings
        assert finding.kind == "quantized-already"
        assert TOOLS[tool][1] in finding.evidence
        assert "before any tool quantized it" in finding.remedy
        assert finding.names[0] in TOOLS[tool][0]


# The tools that store several codes in one number.
PACKING = {"GPTQ", "AWQ", "bitsandbytes in 4 bits", "compressed-tensors", "HQQ", "MXFP4", "AQLM"}


@pytest.mark.parametrize("tool", TOOLS)
def test_packed_codes_do_not_count_as_weights(tool: str, tmp_path: Path) -> None:
    state = floats() | TOOLS[tool][0]
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    found = pared.inspect(tmp_path / "model.safetensors", depth="quick")
    assert found.unit == ("stored number" if tool in PACKING else "weight")
    bits = 8 * found.nbytes / sum(one.numel() for one in state.values())
    said = f"{found.nbytes:,} bytes, {bits:.2f} bits per {found.unit}"
    assert said in found.render().splitlines()
    assert ("may hold several weights" in found.render()) == (tool in PACKING)


CONFIGS: dict[str, tuple[str, Any, str]] = {
    "GPTQ": ("config.json", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "GPTQ, 4 bits"),
    "bitsandbytes": (
        "config.json",
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        "bitsandbytes, 8 bits",
    ),
    "in a part": ("config.json", {"text_config": {"quantization_config": {"quant_method": "hqq"}}}, "HQQ"),
    "compression_config": (
        "config.json",
        {"compression_config": {"quant_method": "compressed-tensors"}},
        "compressed-",
    ),
    "a method of tomorrow": ("config.json", {"quantization_config": {"quant_method": "newq"}}, "newq"),
    "AutoGPTQ": ("quantize_config.json", {"bits": 3, "group_size": 128}, "3 bits"),
    "ModelOpt": ("hf_quant_config.json", {"quantization": {"quant_algo": "FP8"}}, "FP8"),
    "MLX": ("config.json", {"quantization": {"group_size": 64, "bits": 4}}, "4 bits"),
}


@pytest.mark.parametrize("config", CONFIGS)
def test_a_configuration_says_it(config: str, tmp_path: Path) -> None:
    name, content, label = CONFIGS[config]
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / name).write_text(json.dumps(content))
    safetensors.torch.save_file(floats(), tmp_path / "hf" / "model.safetensors")
    done = compress.run(tmp_path / "hf", tmp_path / "small", bits=4, quiet=True)
    assert label in done.about
    assert f": {name})" in done.about
    pared.expand(tmp_path / "small", tmp_path / "back")
    assert same(safetensors.torch.load_file(tmp_path / "back" / "model.safetensors"), floats())
    assert [finding.kind for finding in pared.inspect(tmp_path / "hf").findings] == ["quantized-already"]


NOTHING: dict[str, str] = {
    "no quantization": json.dumps({"model_type": "bert", "quantization_config": None}),
    "an empty one": json.dumps({"quantization_config": {}}),
    "a list": "[1, 2]",
    "no JSON": "{",
    "nested without end": "[" * 100_000,
    "keys that are numbers elsewhere": json.dumps({"quantization_config": {"bits": "4"}}),
}


@pytest.mark.parametrize("config", NOTHING)
def test_other_configurations_say_nothing(config: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(NOTHING[config])
    safetensors.torch.save_file(floats(), tmp_path / "model.safetensors")
    with readers.open_listing(tmp_path) as listing:
        assert recognize(listing) is None


def test_a_configuration_outside_of_the_folder_is_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "elsewhere.json").write_text(json.dumps({"quantization_config": {"quant_method": "a secret"}}))
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").symlink_to(tmp_path / "elsewhere.json")
    safetensors.torch.save_file(floats(), tmp_path / "hf" / "model.safetensors")
    with readers.open_listing(tmp_path / "hf") as listing:
        assert recognize(listing) is None
    assert "config.json is not read: a link that leads out of the folder" in caplog.text


def test_a_configuration_among_the_blobs_of_a_cache_is_read(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1234", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "c").write_text(json.dumps({"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    safetensors.torch.save_file(floats(), blobs / "m")
    for name, blob in (("config.json", "c"), ("model.safetensors", "m")):
        (snapshot / name).symlink_to(f"../../blobs/{blob}")
    with readers.open_listing(snapshot) as listing:
        found = recognize(listing)
    assert found is not None
    assert found.label == "GPTQ, 4 bits"


FLOAT_MODELS: dict[str, Callable[[], State]] = {
    "a table of indexes beside a scale": lambda: {
        "attn.relative_position_index": codes(49, 49),
        "attn.logit_scale": drawn(4, 1, 1),
        "attn.weight": drawn(64, 64),
    },
    "counts and masks": lambda: {
        "bn.weight": drawn(64),
        "bn.num_batches_tracked": torch.tensor(3),
        "bn.scale": drawn(1),
        "causal_mask": torch.ones(64, 64, dtype=torch.bool),
        "position_ids": torch.arange(512)[None],
    },
    "weights of fake quantization": lambda: {
        "fc.weight": drawn(64, 64),
        "fc.weight_fake_quant.scale": drawn(64),
        "fc.weight_fake_quant.zero_point": torch.zeros(64, dtype=torch.int32),
    },
}


@pytest.mark.parametrize("model", FLOAT_MODELS)
def test_a_float_model_is_not_taken_for_one(model: str, tmp_path: Path) -> None:
    safetensors.torch.save_file(FLOAT_MODELS[model](), tmp_path / "model.safetensors")
    with readers.open_listing(tmp_path / "model.safetensors") as listing:
        assert recognize(listing) is None


@pytest.mark.parametrize("scale", ["weight_scale_inv", "weight_scale", "other"])
def test_what_an_artifact_cannot_hold_is_told(scale: str, tmp_path: Path) -> None:
    state = {"l.weight": drawn(64, 64).to(torch.float8_e4m3fn), f"l.{scale}": drawn(1, 1, dtype=torch.float32)}
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"cannot hold: it is quantized already \(FP8: l.weight is float8_e4m3fn\)"):
        pared.compress(tmp_path / "model.safetensors", tmp_path / "small")
    assert [finding.kind for finding in pared.inspect(tmp_path / "model.safetensors").findings] == ["quantized-already"]


def test_a_size_cannot_be_met_by_rounding(tmp_path: Path) -> None:
    safetensors.torch.save_file(floats() | TOOLS["GPTQ"][0], tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"max_size: 20,000 bytes are too few: nothing may be rounded.*GPTQ"):
        pared.compress(tmp_path / "model.safetensors", tmp_path / "small", max_size=20_000)
    assert pared.compress(tmp_path / "model.safetensors", tmp_path / "small", max_size="1MB").is_file()


def test_the_command_says_it_in_a_line(tmp_path: Path) -> None:
    safetensors.torch.save_file(floats() | TOOLS["AWQ"][0], tmp_path / "model.safetensors")
    found = CliRunner().invoke(app, ["compress", str(tmp_path / "model.safetensors"), "-o", str(tmp_path / "small")])
    assert "nothing was rounded: it is quantized already (AWQ: " in found.output
