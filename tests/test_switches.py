"""What holds for the whole process is afterwards what it was, however many threads changed it at once."""

import gc
import logging
import random
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pared
from pared.files.memory_limit import MemoryLimit
from pared.files.pickles import read_pickle
from pared.runtime.graphs.capturing.capture import LOGGERS
from pared.switches import WITHOUT_FAST_PATHS, Switch, ignoring, quantized_engine, rare_collections

pytestmark = pytest.mark.slow

THREADS = 8


def process() -> dict[str, Any]:
    """Every setting of the process that something here might change."""
    return {
        "fast paths": torch.backends.mha.get_fastpath_enabled(),
        "engine": torch.backends.quantized.engine,
        "mkldnn": torch.backends.mkldnn.enabled,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "filters": list(warnings.filters),
        "showwarning": warnings.showwarning,
        "levels": {name: logging.getLogger(name).level for name in LOGGERS},
        "logging filters": {name: list(logging.getLogger(name).filters) for name in LOGGERS},
        "disabled": logging.root.manager.disable,
        "collections": gc.get_threshold(),
        "torch": torch.get_rng_state().tolist(),
        "numpy": str(np.random.get_state()),
        "random": random.getstate(),
        "exporting": torch.compiler.is_exporting(),
    }


@pytest.fixture
def unchanged() -> Iterator[None]:
    before = process()
    yield
    after = process()
    assert {name for name in before if before[name] != after[name]} == set()


def in_threads(work: Callable[[int], Any]) -> list[Any]:
    """The results of eight threads that begin at one moment."""
    barrier = threading.Barrier(THREADS)

    def begun(i: int) -> Any:
        barrier.wait()
        return work(i)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(begun, range(THREADS)))


class Blocks(nn.Module):
    """Everything that a switch is for: an encoder layer with a fast path, an LSTM with packed weights, dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.lstm = nn.LSTM(16, 16, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.encoder(x))[0])


MODEL, OTHER = Blocks(), Blocks()
with torch.no_grad():
    OTHER.head.weight.mul_(1.01)
DATA = [torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(i)) for i in range(2)]


def alike(found: Tensor, expected: Tensor) -> bool:
    """Equal up to rounding: while one thread captures, encoder layers take no fast path in the others either."""
    return torch.allclose(found, expected, rtol=0, atol=1e-6)


def small(model: nn.Module) -> nn.Module:
    conf = pared.PostTrainingQuantConfig(approach="dynamic", quant_level=0)
    return pared.fit(model, conf, DATA, quiet=True)


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(("tensors", "own", "inside"), [(10, 700, 700), (2_000, 700, 50_000), (2_000, 0, 0)])
def test_collections_are_rare_while_there_are_many_tensors(tensors: int, own: int, inside: int) -> None:
    before = gc.get_threshold()
    gc.set_threshold(own)  # 0: none
    try:
        with rare_collections(tensors):
            assert gc.get_threshold()[0] == inside
        assert gc.get_threshold()[0] == own
    finally:
        gc.set_threshold(*before)


@pytest.mark.usefixtures("unchanged")
def test_eight_threads_fit() -> None:
    expected = small(MODEL).state_dict()
    for found in in_threads(lambda _: small(MODEL).state_dict()):
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.usefixtures("unchanged")
def test_eight_threads_compare() -> None:
    expected = pared.compare(MODEL, OTHER, DATA).to_json()
    assert all(found == expected for found in in_threads(lambda _: pared.compare(MODEL, OTHER, DATA).to_json()))
    assert all(module.training for module in MODEL.modules())


@pytest.mark.usefixtures("unchanged")
def test_eight_threads_load_and_call_for_the_first_time(tmp_path: Path) -> None:
    path = pared.save(small(MODEL), tmp_path)
    (tmp_path / "engine.json").unlink()
    with torch.no_grad():
        expected = pared.load(path, model=MODEL)(DATA[0])
        loaded = pared.load(path, model=MODEL)

    def first_call(i: int) -> Tensor:
        model = loaded if i % 2 else pared.load(path, model=MODEL)
        with torch.no_grad():
            return model(DATA[0])

    assert all(torch.equal(found, expected) for found in in_threads(first_call))


@pytest.mark.usefixtures("unchanged")
def test_eight_threads_export_or_call_for_the_first_time(tmp_path: Path) -> None:
    """Captures of both kinds at once, which silence the same loggers."""
    path = pared.save(small(MODEL), tmp_path)
    with torch.no_grad():
        expected = pared.load(path, model=MODEL)(DATA[0])

    def work(i: int) -> bool:
        model = pared.load(path, model=MODEL)
        if i % 4 == 0:
            return "model.onnx" in str(pared.export(model, tmp_path / str(i), DATA[0]).path)
        with torch.no_grad():
            return alike(model(DATA[0]), expected)

    assert all(in_threads(work))


@pytest.mark.usefixtures("unchanged")
def test_overlapping_uses_leave_the_setting_as_it_was() -> None:
    """The first to enter leaves first: who remembers the setting alone puts back what the second found."""
    for order in ((0, 1), (1, 0)):
        inside = [ExitStack(), ExitStack()]
        for one in inside:
            one.enter_context(WITHOUT_FAST_PATHS)
        inside[order[0]].close()
        assert not torch.backends.mha.get_fastpath_enabled()
        inside[order[1]].close()
        assert torch.backends.mha.get_fastpath_enabled()


def test_a_switch_is_put_back_after_an_error() -> None:
    state = ["before"]
    switch = Switch(lambda: state[0], lambda value: state.__setitem__(0, value), "inside")

    def fails() -> None:
        with switch, switch:
            assert state == ["inside"]
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert state == ["before"]


@pytest.mark.usefixtures("unchanged")
def test_warnings_are_ignored_in_one_thread_only() -> None:
    with ignoring(UserWarning, "our"), ThreadPoolExecutor(1) as pool:
        warnings.warn("our own", UserWarning, stacklevel=1)
        with pytest.raises(UserWarning, match="other"):
            warnings.warn("other", UserWarning, stacklevel=1)
        with pytest.raises(UserWarning, match="our own"):
            pool.submit(warnings.warn, "our own", UserWarning).result()
    with pytest.raises(UserWarning, match="our own"):
        warnings.warn("our own", UserWarning, stacklevel=1)


@pytest.mark.usefixtures("unchanged")
def test_filters_that_somebody_else_catches_are_put_back() -> None:
    for first in (True, False):
        ours, theirs = ExitStack(), ExitStack()
        ours.enter_context(ignoring()) if first else theirs.enter_context(warnings.catch_warnings())
        theirs.enter_context(warnings.catch_warnings()) if first else ours.enter_context(ignoring())
        (ours if first else theirs).close()
        (theirs if first else ours).close()


@pytest.mark.usefixtures("unchanged")
def test_eight_threads_read_pickles_and_pack_weights() -> None:
    old = b"S'\\q'\n."  # an escape that Python deprecates

    def work(i: int) -> str:
        with quantized_engine(("onednn", "fbgemm")[i % 2]):
            assert torch.backends.quantized.engine == ("onednn", "fbgemm")[i % 2]
        return str(read_pickle(old, (), "file", MemoryLimit("file", 100)).root)

    assert set(in_threads(work)) == {"\\q"}


@pytest.mark.child
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted on Linux only")
def test_idle_threads_end_and_come_again() -> None:
    code = """
import os, torch
from pared.switches import end_idle_threads
torch.set_num_threads(3)
x = torch.ones(1_000_000)
def work():
    return float((x * 2).sum()), len(os.listdir("/proc/self/task"))
before = work()
end_idle_threads()
end_idle_threads()
without = len(os.listdir("/proc/self/task"))
print(before[0], work() == before, before[1] - without, torch.get_num_threads())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2000000.0", "True", "2", "3"]
