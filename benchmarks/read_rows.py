"""How fast rows are read, tokenised and packed, and what that costs the training process.

    python -m benchmarks.read_rows

Reads rows of 8192 tokens of Python's own sources with a BPE tokenizer of 8,000 tokens: one document after
another as a training loop would without help, then with the loader of ``nsa-convert train`` and 0, 1 and 2
workers, and one of two processes. Prints tokens a second, and per second of CPU of the training process.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from nsa_convert.training.data import lanes
from nsa_convert.training.data.documents import Order
from nsa_convert.training.data.loader import RowLoader
from nsa_convert.training.data.rows import PackedRows, collate
from nsa_convert.training.recipe.schema import recipe_from_dict
from nsa_convert.training.recipe.sections import Source
from nsa_convert.training.run.models import fresh_tokenizer

SEQ_LEN = 8192
STEP = 16
"""Rows of a step."""
DATA = {"kind": "python"}


def tokenizer() -> Any:
    """Return a tokenizer trained on the data."""
    config = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    stage = {"name": "a", "kind": "pretrain", "train": "all", "seq_len": 64, "tokens": 64, "batch_tokens": 64}
    model = {"family": "llama", "vocab": 8000, "config": config}
    values = {"model": model, "out": "none", "stages": [{**stage, "data": [DATA]}]}
    return fresh_tokenizer(recipe_from_dict(values), Path())


def one_by_one(text_tokenizer: Any) -> Iterator[Any]:
    """Yield micro-batches of one row, each document tokenised by itself when it is needed."""
    rows = PackedRows([Source(**DATA)], text_tokenizer, SEQ_LEN, Order(), Path(), 1)
    rows._encoder._fast = False
    kept = lanes.AHEAD
    lanes.AHEAD = 1
    try:
        for row in rows:
            yield collate([row])
    finally:
        lanes.AHEAD = kept


def measure(name: str, batches: Callable[[], Iterator[Any]], count: int) -> None:
    """Print the speed of an iterator after its first batches."""
    stream = batches()
    list(islice(stream, STEP))
    begin, used = time.perf_counter(), time.process_time()
    read = sum(batch["input_ids"].numel() for batch in islice(stream, count))
    seconds, busy = time.perf_counter() - begin, time.process_time() - used
    print(f"{name:34} {read / seconds:12,.0f} tokens/s {read / busy:14,.0f} per CPU second", flush=True)


def main() -> None:
    """Measure every way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=160, help="rows that are timed")
    count = parser.parse_args().rows
    text_tokenizer = tokenizer()

    def loader(**options: int) -> Callable[[], Iterator[Any]]:
        rows = PackedRows([Source(**DATA)], text_tokenizer, SEQ_LEN, Order(), Path(), STEP)
        return lambda: iter(RowLoader(rows, 1, **options))

    measure("one by one, in the process", lambda: one_by_one(text_tokenizer), count)
    for workers in (0, 1, 2):
        measure(f"{workers} workers", loader(workers=workers), count)
    measure("1 worker, one of two processes", loader(workers=1, processes=2), count // 2)


if __name__ == "__main__":
    main()
