"""What is known of caches and outputs of transformers: enough to make others like them."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from pared.runtime.graphs.containers import Layout, container_of, layout_from, renewed
from tests.runtime.generators import quantized

pytestmark = [pytest.mark.slow, pytest.mark.engine]


@pytest.mark.parametrize("what", ["sliding", "offloaded"])
def test_caches_that_do_more_are_not_known(what: str) -> None:
    config = quantized("llama").config
    if what == "sliding":
        config = copy.deepcopy(config)
        config.sliding_window, config.layer_types = 4, ["sliding_attention"] * 2
    found = DynamicCache(config=config)
    found.offloading = what == "offloaded"
    assert container_of(found) is None


@pytest.mark.parametrize(
    "made",
    [
        lambda: DynamicCache(),
        lambda: DynamicCache([(torch.ones(1, 2, 3, 4), torch.zeros(1, 2, 3, 4))] * 2),
        lambda: DynamicCache(config=quantized("llama").config),
        lambda: EncoderDecoderCache(DynamicCache(), DynamicCache()),
        lambda: BaseModelOutput(torch.ones(1, 2), attentions=None),
    ],
    ids=["new", "filled", "of a model", "pair", "output"],
)
def test_what_is_known_of_an_object_makes_another_like_it(made: Callable[[], Any]) -> None:
    held = container_of(made())
    assert held is not None
    assert layout_from(str(held.layout)) == held.layout
    again = container_of(held.layout.made(list(held.tensors.values())))
    assert again is not None
    assert again.layout == held.layout
    assert all(again.tensors[name] is tensor for name, tensor in held.tensors.items())
    if held.is_cache:
        assert renewed(held.held) is not held.held


@pytest.mark.parametrize("text", ["DynamicCache", "DynamicCache(-1)", "DynamicCache(1001)", "a.b(c)", "A(b, b)", "A()"])
def test_other_texts_are_no_layout(text: str) -> None:
    assert layout_from(text) is None


@pytest.mark.parametrize("name", ["ModelOutput", "OrderedDict", "dataclass", "torch", "Nothing"])
def test_only_outputs_are_made_by_name(name: str) -> None:
    with pytest.raises((LookupError, TypeError)):
        Layout(output=name, fields=("x",)).made([torch.ones(1)])
