"""Causes that show in the headers: no numbers are read here."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Final

from pared.checkpoints.quantized.recognize import REMEDY, recognize
from pared.inspection.findings.finding import JUDGED_NBYTES, QUANTIZED, WORTH_SHARE, Case, Cause, megabytes
from pared.readers.listing import ListedTensor, Listing, Storage

# A pickle needs about 200 bytes to describe a tensor, and a state dict holds little else. A pickle far larger than
# that holds other data: images, tables, logs.
_PICKLED_NBYTES: Final = 1024
# The share of a quantized file from which unquantized tensors are worth reporting.
_MOSTLY: Final = 0.25
# Remedies where `pared compress` does not help.
_NO_MODEL: Final = "Keep it only as long as the training may be continued."
_OF_SOURCE: Final = "Compress the float model it was made from: pared compress FLOAT.pt -o small"
# What loading imports if torch.save pickled one of our quantized models whole, and the remedy: for current versions,
# and for those before 0.1, whose pickles are no longer read.
_SAVE: Final = {
    "pared._revive": "It is a quantized model already: torch.load(path, weights_only=False).save(directory) writes it "
    "without code.",
    "pared.model._revive": "It is a quantized model of a version before 0.1, whose pickles are no longer read: use the "
    "artifact that save(directory) wrote.",
}
_WHOLE: Final = "Save the whole state dict into a file of its own; pared compress refuses this one."
_PICKLE: Final = re.compile(r"(^\(|: )pickle\)$")


def executable_pickle(case: Case) -> Iterator[Cause]:
    """Code that loading the file would import and could run."""
    imports = case.listing.imports
    if imports:
        shown = ", ".join(imports[:3]) + (f" and {len(imports) - 3} more" if imports[3:] else "")
        nbytes = sum(_pickles(case.listing).values())
        remedy = next((_SAVE[name] for name in imports if name in _SAVE), "")
        yield Cause(imports, nbytes, f"loading it would run {shown}", remedy, always=True)


def stray_bytes(case: Case) -> Iterator[Cause]:
    """Bytes of a file that belong to no tensor: what they hold is missing from the listing."""
    stray = {name: note for name, note in case.listing.notes.items() if note.stray}
    if stray:
        nbytes = sum(note.nbytes for note in stray.values())
        why = "; ".join(dict.fromkeys(note.because for note in stray.values()))
        evidence = f"{nbytes:,} bytes are {why}: another file may have been appended"
        yield Cause(tuple(stray), nbytes, evidence, _WHOLE, always=True)


def ballast(case: Case) -> Iterator[Cause]:
    """Bytes that no tensor of the model needs."""
    used = {held.storage for held in case.listing.tensors}
    # Code that the file imports may use storages that no tensor refers to.
    unused = {} if case.listing.imports else {k: s for k, s in case.listing.storages.items() if k not in used}
    pieces = {f"(data/{key})": storage.nbytes for key, storage in unused.items()}
    reasons = ["storages that no tensor refers to"] if pieces else []
    for name, note in case.listing.notes.items():
        if note.ballast:
            pieces[name] = note.nbytes
            reasons.append(f"{name}: {note.because}" if note.because else name)
    needed = _PICKLED_NBYTES * (1 + len(case.listing.tensors))
    pickles = _pickles(case.listing)
    if sum(pickles.values()) > 2 * needed:
        pieces[max(pickles, key=lambda name: pickles[name])] = sum(pickles.values()) - needed
        reasons.append("its pickle holds data other than tensors")
    for left in case.selection.left_out:
        if left.kind == "ballast" and left.nbytes:
            pieces[left.name] = left.nbytes
            reasons.append(left.because)
    yield Cause(tuple(pieces), sum(pieces.values()), "; ".join(dict.fromkeys(reasons)))


def _pickles(listing: Listing) -> dict[str, int]:
    """The bytes of the pickle, or of the pickles of the files in a folder, by the names of their notes."""
    return {name: note.nbytes for name, note in listing.notes.items() if _PICKLE.search(name)}


def view_of_larger_storage(case: Case) -> Iterator[Cause]:
    """Storages that the tensors use only in part: `torch.save` writes all of them."""
    tenants: dict[str, list[ListedTensor]] = {}
    for held in case.distinct:
        tenants.setdefault(str(held.storage), []).append(held)
    wasted = {
        group[0].name: (case.listing.storages[key], unused)
        for key, group in tenants.items()
        if (unused := _unused(group, case.listing.storages[key]))
    }
    if wasted:
        name, (storage, unused) = max(wasted.items(), key=lambda item: item[1][1])
        evidence = f"{name} uses {megabytes(storage.nbytes - unused)} of a storage of {megabytes(storage.nbytes)}"
        evidence += f"; and {len(wasted) - 1} more" if len(wasted) > 1 else ""
        yield Cause(tuple(wasted), sum(unused for _, unused in wasted.values()), evidence, explains=False)


def _unused(tenants: Sequence[ListedTensor], storage: Storage) -> int:
    """The bytes of a storage that its tensors do not use (a lower bound)."""
    return 0 if storage.coded else max(0, storage.nbytes - sum(held.nbytes for held in tenants))


def optimizer_state(case: Case) -> Iterator[Cause]:
    """The state that an optimizer keeps for each weight, which only training needs."""
    left = [left for left in case.selection.left_out if left.kind == "optimizer-state"]
    words = "/".join(sorted({_last(one.name) for one in left if one.nbytes > 8}))
    nbytes = sum(one.nbytes for one in left)
    model = sum(kept.held.nbytes for kept in case.selection.kept)
    alone = model <= WORTH_SHARE * nbytes
    times = "there is no model" if alone else f"{nbytes / model:.1f} times the bytes of the model"
    evidence = f"{words[:60]} in {len(left)} entries: only training needs them; {times}"
    yield Cause(tuple(one.name for one in left), nbytes, evidence, _NO_MODEL if alone else "")


def quantized_already(case: Case) -> Iterator[Cause]:
    """Codes and scales of another tool, which must not be rounded again; no other cause is looked for in their file."""
    found = recognize(case.listing)
    if found is not None:
        kept = [one.held for one in case.selection.kept]
        nbytes = sum(map(case.stored, found.codes or kept))
        names = tuple(held.name for held in (*found.codes, *kept))
        because = "pared compress keeps every tensor as it is"
        evidence = f"{found.label} ({found.seen}): {because}"
        yield Cause(tuple(dict.fromkeys(names)), nbytes, evidence, REMEDY, always=True)


def left_in_float(case: Case) -> Iterator[Cause]:
    """Weights that a quantizer left in float32, in a file that is otherwise quantized."""
    weights = [held for held in case.distinct if len(held.shape) > 1 and held.name not in case.explained]
    codes = [held for held in weights if held.dtype in QUANTIZED]
    floats = [held for held in weights if held.dtype == "float32" and held.nbytes >= JUDGED_NBYTES]
    if codes and sum(map(case.stored, floats)) >= _MOSTLY * case.listing.nbytes:
        largest = max(floats, key=lambda held: held.nbytes)
        yield Cause(
            tuple(held.name for held in floats),
            sum(map(case.stored, floats)),
            f"{len(codes)} tensors are {codes[0].dtype}, but {len(floats)} are still float32, such as {largest.name}",
            _OF_SOURCE if any(kept.held.dtype in QUANTIZED for kept in case.selection.kept) else "",
            explains=False,
        )


def _last(name: str) -> str:
    return name.replace("/", ".").rpartition(".")[2]


def wide_float(case: Case) -> Iterator[Cause]:
    """Weights in float64: twice the size of what networks are trained in."""
    wide = [held for held in case.distinct if held.dtype == "float64" and held.nbytes >= JUDGED_NBYTES]
    wide = [held for held in wide if held.name not in case.explained]
    yield Cause(
        tuple(held.name for held in wide),
        sum(map(case.stored, wide)),
        f"{sum(math.prod(held.shape) for held in wide):,} numbers are float64, in {len(wide)} tensors",
    )
