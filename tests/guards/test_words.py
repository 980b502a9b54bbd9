"""One meaning a word, one word a thing: pages and code keep the tables of docs/concepts.md."""

from __future__ import annotations

import io
import re
import tokenize

import pytest

from tests.published.pages import PAGES, ROOT

CONCEPTS = ROOT / "docs" / "concepts.md"
HISTORY = "docs/log.md"
"""Says what was tried in the words of its day."""


def rows(text: str, mark: str) -> list[list[str]]:
    """Return the cells of the table between two marks, its header left out."""
    found = re.search(rf"<!-- {mark} -->\n(.*?)<!-- /{mark} -->", text, re.DOTALL)
    assert found, f"the page has no <!-- {mark} --> section"
    lines = found[1].strip().splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def prose(text: str) -> str:
    """Return a page's words alone: no code, no tables of words, no targets of links."""
    text = re.sub(r"<!-- (words|not used|retired) -->.*?<!-- /\1 -->", "", text, flags=re.DOTALL)
    text = re.sub(r"^( *)```.*?^\1```", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"\n\n(?:    .*\n)+", "\n\n", text)
    text = re.sub(r"`[^`]*`", "", text)
    return " ".join(re.sub(r"\]\([^)]*\)|<!--.*?-->", "]", text).split())


def uses(text: str, word: str) -> list[str]:
    """Return the places where a word stands, in one or many, with what is around it."""
    ends = "" if word.endswith("s") else "(?:s|es)?"
    pattern = rf"(?<![\w-]){re.escape(word)}{ends}(?![\w-])"
    return [
        text[max(0, found.start() - 30) : found.end() + 20]
        for found in re.finditer(pattern, text, re.IGNORECASE)
    ]


def names(source: str) -> set[str]:
    """Return the identifiers of a Python file, comments and texts left out."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.string for token in tokens if token.type == tokenize.NAME}


def forbidden(text: str, table: list[list[str]]) -> list[str]:
    """Return the places where a word stands that is not used."""
    found = []
    for words, _, allowed in table:
        left = text
        for phrase in filter(None, allowed.split(", ")):
            left = re.sub(re.escape(phrase), "", left, flags=re.IGNORECASE)
        found += [f"{word}: ...{place}..." for word in words.split(", ") for place in uses(left, word)]
    return found


WORDS = rows(CONCEPTS.read_text(), "words")
NOT_USED = rows(CONCEPTS.read_text(), "not used")
RETIRED = {row[0].strip("`"): row[1] for row in rows(CONCEPTS.read_text(), "retired")}
TEXTS = {page: prose(path.read_text()) for page, path in PAGES.items() if page != HISTORY}


def test_a_word_has_one_meaning_and_a_meaning_one_word():
    words, meanings = zip(*WORDS, strict=True)
    assert all(meanings)
    assert len({word.lower() for word in words}) == len(words)
    assert len(set(meanings)) == len(meanings)
    assert {word for row in NOT_USED for word in row[0].split(", ")} & set(words) == set()


@pytest.mark.parametrize("word", [row[0] for row in WORDS])
def test_a_word_is_used(word):
    assert any(uses(text, word) for text in TEXTS.values()), "no page uses it: leave it out of the table"


@pytest.mark.parametrize("page", TEXTS)
def test_a_page_does_without_what_is_not_used(page):
    found = forbidden(TEXTS[page], NOT_USED)
    assert not found, "\n".join(found)


def test_retired_identifiers_are_gone():
    code = {path: names(path.read_text()) for path in sorted((ROOT / "nsa_convert").rglob("*.py"))}
    assert code
    found = [f"{path.relative_to(ROOT)}: {name}" for path in code for name in RETIRED if name in code[path]]
    assert not found, "\n".join(found)


def test_these_checks_can_fail():
    table = [["stream, streams", "token states", "residual stream"]]
    assert forbidden("The residual stream is added.", table) == []
    assert forbidden("Two streams of a layer.", table) != []
    assert forbidden("StreamingLLM, streaming heads and a streamed answer", table) == []
    assert forbidden(prose("See `stream` and\n```text\nstream\n```\n[x](stream.md)"), table) == []
    assert uses("All tiles", "tile")
    assert not uses("reptile, tile-wise", "tile")
    assert names("a.cover = 1  # covers\n'cover_all'") == {"a", "cover"}
    page = "<!-- words -->\n| word | meaning |\n|---|---|\n| a | b |\n<!-- /words -->"
    assert rows(page, "words") == [["a", "b"]]


def test_pages_are_read():
    assert {"README.md", "docs/concepts.md"} <= TEXTS.keys()
    assert len(TEXTS["docs/concepts.md"]) > 1000
