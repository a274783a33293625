"""What it costs to find some tensors does not grow with the number of all: a mixture may have thousands."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from pared import readers
from pared.fitting.hugging_face.loading import skeleton_in
from pared.fitting.streamed.parts.blocks import find_blocks
from pared.fitting.streamed.parts.weights import weights_of
from pared.fitting.streamed.shards.runs import BlockRuns
from pared.fitting.streamed.store import Store
from pared.model.tensors import ModelTensors, find_tensors
from tests.fitting.streamed.models import small, written


class Counted(tuple[Any, ...]):
    """Counts how many of its members were looked at by going over them."""

    seen = 0

    def __iter__(self) -> Iterator[Any]:
        for one in super().__iter__():
            Counted.seen += 1
            yield one


def test_tensors_are_found_without_going_over_all_of_them(tmp_path: Path) -> None:
    folder = written(small("Mixtral", layers=3), tmp_path / "model")
    with ExitStack() as opened:
        listing = opened.enter_context(readers.open_listing(folder))
        tensors = find_tensors(skeleton_in(folder))
        blocks = find_blocks(tensors)
        found = weights_of(tensors, listing)  # the stacks of experts are made of many tensors of the file
        counted: ModelTensors[nn.Module] = ModelTensors(tensors.model, Counted(tensors.tensors))
        weights = replace(found, tensors=counted, listing=replace(listing, tensors=Counted(listing.tensors)))
        runs: Any = BlockRuns(weights, blocks, None, Store(tmp_path), [], ((1, 4, 32),), "float32")
        for names in blocks.tensors:  # whatever is found once for all
            with weights.loaded(names), weights.around(blocks.outside):
                weights.groups(names)
            assert len(runs.experts(0)) == 1
            runs.memory((0, (0,)))
        once = Counted.seen
        assert 0 < once < 6 * len(tensors) + 2 * len(listing.tensors)
        for number, names in enumerate(blocks.tensors * 3):
            for some in (names, names[:1]):
                with weights.loaded(some) as loaded, weights.around(blocks.outside):
                    assert [one.name for one in loaded] == [name for name in weights.order if name in some]
                weights.groups(some)
            assert len(runs.experts(number % len(blocks))) == 1
            runs.memory((number % len(blocks), (0,)))
        assert Counted.seen == once
