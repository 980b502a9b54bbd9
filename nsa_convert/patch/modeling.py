"""Converted model classes: a family's own classes with sparse attention layers."""

from __future__ import annotations

import dataclasses
import functools
import os
import types
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.initialization import copy_ as init_copy_
from transformers.masking_utils import AttentionMaskInterface
from transformers.utils.generic import can_return_tuple

from nsa_convert.config import SparseAttentionConfig
from nsa_convert.errors import BackendError, ConfigError
from nsa_convert.families import check_config, family_of_sparse, geometry_of
from nsa_convert.methods.parts.base import InitialisedModule
from nsa_convert.methods.parts.registry import build_layer
from nsa_convert.methods.parts.training_mode import TrainingMode
from nsa_convert.patch.attention import SparseAttention
from nsa_convert.patch.chunked_loss import chunked_losses, next_labels
from nsa_convert.patch.layout import NO_CONTINUOUS_BATCHING, read_context, shard_context
from nsa_convert.patch.saved_code import package_function, write_own_code, write_own_reports
from nsa_convert.patch.training_pass import (
    LABELS,
    SparseCausalLMOutput,
    TrainingPass,
    count_labels,
    is_sharded,
    logit_kl,
    warn_of_silent_weights,
)
from nsa_convert.plan import resolve_plan

ATTENTION_NAME = "nsa_convert"
"""``attn_implementation`` of converted models: no masks, and no use of transformers' attention functions."""


def _no_mask(**_: Any) -> None:
    """Sparse layers read padding and packing from their context: no T x T mask is ever built for them."""


def _no_dense_layer(*_: Any, **__: Any) -> None:
    raise BackendError(
        f"attn_implementation='{ATTENTION_NAME}' is the name converted models have; a dense model takes "
        "'sdpa' or 'eager'"
    )


AttentionInterface.register(ATTENTION_NAME, _no_dense_layer)
AttentionMaskInterface.register(ATTENTION_NAME, _no_mask)


# The mixins stand before a family's class: a type checker sees them on one.
_Family: Any = object


class SparsePreTrainedMixin(_Family):
    """What every converted model class does differently from its family's."""

    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = False  # layers do not call transformers' attention functions
    # A decoding step with a static cache, where all tokens are kept; training, scoring and prefill, where the
    # method is trainable. A prefill method that must read values of a prompt breaks that prompt's graph.
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, InitialisedModule):
            for name, value in module.initial_values().items():
                parameter = getattr(module, name)
                init_copy_(parameter, value.to(device=parameter.device, dtype=parameter.dtype))
        else:
            super()._init_weights(module)

    def _check_and_adjust_attn_implementation(
        self, attn_implementation: str | None, *args: Any, **kwargs: Any
    ) -> str:
        """Keep the layers' own attention, and say so where another one is asked for.

        Raises:
            ValueError: An attention other than transformers' plain ones is asked for.
        """
        if attn_implementation in ("sdpa", "eager"):
            warnings.warn(
                f"attn_implementation={attn_implementation!r} changes nothing in a converted model: its "
                "layers compute sparse attention themselves (nsa_convert.use_backend chooses how)",
                stacklevel=3,
            )
        elif attn_implementation not in (None, ATTENTION_NAME):
            raise ValueError(
                f"attn_implementation={attn_implementation!r} cannot run in a converted model: its layers "
                f"compute sparse attention themselves; leave it out, or give {ATTENTION_NAME!r}"
            )

        return ATTENTION_NAME

    def set_attn_implementation(self, attn_implementation: str | dict, *args: Any, **kwargs: Any) -> None:
        """Say what holds: the layers' own attention stays.

        Raises:
            ValueError: An attention other than transformers' plain ones is asked for.
        """
        wanted = attn_implementation.get("") if isinstance(attn_implementation, dict) else attn_implementation
        self._check_and_adjust_attn_implementation(wanted)

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, mesh_manager: Any) -> Any:
        """Cut a model among processes as transformers does, the new weights by their heads.

        Raises:
            ConfigError: Tensor parallel with a method whose heads cannot live in different processes.
            BackendError: Tensor parallel without the installed package.
        """
        tensor = mesh_manager is not None and distributed_config.tp_size > 1

        if tensor:
            package_function("patch.tensor_parallel", "prepare_heads")(model, distributed_config.tp_size)

        model = super().maybe_distribute_model(model, distributed_config, mesh_manager)
        if tensor:
            package_function("patch.tensor_parallel", "share_heads")(model, mesh_manager)

        return model

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save as transformers does, with the code files that load the model where this package is absent.

        With the package there are also the reports that ``nsa-convert verify`` and ``card`` read.
        """
        is_main = kwargs.get("is_main_process", True)
        if is_main:
            os.makedirs(save_directory, exist_ok=True)  # why: where the user says, before code files go there
            write_own_code(save_directory, self.config.to_dict())
            names = getattr(self.config, "auto_map", None) or {}
            # Loaded from the Hub, they name the code of that repository; from now on, the files just written.
            self.config.auto_map = {auto: name.rpartition("--")[2] for auto, name in names.items()}

        super().save_pretrained(save_directory, **kwargs)  # why: the weights, where the user says
        if is_main:
            write_own_reports(save_directory, self)


class SparseModelMixin(SparsePreTrainedMixin):
    """The decoder: reads padding and packing once, for all layers."""

    context_group: Any = None
    """Processes that share each row, each with a run of its tokens; see :func:`shard_context`."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        training_pass: TrainingPass | None = None,
        **kwargs: Any,
    ) -> Any:
        """See the family's model; masks must be 2-D, see :func:`nsa_convert.patch.layout.read_context`.

        With a ``training_pass`` the layers hand their auxiliary losses to it.

        Raises:
            NotImplementedError: Attention weights are asked for.
            ValueError: There are neither ids nor embeddings, or both; or masks and positions do not fit.
        """
        if kwargs.get("output_attentions", self.config.output_attentions):
            raise NotImplementedError(
                "output_attentions: sparse layers never hold a matrix of attention weights; "
                "`nsa_convert.methods.parts.base.observe` reports what each layer attends to, and a dense "
                "model (unpatch_model, nsa-convert revert) returns them"
            )

        tokens = input_ids if inputs_embeds is None else inputs_embeds
        if tokens is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("give either input_ids or inputs_embeds: what the model reads")

        # Tokens that are cached before the call.
        past: int | Tensor = 0 if past_key_values is None else past_key_values.get_seq_length()
        if isinstance(past, Tensor):
            # A static cache hands out the very tensor that it is about to change.
            past = past.clone() if torch.compiler.is_compiling() else int(past)

        # What the layers must know of padding and packing, read once for all of them.
        if self.context_group is not None:
            bounds = kwargs.get("cu_seq_lens_q")
            context = shard_context(position_ids, bounds, self.rotary_emb, self.context_group)
        else:
            context, position_ids = read_context(
                tokens=tokens,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past=past,
                has_cache=past_key_values is not None,
                rotary=self.rotary_emb,
                hints=kwargs,
            )

        # Neither packed documents nor a training pass fill a cache.
        if context.layout.cu_seqlens is not None:
            use_cache = False
        if training_pass is not None:
            context = dataclasses.replace(context, training=training_pass)
            use_cache = False

        return super().forward(
            input_ids=input_ids,
            attention_mask=None,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            sparse_context=context,
            **kwargs,
        )


class SparseHeadMixin(SparsePreTrainedMixin):
    """A head around the decoder: its loss also teaches the methods to choose."""

    auxiliary_draw = 0
    """Training forwards so far; losses on a sample of the queries draw it from this."""
    told = False
    """Whether the warning about new weights that do not train was given."""

    def __setattr__(self, name: str, value: Any) -> None:
        # Trainers put forwards of their own on an instance: TRL's fused head, Liger's loss, casts.
        if name == "forward":

            @functools.wraps(value)
            def taught(self: Any, *args: Any, **kwargs: Any) -> Any:
                return self._teach(value, args, kwargs)

            super().__setattr__(name, types.MethodType(taught, self))
        else:
            super().__setattr__(name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See the family's class, whose forward this runs.

        In training with labels the loss also holds the auxiliary losses without which a method that learns to
        choose would not learn it, as in :class:`SparseCausalLMMixin`.
        """
        return self._teach(super().forward, args, kwargs)

    def _teach(self, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Call a forward; in training with labels, let it also teach the methods to choose."""
        mode = None
        if "training_pass" not in kwargs and kwargs.get("training_mode") is None:
            mode = self._ordinary_mode(kwargs.get("labels", kwargs.get("start_positions")), kwargs)
        if mode is None:
            return forward(*args, **kwargs)

        training = TrainingPass(mode, joined=False)
        as_tuple = not kwargs.get("return_dict", self.config.return_dict)
        out = training.join(forward(*args, **{**kwargs, "training_pass": training, "return_dict": True}))
        return out.to_tuple() if as_tuple else out

    def _ordinary_mode(self, labels: Tensor | None, hints: Mapping[str, Any]) -> TrainingMode | None:
        """Return what an ordinary forward asks of the layers so that they learn to choose; None for nothing.

        The losses of a pass count by its share of the step's labels, as its next-token loss does.
        """
        if not (self.training and torch.is_grad_enabled()):
            return None

        # The losses that the methods of the layers have; say once which new weights learn nothing.
        coefficient = self.config.sparse_aux_loss_coef
        layers = [layer.self_attn.sparse.training_spec.choice_losses() for layer in self.base_model.layers]
        names = sorted({name for losses in layers for name in losses})
        if not self.told and not torch.compiler.is_compiling():
            self.told = True
            warn_of_silent_weights(self, names if labels is None and coefficient else [])
        if not names or not coefficient or labels is None or hints.get("past_key_values") is not None:
            return None

        total = hints.get("num_items_in_batch")
        share = 1.0 if total is None else count_labels(labels, hints.get("shift_labels")) / total

        weights = []
        for name in names:
            having = [losses[name] for losses in layers if name in losses]
            weights.append(coefficient * share * sum(having) / len(having) ** 2)  # a mean over these layers

        draw = 0
        if not torch.compiler.is_compiling():  # a graph for every number would be compiled anew
            draw = self.auxiliary_draw
            self.auxiliary_draw += 1

        return TrainingMode(stream="ordinary", losses=tuple(names), weights=tuple(weights), draw=draw)


class SparseCausalLMMixin(SparseHeadMixin):
    """The language model around the decoder."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        training_mode: TrainingMode | None = None,
        **kwargs: Any,
    ) -> Any:
        """See the family's language model, whose forward this runs.

        In training (``model.train()``) with ``labels`` the loss also holds, times
        ``config.sparse_aux_loss_coef``, the auxiliary losses without which a method that learns to choose
        would not learn it, and the output has ``aux_loss``. A ``training_mode`` says itself what the layers
        do and how the losses count; the result is a :class:`SparseCausalLMOutput` then.
        """
        tokens = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        rest = {"labels": labels, "logits_to_keep": logits_to_keep, "return_dict": True, **kwargs}

        # An ordinary call.
        if training_mode is None:
            rest |= {"past_key_values": past_key_values, "use_cache": use_cache}
            return self._teach(super(SparseHeadMixin, self).forward, (), {**tokens, **rest})

        # A call with a training mode: one forward pass, then the losses with their weights.
        if labels is None:
            rest["labels"] = kwargs.get("shift_labels")  # where both are there, the loss reads these alone

        joined = training_mode.stream == "teacher" and not is_sharded(self)
        training = TrainingPass(training_mode, joined=joined)
        in_chunks = rest["labels"] is not None and not training_mode.keep_logits
        compute = self._losses_in_chunks if in_chunks else self._losses_on_logits
        return training.join(compute(tokens, training, rest))

    def _losses_in_chunks(
        self, tokens: Mapping[str, Any], training: TrainingPass, rest: Mapping[str, Any]
    ) -> SparseCausalLMOutput:
        """Return the losses on the logits, which are computed for a chunk of the rows at a time."""
        given = {name: value for name, value in rest.items() if name not in (*LABELS, "logits_to_keep")}
        hidden = self.base_model(**tokens, training_pass=training, **given).last_hidden_state

        # The teacher comes second: autocast hands on the copies of weights that it made, as they were made.
        mode, teacher = training.mode, None
        if mode.teacher_kl:
            with torch.no_grad():
                dense = self.base_model(**tokens, training_pass=_teacher_pass(mode), **given)
            teacher = dense.last_hidden_state

        losses = chunked_losses(
            self,
            hidden,
            next_labels(rest["labels"], rest.get("shift_labels")),
            num_items_in_batch=rest.get("num_items_in_batch"),
            cross_entropy=mode.cross_entropy,
            teacher_hidden=teacher,
            teacher_kl=mode.teacher_kl,
        )
        return SparseCausalLMOutput(**vars(losses))

    def _losses_on_logits(
        self, tokens: Mapping[str, Any], training: TrainingPass, rest: Mapping[str, Any]
    ) -> SparseCausalLMOutput:
        """Return the losses on the logits, which the output holds."""
        mode = training.mode
        out = super(SparseHeadMixin, self).forward(**tokens, training_pass=training, **rest)
        out = SparseCausalLMOutput(**out, cross_entropy=out.loss)
        if out.loss is not None:
            out.loss = mode.cross_entropy * out.loss
        if not mode.teacher_kl:
            return out

        # The same call through dense attention, without labels.
        given = {name: value for name, value in rest.items() if name != "labels"}
        with torch.no_grad():
            forward = super(SparseHeadMixin, self).forward
            dense = forward(**tokens, training_pass=_teacher_pass(mode), **given).logits

        out.teacher_kl = logit_kl(dense, out.logits, **{name: rest.get(name) for name in LABELS})
        weighted = mode.teacher_kl * out.teacher_kl
        out.loss = weighted if out.loss is None else out.loss + weighted
        return out

    def init_continuous_batching(self, *_: Any, **__: Any) -> None:
        """Refuse before a paged cache is allocated.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(NO_CONTINUOUS_BATCHING)

    generate_batch = continuous_batching_context_manager = init_continuous_batching

    @staticmethod
    def create_masks_for_generate(
        *, inputs_embeds: Tensor, attention_mask: Tensor | None, past_key_values: Any, **_: Any
    ) -> Tensor:
        """Return the 2-D padding mask ``[B, capacity]`` of a static cache, the same shape at every step."""
        capacity, _ = past_key_values.get_mask_sizes(inputs_embeds.shape[1], 0)

        if attention_mask is None:
            return torch.ones(inputs_embeds.shape[0], capacity, dtype=torch.bool, device=inputs_embeds.device)
        return nn.functional.pad(attention_mask.bool(), (0, capacity - attention_mask.shape[1]), value=True)


def _teacher_pass(mode: TrainingMode) -> TrainingPass:
    """Return the pass through dense attention over the same weights, of which only the outputs are wanted."""
    return TrainingPass(dataclasses.replace(mode, stream="teacher", losses=(), weights=()), joined=True)


def install_sparse_attention(decoder: Any) -> None:
    """Replace every layer's attention module by the method that ``config.sparse_attention`` plans for it.

    Raises:
        ConfigError: The config holds no plan, or one that does not fit the model, or asks for what sparse
            layers do not support.
    """
    config = decoder.config
    if config.sparse_attention is None:
        raise ConfigError(
            "config.sparse_attention is missing: this is not the config of a converted model", code="CF20"
        )

    # Check the plan as a whole before any layer is changed.
    sparse = SparseAttentionConfig.from_dict(config.sparse_attention)
    family = family_of_sparse(config.model_type)
    check_config(config.to_dict(), family)
    geometry = geometry_of(config.to_dict(), family)
    resolve_plan(sparse, len(decoder.layers), geometry)

    for index, layer in enumerate(decoder.layers):
        layer.self_attn = SparseAttention(layer.self_attn, build_layer(sparse, geometry, index))
    config._attn_implementation_internal = ATTENTION_NAME
