"""Converted model classes: a family's own classes with sparse attention layers."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.utils import ModelOutput

from nsa_convert.config import SparseAttentionConfig
from nsa_convert.errors import BackendError, ConfigError
from nsa_convert.methods.base import InitialisedModule, TrainingMode
from nsa_convert.methods.registry import build_layer
from nsa_convert.patch.attention import SparseAttention
from nsa_convert.patch.families import ModelFamily, family_of_sparse, geometry_of
from nsa_convert.patch.layout import SparseContext, read_context, shard_context
from nsa_convert.patch.own_code import write_own_code
from nsa_convert.patch.plan import resolve_plan

try:  # transformers 5: does not touch parameters that were loaded
    from transformers.initialization import copy_ as init_copy_
except ImportError:

    def init_copy_(parameter: Tensor, value: Tensor) -> None:
        """Write a value into a parameter."""
        parameter.data.copy_(value)


ATTENTION_NAME = "nsa_convert"
"""``attn_implementation`` of converted models: no masks, and no use of transformers' attention functions."""


PACKING_HINTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""Keyword arguments that describe packed documents; collators of transformers and TRL send them."""


def _no_mask(**_: Any) -> None:
    """Sparse layers read padding and packing from their context: no T x T mask is ever built for them."""


def _no_dense_layer(*_: Any, **__: Any) -> None:
    raise BackendError(
        f"attn_implementation='{ATTENTION_NAME}' belongs to converted models; use 'sdpa' or 'eager'"
    )


AttentionInterface.register(ATTENTION_NAME, _no_dense_layer)
AttentionMaskInterface.register(ATTENTION_NAME, _no_mask)


class SparsePreTrainedMixin:
    """What every converted model class does differently from its family's."""

    _supports_flash_attn = False
    _supports_flex_attn = False
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, InitialisedModule):
            for name, value in module.initial_values().items():
                parameter = getattr(module, name)
                init_copy_(parameter, value.to(device=parameter.device, dtype=parameter.dtype))
        else:
            super()._init_weights(module)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save as transformers does, with the code files that load the model where this package is absent."""
        if kwargs.get("is_main_process", True):
            os.makedirs(save_directory, exist_ok=True)
            write_own_code(save_directory, self.config.model_type)
        super().save_pretrained(save_directory, **kwargs)


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
        training_mode: TrainingMode | None = None,
        **kwargs: Any,
    ) -> Any:
        """See the family's model; masks must be 2-D, see :func:`nsa_convert.patch.layout.read_context`.

        With a ``training_mode`` the result is ``(last hidden state, losses [layers, K])``.
        """
        past: int | Tensor = 0 if past_key_values is None else past_key_values.get_seq_length()
        if isinstance(past, Tensor):
            # A static cache hands out the very tensor that it is about to change.
            past = past.clone() if torch.compiler.is_compiling() else int(past)
        if self.context_group is not None:
            bounds = kwargs.get("cu_seq_lens_q")
            context = shard_context(position_ids, bounds, self.rotary_emb, self.context_group)
        else:
            context, position_ids = read_context(
                tokens=input_ids if inputs_embeds is None else inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past=past,
                has_cache=past_key_values is not None,
                rotary=self.rotary_emb,
                hints=kwargs,
            )
        if context.layout.cu_seqlens is not None:
            use_cache = False
        if training_mode is not None:
            hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            return self._train_layers(
                hidden, position_ids, dataclasses.replace(context, training=training_mode)
            )
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

    def _train_layers(
        self, hidden: Tensor, position_ids: Tensor, context: SparseContext
    ) -> tuple[Tensor, Tensor]:
        """Run the layers; their losses are outputs, which checkpointing and FSDP keep in the graph."""
        angles = self.rotary_emb(hidden, position_ids=position_ids)
        losses = []
        for layer in self.layers:
            hidden, values = layer(
                hidden, position_embeddings=angles, position_ids=position_ids, sparse_context=context
            )
            losses.append(values)
        return self.norm(hidden), torch.stack(losses)


@dataclasses.dataclass
class TrainingOutput(ModelOutput):
    """What a converted model returns in training.

    Attributes:
        loss: Next-token loss, or None without labels.
        auxiliary: ``[layers, K]``, one column for each name of ``training_mode.losses``.
        hidden: ``[B, T, hidden]`` final hidden state.
        teacher_kl: Divergence from dense attention over the same weights, or None when it was not asked for.
    """

    loss: Tensor | None = None
    auxiliary: Tensor | None = None
    hidden: Tensor | None = None
    teacher_kl: Tensor | None = None


def logit_kl(
    teacher: Tensor,
    student: Tensor,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    **_: Any,
) -> Tensor:
    """Return ``KL(teacher || student)`` over the vocabulary, mean over the tokens whose next one has a label.

    Args:
        teacher: ``[B, T, V]`` logits, no gradient.
        student: ``[B, T, V]`` logits.
        labels: ``[B, T]``; -100 where there is none. All tokens count without them.
        shift_labels: ``[B, T]`` labels of the tokens that follow, instead of ``labels``.
        num_items_in_batch: Labels of the whole optimizer step, to divide by.
    """
    wide = torch.promote_types(student.dtype, torch.float32)
    target = teacher.to(wide).log_softmax(-1)
    kl = (target.exp() * (target - student.to(wide).log_softmax(-1))).sum(-1)  # [B, T]
    if shift_labels is None and labels is not None:
        shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    if shift_labels is None:
        return kl.mean()
    counted = shift_labels != -100
    return (kl * counted).sum() / (counted.sum() if num_items_in_batch is None else num_items_in_batch)


class SparseCausalLMMixin(SparsePreTrainedMixin):
    """The language model around the decoder."""

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
        """See the family's language model; with a ``training_mode`` the result is a :class:`TrainingOutput`.

        The mode makes every layer return its auxiliary losses. Logits are computed only for ``labels``.
        """
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        if training_mode is None:
            return super().forward(
                **inputs,
                past_key_values=past_key_values,
                labels=labels,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
                **kwargs,
            )
        hints = {key: kwargs[key] for key in PACKING_HINTS if key in kwargs}
        hidden, auxiliary = self.model(**inputs, training_mode=training_mode, **hints)
        divergence = None
        if training_mode.teacher_kl:
            teacher = dataclasses.replace(training_mode, stream="teacher", losses=())
            with torch.no_grad():
                dense, _ = self.model(**inputs, training_mode=teacher, **hints)
                dense = self.lm_head(dense)
            divergence = logit_kl(dense, self.lm_head(hidden), labels, **kwargs)
        loss = None
        if labels is not None or kwargs.get("shift_labels") is not None:
            rest = {key: value for key, value in kwargs.items() if key not in PACKING_HINTS}
            logits = self.lm_head(hidden)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **rest)
        return TrainingOutput(loss=loss, auxiliary=auxiliary, hidden=hidden, teacher_kl=divergence)

    @staticmethod
    def create_masks_for_generate(
        *, inputs_embeds: Tensor, attention_mask: Tensor | None, past_key_values: Any, **_: Any
    ) -> Tensor:
        """Return the 2-D padding mask ``[B, capacity]`` of a static cache, the same shape at every step."""
        capacity, _ = past_key_values.get_mask_sizes(inputs_embeds.shape[1], 0)
        if attention_mask is None:
            return torch.ones(inputs_embeds.shape[0], capacity, dtype=torch.bool, device=inputs_embeds.device)
        return nn.functional.pad(attention_mask.bool(), (0, capacity - attention_mask.shape[1]), value=True)


def sparse_config_class(family: ModelFamily, module: str) -> type:
    """Make the config class of a converted family: the dense one plus the field ``sparse_attention``."""
    library = importlib.import_module(
        f"transformers.models.{family.model_type}.configuration_{family.model_type}"
    )
    body = {
        "__module__": module,
        "__doc__": f"Configuration of a {family.title} model converted to sparse attention.",
        "__annotations__": {"sparse_attention": dict | None},
        "model_type": family.sparse_model_type,
        "sparse_attention": None,
    }
    return type(f"NSA{family.class_prefix}Config", (getattr(library, f"{family.class_prefix}Config"),), body)


def sparse_model_classes(family: ModelFamily, config_class: type, module: str) -> tuple[type, type]:
    """Make the decoder and the causal language model class of a converted family."""
    prefix = family.class_prefix
    library = importlib.import_module(f"transformers.models.{family.model_type}.modeling_{family.model_type}")
    dense_model, dense_lm = getattr(library, f"{prefix}Model"), getattr(library, f"{prefix}ForCausalLM")

    def init_model(self: Any, config: Any) -> None:
        dense_model.__init__(self, config)
        install_sparse_attention(self)
        self.post_init()

    def init_lm(self: Any, config: Any) -> None:
        dense_lm.__init__(self, config)
        adopt_class(self.model, model)
        install_sparse_attention(self.model)
        self.post_init()

    shared = {"__module__": module, "config_class": config_class}
    model = type(f"NSA{prefix}Model", (SparseModelMixin, dense_model), {**shared, "__init__": init_model})
    lm = type(f"NSA{prefix}ForCausalLM", (SparseCausalLMMixin, dense_lm), {**shared, "__init__": init_lm})
    return model, lm


@functools.cache
def sparse_layer_class(dense_layer: type[nn.Module]) -> type[nn.Module]:
    """Make the decoder layer of a converted model: the family's, with auxiliary losses as a second output."""

    class SparseLayer(dense_layer):
        def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
            context = kwargs.get("sparse_context")
            if context is None or context.training is None:
                return super().forward(hidden_states, **kwargs)
            out, losses = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
            hidden_states = hidden_states + out
            return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)), losses

    # Other libraries find the layers to wrap by the name of their class.
    SparseLayer.__name__ = dense_layer.__name__
    SparseLayer.__qualname__ = dense_layer.__qualname__
    SparseLayer.__doc__ = dense_layer.__doc__
    return SparseLayer


def adopt_class(instance: PreTrainedModel, cls: type[PreTrainedModel]) -> None:
    """Make an existing model object an instance of a class that was never constructed itself.

    The base initialiser notes for each class which outputs it can record (``output_hidden_states``); it runs
    here on an empty object, because ``instance`` keeps its weights.
    """
    PreTrainedModel.__init__(cls.__new__(cls), copy.copy(instance.config))
    instance.__class__ = cls


def install_sparse_attention(decoder: nn.Module) -> None:
    """Replace every layer's attention module by the method that ``config.sparse_attention`` plans for it.

    Raises:
        ConfigError: The config holds no plan, or one that does not fit the model.
    """
    config = decoder.config
    if config.sparse_attention is None:
        raise ConfigError(
            "config.sparse_attention is missing: this is not the config of a converted model", code="CF20"
        )
    sparse = SparseAttentionConfig.from_dict(config.sparse_attention)
    geometry = geometry_of(config.to_dict(), family_of_sparse(config.model_type))
    resolve_plan(sparse, len(decoder.layers), geometry)
    for index, layer in enumerate(decoder.layers):
        layer.self_attn = SparseAttention(layer.self_attn, build_layer(sparse, geometry, index))
        layer.__class__ = sparse_layer_class(type(layer))
    config._attn_implementation = ATTENTION_NAME
