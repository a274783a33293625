"""Does the installed wheel work in an environment that has nothing else? `make dist` asks, without torch and with it.

This is not a part of the test suite: it runs the installed package, and imports nothing of this project.
"""

import importlib.util
import json
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

WEIGHT = np.random.default_rng(0).normal(size=(256, 512)).astype("<f4")
FACTORY = """
import torch

def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(512, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10)).eval()

def batches():
    return [torch.randn(16, 512)]
"""
COMMANDS = (
    ("compress", "model.safetensors", "-o", "small"),
    ("inspect", "model.safetensors"),
    ("inspect", "small"),
    ("expand", "small", "-o", "large.safetensors"),
    ("compare", "model.safetensors", "large.safetensors"),
)
FIT = ("fit", "factory:model", "--calib", "factory:batches", "-o", "fitted")


def write_safetensors(path: Path) -> None:
    """A checkpoint of one weight, written by hand: the package of that name is not installed."""
    entry = {"dtype": "F32", "shape": WEIGHT.shape, "data_offsets": [0, WEIGHT.nbytes]}
    header = json.dumps({"encoder.weight": entry}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + WEIGHT.tobytes())


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`pared ARGUMENTS` in a folder, by the command that the wheel installed; what it says is shown."""
    command = Path(sys.executable).with_name("pared")
    print("$ pared", *arguments, flush=True)
    done = subprocess.run([str(command), *arguments], cwd=folder, text=True, capture_output=True)
    print(done.stdout + done.stderr, flush=True)
    return done


def require(holds: bool, what: str) -> None:
    """End with an error unless what is required holds; unlike `assert`, under `python -O` too."""
    if not holds:
        raise SystemExit(f"smoke test: {what}")


def files(folder: Path) -> None:
    """The four verbs that read files."""
    write_safetensors(folder / "model.safetensors")
    for arguments in COMMANDS:
        require(run(folder, *arguments).returncode == 0, f"pared {arguments[0]} failed")
    small, large = (folder / name for name in ("small/best_model.pt", "large.safetensors"))
    require(small.stat().st_size < 0.3 * WEIGHT.nbytes, "the artifact is not smaller than 0.3 of the checkpoint")
    back = np.frombuffer(large.read_bytes()[-WEIGHT.nbytes :], "<f4").reshape(WEIGHT.shape)
    require(float(np.abs(back - WEIGHT).max()) < 0.03, "the weights that come back are not those that went in")


def without_torch(folder: Path) -> None:
    """`fit` says what to install."""
    done = run(folder, *FIT)
    require(done.returncode == 2, "fit without torch does not end with exit status 2")
    require("pip install 'pared[torch]'" in done.stderr, "fit without torch does not say what to install")
    require("Traceback" not in done.stderr, "fit without torch shows a traceback")


def with_torch(folder: Path) -> None:
    """A model is compressed on the command line and from Python; it loads, and gives what it gave before."""
    require(run(folder, *FIT).returncode == 0, "pared fit failed")
    code = """if True:
        import factory, pared, torch
        model, [x] = factory.model(), factory.batches()
        small = pared.fit(model, calib_dataloader=[x], quiet=True)
        pared.save(small, "saved")
        loaded = pared.load("saved", model=factory.model())
        torch.testing.assert_close(loaded(x), model(x), rtol=0.05, atol=0.05)
    """
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)


def main() -> None:
    """Run what can be run here."""
    torch = importlib.util.find_spec("torch") is not None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "factory.py").write_text(FACTORY, encoding="utf-8")
        files(folder)
        (with_torch if torch else without_torch)(folder)
    print(f"The installed pared works {'with' if torch else 'without'} torch.")


if __name__ == "__main__":
    main()
