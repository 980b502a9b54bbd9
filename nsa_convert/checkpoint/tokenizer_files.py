"""Checks of the tokenizer files that travel with the weights."""

from __future__ import annotations

from typing import Any

from nsa_convert.checkpoint.shards import resolve_inside
from nsa_convert.checkpoint.source import Checkpoint
from nsa_convert.errors import CheckpointError
from nsa_convert.strict_files import read_json_mapping

TOKENIZER_FILE = "tokenizer.json"
FILE_LIMIT = 200_000_000  # bytes
VALUES_LIMIT = 10_000_000
"""The largest vocabularies in use have a sixth of these."""


def check_tokenizer(checkpoint: Checkpoint) -> None:
    """Refuse a tokenizer that can produce a token the embeddings do not have.

    Raises:
        CheckpointError: A token id is too large, or ``tokenizer.json`` is not readable.
    """
    if TOKENIZER_FILE not in checkpoint.side_files:
        return

    path = resolve_inside(checkpoint.folder, TOKENIZER_FILE)
    try:
        content = read_json_mapping(path, limit=FILE_LIMIT, values=VALUES_LIMIT, code="TK01")
        largest = _largest_id(content)
    except (TypeError, AttributeError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{TOKENIZER_FILE} is damaged: {type(error).__name__} {error}",
            code="TK01",
            where=TOKENIZER_FILE,
            hint="fetch it again",
        ) from error

    rows = checkpoint.config["vocab_size"]
    if largest >= rows:
        raise CheckpointError(
            f"the tokenizer knows token {largest}, the embeddings have {rows} rows",
            code="TK02",
            where=TOKENIZER_FILE,
            expected=f"token ids below {rows}",
            found=str(largest),
            hint="use the tokenizer that belongs to these weights, or resize the embeddings first",
        )


def _largest_id(content: dict[str, Any]) -> int:
    # A BPE vocabulary maps tokens to ids; a unigram one is a list whose positions are the ids.
    vocabulary = content["model"].get("vocab") or {}
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
    ids += [token["id"] for token in content.get("added_tokens") or []]

    wrong = [number for number in ids if type(number) is not int]
    if wrong:
        raise TypeError(f"token id {wrong[0]!r}")
    return max(ids, default=-1)
