"""The arithmetic that a stage does for a token, and what devices can do: for MFU and estimates of time."""

from __future__ import annotations

from typing import Any

import torch

from nsa_convert.patch.patching import sparse_methods
from nsa_convert.training.recipe.schema import Stage

# Dense bf16 FLOPs a second (without sparsity, with float32 accumulation), from the makers' data sheets:
# nvidia.com/en-us/data-center/{h100,h200,a100,l40s,dgx-b200,dgx-b300}, the whitepapers of the Ada and
# Blackwell GeForce GPUs, amd.com/en/products/accelerators/instinct/mi300/mi300x.html.
# A name that is part of another one comes after it.
PEAKS = {
    "B300": 2250e12,
    "B200": 2250e12,
    "H100": 989e12,
    "H200": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "5090": 209.5e12,
    "4090": 165e12,
    "MI300X": 1307e12,
}
"""Part of a device's name -> its dense bf16 FLOPs a second."""


def peak_flops() -> float | None:
    """Return the peak of the device, for MFU; None where it is not known."""
    if not torch.cuda.is_available():
        return None

    name = torch.cuda.get_device_name()
    return next((peak for key, peak in PEAKS.items() if key in name), None)


def flops_per_token(model: Any, stage: Stage) -> float:
    """Return the FLOPs of one token, forward and backward; what checkpointing repeats is not counted.

    A weight of a matrix takes 2 forward; 2 for the gradient of what it reads, where that flows through it;
    and 2 for its own gradient, where it is trained. A visible key takes 4 per query head and coordinate (the
    two products of attention), and twice that backward.

    Args:
        model: The model; which of its weights are trained stands in ``requires_grad``.
        stage: The stage.
    """
    config = model.config
    methods = sparse_methods(model)
    aligns = stage.kind == "align"

    # Nothing flows back through the dense weights of the alignment stage, and it has no next-token loss.
    total = 0.0
    for name, weight in model.named_parameters():
        if weight.dim() > 1 and "embed_tokens" not in name and "lm_head" not in name:
            flows = not aligns or weight.requires_grad
            total += weight.numel() * (2.0 + 2.0 * flows + 2.0 * weight.requires_grad)

    # The input embedding is a lookup and takes no FLOPs; tied, the same weight is the LM head's matrix.
    head = model.get_output_embeddings().weight
    head_work = 0.0 if aligns else head.numel() * (4.0 + 2.0 * head.requires_grad)

    # A causal query sees half a row on average, a sparse one at most the limit of its method.
    keys = stage.seq_len / 2
    limits = [method.reach().decode_keys for method in methods] or [None] * config.num_hidden_layers
    seen = sum(keys if limit is None else min(keys, limit) for limit in limits)
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    product = 4.0 * config.num_attention_heads * dim
    attention = 3.0 * product * seen

    # Dense attention beside the sparse one, forward alone: the teacher of each layer, or of the logits.
    dense = product * keys * config.num_hidden_layers
    if aligns:
        attention += dense
    if stage.teacher_kl:
        attention += dense
        matrices = sum(p.numel() for n, p in model.named_parameters() if p.dim() > 1 and _is_dense(n))
        head_work += 2.0 * (matrices + head.numel())
    return total + head_work + attention


def _is_dense(name: str) -> bool:
    """Return whether the teacher runs through a matrix."""
    return not any(part in name for part in (".sparse.", "embed_tokens", "lm_head"))
