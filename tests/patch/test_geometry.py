"""Models of real head geometry start at the dense model, in float32, up to the default budget of 1024."""

from __future__ import annotations

import pytest
import torch
import transformers

from nsa_convert.patch.patching import patch_model, unpatch_model
from tests.marks import these_quick
from tests.models import plan, tokens

GEOMETRIES = [
    ("Qwen2", 28, 4, 128),  # Qwen2.5-7B
    ("Qwen2", 14, 2, 64),  # Qwen2.5-0.5B
    ("Qwen3", 16, 8, 128),  # Qwen3-0.6B
    ("Mistral", 32, 8, 128),  # Mistral-7B
    ("Llama", 9, 3, 64),  # SmolLM2-135M
]


@pytest.mark.parametrize(
    ("prefix", "heads", "kv_heads", "head_dim"),
    these_quick(GEOMETRIES, [g for g in GEOMETRIES if g[3] < 128]),
)
def test_starts_at_the_dense_model(prefix: str, heads: int, kv_heads: int, head_dim: int) -> None:
    torch.manual_seed(0)
    options = {"sliding_window": None} if prefix == "Mistral" else {}
    config = getattr(transformers, f"{prefix}Config")(
        vocab_size=256, hidden_size=576 if heads == 9 else 512, intermediate_size=128,
        num_hidden_layers=2, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim,
        max_position_embeddings=2048, initializer_range=0.3, **options,
    )  # fmt: skip
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    ids = tokens(1, 1024)
    with torch.no_grad():
        for length in (1, 65, 511, 1024):
            dense = model(ids[:, :length]).logits
            for method in ("nsa", "ssa"):
                sparse = patch_model(model, plan({"method": method}))(ids[:, :length]).logits
                unpatch_model(model)
                assert (sparse - dense).abs().max() < 1e-4, (method, length)
        longer = tokens(1, 1300)
        dense = model(longer).logits
        assert (patch_model(model, plan({"method": "nsa"}))(longer).logits - dense).abs().max() > 1e-2
