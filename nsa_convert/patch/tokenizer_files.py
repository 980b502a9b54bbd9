"""Checks of the tokenizer files that travel with the weights."""

from __future__ import annotations

import json
from typing import Any

from nsa_convert.errors import CheckpointError
from nsa_convert.patch.checkpoint import Checkpoint
from nsa_convert.patch.shards import resolve_inside

TOKENIZER_FILE = "tokenizer.json"


def check_tokenizer(checkpoint: Checkpoint) -> None:
    """Refuse a tokenizer that can produce a token the embeddings do not have.

    Raises:
        CheckpointError: A token id is too large, or ``tokenizer.json`` is not readable.
    """
    if TOKENIZER_FILE not in checkpoint.side_files:
        return
    try:
        content = json.loads(resolve_inside(checkpoint.folder, TOKENIZER_FILE).read_bytes())
        largest = _largest_id(content)
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise CheckpointError(
            f"{TOKENIZER_FILE} is damaged: {error}", code="TK01", where=TOKENIZER_FILE, hint="fetch it again"
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
    vocabulary = content["model"].get("vocab") or {}
    largest = max(vocabulary.values(), default=-1) if isinstance(vocabulary, dict) else len(vocabulary) - 1
    return max([largest, *(token["id"] for token in content.get("added_tokens") or [])])
