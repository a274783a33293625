"""What people read is plain English: the phrases of the list do not occur, and the list recognizes them."""

import pytest

from tests import words

# One sentence for each pattern, with the phrase that it has to find.
UN_ENGLISH = {
    "The header has so many bytes.": "so many",
    "'abc' is no rate.": "is no rate",
    "Modules are found by themselves.": "by themselves",
    '    """Of the data."""': "Of the",
    "        nbytes: of the file.": "nbytes: of",
    "    # What an index takes more, about": ", about",
    "Whoever exceeds the bound gets an error.": "Whoever",
    "It quantizes anew.": "anew",
    "They run in turns.": "in turns",
    "Files stay readable for ever.": "for ever",
    "It bears the name of its class.": "bears the name",
    "Neither are such ones served.": "such ones",
    "Codes are cast by way of int32.": "by way of",
    "The command that mends it.": "mends",
    "No compiler may be asked for at the user's.": "at the user's",
    "All that is said of each word.": "is said of",
    "The workshop builds models.": "workshop",
    "All are equal, but for a single one.": ", but for",
    "A layer of one's own.": "one's own",
    "They do what is said there.": "what is said",
}
ENGLISH = """
There is no limit, and it is no longer than a line. The dataclass is nonempty, and there are no data.
    nbytes: the size of the file, about 3 kB.
    format: offset in bytes
Of these, two are kept. The forms are timed in turn. A means of recovery, amended once.
"""


def test_no_phrase_of_the_list_occurs() -> None:
    assert [f"{name}:{line}: {phrase!r}: write {instead}" for name, line, phrase, instead in words.found()] == []


@pytest.mark.parametrize("sentence", UN_ENGLISH)
def test_each_phrase_is_found_in_its_line(sentence: str) -> None:
    found = list(words.found_in(f"A line before it.\n{sentence}\nA line after it.\n"))
    assert [(line, phrase) for line, phrase, _ in found] == [(2, UN_ENGLISH[sentence])]


def test_each_pattern_has_a_sentence() -> None:
    seen = {instead for sentence in UN_ENGLISH for _, _, instead in words.found_in(sentence)}
    assert seen == set(words.INSTEAD.values())


def test_plain_sentences_pass() -> None:
    assert list(words.found_in(ENGLISH)) == []
