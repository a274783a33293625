"""Every verb that writes, where no file can grow: for `test_paths.py`, in a process of its own."""

import contextlib
import io
import logging
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import pared
from pared.cli import app
from pared.errors import FileError

_MOST = 2048  # bytes of a file, less than what is written, except
_SMALL = (".pared-compress", "baseline.json", "corrections.json", "fingerprint.json", "curve.json")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 64)).eval()


def score(_: nn.Module) -> float:
    return 1.0


X = [torch.ones(4, 128)]


def main(directory: str) -> None:
    """Print each verb that raises no FileError, or changes what is there; then "done"."""
    logging.disable()
    base = Path(directory)
    small = pared.fit(net(), quiet=True)
    torch.save(net().state_dict(), base / "source.pt")
    artifact = pared.save(small, base / "artifact")
    curve = ["fit", f"{__name__}:net", "--calib", f"{__name__}:X", "--curve", "-q"]
    verbs: dict[str, Callable[[Path], object]] = {
        "save": lambda place: pared.save(small, place),
        "save as safetensors": lambda place: pared.save(small, place, container="safetensors"),
        "export": lambda place: pared.export(small, place, X[0]),
        "compress": lambda place: pared.compress(base / "source.pt", place),
        "expand": lambda place: pared.expand(artifact, place),
        "expand to a file": lambda place: pared.expand(artifact, place / "model.safetensors"),
        "report": lambda place: pared.report(small, html=place / "report.html"),
        "workspace": lambda place: pared.fit(net(), None, X, score, workspace=place, quiet=True),
        "inspect": lambda place: command("inspect", str(base / "source.pt"), "--html", str(place / "page.html")),
        "curve": lambda place: command(*curve, "-o", str(place)),
    }
    for verb in verbs.values():  # import what they need, and write what is there before
        verb(base / "before")
    places = {name: base / name for name in verbs}
    for name, verb in verbs.items():
        verb(places[name])
        if name == "workspace":  # of which a trial is still to be written
            (places[name] / "trials.jsonl").unlink()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    for name, verb in verbs.items():
        before = contents(places[name])
        resource.setrlimit(resource.RLIMIT_FSIZE, (_MOST, most))
        try:
            verb(places[name])
            found = "no error"
        except FileError as error:
            found = "" if "cannot be written: File too large" in error.what else repr(error)
        except BaseException as error:  # noqa: BLE001  # whatever it is, it is printed
            found = repr(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        changed = sorted(path for path, content in contents(places[name]).items() if before.get(path) != content)
        changed += sorted(before.keys() - contents(places[name]).keys())
        changed = [path for path in changed if not path.startswith(_SMALL)]
        if found or changed:
            sys.stdout.write(f"{name}: {found} {changed}\n")
    sys.stdout.write("done\n")


def command(*words: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        app(list(words), standalone_mode=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
