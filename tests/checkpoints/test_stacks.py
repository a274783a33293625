"""Weights of all experts in one tensor of a checkpoint: name and shape tell that it is a stack of matrices."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import pared
from pared.checkpoints.packing import Fineness, pack


@pytest.mark.parametrize(
    ("name", "shape", "rows"),
    [
        ("model.layers.0.mlp.experts.gate_up_proj", (4, 24, 16), (0, 1)),
        ("block_sparse_moe.input_linear.weight", (4, 24, 16), (0, 1)),
        ("attention.in_proj", (3, 64, 64), (0, 1)),
        ("layers.experts.w1", (2, 4, 24, 16), (0, 1, 2)),  # the layers are stacked, too
        ("conv1.weight", (24, 16, 3), (0,)),
        ("experts.0.conv.weight", (24, 16, 16), (0,)),
        ("encoder.pos_conv_embed.conv.weight_v", (64, 48, 128), (0,)),
        ("patch_embed.weight", (64, 3, 32, 32), (0,)),
        ("position_embeddings", (1, 50, 64), (0,)),
    ],
)
def test_rows_by_name_and_shape(name: str, shape: tuple[int, ...], rows: tuple[int, ...]) -> None:
    packed = pack(np.random.default_rng(0).standard_normal(shape, np.float32), Fineness(), name)
    assert packed.view is not None
    assert packed.view.rows == rows


def test_channels_of_uneven_scale_keep_their_precision(tmp_path: Path) -> None:
    scales = np.logspace(-3, 3, 4 * 24).reshape(4, 24, 1).astype(np.float32)
    weight = np.random.default_rng(0).standard_normal((4, 24, 16), np.float32) * scales
    save_file({"mlp.experts.down_proj": weight}, tmp_path / "model.safetensors")
    pared.compress(tmp_path / "model.safetensors", tmp_path / "small")
    pared.expand(tmp_path / "small", tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")["mlp.experts.down_proj"]
    assert np.abs((back - weight) / scales).max() < 0.02
