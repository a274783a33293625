"""An artifact as a folder that `from_pretrained` of transformers opens: configuration, tokenizer, and a note on both.

The artifact keeps its own name. transformers alone looks for another one, so that without pared it says that there are
no weights, instead of taking random ones. The note in config.json leads to pared, which knows the name.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from pared.artifact.beside import companions
from pared.artifact.envelope import FILE_NAMES, INDEX_FILE, open_records
from pared.artifact.parse import parse_index
from pared.artifact.shards import check_there
from pared.checkpoints.runtimes.conversion import CONFIG, config_of
from pared.errors import ConfigError, FileError, ParedError, VersionError
from pared.files.disk import reading, write_atomic
from pared.formats.dtypes import FLOATING
from pared.readers.folders.names import is_weights
from pared.scalars import check_choice

WEIGHTS: Final = FILE_NAMES["safetensors"]
METHOD: Final = "pared"
NOTE: Final = "quantization_config"  # the key of config.json
_VERSION: Final = 1
_ELSEWHERE: Final = "Write to another directory."
# What the names of weights begin with that transformers and diffusers look for.
_OPENED: Final = re.compile(r"((diffusion_)?pytorch_model|model|tf_model|flax_model)[-.]")
_KEYS: Final[Mapping[str, tuple[object, ...]]] = {
    "quant_method": (METHOD,),
    "version": (_VERSION,),
    "memory": ("fast", "small"),
    "sharded": (False, True),
}


def note(memory: str = "fast", sharded: bool = False) -> dict[str, Any]:
    """What config.json says of the weights.

    Args:
        memory: as for `pared.load`; a reader may change it in the file.
        sharded: whether the artifact is in several files.

    >>> note()
    {'quant_method': 'pared', 'version': 1, 'memory': 'fast', 'sharded': False}
    """
    return {"quant_method": METHOD, "version": _VERSION, "memory": memory, "sharded": sharded}


def check_note(found: Mapping[str, Any]) -> None:
    """Refuse a note that this version cannot obey.

    Raises:
        VersionError: it has a key, or a version, that is not known.
        ConfigError: a value is none of those that its key may have.

    >>> check_note({"quant_method": "pared", "version": 2})
    Traceback (most recent call last):
    ...
    pared.errors.VersionError: config.json: its quantization_config is of version 2, and this version of pared reads 1
      Install a newer pared: pip install -U pared
    """
    newer = "Install a newer pared: pip install -U pared"
    version = found.get("version")
    if isinstance(version, int) and version > _VERSION:
        what = f"its {NOTE} is of version {version}, and this version of pared reads {_VERSION}"
        raise VersionError(what, where=CONFIG, remedy=newer)
    unknown = sorted(found.keys() - _KEYS.keys())
    if unknown:
        raise VersionError(f"its {NOTE} has a key {unknown[0]!r}, which is not known", where=CONFIG, remedy=newer)
    for key, choices in _KEYS.items():
        if key in found:
            check_choice(CONFIG, key, found[key], choices)


def element_type(artifact: Path) -> str:
    """The type of floats that most numbers of an artifact were made from; "float32" if there are no floats.

    Raises:
        CorruptError, FileError, UnsafeError, VersionError: it cannot be read.
    """
    counts = Counter(float32=0)
    for path in check_there(artifact) if artifact.name == INDEX_FILE else [artifact]:
        with open_records(path) as records:
            for entry in parse_index(records).entries:
                counts[entry.dtype] += entry.elements if entry.dtype in FLOATING else 0
    return counts.most_common(1)[0][0]


def check_apart(source: Path, output: Path) -> None:
    """Refuse to write a folder over the one that it is made from.

    Raises:
        ConfigError: they are the same folder.
    """
    if output.exists() and source.exists() and output.samefile(source):
        raise ConfigError(
            "is the folder of the float model, whose config.json would be lost",
            where=str(output),
            remedy=_ELSEWHERE,
        )


def check_replaceable(output: Path) -> None:
    """Refuse to replace the configuration of another model, which would no longer open.

    Args:
        output: where a config.json will be written. One of ours may stand there.

    Raises:
        ConfigError: the folder holds weights that `from_pretrained` opens by the config.json beside them.
        CorruptError: that is not a JSON object.
    """
    if not (output / CONFIG).is_file():
        return
    with reading(output):
        names = sorted(path.name for path in output.iterdir())
    found = [name for name in names if _OPENED.match(name) and is_weights(name)]
    said = config_of(output, _ELSEWHERE).get(NOTE) if found else None
    if found and not (isinstance(said, dict) and said.get("quant_method") == METHOD):
        raise ConfigError(
            f"holds a model that pared did not write ({found[0]}), whose config.json would be lost",
            where=str(output),
            remedy=_ELSEWHERE,
        )


def complete(artifact: Path, source: Path, architecture: str | None = None) -> None:
    """Put beside an artifact what `from_pretrained` needs; config.json comes last, so that half a folder is none.

    Args:
        artifact: `best_model.safetensors`, finished, in the folder that is to be opened; or the index of its shards.
        source: the folder that the float model came from. Its configuration, tokenizer and other files that are not
            weights are copied.
        architecture: the class of the model; None: that of the source.

    Raises:
        ConfigError: the artifact has another name, the source has no config.json, the two folders are the same, or
            another model is beside the artifact.
        FileError: a file cannot be read or written.
    """
    output = artifact.parent
    check_apart(source, output)
    check_replaceable(output)
    config = described(config_of(source, "Pass the folder that the float model came from."), artifact, architecture)
    names = companions.find_companions(source, output).copied
    companions.copy(source, [name for name in names if name != CONFIG], output, output)
    write_config(config, output)


def described(config: Mapping[str, Any], artifact: Path, architecture: str | None = None) -> dict[str, Any]:
    """The configuration of a float model, turned into that of the artifact made from it.

    Raises:
        ConfigError: the artifact has a name that nobody would look for.
        FileError: it cannot be read.
    """
    if artifact.name not in (WEIGHTS, INDEX_FILE):
        raise ConfigError(
            f"is not called {WEIGHTS}", where=str(artifact), remedy='Write it with container="safetensors".'
        )
    sharded = artifact.name == INDEX_FILE
    kind = element_type(artifact)
    found = {key: value for key, value in config.items() if key not in ("torch_dtype", "transformers_weights")}
    found |= {"dtype": kind, NOTE: note(sharded=sharded)}
    return found | ({"architectures": [architecture]} if architecture else {})


def write_config(config: Mapping[str, Any], output: Path) -> None:
    """Write config.json, and delete an earlier artifact of ours in another container, which readers would find first.

    Raises:
        FileError: the folder cannot be written.
    """
    for name in FILE_NAMES.values():
        if name != WEIGHTS and _is_artifact(output / name):
            (output / name).unlink()
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    write_atomic(output / CONFIG, lambda file: file.write(text.encode()))


def _is_artifact(path: Path) -> bool:
    """Whether a file was written by us: nothing else is ever deleted."""
    if not path.is_file():
        return False
    try:
        with open_records(path):
            return True
    except ParedError:
        return False


def weights_name(found: Mapping[str, Any]) -> str:
    """The file that transformers has to look for, by the note: the artifact, or the index of its shards."""
    return INDEX_FILE if found.get("sharded") else WEIGHTS


def weights_in(files: list[str] | None, name: str) -> Path:
    """The artifact, or the index of its shards, among the files that transformers found for a folder.

    Args:
        files: those files: the artifact, or the shards.
        name: what to look for.

    Raises:
        FileError: it is not there.
    """
    path = Path(files[0]).with_name(name) if files else None
    if path is None or not path.is_file():
        raise FileError(
            f"config.json says that pared wrote this folder, and {name} is missing",
            where=str(path.parent if path else "from_pretrained"),
            remedy="Fetch the folder again, or write it with save_pretrained or pared fit.",
        )
    return path
