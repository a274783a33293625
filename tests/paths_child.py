"""Every verb at paths that may not be read or written: for `test_paths.py`, in a process that is not root."""

import contextlib
import logging
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import pared
from pared.errors import ConfigError, FileError, ParedError
from tests.test_paths import COMMANDS, READS, SMALL, WRITES, net

_NOBODY = 65534


def main(directory: str) -> None:
    """Print each verb that raises nothing, or anything that is not an error of ours; then "done"."""
    logging.disable()
    base = Path(directory)
    places = prepared(base)
    warm_up(base)
    if os.getuid() == 0:
        for folder in (base, base / "free"):
            folder.chmod(0o777)
        os.setgid(_NOBODY)
        os.setuid(_NOBODY)
    for verb, call in (READS | COMMANDS).items():
        for name, path in places.items():
            attempt(verb, name, partial(call, path, base / "free"))
    for verb, call in WRITES.items():
        for name in ("closed", "in a closed folder", "of another"):
            attempt(verb, name, partial(call, places[name], base / "free"))
    sys.stdout.write("done\n")


def prepared(base: Path) -> dict[str, Path]:
    """Paths below folders and files that only their owner may open."""
    (base / "free").mkdir()
    for name in ("closed", "of another", "listed", "inner"):
        pared.save(SMALL, base / name)
        torch.save(net().state_dict(), base / name / "weights.pt")
    shutil.copytree(base / "of another", base / "inner" / "closed")
    (base / "inner" / "best_model.pt").unlink()
    (base / "inner" / "closed").chmod(0)
    (base / "closed").chmod(0)
    (base / "listed").chmod(0o444)  # what is in it has names, and cannot be reached
    (base / "of another").chmod(0o555)
    for file in (base / "of another").iterdir():
        file.chmod(0)
    return {
        "closed": base / "closed",
        "in a closed folder": base / "closed" / "best_model.pt",
        "of another": base / "of another",
        "a file of another": base / "of another" / "best_model.pt",
        "only listed": base / "listed",
        "a folder within is closed": base / "inner",
    }


def warm_up(base: Path) -> None:
    """Import what the verbs need: somebody who is not root may be unable to read the packages."""
    place = base / "warm"
    pared.save(SMALL, place)
    for call in (READS | WRITES | COMMANDS).values():
        with contextlib.suppress(ParedError, OSError, SystemExit):
            call(place, base / "warm" / "free")
    shutil.rmtree(place)


def attempt(verb: str, name: str, call: Callable[[], object]) -> None:
    try:
        call()
    except (FileError, ConfigError):
        return
    except SystemExit as stop:  # of a command whose library has refused the path
        if stop.code != 2:
            sys.stdout.write(f"{verb}, {name}: exit status {stop.code}\n")
        return
    except BaseException as error:  # noqa: BLE001  # whatever it is, it is printed
        sys.stdout.write(f"{verb}, {name}: {error!r}\n")
        return
    sys.stdout.write(f"{verb}, {name}: no error\n")
