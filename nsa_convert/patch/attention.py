"""The attention layer of a converted model: dense projections, RoPE and cache around one sparse method."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from nsa_convert.errors import ConfigError
from nsa_convert.methods.parts.base import AttentionInputs, CacheNeeds, Pool, Projection, SparseMethod
from nsa_convert.methods.parts.inputs import CachedPart, select_heads
from nsa_convert.patch.cache import SparseCacheLayer, held_tokens, sparse_cache_layer
from nsa_convert.patch.eviction import append, evict, evicting_cache_layer, has_eviction, whole_heads
from nsa_convert.patch.layout import SparseContext
from nsa_convert.patch.pooling import grow_cells, grow_states, pool_sequence
from nsa_convert.patch.precision import attention_dtype, without_autocast
from nsa_convert.patch.rope import mover, rotate


class SparseAttention(nn.Module):
    """Takes the place of a family's attention module and keeps the names of its parameters.

    The projections (and q/k norms) are those of the dense module; everything new lives under ``sparse``.
    This is the only place that turns transformers' ``[B, H, T, D]`` into the kernels' ``[B, T, H, D]``.

    Args:
        dense: The attention module to replace; its submodules are adopted, not copied.
        method: The sparse method of this layer.
    """

    def __init__(self, dense: Any, method: SparseMethod) -> None:
        super().__init__()

        # Attributes that transformers and adapters read from an attention module.
        self.config = dense.config
        self.layer_idx: int = dense.layer_idx
        self.head_dim: int = dense.head_dim
        self.scaling: float = dense.scaling
        self.attention_dropout: float = dense.attention_dropout
        self.is_causal = True

        # The submodules of the dense module, under their own names.
        self.q_proj: nn.Module
        self.k_proj: nn.Module
        self.v_proj: nn.Module
        self.o_proj: nn.Module
        self.q_norm: nn.Module
        self.k_norm: nn.Module
        for name, child in dense.named_children():
            self.add_module(name, child)

        self.sparse = method

        # Both are of nsa_convert.patch.collectives, which only the installed package has.
        self.loss_group: Any = None
        """:class:`Processes` that share the heads of the layer: auxiliary losses are means over them."""
        self.context_group: Any = None
        """:class:`Processes` that share each row: queries are local, keys and values are gathered."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        *,
        sparse_context: SparseContext | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; the mask is ignored, its meaning arrives in ``sparse_context``.

        Args:
            hidden_states: ``[B, T, hidden]``.
            position_embeddings: ``(cos, sin)``, each ``[B or 1, T, D]``.
            attention_mask: Not used.
            past_key_values: A transformers cache, or None.
            sparse_context: Padding, packing and offset, from the sparse model's forward.
            **kwargs: Other arguments of transformers' attention modules, not used.

        Returns:
            ``([B, T, hidden], None)``. In training the layer's auxiliary losses go to
            ``sparse_context.training``, one number for each of its names, 0 where the method has none.

        Raises:
            ValueError: The layer is called outside a sparse model.
            NotImplementedError: Training with attention dropout.
        """
        if sparse_context is None:
            raise ValueError("a sparse attention layer must be called by its own model's forward")
        if self.training and self.attention_dropout:
            raise NotImplementedError(
                "attention dropout is not supported by sparse layers; set attention_dropout to 0"
            )

        # Asked of the method first: the value of a tensor in a compiled graph is read only where it matters.
        padding = sparse_context.right_padded
        if padding is not False and not self.sparse.reach().is_causal and padding:
            raise ConfigError(
                "a prompt of this batch ends before the others: the tokens that pad it would choose keys for "
                "its own last ones",
                code="CF25",
                hint="pad on the left (tokenizer.padding_side = 'left')",
            )

        # Project; a method may add keys, values and states of its own.
        batch, length = hidden_states.shape[:2]
        needs = self.sparse.cache_needs()
        own = self.sparse.project(hidden_states, lambda x: rotate(x, *position_embeddings))
        q, k, v = self._project(hidden_states, own)

        # RoPE; a method may mix the keys of neighbours before it, and training compares with unmixed ones.
        q = rotate(q, *position_embeddings)
        plain_keys = None
        if needs.key_taps > 1:
            if sparse_context.training is not None:
                plain_keys = rotate(k, *position_embeddings)
            k = self._mix_keys(k, needs.key_taps, past_key_values, sparse_context)
        k = rotate(k, *position_embeddings)

        # One dtype for all that attends.
        dtype = attention_dtype(v)
        q = q.to(dtype)
        k = k.to(dtype)
        v = v.to(dtype)
        states = {name: x.to(dtype) for name, x in own.token_states.items()}
        plain_keys = None if plain_keys is None else plain_keys.to(dtype)

        # Packed documents are one row; tokens of other processes are fetched.
        if sparse_context.layout.cu_seqlens is not None:
            q, k, v, hidden_states = (_one_row(x) for x in (q, k, v, hidden_states))
            states = {name: _one_row(x) for name, x in states.items()}
            plain_keys = None if plain_keys is None else _one_row(plain_keys)
            past_key_values = None
        if self.context_group is not None:
            gather = self.context_group.gather_tokens
            k = gather(k)
            v = gather(v)
            states |= {name: gather(states[name]) for name in needs.token_states}

        with without_autocast(q.device.type):
            o, losses = self._attend(
                q, k, v, states, needs, plain_keys, hidden_states, past_key_values, sparse_context
            )

        # The output projection; in training the layer's losses go with its output.
        out = self.o_proj(o.reshape(batch, length, -1))
        training = sparse_context.training
        if training is not None:
            assert losses is not None
            out = training.hand_in(self.layer_idx, out, losses)
        return out, None

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        states: dict[str, Tensor],
        needs: CacheNeeds,
        plain_keys: Tensor | None,
        hidden: Tensor,
        cache: Any,
        context: SparseContext,
    ) -> tuple[Tensor, Tensor | None]:
        """Append to the cache and run the method.

        Returns:
            ``[B, TQ, HQ, D]``, and in training the auxiliary losses ``[K]`` in at least float32, else None.
        """
        # The past, from the cache.
        new_tokens = k.shape[1]
        parts, pooled, states = self._remember(k, v, states, needs, cache, context)
        inputs = AttentionInputs(
            **vars(parts[0]),
            q=q,
            hidden=hidden,
            pooled=pooled,
            scale=self.scaling,
            token_states=states,
            plain_keys=plain_keys,
            shared=context.shared,
            move=mover(context.rotary),
            parts=parts if len(parts) > 1 else (),
        )

        # Inference: attend, then drop what the cache policies give up.
        if context.training is None:
            o = self.sparse(inputs)
            if cache is not None and has_eviction(self.sparse):
                evict(self.sparse, cache.layers[self.layer_idx], parts, context, new_tokens)
            return o, None

        # Training: losses of the layer in the order of their names, 0 for those the method has not.
        mode = context.training.mode
        if self.context_group is not None:
            mode = dataclasses.replace(mode, total=self.context_group.total)
        o, losses = self.sparse.train_forward(inputs, mode)
        none = q.new_zeros((), dtype=torch.promote_types(q.dtype, torch.float32))
        values = torch.stack([none, *(losses.get(name, none) for name in mode.losses)])[1:]
        return o, values if self.loss_group is None else self.loss_group.mean(values)

    def _project(self, hidden: Tensor, own: Projection) -> tuple[Tensor, Tensor, Tensor]:
        """Return q ``[B, T, HQ, D]`` and k, v ``[B, T, Hc, D]`` before RoPE, a method's extra heads last."""
        shape = (*hidden.shape[:-1], -1, self.head_dim)
        q = self.q_proj(hidden).view(shape)
        k = self.k_proj(hidden).view(shape)
        v = self.v_proj(hidden).view(shape)

        if own.k is not None and own.v is not None:
            k = torch.cat([k, own.k], 2)
            v = torch.cat([v, own.v], 2)

        # Families with normalised queries and keys (Qwen3).
        if hasattr(self, "q_norm"):
            q = self.q_norm(q)
            k = self.k_norm(k)

        return q, k, v

    def _mix_keys(self, k: Tensor, count: int, cache: Any, context: SparseContext) -> Tensor:
        """Let the method mix the keys of neighbouring tokens, before RoPE.

        The cache keeps the keys as they were, so that it can be cropped and continued at any token.

        Args:
            k: ``[B, T, Hc, D]`` keys before RoPE.
            count: Neighbouring tokens that are mixed, the own one included.
            cache: A transformers cache, or None.
            context: Offset, padding and packing.

        Raises:
            NotImplementedError: The tokens of a row are spread over processes.
        """
        if self.context_group is not None:
            raise NotImplementedError(
                "a convolution over keys does not reach across context-parallel processes; "
                "set key_conv to 0 or train without context parallelism"
            )

        # Keys that the new tokens may read: of a packed row, of the cache, or of the call alone.
        layout, packed = context.layout, context.layout.cu_seqlens is not None
        new = known = _one_row(k) if packed else k
        if cache is not None and not packed:
            layer = sparse_cache_layer(cache, self.layer_idx)
            layer.open(self.sparse, context.starts, layout.offset)
            known = grow_states(layer, "plain keys", k, layout.offset)

        # Taps: the keys of the tokens themselves, of those before them, and so on; 0 before a document.
        slots = layout.positions(new.shape[1], k.device)  # [T]
        starts = layout.row_starts(new.shape[1], k.device)  # [B or 1, T]
        taps = [new]
        for lag in range(1, count):
            missing = slots - lag < starts
            earlier = known[:, (slots - lag).clamp(min=0)]
            taps.append(earlier.masked_fill(missing[..., None, None], 0.0))
        return self.sparse.mix_keys(taps).reshape(k.shape)

    def _remember(
        self,
        k: Tensor,
        v: Tensor,
        states: dict[str, Tensor],
        needs: CacheNeeds,
        cache: Any,
        context: SparseContext,
    ) -> tuple[tuple[CachedPart, ...], dict[str, Tensor], dict[str, Tensor]]:
        """Append to the cache; return what the method may read, the compressed cells and the token states.

        Where a part of the layer forgets, there is one entry for each part, else one for all.
        """
        pools = needs.pools

        # Without a cache the call's own tokens are all there is.
        if cache is None:
            if context.training is not None and context.training.mode.losses:
                pools = (*pools, *needs.loss_pools)
            cells = {p.name: pool_sequence(self.sparse, p, _source(p, k, v), context) for p in pools}
            return (CachedPart(k=k, v=v, layout=context.layout),), cells, states

        # Append the new tokens; k and v become what pools read: all tokens of the heads that keep them.
        new_tokens = k.shape[1]
        offset = context.layout.offset
        evicts = has_eviction(self.sparse)
        if evicts:
            layer: SparseCacheLayer = evicting_cache_layer(cache, self.layer_idx, self.sparse, k, context)
            parts = append(self.sparse, layer, k, v, context)
            place = whole_heads(self.sparse)
            pools = tuple(dataclasses.replace(p, heads=[place[head] for head in p.heads]) for p in pools)
            if place:
                k, v = held_tokens((layer.keys, layer.values), offset, k, v)
        else:
            layer = sparse_cache_layer(cache, self.layer_idx)
            layer.open(self.sparse, context.starts, offset)
            cached = cache.update(k.transpose(1, 2), v.transpose(1, 2), self.layer_idx)
            k, v = held_tokens(cached, offset, k, v)
            parts = (CachedPart(k=k, v=v, layout=context.layout),)

        # Compress the cells that the new tokens complete, and append their states.
        tracked = torch.is_grad_enabled() and any(x.requires_grad for x in (k, v, *self.sparse.parameters()))
        cells = {
            p.name: grow_cells(self.sparse, p, layer, _source(p, k, v), new_tokens, context, tracked=tracked)
            for p in pools
        }
        kept = {name: grow_states(layer, name, states[name], offset) for name in needs.token_states}
        if not evicts:  # else when it has forgotten
            layer.settle()
        return parts, cells, {**states, **kept}


def _one_row(x: Tensor) -> Tensor:
    """Return ``[B, T, ...]`` as one row of packed documents, ``[1, B * T, ...]``."""
    return x.reshape(1, -1, *x.shape[2:])


def _source(pool: Pool, k: Tensor, v: Tensor) -> Tensor:
    """Return the keys or values of the heads a pool reads."""
    return select_heads(k if pool.source == "key" else v, pool.heads)
