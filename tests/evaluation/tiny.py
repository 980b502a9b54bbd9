"""A byte tokenizer and tiny checkpoints on disk."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from nsa_convert.patch.patching import patch_model
from tests.models import NSA, dense_model, plan

BUDGET = NSA["block_size"] * NSA["num_blocks"]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def tiny_dense(seed: int = 0, **changes: object) -> PreTrainedModel:
    return dense_model("llama", seed, **{"vocab_size": 256, "max_position_embeddings": 1024, **changes})


def save(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def save_pair(folder: Path, settings: dict = NSA) -> tuple[Path, Path]:
    """Write the same random weights as a dense and as a converted checkpoint."""
    dense = save(tiny_dense().float(), folder / "dense")
    sparse = save(patch_model(tiny_dense().float(), plan(settings)), folder / "sparse")
    return dense, sparse


def random_ids(length: int, seed: int = 0) -> list[int]:
    return torch.randint(256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
