"""Divergence of a sparse model's next-token distributions from those of the dense model."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from nsa_convert.errors import ConfigError
from nsa_convert.evaluation.metrics.perplexity import CHUNK, Bucket, Readout, perplexity

QUANTILES = (0.5, 0.95, 0.99)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Divergence:
    """Comparison of two models on one sequence of T tokens, prediction by prediction; tensors on the CPU.

    Attributes:
        dense_nll: ``[T - 1]`` negative log-likelihood of the next token under the dense model.
        sparse_nll: ``[T - 1]`` the same under the sparse model.
        kl: ``[T - 1]`` KL(dense || sparse) of the next-token distributions, in nats.
        top1: ``[T - 1]`` 1.0 where both models have the same most likely token, else 0.0.
        top5: ``[T - 1]`` share of the dense model's five most likely tokens that are among the sparse model's
            five.
    """

    dense_nll: Tensor
    sparse_nll: Tensor
    kl: Tensor
    top1: Tensor
    top5: Tensor

    def summary(self, bucket: Bucket | None = None) -> dict[str, float | int]:
        """Average over a range of context lengths, or over all predictions.

        Returns:
            ``tokens, dense_ppl, sparse_ppl, ppl_ratio, kl_mean, kl_p50, kl_p95, kl_p99, kl_max, top1, top5``.
        """
        # Perplexities are means in the logarithm; KL also has quantiles, which show rare large values.
        pick = bucket.of if bucket is not None else lambda values: values
        kl = pick(self.kl).double()
        dense = perplexity(pick(self.dense_nll))
        sparse = perplexity(pick(self.sparse_nll))
        quantiles = torch.quantile(kl, torch.tensor(QUANTILES, dtype=kl.dtype)).tolist()

        return {
            "tokens": len(kl),
            "dense_ppl": dense,
            "sparse_ppl": sparse,
            "ppl_ratio": sparse / dense,
            "kl_mean": kl.mean().item(),
            **{f"kl_p{round(100 * q)}": value for q, value in zip(QUANTILES, quantiles, strict=True)},
            "kl_max": kl.max().item(),
            "top1": pick(self.top1).double().mean().item(),
            "top5": pick(self.top5).double().mean().item(),
        }


@torch.inference_mode()
def compare(dense: Readout, sparse: Readout, input_ids: list[int]) -> Divergence:
    """Compare two models on the sequence that both have read.

    KL is summed over the whole vocabulary in float32. Rounding can make it slightly negative; it is clamped
    to 0.

    Raises:
        ConfigError: The models have different vocabularies (EV07).
        CheckFailedError: A logit is not finite (EV04).
    """
    targets = torch.tensor(input_ids[1:], device=sparse.states.device)
    columns: list[list[Tensor]] = [[], [], [], [], []]

    # In chunks, so that only few positions have their logits in memory at a time.
    for begin in range(0, len(targets), CHUNK):
        target = targets[begin : begin + CHUNK, None]
        p = dense.log_probs(begin, begin + len(target)).to(target.device)
        q = sparse.log_probs(begin, begin + len(target))
        if p.shape != q.shape:
            raise ConfigError(
                f"the models have different vocabularies: {p.shape[1]} and {q.shape[1]} tokens", code="EV07"
            )

        for column, values in zip(columns, _compare_chunk(p, q, target), strict=True):
            column.append(values.cpu())

    names = ("dense_nll", "sparse_nll", "kl", "top1", "top5")
    return Divergence(**{name: torch.cat(c) for name, c in zip(names, columns, strict=True)})


def _compare_chunk(p: Tensor, q: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """Return the fields of :class:`Divergence` for N positions, each ``[N]``.

    Args:
        p: ``[N, V]`` log-probabilities of the dense model.
        q: ``[N, V]`` log-probabilities of the sparse model.
        target: ``[N, 1]`` next tokens.
    """
    size = min(5, p.shape[1])
    dense_top = p.topk(size).indices  # [N, 5]
    sparse_top = q.topk(size).indices
    shared = (dense_top[:, :, None] == sparse_top[:, None]).any(2).float().mean(1)

    return (
        -p.gather(1, target)[:, 0],
        -q.gather(1, target)[:, 0],
        (p.exp() * (p - q)).sum(1).clamp(min=0),
        (dense_top[:, 0] == sparse_top[:, 0]).float(),
        shared,
    )
