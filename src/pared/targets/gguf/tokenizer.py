"""The tokenizer of a Hugging Face folder as metadata of a GGUF file."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import gguf
from gguf import TokenType

from pared.errors import ConfigError, FileError
from pared.files.disk import reading
from pared.targets.gguf.splitting import KEY, splitting_of

log = logging.getLogger(__name__)

_SPACE: Final = "\u2581"  # stands for a space in tokens
_SPECIAL: Final = ("bos", "eos", "unk", "sep", "pad", "mask")
# Files that hold a tokenizer in other ways.
_OTHERS: Final = ("tokenizer.model", "vocab.json", "vocab.txt", "merges.txt")
_RENEW: Final = "Write one: transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."


@dataclass(frozen=True)
class Tokenizer:
    """What llama.cpp needs to turn text into tokens and back.

    Args:
        model: the kind: "gpt2", "llama", "bert", or "none".
        splitting: how text is split first.
        tokens: all of them, by number.
        types: one for each token.
        scores: one for each token, where tokens are joined by them.
        prefix: whether text begins with a space that is not there; None: the kind decides.
        merges: whether tokens are joined by a list of merges.
    """

    model: str
    splitting: str = "default"
    tokens: tuple[str, ...] = ()
    types: tuple[TokenType, ...] = ()
    scores: tuple[float, ...] = ()
    prefix: bool | None = None
    merges: bool = False


def read_tokenizer(folder: Path | None, rows: int) -> Tokenizer:
    """The tokenizer of a folder; without one, a model that takes the numbers of tokens only.

    Args:
        folder: where tokenizer.json is.
        rows: the tokens that the model has a row for; numbers without a token get an unused one.

    Raises:
        ConfigError: the tokenizer is of a kind that llama.cpp does not run for these architectures, or has more tokens
            than the model has rows.
        FileError: a file cannot be read.
    """
    if folder is None or not (folder / "tokenizer.json").is_file():
        other = [name for name in _OTHERS if folder is not None and (folder / name).is_file()]
        if other:
            raise ConfigError(f"has {other[0]} but no tokenizer.json", where=str(folder), remedy=_RENEW)
        log.warning("no tokenizer is written: the file takes the numbers of tokens, not text")
        return Tokenizer("none")
    data, settings = _json(folder / "tokenizer.json"), {}
    if (folder / "tokenizer_config.json").is_file():
        settings = _json(folder / "tokenizer_config.json")
    kind = data.get("model", {}).get("type")
    maker = _KINDS.get("pieces" if kind == "BPE" and data["model"].get("byte_fallback") else kind)
    where = str(folder / "tokenizer.json")
    if maker is None:
        raise ConfigError(
            f"is a tokenizer of the kind {kind}, which is not written to GGUF files",
            where=where,
            remedy="Export without a folder: then the file takes the numbers of tokens.",
        )
    return maker(data, settings, _vocabulary(data, rows, where), where)


def _json(path: Path) -> dict[str, Any]:
    with reading(path):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise FileError(f"is not JSON ({error})", where=str(path), remedy=_RENEW) from error
    return found if isinstance(found, dict) else {}


def _vocabulary(data: Mapping[str, Any], rows: int, where: str) -> list[tuple[str, TokenType]]:
    """Every number's token and its type."""
    found: dict[int, tuple[str, TokenType]] = {
        number: (token, TokenType.NORMAL) for token, number in data["model"]["vocab"].items()
    }
    for added in data.get("added_tokens", ()):
        kind = TokenType.CONTROL if added.get("special") else TokenType.USER_DEFINED
        found[added["id"]] = added["content"], kind
    if found and max(found) >= rows:
        raise ConfigError(
            f"has tokens up to number {max(found)}, and the model has rows for {rows}",
            where=where,
            remedy="Take the tokenizer that belongs to the model, or resize its table.",
        )
    return [found.get(number, (f"[PAD{number}]", TokenType.UNUSED)) for number in range(rows)]


_Vocabulary = list[tuple[str, TokenType]]


def _by_bytes(data: Mapping[str, Any], settings: Mapping[str, Any], vocabulary: _Vocabulary, where: str) -> Tokenizer:
    splitting = splitting_of(data.get("pre_tokenizer"), settings.get(KEY), where)
    tokens, types = zip(*vocabulary, strict=True)
    return Tokenizer("gpt2", splitting, tokens, types, merges=True)


def _by_pieces(data: Mapping[str, Any], _: Mapping[str, Any], vocabulary: _Vocabulary, _where: str) -> Tokenizer:
    """As SentencePiece joins them: the pair with the best score first. Of merges in order, the first has the best."""
    ranks: dict[str, int] = {}
    merges = data["model"]["merges"]
    for rank, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault("".join(pair), rank)
    unknown = data["model"].get("unk_token")
    types = []
    for token, kind in vocabulary:
        is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        types.append(TokenType.UNKNOWN if token == unknown else TokenType.BYTE if is_byte else kind)
    scores = tuple(-float(ranks.get(token, len(merges))) for token, _ in vocabulary)
    text = json.dumps([data.get("normalizer"), data.get("pre_tokenizer")])
    prefix = '"Prepend"' in text or '"prepend_scheme": "first"' in text or '"prepend_scheme": "always"' in text
    return Tokenizer("llama", "default", tuple(token for token, _ in vocabulary), tuple(types), scores, prefix)


def _by_words(data: Mapping[str, Any], _: Mapping[str, Any], vocabulary: _Vocabulary, where: str) -> Tokenizer:
    """Words and their continuations; GGUF marks where words begin, the source where they go on."""
    if not (data.get("normalizer") or {}).get("lowercase", True):
        log.warning("%s keeps capitals; llama.cpp does not: pass it the numbers of tokens", where)
    mark = data["model"].get("continuing_subword_prefix", "##")
    special = (TokenType.CONTROL, TokenType.UNUSED)
    tokens = tuple(
        token if kind in special else token.removeprefix(mark) if token.startswith(mark) else _SPACE + token
        for token, kind in vocabulary
    )
    return Tokenizer("bert", "default", tokens, tuple(kind for _, kind in vocabulary))


_Maker = Callable[[Mapping[str, Any], Mapping[str, Any], _Vocabulary, str], Tokenizer]
_KINDS: Final[Mapping[str | None, _Maker]] = {"BPE": _by_bytes, "pieces": _by_pieces, "WordPiece": _by_words}


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer, folder: Path | None) -> None:
    """Write a tokenizer, with the special tokens and the chat template of its folder."""
    writer.add_tokenizer_model(tokenizer.model)
    if not tokenizer.tokens or folder is None:
        return
    writer.add_tokenizer_pre(tokenizer.splitting)
    writer.add_token_list(list(tokenizer.tokens))
    writer.add_token_types(list(tokenizer.types))
    if tokenizer.scores:
        writer.add_token_scores(list(tokenizer.scores))
    if tokenizer.prefix is not None:
        writer.add_add_space_prefix(tokenizer.prefix)
    special = gguf.SpecialVocab(folder, tokenizer.merges, _SPECIAL, n_vocab=len(tokenizer.tokens))
    special.add_to_gguf(writer, quiet=True)
