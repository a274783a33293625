from __future__ import annotations

import pytest

from pared.checkpoints.runtimes.roles import Weight, role_of
from pared.checkpoints.selection import Kept
from pared.readers.listing import ListedTensor


def kept(*names: str, shape: tuple[int, ...] = (64, 32), dtype: str = "bfloat16") -> Kept:
    return Kept(ListedTensor(names[0], dtype, shape, 2, "w"), names, "parameter")


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("model.layers.0.self_attn.q_proj.weight", "linear"),
        ("model.layers.11.mlp.experts.3.up_proj.weight", "linear"),
        ("model.layers.0.block_sparse_moe.gate.weight", "other"),
        ("model.layers.0.mlp.gate_proj.weight", "linear"),
        ("model.embed_tokens.weight", "table"),
        ("embeddings.word_embeddings.weight", "table"),
        ("embeddings.position_embeddings.weight", "other"),
        ("transformer.wpe.weight", "other"),
        ("transformer.wte.weight", "table"),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "other"),
        ("lm_head.weight", "head"),
        ("embed_out.weight", "head"),
        ("score.weight", "head"),
        ("pooler.dense.weight", "head"),
        ("model.layers.0.mixer.A_log", "other"),
    ],
)
def test_roles_are_told_by_names(name: str, role: str) -> None:
    assert role_of(kept(name)) == role


@pytest.mark.parametrize(("shape", "dtype"), [((64,), "bfloat16"), ((2, 3, 4), "float32"), ((4, 4), "int64")])
def test_only_matrices_of_floats_have_a_role(shape: tuple[int, ...], dtype: str) -> None:
    assert role_of(kept("layers.0.dense.weight", shape=shape, dtype=dtype)) == "other"


def test_a_tied_table_comes_first() -> None:
    weight = Weight(kept("lm_head.weight", "model.embed_tokens.weight"), "table")
    assert role_of(weight.kept) == "table"
    assert weight.names == ("model.embed_tokens.weight", "lm_head.weight")


def test_a_transposed_matrix_has_its_outputs_in_rows() -> None:
    assert Weight(kept("h.0.attn.c_attn.weight", shape=(8, 24)), "linear", transposed=True).matrix == (24, 8)
