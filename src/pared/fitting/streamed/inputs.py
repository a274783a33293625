"""What a folder's model is fitted with: calibration data as its calls, and by what a workspace knows the same fit."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from pared.errors import CalibrationError, ConfigError
from pared.fitting.config import AccuracyCriterion, PostTrainingQuantConfig
from pared.fitting.hugging_face.sources import batches_of
from pared.fitting.rounding.plan import make_plan
from pared.fitting.search.workspace import checksum, told
from pared.model import calls
from pared.model.calls import Call
from pared.model.recorded import values
from pared.model.tensors import ModelTensors
from pared.readers.listing import Listing
from pared.version import __version__

# Names in the fingerprint of what last bits depend on.
THREADS: Final = "threads"
DEVICE: Final = "device"
_SAMPLED: Final = 4096  # bytes of each tensor that the fingerprint looks at, at its beginning and at its end


def calls_of(calibration: Any, folder: Path, model: nn.Module, most: int) -> list[Call]:
    """Calibration data as calls of the model.

    Args:
        calibration: batches, or whatever `pared.calibration` reads.
        folder: where the tokenizer is.
        model: on the meta device.
        most: the number of samples after which reading stops.

    Raises:
        CalibrationError: there are none, they do not fit the model, or have tokens that it has not.
        ConfigError: they are a function, or nothing that can be read.
    """
    batches = batches_of(calibration, folder, most)
    if callable(batches):
        raise ConfigError(
            "the calibration data are a function that calls a model, and that of a folder is never whole",
            where="pared.fit",
            remedy="Pass the batches that it calls the model with, or a text.",
        )
    found: list[Call] = []
    for index, batch in enumerate(batches):
        args, kwargs = calls.bind(model, batch, f"calibration: batch {index}")
        found.append(Call(*values.copied((args, kwargs))))
        if samples_of(found) >= most:
            break
    if not found:
        raise CalibrationError(
            "the calibration data are empty", where="pared.fit", remedy="Pass a text, or at least one batch."
        )
    _check_tokens(found, model)
    return found


def _check_tokens(found: list[Call], model: nn.Module) -> None:
    """Refuse tokens beyond the table: the tokenizer is another model's."""
    language: Any = model
    rows = getattr(language.get_input_embeddings(), "num_embeddings", None)
    for call in found:
        tokens = call.kwargs.get("input_ids", call.args[0] if call.args else None)
        if isinstance(rows, int) and isinstance(tokens, Tensor) and tokens.numel() and int(tokens.max()) >= rows:
            raise CalibrationError(
                f"has the token {int(tokens.max())}, and the model's table has {rows} rows",
                where="the calibration data",
                remedy="Use the tokenizer that the model was trained with.",
            )


def samples_of(found: list[Call]) -> int:
    """How many samples there are in calls."""
    return sum(calls.samples_of(call.args, dict(call.kwargs)) for call in found)


def fingerprint_of(
    folder: Path,
    listing: Listing,
    tensors: ModelTensors[nn.Module],
    conf: PostTrainingQuantConfig,
    made: list[Call],
    dtype: str,
    threads: int,
    device: str,
) -> dict[str, str]:
    """What the sweeps depend on; of the weights, some of each tensor.

    Args:
        folder: that of the model.
        listing: its files.
        tensors: those of the model, on the meta device.
        conf: what is wanted; how much may be lost, and how large the file may be, changes nothing here.
        made: the calls of calibration.
        dtype: the type of hidden states on the disk.
        threads: with how many torch computes; the last bits of products depend on it.
        device: on what it computes in tasks; likewise.
    """
    weights = zlib.crc32((folder / "config.json").read_bytes())
    for one in listing.tensors:
        weights = zlib.crc32(f"{one.name} {one.dtype} {one.shape}".encode(), weights)
        content = listing.storages[one.storage].content if one.storage is not None else None
        if content is not None:
            view = content()[one.offset : one.offset + one.nbytes]
            weights = zlib.crc32(view[-_SAMPLED:], zlib.crc32(view[:_SAMPLED], weights))
    # Rules are told by what comes of them, as their functions cannot be compared.
    decided = [(one.name, one.treatment, one.bits) for one in make_plan(tensors, conf.rules, bits=None)]
    plain = replace(conf, accuracy_criterion=AccuracyCriterion(), max_size=None, max_trials=1, timeout=0, rules=())
    return {
        "pared": __version__,
        "torch": str(torch.__version__),
        "class": type(tensors.model).__name__,
        "weights": f"{weights:08x}",
        "calibration": checksum(told([(call.args, dict(call.kwargs)) for call in made])),
        "options": repr(plain),
        "decisions": checksum(decided),
        "states": dtype,
        THREADS: str(threads),
        DEVICE: device,
    }
