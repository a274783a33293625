"""The private names of torch that we use: each is listed here, and exists in the torch that is installed.

A release of torch may drop any of them without notice; this test says which.
"""

import ast
import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module
from torch.utils import _pytree
from transformers import PreTrainedModel

import pared
from pared.runtime.kernels import machine
from pared.runtime.kernels.fbgemm import recurrent

pytestmark = pytest.mark.slow

LSTM, MODULE, TENSOR, ATEN = nn.LSTM(1, 1), nn.Linear(1, 1), torch.ones(1), torch.ops.aten

# The names, and what has them.
NAMES: dict[str, object] = {
    "_cdata": torch.UntypedStorage(),
    "_getframe": sys,  # these two are of Python
    "_Pickler": pickle,
    "_set_grad_enabled": torch._C,
    **dict.fromkeys(("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"), MODULE),
    **dict.fromkeys(("_forward_hooks", "_forward_pre_hooks"), MODULE),
    **dict.fromkeys(("_state_dict_hooks", "_load_state_dict_pre_hooks"), MODULE),
    **dict.fromkeys(("_flat_weights", "_flat_weights_names", "_flat_weight_refs", "_init_flat_weights"), LSTM),
    **dict.fromkeys(("_version", "_make_wrapper_subclass"), TENSOR),
    **dict.fromkeys(("_C", "_ops", "_make_per_channel_quantized_tensor", "_weight_int8pack_mm"), torch),
    **dict.fromkeys(("_assert_tensor_metadata", "_native_batch_norm_legit_no_training", "_unsafe_view"), ATEN),
    **dict.fromkeys(("_assert_scalar", "_assert_async"), ATEN),
    "_init_weights": PreTrainedModel,  # of transformers
    "_functorch": torch._C,
    "maybe_current_level": torch._C._functorch,
    "DisableTorchFunctionSubclass": torch._C,
    "_current_level": forward_ad,
    "_has_any_global_hook": torch_module,
    **dict.fromkeys(("_schema", "_overloadname"), torch.ops.aten.relu.default),
}
NOT_ONLY_TORCHS = {"_modules", "_version", "_flat_weights"}  # names of ours as well, so the search leaves them out
PUBLIC_THERE = {"maybe_current_level", "DisableTorchFunctionSubclass"}  # in a private module
NAMED_IN_TEXT = {"_flat_weight_refs"}
OF_KERNELS = {"_reorder_convolution_weight"}  # missing from builds without oneDNN


def private_names() -> set[str]:
    """Attributes of objects that begin with an underscore and that no module of ours defines."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in Path(pared.__file__).parent.rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    ours = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    ours |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
    ours |= {
        node.attr
        for node in attributes
        if isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
    }
    found = {node.attr for node in attributes if node.attr.startswith("_") and not node.attr.startswith("__")}
    return found - ours


def test_every_private_name_of_torch_is_listed() -> None:
    assert private_names() - OF_KERNELS == set(NAMES) - NOT_ONLY_TORCHS - PUBLIC_THERE - NAMED_IN_TEXT


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_private_name_exists(name: str) -> None:
    assert hasattr(NAMES[name], name)


@pytest.mark.parametrize("name", ["TreeSpec", "tree_flatten", "tree_leaves", "tree_map", "tree_unflatten"])
def test_a_name_of_the_private_module_for_trees_exists(name: str) -> None:
    assert hasattr(_pytree, name)


@pytest.mark.skipif(machine.available() != "", reason=machine.available() or "the int8 kernels run here")
def test_the_kernels_operators_exist() -> None:
    assert [name for name in machine._OPERATORS if machine.operator_of("onednn", name) is None] == []
    assert machine.operator_of("onednn", "qlinear_pointwise", "binary") is not None
    assert machine.operator_of("mkldnn", "_convolution_pointwise") is not None
    assert machine.operator_of("mkldnn", "_reorder_convolution_weight") is not None


@pytest.mark.skipif(recurrent.available() != "", reason=recurrent.available() or "recurrent kernels run here")
def test_the_operators_of_recurrent_layers_exist() -> None:
    assert callable(torch.quantized_lstm)
    assert callable(torch.quantized_gru)
    assert machine.operator_of("quantized", "linear_prepack") is not None
    assert machine.operator_of("quantized", "make_quantized_cell_params_dynamic") is not None
