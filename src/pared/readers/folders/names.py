"""What the name of a file says: weights or not, one of several, a piece of a cut file, or a state of training."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final

# The suffixes of files of weights that are read; any other file in a folder is a note, whatever it contains.
SUFFIXES: Final = frozenset(
    (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".pt2", ".onnx", ".gguf", ".npz", ".npy", ".h5", ".keras")
)
# The suffixes of weights of other programs; such files are never copied beside compressed weights.
_OF_OTHERS: Final = frozenset(
    (".onnx_data", ".hdf5", ".msgpack", ".tflite", ".ot", ".ggml", ".llamafile", ".distcp", ".pte", ".ptl", ".mar",
     ".nemo", ".pdparams", ".pdopt", ".pdiparams", ".params", ".caffemodel", ".mlmodel", ".engine", ".plan", ".trt",
     ".dlc", ".pb", ".zarr", ".incomplete", ".crdownload", ".aria2")
)  # fmt: skip
# Arrays beside the weights may be data that the model's code needs, such as the voices of a speech model.
_WEIGHTS: Final = (SUFFIXES | _OF_OTHERS) - {".npy"}
# What may follow such a suffix in the name of another kind of file.
_TEXTS: Final = frozenset((".json", ".md", ".txt", ".py", ".yaml", ".yml", ".toml", ".sha256", ".lock"))

# The index of shards; of a variant of the model, with its name: model.safetensors.index.fp16.json.
INDEX: Final = ".index.json"
_INDEX: Final = re.compile(r".*\.index(\.\w{1,20})?\.json$")
# The metadata of a checkpoint of torch.distributed.checkpoint; the numbers are in `*.distcp` beside it.
DISTRIBUTED: Final = ".metadata"
CHUNKS: Final = ".distcp"

# The files that libraries open, the first that is there; with this suffix an index, or shards, come in their place.
MAIN: Final = ("model.safetensors", "diffusion_pytorch_model.safetensors", "adapter_model.safetensors",
               "pytorch_model.bin", "diffusion_pytorch_model.bin", "adapter_model.bin", "best_model.pt")  # fmt: skip

# What trainers save beside the weights: of optimizers, schedules, random numbers and arguments.
_TRAINING: Final = re.compile(
    r"(?i)(optim(izer)?|(lr_)?scheduler|(grad_)?scaler|rng_state|random_states?|training_args|train(er)?_state|"
    r"extra_state|events\.out\.tfevents|.*optim_states?)([-_.\d].*)?$"
)
_TRAINING_FOLDER: Final = re.compile(r"(?i)optimizer[-_\d]*$")
_STAGE: Final = re.compile(r"(?i)(checkpoint|global_step)[-_]?\d+$")

_NUMBERED: Final = re.compile(r"(?P<before>.*?)(?P<number>\d{1,6})[-_.]of[-_.](?P<count>\d{1,6})(?P<after>\D.*|)$")
# Of a training that saves again and again, and of models that differ in one number, each is whole.
_WHOLE: Final = re.compile(r"(?i)(epoch|step|iter|fold|seed|run|best|top|ep)[-_.= ]*$")
_PART: Final = re.compile(
    r"(?i)(?P<before>(?:.*[-_.])?(?:part|shard|chunk|piece|(?P<rank>rank))[-_.]?)(?P<number>\d{1,6})(?P<after>(?:\D.*)?)$"
)
_WORLD: Final = re.compile(r"(?P<before>.*world_size_(?P<count>\d{1,6})_rank_)(?P<number>\d{1,6})(?P<after>\..*)$")
_ZERO: Final = re.compile(r"(?P<before>(?:.*_)?zero_pp_rank_)(?P<number>\d+)(?P<after>_.*)$")  # DeepSpeed, stage 3
_PARALLEL: Final = re.compile(r"(?P<before>(?P<rank>consolidated)\.)(?P<number>\d\d)(?P<after>\.pth)$")
_PARTS: Final = (_ZERO, _WORLD, _PARALLEL, _PART)  # the first that matches counts
_RANK_FOLDER: Final = re.compile(r"(?i)(?:(?:mp|tp|pp|model_parallel)_?rank_?\d+_?)+(?:\d+)?$")  # of Megatron

# Pieces of a file that was cut, by `split` and similar: of such a piece the suffix of the whole is followed by more.
_CUT: Final = re.compile(
    r"(?i)(.*\.(?:safetensors|gguf|bin|pth?|ckpt|onnx|npz))[-_.](?:part|split|chunk)[-_.]?\w{1,9}$"
)
_MAYBE_CUT: Final = re.compile(r"(?i)(.*\.(?:safetensors|gguf|bin|pth?|ckpt|onnx|npz))\.(?:\d{1,4}|[a-z]{2})$")


@dataclass(frozen=True)
class Numbered:
    """A file that is one of several, by its name.

    Args:
        before: the name before the number.
        after: the name after the number, and after the count.
        number: its number.
        count: how many there are; None if the name does not say.
        rank: whether the number is that of a process in training: alone, such a file may be a whole model.
    """

    before: str
    after: str
    number: int
    count: int | None
    rank: bool = False

    @property
    def family(self) -> object:
        """Equal for two files of one model."""
        return self.before, self.after, self.count


def numbered(name: str) -> Numbered | None:
    """What the last part of a path says about a file that is one of several; None if it is not.

    >>> numbered("model-00002-of-00003.safetensors")
    Numbered(before='model-', after='.safetensors', number=2, count=3, rank=False)
    >>> numbered("pytorch_model_part-0.bin").count, numbered("epoch-3-of-10.pt"), numbered("model_2.pt")
    (None, None, None)
    """
    found = _match(name)
    if found is None:
        return None
    parts = found.groupdict()
    number, count = int(parts["number"]), int(parts["count"]) if parts.get("count") else None
    # A model of one file is whole; and if the number is beyond the count, the name means something else.
    if count is not None and not number <= count > 1:
        return None
    return Numbered(folder_of(name) + parts["before"], parts["after"], number, count, parts.get("rank") is not None)


def _match(name: str) -> re.Match[str] | None:
    """The name of one of several files, divided."""
    base = name.rpartition("/")[2]
    found = _NUMBERED.match(base)
    if found and int(found["count"]) > 1:
        return None if _WHOLE.search(found["before"]) else found
    if is_cut(name) or PurePosixPath(base).suffix not in SUFFIXES:
        return None
    return next((found for pattern in _PARTS if (found := pattern.match(base))), None)


def sibling(name: str, number: int) -> str:
    """The name of the file of the same model with another number.

    >>> sibling("model-00002-of-00003.safetensors", 1)
    'model-00001-of-00003.safetensors'
    """
    found = _match(name)
    assert found is not None
    base, (begin, end) = found.string, found.span("number")
    return f"{folder_of(name)}{base[:begin]}{number:0{end - begin}d}{base[end:]}"


def is_rank_folder(name: str) -> bool:
    """Whether the files of a folder are those of one of several processes, each with a slice of every tensor.

    >>> is_rank_folder("mp_rank_00"), is_rank_folder("tp_rank_01_pp_rank_000"), is_rank_folder("rank")
    (True, True, False)
    """
    return _RANK_FOLDER.match(name) is not None


def is_cut(name: str, beside: Collection[str] = ()) -> str:
    """The name of the whole file, if the name is that of a piece of a file that was cut; else "".

    Args:
        name: the name of the file.
        beside: the files of its folder: what may be the number of a version is that of a piece if there are others.

    >>> is_cut("model.safetensors.part1"), is_cut("model.safetensors"), is_cut("m.bin.01", ["m.bin.01", "m.bin.02"])
    ('model.safetensors', '', 'm.bin')
    """
    found = _CUT.match(name)
    if found is None and (maybe := _MAYBE_CUT.match(name)):
        others = [other for other in beside if (one := _MAYBE_CUT.match(other)) and one[1] == maybe[1]]
        found = maybe if len(others) > 1 and maybe[1] not in beside else None
    return found[1] if found else ""


def is_read(name: str) -> bool:
    """Whether a file of a folder is read as weights: by its suffix.

    >>> is_read("pytorch_model.bin-00001-of-00002"), is_read("model.txt-1-of-2")
    (True, False)
    """
    suffix = PurePosixPath(name).suffix
    found = _NUMBERED.match(suffix)
    return (found["before"].rstrip("-_.") if found else suffix) in SUFFIXES


def is_index(name: str) -> bool:
    """Whether a file is an index of shards, by its name.

    >>> is_index("model.safetensors.index.json"), is_index("model.safetensors.index.fp16.json"), is_index("index.json")
    (True, True, False)
    """
    return _INDEX.match(name) is not None


def is_weights(name: str) -> bool:
    """Whether a file holds weights of any program, or an index of weights, by its name.

    >>> is_weights("a/flax_model.msgpack"), is_weights("model.safetensors.part1"), is_weights("tokenizer.json")
    (True, True, False)
    """
    suffixes = PurePosixPath(name).suffixes
    if is_index(name) or not suffixes:
        return is_index(name)
    return suffixes[-1] in _WEIGHTS or (suffixes[-1] not in _TEXTS and not _WEIGHTS.isdisjoint(suffixes))


def is_training(name: str) -> bool:
    """Whether a file belongs to a training, not to a model, by its name or by that of its folder.

    >>> is_training("rng_state_0.pth"), is_training("optimizer_0/.metadata"), is_training("model.pt")
    (True, True, False)
    """
    *folders, base = name.split("/")
    state = _TRAINING.match(base) is not None and PurePosixPath(base).suffix not in _TEXTS
    return state or any(_TRAINING_FOLDER.match(one) for one in folders)


def is_stage(name: str) -> bool:
    """Whether a file is in the folder of an earlier stage of a training, beside which the model may be.

    >>> is_stage("checkpoint-500/model.safetensors"), is_stage("global_step10/mp_rank_00_model_states.pt")
    (True, True)
    """
    return any(_STAGE.match(one) for one in name.split("/")[:-1])


def folder_of(name: str) -> str:
    """The folder in a relative path, with a slash after it; "" for a file of the top folder.

    >>> folder_of("unet/model.safetensors"), folder_of("model.safetensors")
    ('unet/', '')
    """
    folder, slash, _ = name.rpartition("/")
    return folder + slash


def of_folder(names: Collection[str], folder: str) -> list[str]:
    """The names of those files that are directly in a folder, sorted."""
    return sorted(name for name in names if folder_of(name) == folder)
