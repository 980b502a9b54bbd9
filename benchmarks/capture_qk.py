"""Write the queries and keys of one layer of a real model, for benchmarks/ops_cpu.py --inputs.

python benchmarks/capture_qk.py MODEL_FOLDER TEXT_FILE OUT.safetensors [--layer 15] [--tokens 8192]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from nsa_convert.config import LayerRule, SparseAttentionConfig
from nsa_convert.methods.parts.base import AttentionRecord, observe
from nsa_convert.patch.patching import patch_model


def main() -> None:
    """Run the model densely over the text and keep what one layer's attention was given."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=8192)
    options = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16).eval()
    # SSA in full mode computes dense attention and lets an observer see it.
    patch_model(model, SparseAttentionConfig(default=LayerRule(method="ssa", settings={"mode": "full"})))

    tokens = AutoTokenizer.from_pretrained(options.model)(options.text.read_text(), return_tensors="pt")
    kept: dict[str, torch.Tensor] = {}

    def keep(record: AttentionRecord) -> None:
        if record.layer_index == options.layer:
            kept.update(q=record.q[0].contiguous(), k=record.k[0].contiguous())

    with torch.inference_mode(), observe(keep):
        model.model(tokens.input_ids[:, : options.tokens])

    save_file(kept, options.out)
    print(f"{options.out}: " + ", ".join(f"{name} {tuple(x.shape)}" for name, x in kept.items()))


if __name__ == "__main__":
    main()
