"""A model written as a folder: what all runtimes that read Hugging Face's layout have in common."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from pared.artifact.beside import companions
from pared.errors import ConfigError
from pared.files.directories.whole import check_vacant, whole
from pared.files.disk import write_atomic
from pared.formats.dtypes import ELEMENTS, Array, converted
from pared.formats.groups.grid import Numbers, StepType
from pared.readers.folders.files import find_files
from pared.targets.alike import joined
from pared.targets.folders.shards import MAX_SHARD_SIZE, Group, Shard, Stored, nbytes_of, shards, write_shards
from pared.targets.pieces import Outline, Source
from pared.targets.target import Offer, Target

WEIGHT: Final = ".weight"
_CONFIG: Final = "config.json"
_TIED: Final = "tie_word_embeddings"
# Matrices of these models are stored as (inputs, outputs), the transpose of what runtimes of this layout quantize.
_TRANSPOSED: Final = frozenset(("gpt2", "openai-gpt", "imagegpt", "decision_transformer"))


@dataclass(frozen=True)
class Layout:
    """What a runtime reads.

    Args:
        stored: the tensors in the file that a quantized weight becomes.
        arrays: their numbers, from the parts of its grid.
        files: the content of the JSON files beside them, by name.
        format: what the files of weights say that they are.
    """

    stored: Callable[[Outline, Offer], Group]
    arrays: Callable[[Outline, Offer, Mapping[str, Numbers]], Sequence[Array]]
    files: Mapping[str, Mapping[str, Any]]
    format: str = "pt"


def write_folder(
    source: Source, path: Path, target: Target, layout: Layout, max_shard_size: int = MAX_SHARD_SIZE
) -> list[Path]:
    """Write a model with its configuration, and the other files of the folder that it came from.

    Args:
        source: the model.
        path: the folder, which appears when all is written.
        target: the runtime.
        layout: what it reads.
        max_shard_size: the most bytes of tensors in one file.

    Returns:
        the files with weights and their index.

    Raises:
        ConfigError: the runtime cannot take the model.
        FileError: the folder cannot be written, or there is something already.
    """
    check(source, target)
    check_vacant(path)
    files = _shards(source, layout, max_shard_size)
    with whole(path) as folder:
        folder.mkdir()
        if source.folder is not None:
            taken = [name for name in find_files(source.folder).sizes if name in layout.files]
            beside = companions.find_companions(source.folder, path, taken)
            companions.copy(source.folder, beside.copied, folder, folder)
        for name, content in layout.files.items():
            text = json.dumps(content, indent=2) + "\n"
            write_atomic(folder / name, lambda file, text=text: file.write(text.encode()))  # type: ignore[misc]  # bound now
        written = write_shards(folder, files, _numbers(source, layout))
    return [path / one.name for one in written]


def folder_nbytes(source: Source, layout: Layout, max_shard_size: int = MAX_SHARD_SIZE) -> int:
    """The exact bytes of the files of weights and their index."""
    return nbytes_of(_shards(source, layout, max_shard_size))


def _shards(source: Source, layout: Layout, max_shard_size: int) -> tuple[Shard, ...]:
    metadata = {"format": layout.format}
    if source.provenance:
        metadata["pared"] = json.dumps(source.provenance)
    return shards([_group(source, outline, layout) for outline in source.outlines], metadata, max_shard_size)


def _group(source: Source, outline: Outline, layout: Layout) -> Group:
    found: list[Stored] = []
    for name in _names(source, outline):
        if outline.offer is not None:
            found += layout.stored(replace(outline, name=name), outline.offer)
        else:
            found.append(Stored(name, outline.dtype, outline.shape))
    return found


def _names(source: Source, outline: Outline) -> Sequence[str]:
    """The names under which a tensor is written: all, unless the model itself ties them."""
    return (outline.names or (outline.name,)) if _ties(source) is False else (outline.name,)


def _ties(source: Source) -> bool | None:
    """Whether the head is the table: as the configuration says, or else as the tensors are; None: there is no head."""
    inner = source.config.get("text_config")
    for config in (source.config, inner if isinstance(inner, dict) else {}):
        if isinstance(config.get(_TIED), bool):
            return bool(config[_TIED])
    tables = [one for one in source.outlines if one.role == "table"]
    if any(len(one.names) > 1 for one in tables):
        return True
    shapes = {one.shape for one in tables}
    return False if any(one.role == "head" and one.shape in shapes for one in source.outlines) else None


def config_of(source: Source) -> dict[str, Any]:
    """What config.json says of the model itself, to which a target adds what it has of its own.

    Whether the head is tied to the table is said in any case: loaders differ in what they take for granted, and
    transformers from class to class.
    """
    ties = _ties(source)
    return dict(source.config) | ({} if ties is None else {_TIED: ties})


def _numbers(source: Source, layout: Layout) -> Iterator[Sequence[Array]]:
    for outline in source.outlines:
        parts = source.read(outline)
        arrays = [parts["values"]] if outline.offer is None else layout.arrays(outline, outline.offer, parts)
        yield [*arrays] * len(_names(source, outline))


def quantized(source: Source) -> dict[str, Offer]:
    """The format of each module that has one, in order."""
    return {
        module_of(name): one.offer for one in source.outlines if one.offer is not None for name in _names(source, one)
    }


def left(source: Source) -> list[str]:
    """The modules of matrices that stay in float, under all their names."""
    found = [one for one in source.outlines if one.offer is None and len(one.shape) == 2]
    return [module_of(name) for one in found for name in one.names or (one.name,) if name.endswith(WEIGHT)]


def module_of(name: str) -> str:
    """The module of a weight."""
    return name.removesuffix(WEIGHT)


def dtype_of(config: Mapping[str, Any]) -> str:
    """The type in which a model computes, as its configuration says; float32 if it does not."""
    inner = config.get("text_config")
    said = config.get("dtype") or config.get("torch_dtype") or (dtype_of(inner) if isinstance(inner, dict) else None)
    return str(said or "float32").removeprefix("torch.")


def half_or_bfloat16(dtype: str) -> StepType:
    """The type of steps where float16 models have float16, and all others bfloat16."""
    return "float16" if dtype == "float16" else "bfloat16"


def stored_steps(values: Numbers, kind: StepType, name: str) -> Array:
    """Steps, or least values, in the type in which they are stored.

    Raises:
        ConfigError: it does not hold them exactly.
    """
    stored = converted(values, ELEMENTS[kind])
    if (stored.astype(np.float32) != values).any():
        raise ConfigError(
            f"has steps that {kind} does not hold, in which the model computes",
            where=name,
            remedy=f'Leave it in float, or pass a configuration with dtype "bfloat16"; a fit for this target, and '
            f"pared compress --target, choose steps that {kind} holds.",
        )
    return stored


def check(source: Source, target: Target) -> None:
    """Refuse what the runtime cannot take, before any work.

    Raises:
        ConfigError: there is no configuration; a matrix has a shape that its format cannot have; weights that the
            runtime joins differ in their formats.
    """
    check_config(source.config, source.folder, target)
    if quantized(source):
        check_orientation(source.config, target)
    groups: dict[str, Outline] = {}
    for one in source.outlines:
        if one.offer is not None:
            _check_shape(one, one.offer, target)
        key = joined(one.name, target.alike) if one.role == "linear" else None
        if key is None:
            continue
        first = groups.setdefault(key, one)
        if first.offer != one.offer:
            formats = " and ".join("float" if each.offer is None else each.offer.name for each in (first, one))
            raise ConfigError(
                f"{formats} differ from {first.name}, with which {target.name} joins it",
                where=one.name,
                remedy="Give both the same format.",
            )


def check_config(config: Mapping[str, Any], folder: Path | None, target: Target) -> None:
    """Refuse a model without a configuration.

    Raises:
        ConfigError: it has none.
    """
    if not config:
        raise ConfigError(
            f"there is no {_CONFIG}, which every loader of {target.name} reads",
            where=str(folder or target.name),
            remedy="Pass the folder of the model, with its configuration.",
        )


def check_orientation(config: Mapping[str, Any], target: Target) -> None:
    """Refuse models that store their matrices transposed.

    Raises:
        ConfigError: this is one.
    """
    kind = config.get("model_type")
    if kind in _TRANSPOSED:
        raise ConfigError(
            f"models of type {kind} store their matrices transposed, which {target.name} cannot run",
            where=_CONFIG,
            remedy='Use the target "gguf", "onnx" or "openvino".',
        )


def _check_shape(outline: Outline, offer: Offer, target: Target) -> None:
    named = outline.name.endswith(WEIGHT) and len(outline.shape) == 2
    if not named or not offer.takes(outline.role, outline.shape[1], outline.shape[0]):
        raise ConfigError(
            f"a {outline.role} of shape {list(outline.shape)} cannot be {offer.name} in {target.name}: its columns "
            f"must be a multiple of {offer.multiple}, its rows of {offer.row_multiple}",
            where=outline.name,
            remedy="Leave it in float, or use another of the target's formats.",
        )


_NUMBER: Final = re.compile(r"\.(\d+)\.")


def patterns(modules: Collection[str]) -> list[str]:
    r"""Regular expressions that match these names of modules and no others of the model.

    >>> patterns(["layers.0.q", "layers.1.q", "head"])
    ['layers\\.(0|1)\\.q$', 'head$']
    """
    blocks: dict[tuple[str, str], list[str]] = {}
    for name in modules:
        before, number, after = _NUMBER.split(name, maxsplit=1) if _NUMBER.search(name) else (name, "", "")
        blocks.setdefault((before, after), []).append(number)
    return [_pattern(before, numbers, after) for (before, after), numbers in blocks.items()]


def _pattern(before: str, numbers: Sequence[str], after: str) -> str:
    if not numbers[0]:
        return f"{re.escape(before)}$"
    choice = numbers[0] if len(numbers) == 1 else f"({'|'.join(numbers)})"
    return rf"{re.escape(before)}\.{choice}\.{re.escape(after)}$"
