"""Attention over patterns: tensors in, ``(o, lse)`` out; nothing here knows a method or a model."""

from nsa_convert.kernels.attention import dense_attention, sparse_attention
from nsa_convert.kernels.common.backend import current_backend, use_backend
from nsa_convert.kernels.common.merge import merge_lse
from nsa_convert.kernels.compressed import CompressedOutput, block_topk, compressed_attention
from nsa_convert.kernels.gates import gated_sum

__all__ = [
    "CompressedOutput",
    "block_topk",
    "compressed_attention",
    "current_backend",
    "dense_attention",
    "gated_sum",
    "merge_lse",
    "sparse_attention",
    "use_backend",
]
