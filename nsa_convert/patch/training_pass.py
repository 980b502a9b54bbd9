"""One forward pass that trains: what it asks of the layers, and how their losses join the model's."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from nsa_convert.methods.parts.training_mode import TrainingMode
from nsa_convert.patch.chunked_loss import next_labels, token_kl

LABELS = ("labels", "shift_labels", "num_items_in_batch")
"""Arguments of a forward call that say which tokens count, and out of how many."""


@dataclasses.dataclass
class SparseCausalLMOutput(CausalLMOutputWithPast):
    """What a converted model returns from a call with a ``training_mode``.

    An ordinary call in training with labels returns the family's output, with ``aux_loss`` and ``auxiliary``.

    Attributes:
        loss: The loss to minimise, auxiliary losses included; None where nothing is to be minimised.
        aux_loss: What the auxiliary losses contribute to it, without gradient; None where nothing.
        auxiliary: ``[layers, K]``, one column for each name of ``training_mode.losses``.
        cross_entropy: Next-token loss, or None without labels.
        teacher_kl: Divergence from dense attention over the same weights, or None where it was not asked for.

    A mode without ``keep_logits`` leaves ``logits`` None; of the losses ``loss`` alone has a gradient then.
    """

    aux_loss: Tensor | None = None
    auxiliary: Tensor | None = None
    cross_entropy: Tensor | None = None
    teacher_kl: Tensor | None = None


class TrainingPass:
    """Travels with one forward pass to every sparse layer and gathers what they hand in.

    A layer's losses are not outputs of the layer: the family's own forwards run unchanged. They are attached
    to the layer's output by an identity whose backward hands them their gradient, as if they had been added
    to the model's loss: the weight of each times the gradient that the model's loss itself receives. So the
    scale of gradient accumulation or of a half-precision scaler reaches them, a layer that is computed again
    (checkpointing) attaches them again, and a sharded layer (FSDP2) sees its gradients arrive with those of
    its output.

    Where no gradient runs along the layers anyway (``stream: teacher``), and in a compiled graph, which
    cannot see the gradient that another node noted, the losses are added to the model's loss as they are.

    Args:
        mode: What the step asks for.
        joined: Whether the losses are added to the model's loss instead of attached to the outputs.
    """

    def __init__(self, mode: TrainingMode, *, joined: bool) -> None:
        self.mode = mode
        self.joined = joined
        self.values: dict[int, Tensor] = {}
        """Layer -> ``[K]``, one value for each name of ``mode.losses``."""
        self.live: dict[int, Tensor] = {}
        """Those of ``values`` that are added to the model's loss."""
        self.ended = False
        """Whether the losses joined the model's; layers that run after that are computed again."""
        self.seen: dict[str, Tensor] = {}
        """Field of the output -> how much of the model's loss its gradient stands for, known in backward."""

    def hand_in(self, layer_index: int, output: Tensor, values: Tensor) -> Tensor:
        """Note a layer's losses ``[K]`` and return its output, to which they are attached."""
        # Note the losses until they are joined; a layer that is recomputed (checkpointing) runs after that.
        if not self.ended:
            self.values[layer_index] = values
            # Values without a gradient are constants where gradients are on; where not, the layer runs again.
            in_graph = values.requires_grad and torch.compiler.is_compiling()
            constant = torch.is_grad_enabled() and not values.requires_grad
            if self.joined or in_graph or constant:
                self.live[layer_index] = values

        # Attach them to the output, unless they are added to the model's loss or have no weight in it.
        if not self.mode.weights or not values.requires_grad or layer_index in self.live:
            return output
        return _attach(output, self._weighted(values), self)

    def auxiliary(self) -> Tensor | None:
        """Return the losses of all layers, ``[layers, K]``; None where no layer handed in any."""
        rows = [self.values[layer] for layer in sorted(self.values)]
        return torch.stack(rows) if rows else None

    def join(self, out: Any) -> Any:
        """Return the output of a model with the weighted losses of the layers in its loss.

        What a trainer makes its own loss of is followed too: per-token ``log_probs`` (TRL's fused head), as
        long as it only raises them, as a likelihood does; then the losses count by the sum of their weights.

        Args:
            out: Output of transformers or TRL; ``loss`` may be None. It gets ``aux_loss``, what the losses
                contribute, and ``auxiliary``, see :meth:`auxiliary`.
        """
        self.ended = True
        auxiliary = self.auxiliary()
        extra = None

        # Losses attached to the layers' outputs: their value here, their gradient through the outputs.
        attached = [values.detach() for layer, values in self.values.items() if layer not in self.live]
        if self.mode.weights and attached:
            extra = self._weighted(_sum(attached))
            if getattr(out, "log_probs", None) is not None:
                out.log_probs = _Observe.apply(out.log_probs, self, "log_probs", out.label_mask)
            base = out.logits.sum().to(extra.dtype) * 0.0 if out.loss is None else out.loss
            out.loss = _Observe.apply(base, self, "loss", None) + extra

        # Losses that are added as they are.
        if self.mode.weights and self.live:
            live = self._weighted(_sum(self.live.values()))
            if getattr(out, "log_probs", None) is not None:
                out.log_probs = _Carry.apply(out.log_probs, live, out.label_mask)
            out.loss = live if out.loss is None else out.loss + live
            extra = live if extra is None else extra + live

        out["aux_loss"], out["auxiliary"] = None if extra is None else extra.detach(), auxiliary
        return out

    def gradient(self) -> Tensor | None:
        """Return the gradient of the model's loss once its backward has begun; None where nothing used it."""
        return _sum(self.seen.values()) if self.seen else None

    def _weighted(self, values: Tensor) -> Tensor:
        return _sum(weight * values[k] for k, weight in enumerate(self.mode.weights))


def _sum(terms: Iterable[Tensor]) -> Tensor:
    """Return the sum of one or more tensors."""
    first, *others = terms
    return sum(others, start=first)


class _Attach(torch.autograd.Function):
    """Pass the output of a layer; in backward, give its losses the gradient that the model's loss got."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, loss: Tensor, owner: TrainingPass) -> Tensor:
        ctx.owner = owner
        ctx.like = (loss.dtype, loss.device)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        gradient = ctx.owner.gradient()
        if gradient is not None:
            dtype, device = ctx.like
            gradient = gradient.to(device=device, dtype=dtype)
        return grad, gradient, None


@torch.compiler.disable
def _attach(output: Tensor, loss: Tensor, owner: TrainingPass) -> Tensor:
    """Attach outside of a compiled graph, which cannot see the gradient that :class:`_Observe` noted."""
    return _Attach.apply(output, loss, owner)


class _Observe(torch.autograd.Function):
    """Pass a field of the output; in backward, note its gradient before any layer's backward runs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, owner: TrainingPass, field: str, counted: Tensor | None) -> Tensor:
        ctx.owner = owner
        ctx.field = field
        ctx.counted = counted
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.owner.seen[ctx.field] = grad if ctx.counted is None else _total_weight(grad, ctx.counted)
        return grad, None, None, None


class _Carry(torch.autograd.Function):
    """Pass per-token log-probabilities; in backward, give a loss beside them the weight that they have."""

    @staticmethod
    def forward(ctx: Any, log_probs: Tensor, loss: Tensor, counted: Tensor) -> Tensor:
        ctx.save_for_backward(counted)
        ctx.dtype = loss.dtype
        return log_probs.view_as(log_probs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, _total_weight(grad, *ctx.saved_tensors).to(ctx.dtype), None


def _total_weight(grad: Tensor, counted: Tensor) -> Tensor:
    """Return the sum of the weights of a likelihood, minus the gradient of its log-probabilities.

    A preference has gradients of either sign; it has no such weight, and gets 0.
    """
    rises = grad.masked_fill(~counted, 0.0)
    return torch.where((rises <= 0).all(), -rises.sum(), grad.new_zeros(()))


def warn_of_silent_weights(model: nn.Module, unlabelled: Sequence[str]) -> None:
    """Warn where a trainer leaves new weights out: frozen beside weights that are trained, or without a loss.

    Args:
        model: A converted model in training.
        unlabelled: Losses that teach what chooses and that this call, having no labels, does not compute.
    """
    # Frozen beside weights that are trained: PEFT was not told of them.
    named = list(model.named_parameters())
    new = [(name, p) for name, p in named if ".self_attn.sparse." in name and ".base_layer." not in name]
    frozen = sorted({name.split(".sparse.")[1] for name, p in new if not p.requires_grad})
    if frozen and any(p.requires_grad for _, p in named):
        modules = sorted({_module_of(name) for name in frozen})
        warnings.warn(
            f"these weights that conversion added are frozen and learn nothing: {', '.join(frozen)}. With "
            f"PEFT, name their modules in modules_to_save, as in {modules}",
            stacklevel=5,
        )

    # No loss: what chooses learns by losses that are computed with labels.
    learns = [name for name, p in new if p.requires_grad and (".index" in name or "compress_key" in name)]
    if unlabelled and learns:
        warnings.warn(
            f"this training forward has no labels, so {', '.join(unlabelled)} is not computed and what "
            "chooses the keys learns nothing from it; pass labels, or train it with `nsa-convert train`",
            stacklevel=5,
        )


def _module_of(parameter: str) -> str:
    """Return the name by which PEFT finds the module of a parameter: ``sparse.gate`` of ``gate.weight``."""
    return f"sparse.{parameter.rpartition('.')[0]}"


def is_sharded(model: nn.Module) -> bool:
    """Return whether the weights of the layers are spread over processes (FSDP2, tensor parallel)."""
    return any(hasattr(parameter, "_local_tensor") for parameter in model.parameters())


def count_labels(labels: Tensor | None, shift_labels: Tensor | None) -> Tensor:
    """Return how many tokens have a label to predict.

    Args:
        labels: ``[B, T]``; -100 where there is none.
        shift_labels: ``[B, T]`` labels of the tokens that follow, instead of ``labels``.
    """
    if shift_labels is not None:
        return (shift_labels != -100).sum()
    assert labels is not None
    return (labels[..., 1:] != -100).sum()


def logit_kl(
    teacher: Tensor,
    student: Tensor,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """Return ``KL(teacher || student)`` over the vocabulary, mean over the tokens whose next one has a label.

    Args:
        teacher: ``[B, T, V]`` logits, no gradient.
        student: ``[B, T, V]`` logits.
        labels: ``[B, T]``; -100 where there is none. All tokens count without them.
        shift_labels: ``[B, T]`` labels of the tokens that follow, instead of ``labels``.
        num_items_in_batch: Labels of the whole optimizer step, to divide by.
    """
    kl = token_kl(teacher, student)  # [B, T]

    # The mean over the tokens that have a label.
    following = next_labels(labels, shift_labels)
    if following is None:
        return kl.mean()
    counted = following != -100
    return (kl * counted).sum() / (counted.sum() if num_items_in_batch is None else num_items_in_batch)
