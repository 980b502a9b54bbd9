"""The losses on a language model's logits, computed for a chunk of rows at a time: all logits are never held.

A row of logits has as many numbers as the vocabulary has tokens, and the ordinary way holds 12 to 16 bytes
for each: at 128,256 tokens and 8,192 rows that is 14 GB, more than everything else a small model needs. Here
the gradient of a chunk is computed right after its loss, so that what stays is the gradient of the hidden
states and that of the head: the arithmetic is that of the ordinary way, nothing is computed twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

CHUNK = 2**26
"""Logits of one chunk: 512 rows of 128k tokens, 256 MiB in float32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogitLosses:
    """What :func:`chunked_losses` returns.

    Attributes:
        loss: The weighted sum, with its gradient.
        cross_entropy: Next-token loss without its weight and without gradient; None without labels.
        teacher_kl: Divergence from the teacher, in the same way; None without a teacher.
    """

    loss: Tensor
    cross_entropy: Tensor | None
    teacher_kl: Tensor | None


def next_labels(labels: Tensor | None, shift_labels: Tensor | None) -> Tensor | None:
    """Return ``[B, T]`` labels of the tokens that follow, -100 where there is none.

    Args:
        labels: ``[B, T]`` labels of the tokens themselves.
        shift_labels: ``[B, T]`` those of the tokens that follow; they win over ``labels``.
    """
    if shift_labels is not None or labels is None:
        return shift_labels
    return nn.functional.pad(labels[:, 1:], (0, 1), value=-100)


def token_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """Return ``KL(teacher || student)`` of each row over the vocabulary, in at least float32.

    Args:
        teacher: ``[..., V]`` logits, no gradient.
        student: ``[..., V]`` logits.
    """
    wide = torch.promote_types(student.dtype, torch.float32)
    target = teacher.to(wide).log_softmax(-1)
    return (target.exp() * (target - student.to(wide).log_softmax(-1))).sum(-1)


def scaled_logits(logits: Tensor, config: Any) -> Tensor:
    """Return the logits that a family makes of its head's outputs (Granite divides, Gemma 2 caps them)."""
    if scale := getattr(config, "logits_scaling", None):
        logits = logits / scale
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = (logits / cap).tanh() * cap
    return logits


def chunked_losses(
    model: Any,
    hidden: Tensor,
    following: Tensor | None,
    *,
    num_items_in_batch: Tensor | int | None = None,
    cross_entropy: float = 1.0,
    teacher_hidden: Tensor | None = None,
    teacher_kl: float = 0.0,
) -> LogitLosses:
    """Return the losses on the logits of a language model, from the outputs of its decoder.

    Args:
        model: The language model; its head may be tied, sharded or adapted.
        hidden: ``[B, T, hidden_size]`` outputs of the decoder.
        following: ``[B, T]`` labels of the tokens that follow, -100 where there is none; None counts all
            tokens for the divergence.
        num_items_in_batch: Labels of the whole optimizer step, to divide by; else those of this call.
        cross_entropy: Weight of the next-token loss.
        teacher_hidden: Outputs of the decoder through dense attention, for the divergence; no gradient.
        teacher_kl: Weight of the divergence.
    """
    rows = hidden.reshape(-1, hidden.shape[-1])
    labels = None if following is None else following.reshape(-1).to(rows.device)
    teacher = None if teacher_hidden is None else teacher_hidden.reshape(rows.shape)

    # What the sums over the tokens are divided by.
    counted = None if labels is None else labels != -100
    items: Tensor | int | None = num_items_in_batch
    if items is None:
        items = len(rows) if counted is None else counted.sum()
    elif isinstance(items, Tensor):
        items = items.to(rows.device)

    def measure(head: Callable[[Tensor], Tensor], x: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        """Return the share of some rows in next-token loss and divergence."""
        logits = scaled_logits(head(x), model.config)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = kl = wide.new_zeros(())
        if labels is not None:
            loss = nn.functional.cross_entropy(wide, labels[part], reduction="sum") / items

        if teacher is not None:
            with torch.no_grad():
                target = scaled_logits(head(teacher[part]), model.config)
            each = token_kl(target, wide)
            kl = (each if counted is None else each * counted[part]).sum() / items
        return loss, kl

    weights = (cross_entropy, teacher_kl)
    size = max(1, CHUNK // model.config.vocab_size)
    loss, values = _through_head(model.get_output_embeddings(), rows, measure, weights, size)
    return LogitLosses(
        loss=loss,
        cross_entropy=None if labels is None else values[0],
        teacher_kl=None if teacher is None else values[1],
    )


Measure = Callable[[Callable[[Tensor], Tensor], Tensor, slice], tuple[Tensor, Tensor]]


def _through_head(
    head: Any, rows: Tensor, measure: Measure, weights: tuple[float, float], size: int
) -> tuple[Tensor, Tensor]:
    """Return the weighted loss with its gradient, and both losses ``[2]``.

    A head that FSDP2 shards by itself is gathered by a call and released by its end, so that all chunks have
    to lie within one call of it. Wrapped by an adapter it runs in one chunk: the call inside is not ours.
    """
    if not _is_sharded_module(head):
        inside = any(_is_sharded_module(module) for module in head.modules())
        return _in_chunks(head, head, rows, measure, weights, len(rows) if inside else size)

    own = head.forward
    head.forward = lambda x: _in_chunks(head, own, x, measure, weights, size)
    try:
        return head(rows)
    finally:
        del head.forward


def _is_sharded_module(module: nn.Module) -> bool:
    """Return whether FSDP2 gathers the weights of a module by hooks on its calls."""
    return any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)


def _in_chunks(
    head: nn.Module,
    call: Callable[[Tensor], Tensor],
    rows: Tensor,
    measure: Measure,
    weights: tuple[float, float],
    size: int,
) -> tuple[Tensor, Tensor]:
    """Return loss and values of :func:`_through_head`, a chunk of ``size`` rows at a time."""
    parts = [slice(start, start + size) for start in range(0, len(rows), size)]
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    return _ChunkedLoss.apply(rows, lambda x, part: measure(call, x, part), parts, weights, *trained)


class _ChunkedLoss(torch.autograd.Function):
    """Sum of the losses of chunks; their gradients are computed in the forward pass, scaled in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        measure: Callable[[Tensor, slice], tuple[Tensor, Tensor]],
        parts: Sequence[slice],
        weights: tuple[float, float],
        *trained: Tensor,
    ) -> tuple[Tensor, Tensor]:
        # What gets a gradient: the rows, and weights of the head. Sums over chunks are in at least float32.
        through_rows = ctx.needs_input_grad[0]
        wanted = through_rows or bool(trained)
        row_gradient = torch.empty_like(rows) if through_rows else None
        sums: list[Any] = [None] * len(trained)
        values = None

        for part in parts:
            with torch.set_grad_enabled(wanted):
                x = rows[part].detach().requires_grad_(through_rows)
                found = measure(x, part)
                loss = _weighted(found, weights)

            now = torch.stack([value.detach() for value in found])
            values = now if values is None else values + now
            if not loss.requires_grad:
                continue

            inputs = [x, *trained] if through_rows else trained
            gradients = list(torch.autograd.grad(loss, inputs, allow_unused=True))
            if row_gradient is not None:
                row_gradient[part] = gradients.pop(0)
            for i, gradient in enumerate(gradients):
                sums[i] = _added(sums[i], gradient)

        assert values is not None, "a call without tokens"
        ctx.gradients = (row_gradient, sums)
        ctx.dtypes = [weight.dtype for weight in trained]
        ctx.mark_non_differentiable(values)
        return _weighted((values[0], values[1]), weights), values

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradient of this loss was taken already: run the forward pass again")

        # In place: for a large vocabulary the gradient of the head is as large as all else.
        row_gradient, sums = ctx.gradients
        ctx.gradients = None
        scaled = [None if x is None else x.mul_(grad.to(x.dtype)) for x in sums]
        weights = [x if x is None else x.to(dtype) for x, dtype in zip(scaled, ctx.dtypes, strict=True)]
        rows = None if row_gradient is None else row_gradient.mul_(grad.to(row_gradient.dtype))
        return (rows, None, None, None, *weights)


def _weighted(values: tuple[Tensor, Tensor], weights: tuple[float, float]) -> Tensor:
    """Return the weighted sum; what has no weight is left out, so that nothing flows back through it."""
    terms = [weight * value for weight, value in zip(weights, values, strict=True) if weight]
    return sum(terms, start=values[0].new_zeros(()))


def _added(total: Any, gradient: Any) -> Any:
    """Return the sum of a weight's gradients so far; narrow ones are added in float32."""
    if gradient is None:
        return total
    gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    return gradient if total is None else total.add_(gradient)


def compute_in_chunks(model: Any) -> None:
    """Let a dense language model compute its loss in chunks; a call with labels returns no logits then.

    Args:
        model: A model of a family that can be converted; its other calls stay as they are.
    """
    ordinary = model.forward

    def forward(
        *args: Any,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        following = next_labels(labels, shift_labels)
        if following is None:
            return ordinary(*args, **kwargs)

        from transformers.modeling_outputs import CausalLMOutputWithPast

        hidden = model.base_model(*args, **kwargs).last_hidden_state
        losses = chunked_losses(model, hidden, following, num_items_in_batch=num_items_in_batch)
        return CausalLMOutputWithPast(loss=losses.loss)

    model.forward = forward
