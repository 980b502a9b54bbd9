"""Parts of a recipe: data sources, RoPE scaling, adapters, fresh models."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from nsa_convert.settings import raise_problems

GENERATED = ("python", "reference", "recall")
"""Kinds of data that need no file: they come with Python or are generated."""


MOST_LANES = 256
"""Lanes of a stage: each keeps documents in memory."""
STREAMED = ("jsonl", "parquet", "hub")
"""Kinds of data that can be read as a stream."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """One part of a data mixture.

    Attributes:
        kind: ``python`` (sources of the running Python's standard library), ``reference`` (its language
            reference), ``recall`` (generated key/value recall, see :mod:`nsa_convert.training.data.sources`),
            ``text`` (files, one document each), ``jsonl``, ``parquet``, or ``hub`` (a data set of the Hub).
        path: File, folder or glob of a file kind; the data set id of ``hub``.
        weight: Share of the tokens, relative to the other sources of the stage.
        column: Field that holds the text (``sft``: the list of messages).
        config: Configuration of a Hub data set.
        split: Split of a Hub data set.
        streaming: Read ``jsonl``, ``parquet`` or ``hub`` row by row instead of fetching or counting it first.
        shuffle: Documents of a streamed source that are shuffled at a time, beside its shards.
        hold_out: Share of the documents that training never sees: the end of a fixed shuffle; of a streamed
            source those whose text has a hash below it.
        size: Documents to draw from, 0 for all; ``recall`` has no end of its own, a streamed source no size.
        min_tokens: Documents of fewer tokens are passed over.
        max_tokens: Documents of more tokens are passed over; 0 for no limit. With ``min_tokens`` a class of
            lengths: a mixture may name one data set several times, each time with another class.
        skip_bad: Documents that may be left out because they are damaged or no text; more are an error.
        pairs: Most key/value pairs in a ``recall`` document, at most 26.
        filler: Most characters of other text (Python's language reference) between what a ``recall`` document
            tells and what it asks for; each document draws its number from 0 to this one. 4 characters are
            about one token: ``filler`` of four times ``seq_len`` lets recall span whole rows.
    """

    kind: Literal["python", "reference", "recall", "text", "jsonl", "parquet", "hub"]
    path: str | None = None
    weight: float = 1.0
    column: str = "text"
    config: str | None = None
    split: str = "train"
    streaming: bool = False
    shuffle: int = 1000
    hold_out: float = 0.0
    size: int = 0
    min_tokens: int = 0
    max_tokens: int = 0
    skip_bad: int = 0
    pairs: int = 20
    filler: int = 0

    def __post_init__(self) -> None:
        problems = []
        if self.kind in GENERATED and self.path is not None:
            problems.append(f"kind {self.kind} reads no path, got {self.path!r}")
        if self.kind not in GENERATED and not self.path:
            problems.append(f"kind {self.kind} needs a path")

        if not (self.weight > 0 and math.isfinite(self.weight)):
            problems.append(f"weight must be a positive number, got {self.weight}")
        if not 0 <= self.hold_out < 1:
            problems.append(f"hold_out must be at least 0 and below 1, got {self.hold_out}")
        if self.streaming and self.kind not in STREAMED:
            problems.append(f"streaming is for {', '.join(STREAMED)}, not for {self.kind}")
        if self.streaming and self.size:
            problems.append(
                "size needs a source that can be counted, not streaming: true; leave one of them out (tokens "
                "of the stage says how much is read)"
            )
        if self.shuffle < 1:
            problems.append(f"shuffle must be >= 1, got {self.shuffle}")
        if self.size < 0 or self.skip_bad < 0:
            problems.append(f"size and skip_bad must be >= 0, got {self.size} and {self.skip_bad}")
        if self.min_tokens < 0 or self.max_tokens < 0:
            problems.append(
                f"min_tokens and max_tokens must be >= 0, got {self.min_tokens} and {self.max_tokens}"
            )
        elif 0 < self.max_tokens < self.min_tokens:
            problems.append(f"max_tokens {self.max_tokens} is below min_tokens {self.min_tokens}")
        if self.filler < 0 or (self.filler and self.kind != "recall"):
            problems.append(f"filler is a number of characters from 0 for kind recall, got {self.filler}")
        if not 1 <= self.pairs <= 26:
            problems.append(f"pairs must be between 1 and 26, got {self.pairs}")
        raise_problems(problems, code="RC08")

    def takes(self, tokens: int) -> bool:
        """Return whether a document of this many tokens is in the class of lengths."""
        return self.min_tokens <= tokens <= (self.max_tokens or tokens)

    @property
    def name(self) -> str:
        """What the source reads: sources of the same name read the same documents."""
        return " ".join(filter(None, (self.kind, self.path, self.config, self.split, self.column)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How positions beyond the trained ones are rotated.

    Attributes:
        type: ``llama3``, ``yarn`` or ``linear``.
        factor: New length over ``original``.
        original: Positions the model was trained for; its max_position_embeddings when left out.
        low_freq_factor: llama3 only.
        high_freq_factor: llama3 only.
    """

    type: Literal["llama3", "yarn", "linear"]
    factor: float
    original: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        problems = []
        if not (self.factor >= 1 and math.isfinite(self.factor)):
            problems.append(f"factor must be a number from 1, got {self.factor}")
        if self.original is not None and self.original < 1:
            problems.append(f"original must be >= 1, got {self.original}")
        if self.type == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            problems.append("low_freq_factor must be positive and below high_freq_factor")
        raise_problems(problems, code="RC08")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters on the dense weights; new weights are trained whole beside them.

    Attributes:
        rank: Rank.
        alpha: Scale is alpha / rank.
        dropout: On the adapter's input.
        targets: Linear layers that get an adapter.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")

    def __post_init__(self) -> None:
        problems = []
        if self.rank < 1 or self.alpha <= 0:
            problems.append(f"rank and alpha must be positive, got {self.rank} and {self.alpha}")
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout must be at least 0 and below 1, got {self.dropout}")
        if not self.targets:
            problems.append("targets is empty")
        raise_problems(problems, code="RC08")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FreshModel:
    """A model with random weights, to be trained from nothing.

    Attributes:
        family: ``model_type`` of transformers.
        config: Keys of its config.json, sizes above all.
        vocab: Tokens of a byte-level BPE tokenizer that is trained on the first stage's data; 257 is bytes.
    """

    family: Literal["llama", "qwen2", "qwen3", "mistral"]
    config: Mapping[str, Any]
    vocab: int = 257


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """What a recipe is meant for; `--dry-run` says whether it fits, and how long it takes there.

    Attributes:
        devices: Number of GPUs.
        memory: Memory of each, in GB (1e9 bytes).
        gpu: Kind of GPU, for the estimate of time.
    """

    devices: int
    memory: float
    gpu: Literal["B300", "B200", "H100", "H200", "H800", "A100", "A800", "L40S", "5090", "4090", "MI300X"] = (
        "H100"
    )

    def __post_init__(self) -> None:
        if self.devices < 1 or not (self.memory > 0 and math.isfinite(self.memory)):
            problem = f"devices and memory must be positive, got {self.devices} and {self.memory}"
            raise_problems([problem], code="RC08")
