"""The rooms of the house: who may import whom, and how large a room may be."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pared

SOURCE = Path(pared.__file__).parent

# A room imports only from itself and from the rooms that stand before it.
ROOMS = (
    *("version", "errors", "scalars", "switches", "terminal", "allocate", "files", "executors", "formats", "readers"),
    *(
        "artifact",
        "targets",
        "checkpoints",
        "model",
        "inspection",
        "runtime",
        "fitting",
        "evaluation",
        "cli",
        "__main__",
    ),
)
WITHOUT_TORCH = (*ROOMS[: ROOMS.index("model")], "inspection", "cli")
# In rooms that otherwise do without it.
WITH_TORCH = ("formats.coded", "formats.encoded.codes", "formats.groups.decoding", "inspection.comparison.divergence")

FILES = {path.relative_to(SOURCE).with_suffix("").as_posix().replace("/", "."): path for path in SOURCE.rglob("*.py")}


def imports(path: Path) -> Iterator[str]:
    """The modules of ours that a file imports: at its top, inside functions, or through `importlib`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            found = [ast.unparse(node.args[0]).strip("'\"")]
        else:
            continue
        names = [name.removeprefix("pared.") for name in found if name.startswith("pared.")]
        yield from (name for name in names if name in FILES or f"{name}.__init__" in FILES)


EDGES = [(name, target) for name, path in FILES.items() if name != "__init__" for target in imports(path)]


def test_rooms_look_down() -> None:
    place = {room: number for number, room in enumerate(ROOMS)}
    assert [f"{a} imports {b}" for a, b in EDGES if place[b.split(".")[0]] > place[a.split(".")[0]]] == []


def test_no_circles() -> None:
    folders = {name.rpartition(".")[0] for name in FILES} - {""}
    for folder in folders:
        depth = folder.count(".") + 2
        children: dict[str, set[str]] = {}
        for a, b in EDGES:
            if a.startswith(f"{folder}.") and b.startswith(f"{folder}."):
                one, other = (".".join(name.split(".")[:depth]) for name in (a, b))
                children.setdefault(one, set()).update({other} - {one})
        graphlib.TopologicalSorter(children).prepare()  # raises CycleError


def test_layers_are_looked_up_where_the_table_is_filled() -> None:
    assert [a for a, b in EDGES if b == "runtime.layers.registry" and not a.startswith("runtime.layers.")] == []


def test_rooms_are_small() -> None:
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in FILES.items()}
    assert {name: count for name, count in lines.items() if count > 400} == {}
    modules = {
        folder: [n for n in FILES if n.rpartition(".")[0] == folder] for folder in {n.rpartition(".")[0] for n in FILES}
    }
    sizes = {folder: sum(not name.endswith("__init__") for name in names) for folder, names in modules.items()}
    assert {folder: size for folder, size in sizes.items() if size > 8} == {}


@pytest.mark.child
def test_rooms_for_files_do_without_torch() -> None:
    names = [name for name in FILES if name.split(".")[0] in WITHOUT_TORCH and name not in WITH_TORCH]
    code = "".join(f"import pared.{name.removesuffix('.__init__')}\n" for name in names)
    subprocess.run([sys.executable, "-c", f"import sys\n{code}assert 'torch' not in sys.modules"], check=True)
