"""URLs (s3://, gs://, memory://, ...): what is read is copied here first, what is written is sent when it is whole.

Files are mapped into memory and replaced in one step, which no object store offers. fsspec knows the protocols; the
package of each is the user's to install. Copies are kept, by URL, until they are deleted by hand.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Final

from pared.errors import ConfigError, FileError, ParedError, UnsafeError, reason_of
from pared.files.directories.lock import owned
from pared.files.disk import as_path, make_directory, reading, write_atomic

log = logging.getLogger(__name__)

_FORM: Final = re.compile(r"([a-z][a-z0-9+.-]+):(/{1,3})([^/].*)")  # a `Path` keeps one of several slashes
_LOCAL: Final = ("file", "local")
_FOLDER: Final = "PARED_CACHE"
_DIGITS: Final = 16  # of the name of a folder for a URL
_WAIT: Final = 24 * 3600.0  # seconds: for another process that copies the same files
_LAST: Final = re.compile(r"best_model\.(pt|safetensors)|config\.json")  # what a folder is opened by
_TRIAL: Final = ".pared-trial"
_PARTLY: Final = ".part"

_COPIES: Final[dict[Path, str]] = {}  # the URL of each copy that this process made or found


def url_of(value: object) -> str | None:
    """The URL that a caller gave, as a string or a `Path`; None if it is something else, or if it exists as a path.

    >>> url_of(Path("s3://models/a")), url_of("file:///a"), url_of("models/a")
    ('s3://models/a', 'file:///a', None)
    """
    named = os.fspath(value) if isinstance(value, os.PathLike) else value
    match = _FORM.fullmatch(named) if isinstance(named, str) else None
    if match is None or os.path.exists(match.string):  # noqa: PTH110  # a `Path` would lose slashes
        return None
    protocol, _, rest = match.groups()
    return f"{protocol}:///{rest}" if protocol in _LOCAL else f"{protocol}://{rest}"


def source_at(value: object, where: str) -> Path:
    """The path of something to be read; of a URL, that of a copy.

    Raises:
        ConfigError: it is something else; or a package is missing, or the protocol is unknown.
        FileError: nothing is there, or it cannot be read or copied.
    """
    url = url_of(value)
    return as_path(value, where) if url is None else fetched(url)


def fetched(url: str) -> Path:
    """A copy of a file, or of the files of a folder, one after the other; what has not changed is not copied again."""
    files, path = _opened(url)
    place = _place(url) / "files" / _name(path)
    make_directory(place.parent)
    with owned(_place(url), wait=_WAIT), _failing(url, "cannot be read"):
        found = {name: info for name, info in files.find(path, detail=True).items() if info["type"] == "file"}
        if not found:
            raise _absent(url)
        names = {name: _relative(name, path, url) for name in found}
        known_file = _place(url) / "known.json"
        known = json.loads(known_file.read_text(encoding="utf-8")) if known_file.is_file() else {}
        marks = {name: files.ukey(name) for name in found}
        wanted = [name for name in found if known.get(name) != marks[name] or not (place / names[name]).is_file()]
        _check_space(place.parent, sum(found[name]["size"] or 0 for name in wanted), url)
        for number, name in enumerate(sorted(wanted), 1):
            log.info("%s: file %d of %d, %s", url, number, len(wanted), names[name] or place.name)
            target = place / names[name]
            partly = target.with_name(target.name + _PARTLY)
            make_directory(target.parent)
            files.get_file(name, str(partly))
            partly.replace(target)
            known[name] = marks[name]
            write_atomic(known_file, lambda file: file.write(json.dumps(known).encode()))
        for old in set(known) - set(found):
            (place / _relative(old, path, url)).unlink(missing_ok=True)
    _COPIES[place] = url
    return place


def urls_of(paths: Collection[Path]) -> set[str]:
    """The URLs whose copies in this process some paths are, or are in."""
    return {url for place, url in _COPIES.items() if any(path.is_relative_to(place) for path in paths)}


@contextmanager
def output_at(value: object, where: str) -> Iterator[Path]:
    """The path of something to be written; of a URL, a place on this machine whose files are sent at the end.

    What opens the result is sent last, so that nothing half-sent looks complete. Where anything fails, what was sent is
    deleted, and what was written stays here.

    Raises:
        ConfigError: it is something else; or a package is missing, or the protocol is unknown.
        FileError: something is there already, or nothing can be written there, which is tried first.
    """
    url = url_of(value)
    if url is None:
        yield as_path(value, where)
        return
    files, path = _opened(url)
    with _failing(url, "cannot be written"):
        if _is_there(files, path):
            raise FileError(
                "is not empty, and several files are not replaced in one step there",
                where=url,
                remedy="Delete what is there, or pass another URL.",
            )
        files.pipe_file(f"{path}{_TRIAL}", b"")
        files.rm_file(f"{path}{_TRIAL}")
    place = _place(url) / "out" / _name(path)
    make_directory(place.parent)
    yield place
    with owned(_place(url)):
        _send(files, place, path, url)
        shutil.rmtree(place.parent)


def written_at(value: object, path: Path) -> Path:
    """What to call a file that `output_at` gave a place for: of a URL, the path within it, with one slash.

    Args:
        value: what the caller gave.
        path: the file, or where it was before it was sent.
    """
    url = url_of(value)
    if url is None:
        return path
    _, inside = _opened(url)
    return Path(url) / path.relative_to(_place(url) / "out" / _name(inside))


def _send(files: Any, place: Path, path: str, url: str) -> None:
    written = [one for one in sorted(place.rglob("*")) if one.is_file()] if place.is_dir() else [place]
    sent: list[str] = []
    try:
        with _failing(
            url, "was not sent", f"What was written is in {place}: send it by other means, or call it again."
        ):
            for one in sorted(written, key=lambda one: _LAST.fullmatch(one.name) is not None):
                name = path if one == place else f"{path}/{one.relative_to(place).as_posix()}"
                sent.append(name)
                files.put_file(str(one), name)
                if files.size(name) != one.stat().st_size:
                    raise OSError(f"{name} is of another size there")
    except BaseException:
        for name in sent:
            with contextlib.suppress(Exception):  # the first failure is the one to tell of
                files.rm_file(name)
        raise


def _opened(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it."""
    try:
        core = importlib.import_module("fsspec.core")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"is a URL, for which a package is missing ({error})", where=url, remedy="pip install 'pared[remote]'"
        ) from error
    options = {"auto_mkdir": True} if url.partition(":")[0] in _LOCAL else {}
    try:
        files, path = core.url_to_fs(url, **options)
    except (ImportError, ValueError) as error:  # the package of the protocol is missing; or there is none
        raise ConfigError(
            f"cannot be opened: {reason_of(error)}",
            where=url,
            remedy="Install the package of its protocol here and on every node (s3fs, gcsfs, adlfs, ...), or mount it.",
        ) from error
    except Exception as error:  # whatever that package raises
        raise _unusable(url, "cannot be opened", error) from error
    return files, path.rstrip("/")


@contextmanager
def _failing(url: str, what: str, remedy: str = "") -> Iterator[None]:
    """Turn whatever the package of a protocol raises into an error of ours."""
    try:
        yield
    except ParedError:
        raise
    except FileNotFoundError as error:
        raise _absent(url) from error
    except Exception as error:  # each package has errors of its own
        raise _unusable(url, what, error, remedy) from error


def _unusable(url: str, what: str, error: Exception, remedy: str = "") -> FileError:
    return FileError(
        f"{what}: {reason_of(error)}",
        where=url,
        remedy=remedy or "Check the name and the credentials, which the package of the protocol looks for.",
    )


def _absent(url: str) -> FileError:
    return FileError("is not there", where=url, remedy="Check the bucket, the name, and who may see them.")


def _is_there(files: Any, path: str) -> bool:
    try:
        return bool(files.find(path))
    except FileNotFoundError:
        return False


def _relative(name: str, path: str, url: str) -> str:
    """Where a file is in the folder that was asked for; "" if it is what was asked for."""
    inside = name.removeprefix(path).lstrip("/")
    if ".." in PurePosixPath(inside).parts or "\\" in inside:
        raise UnsafeError(f"holds the name {name!r}", where=url, remedy="Rename it, or copy what is needed by hand.")
    return inside


def _name(path: str) -> str:
    return PurePosixPath(path).name or "root"


def _check_space(place: Path, needed: int, url: str) -> None:
    with reading(place):
        free = shutil.disk_usage(place).free
    if needed > free:
        raise FileError(
            f"takes {needed:,} bytes, and {free:,} are free in {place}",
            where=url,
            remedy=f"Free space, or name another folder for copies: {_FOLDER}=/large/disk.",
        )


def _place(url: str) -> Path:
    """Where everything about a URL is."""
    directories = importlib.import_module("platformdirs")
    root = Path(os.environ.get(_FOLDER) or directories.user_cache_dir("pared"))
    return root.absolute() / "remote" / hashlib.sha256(url.encode()).hexdigest()[:_DIGITS]
