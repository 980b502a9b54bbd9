"""Tiny random checkpoints of every family, and ways to damage them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
FAMILY_OPTIONS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": None, "head_dim": 8},
}
SETTINGS = {
    "compression_block": 8,
    "compression_stride": 4,
    "block_size": 8,
    "num_blocks": 4,
    "window_size": 8,
}
"""NSA small enough that a test's context is longer than the visible budget of 32 tokens."""


def dense_model(model_type: str = "llama", *, seed: int = 0, **options: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {**SIZES, **FAMILY_OPTIONS[model_type], **options}
    config = AutoConfig.for_model(model_type, **values)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.3)
    return model.eval()


def write_dense(folder: Path, model_type: str = "llama", *, shards: bool = True, **options: Any) -> Path:
    """Save a tiny checkpoint; several shards unless ``shards`` is false."""
    model = dense_model(model_type, **options)
    model.save_pretrained(folder, max_shard_size="12KB" if shards else "1GB")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}\n')
    vocabulary = {f"<{i}>": i for i in range(64)}
    model_part = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<0>"}
    (folder / "tokenizer.json").write_text(
        json.dumps({"version": "1.0", "added_tokens": [], "model": model_part})
    )
    return folder


def tree_hash(folder: Path) -> dict[str, str]:
    """Return path -> hash of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def edit_json(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text())
    for key, value in changes.items():
        values.pop(key, None) if value is ... else values.__setitem__(key, value)
    path.write_text(json.dumps(values))


def shard_paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))
