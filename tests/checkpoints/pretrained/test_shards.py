"""An artifact in several files holds what the whole one holds, and only all of its files together are read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import pared
from pared.artifact.envelope import INDEX_FILE
from pared.artifact.shards import sharded_in, split
from pared.errors import CorruptError, FileError, ParedError
from pared.model import storage
from pared.model.contents import same
from pared.runtime.record import contents_of
from tests.runtime.hugging_face.folders import IDS, WEIGHTS, fitted, folder
from tests.targets.families.models import built

pytestmark = pytest.mark.slow

MOST = 30_000


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in shards."""
    place = tmp_path_factory.mktemp("shards")
    fitted().save_pretrained(place, max_shard_size=MOST)
    return place


def names(place: Path) -> list[str]:
    return sorted(path.name for path in place.glob("best_model*"))


def test_shards_are_the_whole(shards: Path) -> None:
    count = len(names(shards)) - 1
    assert count > 2
    files = [f"best_model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    assert names(shards) == [*files, INDEX_FILE]
    sizes = [(shards / name).stat().st_size for name in files]
    assert max(sizes) <= MOST
    assert sum(sizes) < 1.3 * (folder() / "best_model.safetensors").stat().st_size
    assert same(storage.read(shards / INDEX_FILE), contents_of(fitted()))
    whole, joined = (storage.read(place) for place in (folder() / "best_model.safetensors", shards / INDEX_FILE))
    assert (joined.provenance, joined.states, joined.made) == (whole.provenance, whole.states, whole.made)
    where = json.loads((shards / INDEX_FILE).read_text())["weight_map"]
    assert set(where) == {stored.name for stored in whole.tensors}
    assert set(where.values()) == set(files)


def test_shards_are_opened(shards: Path) -> None:
    found = transformers.AutoModelForCausalLM.from_pretrained(shards)
    with torch.no_grad():
        assert torch.equal(found(IDS).logits, fitted()(IDS, use_cache=True).logits)
    loaded = pared.load(shards, transformers.LlamaForCausalLM(fitted().config), warm=False)
    assert same(contents_of(loaded), contents_of(fitted()))


def test_what_reads_artifacts_reads_shards_or_says_what_to_do(shards: Path) -> None:
    whole, divided = pared.inspect(folder() / "best_model.safetensors"), pared.inspect(shards)
    assert {row.name for row in whole.rows if row.name[0] != "("} <= {row.name for row in divided.rows}
    found = pared.compare(shards, folder())
    assert found.identical == len(found.pairs) > 0
    with pytest.raises(FileError, match=r"its artifact is in shards, .*\n  Load it, and write it whole"):
        pared.expand(shards, shards / "large.safetensors")


def test_each_is_an_artifact(shards: Path) -> None:
    for path in sorted(shards.glob("*-of-*.safetensors")):
        assert pared.inspect(path).rows


def test_what_is_saved_again_leaves_nothing_of_before(shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards, tmp_path, dirs_exist_ok=True)
    fitted().save_pretrained(tmp_path, max_shard_size=2 * MOST)
    assert len(names(tmp_path)) < len(names(shards))
    fitted().save_pretrained(tmp_path)
    assert names(tmp_path) == ["best_model.safetensors"]
    assert sharded_in(tmp_path) is None
    assert not json.loads((tmp_path / "config.json").read_text())["quantization_config"]["sharded"]


def missing(place: Path) -> None:
    sorted(place.glob("*-of-*"))[1].unlink()


def twice(place: Path) -> None:
    first, second, *_ = sorted(place.glob("*-of-*"))
    shutil.copy(first, second)


def of_another(place: Path) -> None:
    """A shard of the same name and number, of a model of the same architecture."""
    other: Any = pared.fit(built("Llama"), WEIGHTS, quiet=True)
    other.save_pretrained(place / "other", max_shard_size=MOST)
    second = sorted(place.glob("*-of-*"))[1]
    shutil.copy(sorted((place / "other").glob("*-of-*"))[1], second)


def with_names(names_of: Callable[[list[str]], list[object]]) -> Callable[[Path], None]:
    def change(place: Path) -> None:
        files = sorted(path.name for path in place.glob("*-of-*"))
        where = {f"t{i}": name for i, name in enumerate(names_of(files))}
        (place / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": where}))

    return change


HOSTILE: dict[str, tuple[Callable[[Path], object], type[ParedError], str]] = {
    "missing": (
        missing,
        FileError,
        r"best_model-00002-of-\d+.safetensors is missing, which best_model.safetensors.index",
    ),
    "of another": (of_another, CorruptError, "is not a shard of the same artifact as those before it"),
    "twice the same": (twice, CorruptError, "is not a shard of the same artifact as those before it"),
    "one left out": (with_names(lambda files: [*files[1:]]), CorruptError, "is not a shard of the same artifact"),
    "another place": (
        with_names(lambda _: ["../../secret.safetensors"]),
        CorruptError,
        "names files that are not shards",
    ),
    "no text": (
        with_names(lambda files: [*files, 5]),
        CorruptError,
        "is not an index of shards|names files that are not",
    ),
    "none": (with_names(lambda _: []), CorruptError, "names files that are not shards"),
    "not JSON": (lambda place: (place / INDEX_FILE).write_text("{"), CorruptError, "is not an index of shards"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_shards_that_do_not_belong_together(case: str, shards: Path, tmp_path: Path) -> None:
    spoil, error, message = HOSTILE[case]
    shutil.copytree(shards, tmp_path, dirs_exist_ok=True)
    spoil(tmp_path)
    with pytest.raises(error, match=message):
        storage.read(tmp_path / INDEX_FILE)


def test_a_file_that_is_small_enough_stays_whole(tmp_path: Path) -> None:
    path = Path(shutil.copy(folder() / "best_model.safetensors", tmp_path))
    before = path.read_bytes()
    assert split(path, len(before)) == path
    assert path.read_bytes() == before
