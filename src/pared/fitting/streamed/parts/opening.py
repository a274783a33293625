"""A folder's model, which stays on the disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pared import readers
from pared.checkpoints.quantized.recognize import REMEDY, recognize
from pared.errors import ConfigError
from pared.fitting.config import PostTrainingQuantConfig
from pared.fitting.hugging_face.loading import skeleton_in
from pared.fitting.search.free.choices import check_rules
from pared.fitting.streamed.parts.blocks import ModelBlocks, find_blocks
from pared.fitting.streamed.parts.weights import Weights, weights_of
from pared.model.tensors import find_tensors


@contextmanager
def opened(folder: Path, conf: PostTrainingQuantConfig) -> Iterator[tuple[Weights, ModelBlocks]]:
    """The weights of a folder's model, and how it is divided; its files are open until the context ends.

    Args:
        folder: a Hugging Face folder.
        conf: whose rules are checked.

    Raises:
        ConfigError: a rule matches nothing; or the folder describes no model, or one that is quantized already.
        FileError: it is incomplete.
        NotInBlocks: the model has no list of blocks.
    """
    tensors = find_tensors(skeleton_in(folder))
    blocks = find_blocks(tensors)
    check_rules(tensors, conf)
    with readers.open_listing(folder) as listing:
        found = recognize(listing)
        if found is not None:
            raise ConfigError(str(found), where=str(folder), remedy=REMEDY)
        yield weights_of(tensors, listing), blocks
