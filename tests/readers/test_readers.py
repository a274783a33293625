"""Readers of torch's files and of models in memory: they see what torch sees."""

import collections
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from pared.formats.dtypes import as_floats
from pared.readers.listing import Listing
from pared.readers.memory import list_model, list_state_dict
from tests.readers.torch_files import Net, listed, saved


def held(name: str, tensor: Tensor) -> tuple[str, str, tuple[int, ...], int]:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return name, dtype, tuple(tensor.shape), tensor.numel() * tensor.element_size()


def seen(listing: Listing) -> list[tuple[str, str, tuple[int, ...], int]]:
    return [(t.name, t.dtype, t.shape, t.nbytes) for t in listing.tensors]


TYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_state_dict_is_listed_as_torch_sees_it(protocol: int) -> None:
    state = Net().state_dict()
    assert seen(listed(saved(state, pickle_protocol=protocol))) == [held(k, v) for k, v in state.items()]


@pytest.mark.parametrize("dtype", TYPES)
def test_every_type_is_known(dtype: torch.dtype) -> None:
    tensor = torch.zeros(2, 3).to(dtype)
    assert seen(listed(saved({"a": tensor}))) == [held("a", tensor)]


@pytest.mark.parametrize("dtype", [t for t in TYPES if t is not torch.complex128])
def test_every_type_of_safetensors_is_known(dtype: torch.dtype) -> None:
    tensor = torch.zeros(2, 3).to(dtype)
    (found,) = listed(safetensors.torch.save({"a": tensor})).tensors
    assert seen(Listing((found,))) == [held("a", tensor)]


def bits_of(tensor: Tensor) -> Any:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("write", [saved, safetensors.torch.save])
def test_numbers_are_read_as_torch_has_them(dtype: torch.dtype, write: Callable[[dict[str, Tensor]], bytes]) -> None:
    if write is not saved and dtype is torch.complex128:
        pytest.skip("safetensors has no complex128")
    tensor = torch.tensor([[0, 1, 2], [3, 4, 5]]).to(dtype)
    listing = listed(write({"a": tensor}))
    array = listing.array(listing.tensors[0])
    assert array is not None
    assert array.shape == (2, 3)
    assert array.tobytes() == bits_of(tensor)


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.T,
        lambda t: t[1:, ::2],
        lambda t: t[:, :1].expand(4, 3),
        lambda t: t[0],
        lambda t: t[2, 3],
        lambda t: t[:0],
        lambda t: t.permute(1, 0).contiguous().T,
    ],
)
def test_numbers_of_views_are_read_as_torch_has_them(view: Callable[[Tensor], Tensor]) -> None:
    tensor = view(torch.arange(24.0).reshape(4, 6))
    listing = listed(saved({"a": tensor}))
    array = listing.array(listing.tensors[0])
    assert array is not None
    assert array.tolist() == tensor.tolist()


def test_what_holds_no_numbers_has_no_array() -> None:
    listing = listed(saved({"meta": torch.ones(3, device="meta")}))
    assert listing.array(listing.tensors[0]) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floats_are_widened_exactly(dtype: torch.dtype) -> None:
    tensor = torch.randn(100, dtype=torch.float64).to(dtype)
    listing = listed(saved({"a": tensor}))
    array = listing.array(listing.tensors[0])
    assert array is not None
    assert as_floats(array).tolist() == tensor.double().tolist()


def test_a_checkpoint_is_listed_with_paths() -> None:
    net = Net()
    optimizer = torch.optim.Adam(net.head.parameters())
    net.head(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    checkpoint = {
        "state_dict": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "history": [1.5, {"last": torch.ones(2)}],
        "args": {"lr": np.float32(0.1), "device": torch.device("cpu"), "shape": torch.Size([1]), "type": torch.float16},
        "version": torch.__version__,
        "counter": collections.Counter("ab"),
        7: torch.ones(1),
    }
    names = [t.name for t in listed(saved(checkpoint)).tensors]
    state = [f"state_dict/{name}" for name in net.state_dict()]
    adam = [f"optimizer/state/{i}/{key}" for i in range(2) for key in ("step", "exp_avg", "exp_avg_sq")]
    assert names == [*state, *adam, "history/1/last", "7"]


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions:UserWarning")  # old files hold them
def test_parameters_buffers_and_unusual_tensors_are_listed() -> None:
    marked = nn.Parameter(torch.ones(2))
    marked.note = "kept"  # type: ignore[attr-defined]  # any tensor takes attributes
    scales, zeros = torch.full((3,), 0.5), torch.zeros(3, dtype=torch.int64)
    found = listed(
        saved(
            {
                "parameter": nn.Parameter(torch.ones(2)),
                "marked": marked,
                "buffer": nn.Buffer(torch.ones(2)),
                "sparse": torch.eye(3).to_sparse(),
                "quantized": torch.quantize_per_channel(torch.ones(3, 2), scales, zeros, 0, torch.qint8),
                "meta": torch.ones(3, device="meta"),
                "scalar": torch.tensor(1.0),
                "empty": torch.empty(0, 3),
                "expanded": torch.ones(1).expand(5),
            }
        )
    )
    assert [(t.name, t.dtype, t.shape, t.storage is None) for t in found.tensors] == [
        ("parameter", "float32", (2,), False),
        ("marked", "float32", (2,), False),
        ("buffer", "float32", (2,), False),
        ("sparse/0", "sparse tensor", (2, 3), False),
        ("sparse/1", "sparse tensor", (3,), False),
        ("quantized", "qint8", (3, 2), False),
        ("quantized/1", "float64", (3,), False),
        ("quantized/2", "int64", (3,), False),
        ("meta", "float32", (3,), True),
        ("scalar", "float32", (), False),
        ("empty", "float32", (0, 3), False),
        ("expanded", "float32", (5,), False),
    ]


def test_shared_storages_are_seen() -> None:
    whole = torch.ones(4, 4)
    found = listed(saved({"whole": whole, "same": whole, "row": whole[1], "other": torch.ones(2)}))
    assert [t.storage for t in found.tensors] == ["0", "0", "0", "1"]
    assert {key: storage.nbytes for key, storage in found.storages.items()} == {"0": 64, "1": 8}


def test_a_model_in_memory_gives_its_numbers() -> None:
    net = Net()
    net.head.weight = nn.Parameter(torch.arange(8.0).reshape(4, 2).T)
    listing = list_model(net)
    state = net.state_dict()
    assert sorted(seen(listing)) == sorted(held(k, v) for k, v in state.items())
    for tensor in listing.tensors:
        array = listing.array(tensor)
        assert array is not None
        assert array.tolist() == state[tensor.name].tolist()


def test_tensors_in_memory_whose_numbers_are_computed_are_read() -> None:
    base = torch.arange(12.0).reshape(3, 4)
    complex_ = torch.complex(base, -base)
    state = {
        "base": base,
        "slice": base[1:, ::2],
        "conjugated": complex_.conj(),
        "negated": complex_.conj().imag,
        "sparse": torch.eye(3).to_sparse(),
        "empty": torch.ones(0, 3),
        "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
        "version": 3,
    }
    listing = list_state_dict(state)
    found = {tensor.name: listing.array(tensor) for tensor in listing.tensors}
    assert list(found) == list(state)[:-1]
    for name, array in found.items():
        tensor = state[name]
        assert isinstance(tensor, Tensor)
        assert array is not None
        assert array.tolist() == tensor.to_dense().tolist()
    assert listing.tensors[0].storage == listing.tensors[1].storage
    assert listing.tensors[1].offset == 16
