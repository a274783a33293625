"""The oldest Python that is declared can read every file and has every name of the standard library that is used."""

import ast
import builtins
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from mypy import api

import pared

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SOURCE = Path(pared.__file__).parent
_DECLARED = re.search(r'requires-python = ">=3\.(\d+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
assert _DECLARED is not None
FLOOR = (3, int(_DECLARED[1]))
BUILTINS = set(dir(builtins))


def uses(tree: ast.AST) -> Iterator[str]:
    """A statement for each name of the standard library, and each builtin, that a file uses."""
    modules: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] in sys.stdlib_module_names:
                    yield f"import {alias.name}"
                    modules[alias.asname or alias.name.partition(".")[0]] = alias.name
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in sys.stdlib_module_names:
            for alias in node.names:
                yield f"from {node.module} import {alias.name}"
        elif isinstance(node, ast.Name) and node.id in BUILTINS:
            yield node.id
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            yield f"import {modules[node.value.id]}; {modules[node.value.id]}.{node.attr}"


def complaints(statements: set[str], folder: Path) -> str:
    """What a type checker says of the statements in the oldest Python."""
    file = folder / "names.py"
    file.write_text("\n".join(sorted(statements)), encoding="utf-8")
    version = ".".join(map(str, FLOOR))
    settings = ["--config-file=", f"--python-version={version}", "--platform=linux", f"--cache-dir={folder / 'cache'}"]
    found, errors, _ = api.run([*settings, "--no-site-packages", "--hide-error-context", "--no-pretty", str(file)])
    assert errors == ""
    return found


def test_the_oldest_python_can_parse_every_file() -> None:
    for path in SOURCE.rglob("*.py"):
        ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=FLOOR)


def test_the_oldest_python_has_every_name(tmp_path: Path) -> None:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in SOURCE.rglob("*.py")]
    found = complaints({use for tree in trees for use in uses(tree)}, tmp_path)
    assert found.startswith("Success"), found


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("from typing import Any, Self", '"Self"'),
        ("import tomllib", '"tomllib"'),
        ("import enum\nclass A(enum.StrEnum): ...", '"StrEnum"'),
        ("from datetime import UTC", '"UTC"'),
        ("import datetime as d\nd.UTC", '"UTC"'),
        ("raise ExceptionGroup('', [])", '"ExceptionGroup"'),
        ("import itertools\nitertools.batched([], 2)", '"batched"'),
    ],
)
def test_what_is_newer_would_be_found(code: str, name: str, tmp_path: Path) -> None:
    found = complaints(set(uses(ast.parse(code))), tmp_path)
    assert name in found


def test_newer_grammar_would_be_found() -> None:
    with pytest.raises(SyntaxError):
        ast.parse("try: ...\nexcept* ValueError: ...", feature_version=FLOOR)
