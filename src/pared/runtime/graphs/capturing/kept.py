"""Captured graphs that outlive a process: a capture takes a second or two, and reading one a tenth of that.

They stand in the user's own folder for caches, not beside an artifact, since they are read with pickle: an artifact may
come from anyone. `PARED_CACHE` names another folder, and nothing is kept if it is empty.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

import platformdirs
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx._graph_pickler import GraphPickler, Options
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from pared.errors import reason_of
from pared.files.disk import write_atomic
from pared.runtime.graphs.call_kinds import Argument
from pared.runtime.graphs.capturing.capture import Captured, capture, module_of
from pared.runtime.graphs.capturing.identity import key_of
from pared.runtime.graphs.capturing.outputs import Outputs
from pared.switches import ignoring

log = logging.getLogger(__name__)

_FOLDER: Final = "PARED_CACHE"
_MOST: Final = 200  # graphs, of some 0.2 MB each; the oldest go
Ones = tuple[bool, ...]
_META: Final = ("val", "tensor_meta")  # what is known of a node that anyone asks for, besides its module


class Checks:
    """The calls for which a graph gave what the modules give, by which of their dimensions have size 1.

    Args:
        file: where they are kept for later processes; None: nowhere.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self._known: set[Ones] = set()
        with contextlib.suppress(OSError, ValueError, TypeError):  # without them, calls are compared again
            if file is not None and file.is_file() and is_own(file):
                self._known = {tuple(map(bool, one)) for one in json.loads(file.read_bytes())}

    def __contains__(self, ones: Ones) -> bool:
        return ones in self._known

    def add(self, ones: Ones) -> None:
        """Note that the graph is right for such calls."""
        self._known.add(ones)
        if self._file is not None:
            try:
                write_own(self._file, json.dumps(sorted(self._known)).encode(), _MOST)
            except OSError as error:
                log.info("what was compared is not kept in %s: %s", self._file.parent, reason_of(error))


def captured(model: nn.Module, arguments: Sequence[Argument], slow: list[str] | None = None) -> Captured:
    """`capture`, or what it gave for this architecture, its code and such a call in an earlier process.

    Args and errors are those of `capture`.
    """
    file = _file_of(model, arguments)
    found = None if file is None else _read(file)
    if found is None:
        found = capture(model, arguments, slow)
        if file is not None:
            _keep(file, found)
    return found


def folder() -> Path | None:
    """Where what outlives a process is kept; None if nothing is."""
    named = os.environ.get(_FOLDER, platformdirs.user_cache_dir("pared"))
    return Path(named) if named else None


def _file_of(model: nn.Module, arguments: Sequence[Argument]) -> Path | None:
    """Where the graph of a call is kept; None if it is not."""
    place = folder()
    if place is None:
        return None
    try:
        return place / f"{key_of(model, arguments)}.graph"
    except Exception as error:  # noqa: BLE001  # whatever the model's own objects raise, the call can be captured
        log.debug("a graph is not kept: %s", reason_of(error))
        return None


def _read(file: Path) -> Captured | None:
    """The graph in a file; None if there is none, or none that can be read."""
    try:
        if not file.is_file() or not is_own(file):
            return None
        with ignoring():  # torch's warning about its own classes
            data = pickle.loads(file.read_bytes())  # this user's own: see `is_own`
        module: Any = GraphPickler.loads(data.pop("graph"), FakeTensorMode(shape_env=ShapeEnv()))
        graph = module.graph
        owners = data.pop("owners")
        if not isinstance(data["outputs"], Outputs):
            raise TypeError("an earlier version wrote it in another form")
        for node in graph.nodes:
            node.meta["nn_module_stack"] = {"": (f"model.{owners[node.name]}", "")}
        with contextlib.suppress(OSError):  # a folder may be there to be read only
            os.utime(file)  # the oldest go first
        return Captured(graph, **data)
    except Exception as error:  # noqa: BLE001  # whatever an old or damaged file raises, the call is captured again
        log.info("%s cannot be read (%s): the call is captured again", file, reason_of(error))
        return None


def is_own(file: Path) -> bool:
    """Whether nobody but this user can have written a file."""
    if not hasattr(os, "getuid"):
        return True  # the folder is in the user's profile
    return all(seen.st_uid == os.getuid() and not seen.st_mode & 0o022 for seen in (file.stat(), file.parent.stat()))


def _keep(file: Path, found: Captured) -> None:
    """Write a graph, if that is possible."""
    try:
        data = {one.name: getattr(found, one.name) for one in fields(found) if one.name != "graph"}
        data["graph"] = GraphPickler.dumps(_bare(found.graph), Options(ops_filter=None))
        data["owners"] = {node.name: module_of(node) for node in found.graph.nodes}  # which torch leaves out
        write_own(file, pickle.dumps(data), _MOST)
    except Exception as error:  # noqa: BLE001  # whatever it is, the graph was captured
        log.info("a graph is not kept in %s: %s", file.parent, reason_of(error))


def write_own(file: Path, data: bytes, most: int) -> None:
    """Write a file that only this user reads and writes, and let the oldest of its kind go where there are too many."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomic(file, lambda stream: stream.write(data))
    file.chmod(0o600)  # where a user's group may write to what the user writes, it could not be read: see `is_own`
    kept = sorted(file.parent.glob(f"*{file.suffix}"), key=lambda one: one.stat().st_mtime)
    for old in kept[:-most]:
        old.unlink(missing_ok=True)


def _bare(graph: fx.Graph) -> fx.GraphModule:
    """A copy of a graph with what is asked for, and nothing else, such as where in the source a node was called."""
    made, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    made.output(made.graph_copy(graph, copies))
    for node, copy in copies.items():
        copy.meta = {name: node.meta[name] for name in _META if name in node.meta}
    return fx.GraphModule(nn.Module(), made)
