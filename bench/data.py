"""Texts, recordings and packages' files for the bench, and how they are dealt into sets that do not overlap.

Debian packages and one source archive are unpacked below `FOLDER` by the Makefile; everything else is read from
installed packages.
"""

from __future__ import annotations

import bz2
import functools
import html
import os
import re
import wave
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from examples import package_folder
from numpy.typing import NDArray
from PIL import Image

T = TypeVar("T")
Part = Literal["calibration", "search", "test"]

VARIABLE = "PARED_BENCH_DATA"
FOLDER = Path(os.environ.get(VARIABLE, "out/data"))
DEBIAN = FOLDER / "deb" / "usr" / "share"

_LEAST_PARAGRAPH = 200  # characters: shorter ones are captions, lists and scraps of markup
_LEAST_ARTICLE = 1000


def generator(*seeds: int) -> np.random.Generator:
    """Random numbers that depend on all of the seeds: each triple (seed, part, index) gives other numbers."""
    return np.random.default_rng(seeds)


def deal(items: Sequence[T], sizes: Sequence[int], seed: int) -> Iterator[list[T]]:
    """Disjoint random parts of these sizes."""
    assert sum(sizes) <= len(items)
    order = generator(seed).permutation(len(items))
    for part in np.split(order, np.cumsum(sizes))[: len(sizes)]:
        yield [items[i] for i in part]


def batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for i in range(0, len(items), size):
        yield items[i : i + size]


def edits(said: Sequence[T], known: Sequence[T]) -> int:
    """Levenshtein's distance, one row of the table at a time."""
    row = list(range(len(known) + 1))
    for i, a in enumerate(said, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(known, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


def recording(file: Path, rate: int) -> NDArray[np.float32]:
    """16-bit samples at this rate, or at a fraction of it, of which the spectrum is continued with nothing."""
    with wave.open(str(file)) as recorded:
        samples = np.frombuffer(recorded.readframes(recorded.getnframes()), "<i2").astype(np.float32) / 32768
        factor = rate // recorded.getframerate()
    result: NDArray[np.float32] = np.fft.irfft(np.fft.rfft(samples), factor * len(samples)).astype(np.float32) * factor
    return result


_CATEGORIES = (
    *("animals/mammals", "animals/birds", "animals/insects", "animals/fish", "food/fruit", "food/vegetables"),
    *("plants/flowers", "town/houses", "seasonal/christmas", "household", "vehicles", "hobbies/music"),
)
_GREY = (128, 128, 128, 255)


@functools.cache
def photos() -> tuple[tuple[Path, int], ...]:
    """The 266 photos of Debian package tuxpaint-stamps-default (GPL-2), each with the number of its category."""
    return tuple(
        (file, category)
        for category, folder in enumerate(_CATEGORIES)
        for file in sorted((DEBIAN / "tuxpaint" / "stamps" / folder).rglob("*.png"))
        if "cartoon" not in str(file) and "mirror" not in str(file)
    )


def square(file: Path) -> Image.Image:
    """A photo in RGB, as wide as high; most are cut out: the rest is grey."""
    photo = Image.open(file).convert("RGBA")
    side = max(photo.size)
    result = Image.new("RGBA", (side, side), _GREY)
    result.alpha_composite(photo, ((side - photo.width) // 2, (side - photo.height) // 2))
    return result.convert("RGB")


@functools.cache
def news() -> tuple[str, ...]:
    """The 293 different documents of the Lee background corpus, which the file repeats to 300 (package gensim)."""
    file = package_folder("gensim") / "test" / "test_data" / "lee_background.cor"
    return tuple(dict.fromkeys(file.read_text(encoding="utf-8").strip().split("\n")))


@functools.cache
def wikipedia() -> tuple[str, ...]:
    """The prose of 93 Wikipedia articles, 2.5 million characters (package gensim; CC-BY-SA)."""
    (file,) = (package_folder("gensim") / "test" / "test_data").glob("enwiki-latest-pages-articles1.xml*.bz2")
    pages = re.findall(r"<text[^>]*>(.*?)</text>", bz2.decompress(file.read_bytes()).decode(), re.DOTALL)
    texts = (_prose(html.unescape(page)) for page in pages)
    return tuple(text for text in texts if len(text) > _LEAST_ARTICLE)


def _prose(markup: str) -> str:
    """Paragraphs of plain text from wiki markup; nothing for a redirection."""
    if markup.lower().startswith("#redirect"):
        return ""
    text = markup
    for _ in range(4):  # templates and tables hold others
        text = re.sub(r"\{\{[^{}]*\}\}|\{\|[^{}]*\|\}", "", text)
    text = re.sub(r"<ref[^>]*/>|<ref.*?</ref>|<!--.*?-->|<[^>]+>", "", text, flags=re.DOTALL)
    text = re.sub(r"\[\[(?:File|Image|Category):[^\[\]]*(?:\[\[[^\]]*\]\][^\[\]]*)*\]\]", "", text)
    text = re.sub(r"\[\[(?:[^|\]]*\|)?([^\]]*)\]\]", r"\1", text)  # a link is its text
    text = re.sub(r"'{2,}|\[http\S* ?([^\]]*)\]", r"\1", text)
    text = re.sub(r"^[=*#:;|!].*$", "", text, flags=re.MULTILINE)  # headings, lists, rows of tables
    paragraphs = re.split(r"\n\s*\n", text.strip())
    return "\n\n".join(paragraph for paragraph in paragraphs if len(paragraph) > _LEAST_PARAGRAPH)


def passages(count: int) -> list[str]:
    """Single paragraphs of Wikipedia, drawn at random, the same ones always."""
    paragraphs = [paragraph for article in wikipedia() for paragraph in article.split("\n\n")]
    (chosen,) = deal(paragraphs, [count], seed=0)
    return chosen
