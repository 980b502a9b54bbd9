"""Read what a GGUF file says about its model, without its weights (format version 2 and 3).

Only names, counts and numbers are read; the long lists of the tokenizer are walked over. transformers reads
the weights later; where it would lose something on the way (scaled RoPE), the file is refused here.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

from nsa_convert.errors import CheckpointError, UnsupportedModelError
from nsa_convert.families import FAMILIES

MAX_COUNT = 10_000_000

# Value type -> struct code, for the types of fixed size.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING = 8
_ARRAY = 9

_KEYS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
"""GGUF key behind the architecture's name -> key of config.json."""


class _Reader:
    """Reads the header of a memory-mapped file, value by value."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 4  # after the letters GGUF

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def count(self) -> int:
        value = self.number("Q")
        if value > MAX_COUNT:
            raise ValueError(f"a count of {value:,}")
        return value

    def string(self) -> str:
        length = self.count()
        self.at += length
        if self.at > len(self.data):
            raise ValueError("a text beyond the end of the file")
        return self.data[self.at - length : self.at].decode()

    def value(self) -> Any:
        """Return a number or text; an array gives its length."""
        kind = self.number("I")
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise ValueError(f"value type {kind}")

        inner = self.number("I")
        length = self.count()

        # Elements are skipped: of the arrays only the length is of use (the number of tokens).
        if inner in _NUMBERS:
            self.at += length * struct.calcsize("<" + _NUMBERS[inner])
        elif inner == _STRING:
            for _ in range(length):
                self.at += 8 + struct.unpack_from("<Q", self.data, self.at)[0]
        else:
            raise ValueError(f"array of type {inner}")

        return length


def read_gguf_config(path: Path) -> dict[str, Any]:
    """Return the config.json that describes the model of a GGUF file.

    Raises:
        CheckpointError: The header is damaged, or the model has scaled RoPE, which transformers would drop.
        UnsupportedModelError: The architecture is not one that can be converted.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            fields, tensors = _read_header(_Reader(data))
    except (struct.error, ValueError, IndexError) as error:
        raise CheckpointError(
            f"{path.name} cannot be read: {error}", code="CK02", where=path.name, hint="fetch the file again"
        ) from error

    architecture = fields.get("general.architecture")
    if architecture not in FAMILIES:
        raise UnsupportedModelError(
            f"GGUF architecture {architecture!r} cannot be converted",
            code="CF12",
            where=path.name,
            expected=", ".join(FAMILIES),
            found=repr(architecture),
        )

    # transformers reads the plain RoPE of a GGUF file and drops its scaling without a word.
    prefix = f"{architecture}."
    if fields.get(prefix + "rope.scaling.type", "none") != "none" or "rope_freqs.weight" in tensors:
        raise CheckpointError(
            f"{path.name} has scaled RoPE, which transformers does not read from GGUF files",
            code="CF09",
            where=path.name,
            hint="convert the original checkpoint of the model",
        )

    # GGUF keys under the names of config.json; without a vocab_size the list of tokens has its length.
    config = {ours: fields[prefix + theirs] for theirs, ours in _KEYS.items() if prefix + theirs in fields}
    config.setdefault("vocab_size", fields.get("tokenizer.ggml.tokens"))

    # Like transformers, which reads the head dim from the file for these two families only.
    if architecture in ("llama", "mistral") and prefix + "rope.dimension_count" in fields:
        config["head_dim"] = fields[prefix + "rope.dimension_count"]
    if architecture == "mistral":
        config["sliding_window"] = None

    return {**config, "model_type": architecture, "tie_word_embeddings": "output.weight" not in tensors}


def _read_header(reader: _Reader) -> tuple[dict[str, Any], set[str]]:
    """Return metadata and tensor names."""
    version = reader.number("I")
    if version not in (2, 3):
        raise ValueError(f"GGUF version {version}")

    num_tensors = reader.count()
    num_fields = reader.count()

    fields = {}
    for _ in range(num_fields):
        key = reader.string()
        fields[key] = reader.value()

    # A tensor: its name, its sizes (8 bytes each), its type (4) and its place (8).
    names = set()
    for _ in range(num_tensors):
        names.add(reader.string())
        dimensions = reader.number("I")
        reader.at += 8 * dimensions + 4 + 8

    if reader.at > len(reader.data):
        raise ValueError("the file ends inside its header")
    return fields, names
