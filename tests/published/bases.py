"""Stand-ins for what recipes name on the Hub: folders of the same names, found before the Hub is asked.

A model is random, of its own family and with its own shape (heads to a key/value head, head size on its own
or not, tied embeddings, biases, RoPE), only small; a data set has the published configurations and columns.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Base:
    """What config.json of a published dense model says.

    Attributes:
        family: ``model_type``.
        hidden: Width.
        inner: Width inside the MLP.
        layers: Number of layers.
        heads: Query heads.
        kv_heads: Key/value heads.
        head_dim: None where it is hidden / heads.
        positions: ``max_position_embeddings``.
        vocab: Rows of the embeddings.
        tied: Whether the output layer is the embedding.
        theta: Of RoPE.
        rope: Its scaling, as the published file has it.
        more: Further keys of the published file.
        bos: Whether the tokenizer puts a token before each text.
    """

    family: str
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int | None
    positions: int
    vocab: int
    tied: bool
    theta: float
    rope: dict[str, Any] | None = None
    more: dict[str, Any] = dataclasses.field(default_factory=dict)
    bos: bool = False

    def config(self) -> dict[str, Any]:
        """Return the values of its config.json, in the form of the published file."""
        sizes = {
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": self.positions,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied,
            "rope_theta": self.theta,
            "rope_scaling": None if self.rope is None else dict(self.rope),
            **self.more,
        }
        return sizes | ({} if self.head_dim is None else {"head_dim": self.head_dim})

    def small(self, shrink: int, layers: int = 1) -> Base:
        """Return a base of few layers, its positions divided by ``shrink``, its shape kept."""
        kv_heads = min(2, self.kv_heads)
        heads = kv_heads * (self.heads // self.kv_heads)
        dim = 8 if heads > 4 else 16
        own_dim = self.head_dim is not None and self.head_dim * self.heads != self.hidden
        rope = None if self.rope is None else dict(self.rope)
        if rope is not None:
            rope["original_max_position_embeddings"] //= shrink
        return dataclasses.replace(
            self,
            hidden=heads * dim // (2 if own_dim else 1),
            inner=64,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=None if self.head_dim is None else dim,
            positions=self.positions // shrink,
            vocab=264,
            rope=rope,
        )


BASES = {
    "meta-llama/Llama-3.2-1B": Base(
        family="llama",
        hidden=2048,
        inner=8192,
        layers=16,
        heads=32,
        kv_heads=8,
        head_dim=64,
        positions=131072,
        vocab=128256,
        tied=True,
        theta=500000.0,
        rope={**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192},
        bos=True,
    ),
    "meta-llama/Llama-3.1-8B": Base(
        family="llama",
        hidden=4096,
        inner=14336,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=None,
        positions=131072,
        vocab=128256,
        tied=False,
        theta=500000.0,
        rope={**LLAMA3, "factor": 8.0, "original_max_position_embeddings": 8192},
        bos=True,
    ),
    "Qwen/Qwen3-0.6B-Base": Base(
        family="qwen3",
        hidden=1024,
        inner=3072,
        layers=28,
        heads=16,
        kv_heads=8,
        head_dim=128,
        positions=32768,
        vocab=151936,
        tied=True,
        theta=1e6,
    ),
    "Qwen/Qwen3-4B-Base": Base(
        family="qwen3",
        hidden=2560,
        inner=9728,
        layers=36,
        heads=32,
        kv_heads=8,
        head_dim=128,
        positions=32768,
        vocab=151936,
        tied=True,
        theta=1e6,
    ),
    "Qwen/Qwen3-8B-Base": Base(
        family="qwen3",
        hidden=4096,
        inner=12288,
        layers=36,
        heads=32,
        kv_heads=8,
        head_dim=128,
        positions=32768,
        vocab=151936,
        tied=False,
        theta=1e6,
    ),
    "Qwen/Qwen2.5-7B": Base(
        family="qwen2",
        hidden=3584,
        inner=18944,
        layers=28,
        heads=28,
        kv_heads=4,
        head_dim=None,
        positions=131072,
        vocab=152064,
        tied=False,
        theta=1e6,
        more={"sliding_window": 131072, "use_sliding_window": False, "max_window_layers": 28},
    ),
    "Qwen/Qwen2.5-0.5B": Base(
        family="qwen2",
        hidden=896,
        inner=4864,
        layers=24,
        heads=14,
        kv_heads=2,
        head_dim=None,
        positions=32768,
        vocab=151936,
        tied=True,
        theta=1e6,
        more={"sliding_window": 32768, "use_sliding_window": False, "max_window_layers": 24},
    ),
    "Qwen/Qwen2.5-1.5B": Base(
        family="qwen2",
        hidden=1536,
        inner=8960,
        layers=28,
        heads=12,
        kv_heads=2,
        head_dim=None,
        positions=131072,
        vocab=151936,
        tied=True,
        theta=1e6,
        more={"sliding_window": 131072, "use_sliding_window": False, "max_window_layers": 28},
    ),
    "Qwen/Qwen2.5-3B": Base(
        family="qwen2",
        hidden=2048,
        inner=11008,
        layers=36,
        heads=16,
        kv_heads=2,
        head_dim=None,
        positions=32768,
        vocab=151936,
        tied=True,
        theta=1e6,
        more={"sliding_window": 32768, "use_sliding_window": False, "max_window_layers": 36},
    ),
    "mistralai/Mistral-7B-v0.3": Base(
        family="mistral",
        hidden=4096,
        inner=14336,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=None,
        positions=32768,
        vocab=32768,
        tied=False,
        theta=1e6,
        more={"sliding_window": None},
        bos=True,
    ),
    "HuggingFaceTB/SmolLM2-135M": Base(
        family="llama",
        hidden=576,
        inner=1536,
        layers=30,
        heads=9,
        kv_heads=3,
        head_dim=None,
        positions=8192,
        vocab=49152,
        tied=True,
        theta=100000.0,
    ),
}
"""Hub id -> the published config.json, for every model that a recipe takes from the Hub."""

DATA = {
    "HuggingFaceFW/fineweb-edu": ("sample-10BT", ("text", "id", "url")),
    "codeparrot/codeparrot-clean": ("default", ("repo_name", "path", "content")),
    "emozilla/pg19": ("default", ("short_book_title", "text")),
}
"""Hub id of a data set -> the configuration that recipes read, and columns it has."""


def byte_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes with an end token, and one before each text where the model's has it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"eos_token": "<|end|>", **({"bos_token": "<|begin|>"} if bos else {})}
    tokenizer.add_special_tokens(list(special.values()))
    if bos:
        number = tokenizer.token_to_id("<|begin|>")
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", number)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def write_base(folder: Path, base: Base, seed: int = 0) -> Path:
    """Write a random model with its tokenizer, as a dense checkpoint in bf16 as the published ones are."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(base.family, **base.config())
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    # transformers writes RoPE under new keys; the published files have the old ones.
    written = json.loads((folder / "config.json").read_text())
    written.pop("rope_parameters")
    written["torch_dtype"] = written.pop("dtype")
    (folder / "config.json").write_text(json.dumps(written | base.config(), indent=2))
    byte_tokenizer(base.bos).save_pretrained(folder)
    return folder


def write_data(folder: Path, name: str, documents: int = 40) -> Path:
    """Write a data set as a Hub repository has it: a card that names configurations, and their files."""
    config, columns = DATA[name]
    rows = [
        {
            # Every third document is short: recipes read classes of lengths.
            column: f"{name} has document {i}: " + " ".join(f"{column} {i * j % 97}" for j in range(60))
            if i % 3
            else f"{i}: a short {column}"
            for column in columns
        }
        for i in range(documents)
    ]
    folder.mkdir(parents=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = "  data_files:\n  - split: train\n    path: rows.jsonl\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: {config}\n{files}---\n")
    return folder
