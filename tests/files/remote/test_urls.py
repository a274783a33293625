"""What is read from a URL is copied here; what is written to one is sent when it is whole."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import pared
from pared.cli import app
from pared.errors import ConfigError, FileError, UnsafeError
from pared.files.remote import urls
from pared.files.remote.urls import fetched, output_at, source_at, url_of

fsspec = pytest.importorskip("fsspec")
from fsspec.implementations.memory import MemoryFileSystem  # noqa: E402  # it may not be installed

RNG = np.random.default_rng(0)
TENSORS = {"a.weight": RNG.standard_normal((64, 64), np.float32), "a.bias": RNG.standard_normal(64, np.float32)}


@pytest.fixture(autouse=True)
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An empty store of objects, and a place for copies."""
    monkeypatch.setenv("PARED_CACHE", str(tmp_path / "cache"))
    files = fsspec.filesystem("memory")
    yield files
    files.rm("/", recursive=True)


def model(files: Any, at: str = "/models/small") -> str:
    """A folder with a checkpoint, and a file beside it."""
    place = Path(urls._place("x")).parent / "made.safetensors"
    place.parent.mkdir(parents=True, exist_ok=True)
    save_file(TENSORS, place)
    files.pipe_file(f"{at}/model.safetensors", place.read_bytes())
    files.pipe_file(f"{at}/config.json", b'{"model_type": "llama"}')
    files.pipe_file(f"{at}/more/notes.txt", b"hello")
    return f"memory://{at.lstrip('/')}"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("s3://bucket/a b", "s3://bucket/a b"),
        (Path("s3://bucket/a"), "s3://bucket/a"),
        ("file:///tmp/nothing", "file:///tmp/nothing"),
        (Path("file:///tmp/nothing"), "file:///tmp/nothing"),
        ("models/a", None),
        ("C:/models", None),
        ("pkg.mod:factory", None),
        (3, None),
    ],
)
def test_what_a_url_is(given: object, expected: str | None) -> None:
    assert url_of(given) == expected


def test_a_path_that_exists_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s3:").mkdir()
    (tmp_path / "s3:" / "a").touch()
    assert source_at("s3:/a", "here") == Path("s3:/a")


def test_what_has_not_changed_is_copied_once(storage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    url = model(storage)
    copied: list[str] = []
    get_file = MemoryFileSystem.get_file

    def counted(self: Any, path: str, *rest: Any, **more: Any) -> Any:
        copied.append(path)
        return get_file(self, path, *rest, **more)

    monkeypatch.setattr(MemoryFileSystem, "get_file", counted)
    place = fetched(url)
    assert {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()} == {
        "model.safetensors",
        "config.json",
        "more/notes.txt",
    }
    assert len(copied) == 3
    assert fetched(url) == place
    assert len(copied) == 3
    storage.pipe_file("/models/small/config.json", b"{}")
    storage.rm_file("/models/small/more/notes.txt")
    assert (fetched(url) / "config.json").read_bytes() == b"{}"
    assert copied[3:] == ["/models/small/config.json"]
    assert not (place / "more/notes.txt").exists()
    assert urls.urls_of([place / "config.json"]) == {url}


def test_half_a_copy_is_none(storage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    url = model(storage)

    def cut(_self: Any, _path: str, local: str, **_: Any) -> None:
        Path(local).write_bytes(b"half")
        raise ConnectionResetError("the line is dead")

    with monkeypatch.context() as broken:
        broken.setattr(MemoryFileSystem, "get_file", cut)
        with pytest.raises(FileError, match=f"{url}: cannot be read: ConnectionResetError: the line is dead"):
            fetched(url)
    assert load_file(fetched(url) / "model.safetensors").keys() == TENSORS.keys()


def test_compress_and_expand(storage: Any, tmp_path: Path) -> None:
    url = model(storage)
    here = pared.compress(fetched(url), tmp_path / "here", bits=4)
    there = pared.compress(url, "memory://out/small", bits=4)
    assert str(there) == "memory:/out/small/best_model.pt"
    assert storage.cat_file("/out/small/best_model.pt") == here.read_bytes()
    assert {name.removeprefix("/out/small/") for name in storage.find("/out/small")} == {
        path.relative_to(here.parent).as_posix() for path in here.parent.rglob("*") if path.is_file()
    }
    assert not urls._place("memory://out/small").joinpath("out").exists()
    assert str(pared.expand(there, "memory://floats.safetensors")) == "memory:/floats.safetensors"
    assert storage.size("/floats.safetensors") > sum(one.nbytes for one in TENSORS.values())


def test_the_command_line(storage: Any, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["compress", model(storage), "-o", f"file://{tmp_path}/out/small"])
    assert done.exit_code == 0, done.output
    assert done.stdout.endswith(f"sent to file://{tmp_path}/out/small\n")
    assert (tmp_path / "out" / "small" / "best_model.pt").is_file()
    assert (tmp_path / "out" / "small" / "more" / "notes.txt").read_bytes() == b"hello"


def test_the_artifact_is_sent_last_and_nothing_stays_where_that_fails(
    storage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, sent = model(storage), []
    put_file = MemoryFileSystem.put_file

    def failing(self: Any, local: str, path: str, **more: Any) -> None:
        sent.append(path)
        put_file(self, local, path, **more)
        if path.endswith("best_model.pt"):
            raise PermissionError("AccessDenied")

    monkeypatch.setattr(MemoryFileSystem, "put_file", failing)
    with pytest.raises(
        FileError, match="was not sent: PermissionError: AccessDenied\n  What was written is in .*"
    ) as found:
        pared.compress(url, "memory://out")
    assert sent[-1] == "/out/best_model.pt"
    assert len(sent) == 2
    assert storage.find("/out") == []
    place = Path(found.value.remedy.split(" is in ")[1].split(": send")[0])
    assert (place / "best_model.pt").is_file()


def test_what_is_there_is_not_replaced(storage: Any) -> None:
    url = model(storage)
    with pytest.raises(FileError, match="memory://models/small: is not empty"):
        pared.compress(url, url)


def test_whether_it_can_be_written_is_known_before_the_work(storage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    url = model(storage)

    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError("AccessDenied")

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", denied)
    with (
        pytest.raises(FileError, match="memory://out: cannot be written: PermissionError: AccessDenied\n  Check"),
        output_at("memory://out", "here"),
    ):
        pytest.fail("work has begun")
    assert storage.find("/out") == []
    assert url


@pytest.mark.parametrize("name", ["memory://nothing/here", "file:///nothing/here"])
def test_nothing_there(name: str) -> None:
    with pytest.raises(FileError, match=f"{name}: is not there"):
        pared.compress(name, "out")


def test_an_unknown_protocol() -> None:
    with pytest.raises(ConfigError, match="abc://x: cannot be opened: ValueError: Protocol not known: abc"):
        pared.compress("abc://x", "out")


def test_a_protocol_whose_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ConfigError, match=r"s3://bucket/x: cannot be opened: .*s3fs.*\n  Install the package"):
        pared.compress("s3://bucket/x", "out")


def test_without_fsspec(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ConfigError, match=r"is a URL, for which a package is missing .*\n .* 'pared\[remote\]'"):
        pared.compress("s3://bucket/x", "out")


def test_no_space(storage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        free = 10

    url = model(storage)
    monkeypatch.setattr("shutil.disk_usage", lambda _: Full)
    with pytest.raises(FileError, match="takes .* bytes, and 10 are free .*\n  Free space, or name another folder"):
        fetched(url)


def test_names_that_lead_elsewhere(storage: Any) -> None:
    storage.store["/models/evil/../../x.safetensors"] = storage.open("/models/a", "wb")
    with pytest.raises(UnsafeError, match="memory://models/evil: holds the name"):
        fetched("memory://models/evil")
    storage.store.clear()


def test_other_functions_say_what_takes_urls() -> None:
    with pytest.raises(FileError, match="s3:/a/b: is a URL.*\n  Mount .*: only compress, expand, fit"):
        pared.inspect(Path("s3://a/b"))
