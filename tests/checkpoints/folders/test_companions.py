"""What is copied beside compressed weights: nothing from outside the folder, no weights, and nothing that is a pipe."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

import pared
from pared.checkpoints import compress
from pared.checkpoints.result import Compressed

STATE = {"w": torch.randn(16, 32)}


def repository(folder: Path) -> Path:
    folder.mkdir(parents=True)
    safetensors.torch.save_file(STATE, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def written(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def there_and_back(source: Path, where: Path) -> Compressed:
    """Compress and expand; whatever is in the output is a plain file."""
    done = compress.run(source, where / "small", quiet=True)
    pared.expand(where / "small", where / "big")
    for folder in ("small", "big"):
        assert not any(path.is_symlink() for path in (where / folder).rglob("*"))
    companions = [name for name in written(where / "small") if name != "best_model.pt"]
    assert companions == sorted(done.copied)
    assert sorted([*companions, "model.safetensors"]) == written(where / "big")
    return done


def test_what_links_outside_lead_to_is_not_copied(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = repository(tmp_path / "repo")
    (tmp_path / "private_key").write_text("SECRET")
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "a.txt").write_text("SECRET")
    (source / "inside.txt").write_text("plain")
    (source / "sub").mkdir()
    for name, target in {
        "vocab.txt": "../private_key",
        "merges.txt": tmp_path / "private_key",
        "dots.txt": "sub/../../repo/../private_key",
        "twice.txt": "vocab.txt",
        "sub/up.txt": "../../private_key",
        "secrets": tmp_path / "secrets",
        "folder": "sub",
        "lost.txt": "nowhere",
        "circle.txt": "circle.txt",
        "ring1.txt": "ring2.txt",
        "ring2.txt": "ring1.txt",
        "proc.txt": "/proc/self/environ",
        "good.txt": "inside.txt",
        "sub/good.txt": "../inside.txt",
    }.items():
        (source / name).symlink_to(target)
    done = there_and_back(source, tmp_path)
    assert set(done.copied) == {"config.json", "good.txt", "inside.txt", "sub/good.txt"}
    assert (tmp_path / "big" / "sub" / "good.txt").read_text() == "plain"
    outside = "a link that leads out of the folder"
    assert {name for name, why in done.not_copied.items() if why == outside} == {
        *("vocab.txt", "merges.txt", "dots.txt", "twice.txt", "sub/up.txt", "proc.txt")
    }
    assert f"{source / 'vocab.txt'} is not copied: {outside}" in caplog.text
    assert "not copied: " in str(done)
    assert {done.not_copied[name] for name in ("secrets", "folder")} == {"a link to a directory"}
    assert {done.not_copied[name] for name in ("lost.txt", "circle.txt", "ring1.txt")} == {"a link that leads nowhere"}
    assert all(b"SECRET" not in path.read_bytes() for path in (tmp_path / "small").rglob("*.txt"))


def test_an_artifact_folder_of_a_stranger_copies_nothing_from_outside(tmp_path: Path) -> None:
    pared.compress(repository(tmp_path / "repo"), tmp_path / "small")
    (tmp_path / "private_key").write_text("SECRET")
    (tmp_path / "small" / "vocab.txt").symlink_to("../private_key")
    pared.expand(tmp_path / "small", tmp_path / "big")
    assert written(tmp_path / "big") == ["config.json", "model.safetensors"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes")
def test_pipes_are_never_opened(tmp_path: Path) -> None:
    source = repository(tmp_path / "repo")
    os.mkfifo(source / "vocab.txt")
    os.mkfifo(source / "other.bin")
    (source / "zero.txt").symlink_to("/dev/zero")
    done = there_and_back(source, tmp_path)
    assert done.copied == ("config.json",)
    assert set(done.not_copied) == {"vocab.txt", "other.bin", "zero.txt"}
    assert pared.inspect(source).nbytes == sum(p.stat().st_size for p in source.iterdir() if p.is_file())


def torch_file() -> bytes:
    stream = io.BytesIO()
    torch.save(STATE, stream)
    return stream.getvalue()


@pytest.mark.parametrize(
    "name",
    [
        *("tf_model.h5", "flax_model.msgpack", "rust_model.ot", "model.ckpt", "weights.pth", "m.gguf", "m.onnx"),
        *("m.onnx_data", "original/consolidated.00.pth", "pytorch_model.bin.index.json", "model.safetensors.bak"),
        *("model.safetensors.index.fp16.json", "old/model", "model.tflite", "a/b/c/deep.safetensors", "x.distcp"),
    ],
)
def test_weights_are_no_companions(tmp_path: Path, name: str) -> None:
    source = repository(tmp_path / "repo")
    (source / name).parent.mkdir(parents=True, exist_ok=True)
    (source / name).write_bytes(b'{"weight_map": {}}' if name.endswith(".json") else torch_file())
    done = there_and_back(source, tmp_path)
    assert done.copied == ("config.json",)


def test_what_only_training_needs_is_left_and_named(tmp_path: Path) -> None:
    source = repository(tmp_path / "repo")
    torch.save({"state": {0: {"exp_avg": torch.ones(16, 32), "step": torch.ones(())}}}, source / "optimizer.pt")
    torch.save({"cpu": torch.get_rng_state()}, source / "rng_state.pth")
    torch.save({"lr": 0.1}, source / "scheduler.pt")
    torch.save({"lr": 0.1}, source / "training_args.bin")
    (source / "random_states_0.pkl").write_bytes(b"x")
    (source / "checkpoint-500").mkdir()
    (source / "checkpoint-500" / "config.json").write_text("{}")
    torch.save(STATE, source / "checkpoint-500" / "pytorch_model.bin")
    (source / "trainer_state.json").write_text("{}")
    done = there_and_back(source, tmp_path)
    assert done.copied == ("config.json", "trainer_state.json")
    training = [name for name, why in done.not_copied.items() if why == "only training needs it"]
    assert sorted(training) == [
        *("optimizer.pt", "random_states_0.pkl", "rng_state.pth", "scheduler.pt", "training_args.bin")
    ]
    assert "not copied: optimizer.pt, random_states_0.pkl, rng_state.pth, scheduler.pt, training_args.bin: only" in str(
        done
    )


def test_a_model_beside_the_state_of_its_training_is_one_model(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "weights.pt")
    torch.save({"state": {0: {"exp_avg": torch.ones(16, 32), "step": torch.ones(())}}}, tmp_path / "optimizer.pt")
    back = safetensors.torch.load_file(
        pared.expand(pared.compress(tmp_path, tmp_path / "small"), tmp_path / "b.safetensors")
    )
    assert set(back) == {"w"}


def test_pointers_are_no_companions(tmp_path: Path) -> None:
    source = repository(tmp_path / "repo")
    (source / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
    done = there_and_back(source, tmp_path)
    assert done.copied == ("config.json",)
    assert "run git lfs pull" in done.not_copied["tokenizer.json"]


# --- the cache of the hub


def cache(top: Path, commit: str = "abc", *, ref: bool = True) -> Path:
    """A model in two shards, as the hub's library lays it out: links into a folder of blobs."""
    snapshot = top / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (top / "blobs").mkdir(exist_ok=True)
    contents = {
        "config.json": b"{}",
        "tokenizer/vocab.txt": b"vocabulary",
        **{
            f"model-0000{i}-of-00002.safetensors": safetensors.torch.save({f"w{i}": torch.randn(8, 32)}) for i in (1, 2)
        },
    }
    for i, (name, content) in enumerate(contents.items()):
        blob = top / "blobs" / f"{commit}{i}"
        blob.write_bytes(content)
        (snapshot / name).parent.mkdir(exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
    if ref:
        (top / "refs").mkdir(exist_ok=True)
        (top / "refs" / "main").write_text(commit)
    return snapshot


def test_a_cache_is_its_snapshot_wherever_it_is_pointed_at(tmp_path: Path) -> None:
    top = tmp_path / "hub" / "models--org--name"
    cache(top, "old")
    snapshot = cache(top, "new")
    (tmp_path / "hub" / "private_key").write_text("SECRET")
    (snapshot / "merges.txt").symlink_to("../../../private_key")
    link = tmp_path / "link.safetensors"
    link.symlink_to(snapshot / "model-00002-of-00002.safetensors")
    folders = {"top": top, "snapshots": top / "snapshots", "snapshot": snapshot}
    files = {"file": snapshot / "model-00001-of-00002.safetensors", "link": link, "blob": top / "blobs" / "new3"}
    made = set()
    for name, source in (folders | files).items():
        done = compress.run(source, tmp_path / name, quiet=True)
        made.add(done.path.read_bytes())
        assert done.copied == (("config.json", "tokenizer/vocab.txt") if name in folders else ())
    assert len(made) == 1
    assert "2 in both" in str(pared.compare(top, tmp_path / "top"))


def test_a_cache_without_a_main_branch_asks_for_a_snapshot(tmp_path: Path) -> None:
    top = tmp_path / "models--org--name"
    cache(top, "one", ref=False)
    assert len(pared.inspect(top).rows) > 2
    cache(top, "two", ref=False)
    with pytest.raises(pared.FileError, match="holds the snapshots one, two"):
        pared.inspect(top)


def test_a_snapshot_whose_blob_is_gone(tmp_path: Path) -> None:
    top = tmp_path / "models--org--name"
    cache(top)
    (top / "blobs" / "abc3").unlink()
    with pytest.raises(pared.FileError, match="model-00002-of-00002.safetensors is missing"):
        pared.compress(top, tmp_path / "out")


@pytest.mark.parametrize("part", ["", "unet"])
def test_the_configuration_of_another_model_is_not_replaced(part: str, tmp_path: Path) -> None:
    source, place = repository(tmp_path / "one" / part), repository(tmp_path / "other" / part)
    if part:
        (tmp_path / "one" / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "UNet2DModel"]}))
    (place / "config.json").write_text('{"mine": 1}')
    before = written(tmp_path / "other")
    with pytest.raises(pared.ConfigError, match=r"other.*: holds a model that pared did not write \(model\.safet"):
        pared.compress(tmp_path / "one", tmp_path / "other")
    assert written(tmp_path / "other") == before
    assert (place / "config.json").read_text() == '{"mine": 1}'
    (source / "config.json").unlink()
    (tmp_path / "one" / "model_index.json").unlink(missing_ok=True)
    pared.compress(source, place)
    assert (place / "config.json").read_text() == '{"mine": 1}'
