"""What every method shares: its metadata, its settings, what it pools, and how it is called."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from nsa_convert.config import AttentionGeometry, strict_dataclass
from nsa_convert.kernels.attention import dense_attention
from nsa_convert.methods.parts.cache_policy import CachePolicy
from nsa_convert.methods.parts.inputs import AttentionInputs
from nsa_convert.methods.parts.losses import output_error
from nsa_convert.methods.parts.training_mode import CHOICE_LOSSES, TrainingMode
from nsa_convert.patterns import BlockTopK, Pattern, SequenceLayout


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodSpec:
    """Facts about a method, told once: the method table, cards and errors read them.

    Attributes:
        name: Name on the command line and in configs.
        title: Name for people.
        paper: Where it is defined.
        summary: One sentence.
        trainable: Whether the method is meant to be trained (or runs on unmodified weights).
        phases: Where it applies: ``"train"``, ``"prefill"``, ``"decode"``.
        granularity: What is selected, and for whom.
        sources: Setting -> where its default comes from.
        causal_selection: Whether no query's keys are chosen by later tokens. Where they are, reading a text
            in one pass and scoring it is no measure of the model; score what follows a prompt.
    """

    name: str
    title: str
    paper: str
    summary: str
    trainable: bool
    phases: tuple[str, ...]
    granularity: str
    sources: Mapping[str, str]
    causal_selection: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pool:
    """A stream of compressed cells that a method needs, cached and grown every ``stride`` tokens.

    Attributes:
        name: Key under which the method finds the cells.
        source: Whether keys or values are compressed.
        heads: The cached key/value heads it reads.
        width: l, tokens in a cell.
        stride: d, tokens between cells.
        rope: ``"after"`` compresses rotated keys as they are cached; ``"before"`` compresses them
            unrotated and rotates the cell to the position of its first token.
    """

    name: str
    source: Literal["key", "value"]
    heads: Sequence[int]
    width: int
    stride: int
    rope: Literal["after", "before"] = "after"


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexSize:
    """What a method reads of every earlier token to choose by.

    Attributes:
        query_heads: Index queries of head dim size for each token.
        key_heads: Index keys of head dim size it reads for each earlier token.
        cached: Whether these keys are kept beside the layer's own.
    """

    query_heads: int
    key_heads: int
    cached: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionRecord:
    """What one layer attended to, for measurement.

    Attributes:
        layer_index: Layer of the model.
        q: ``[B, TQ, HQ, D]``.
        k: ``[B, TK, H, D]`` keys the patterns refer to.
        patterns: Branch name -> pattern; empty where the layer attended densely.
        layout: Position of the queries, padding and packing.
        scale: Factor on the scores.
        gates: ``[B, TQ, HQ, branches]`` gate values, or None.
        heads: Key/value heads of the layer that q and k hold; None for all.
    """

    layer_index: int
    q: Tensor
    k: Tensor
    patterns: Mapping[str, Pattern]
    layout: SequenceLayout
    scale: float
    gates: Tensor | None
    heads: tuple[int, ...] | None = None


# A plain global, shared by threads: torch.compile cannot trace a ContextVar.
_observer: Callable[[AttentionRecord], None] | None = None


@contextlib.contextmanager
def observe(callback: Callable[[AttentionRecord], None]) -> Iterator[None]:
    """Call ``callback`` with an :class:`AttentionRecord` for every layer that runs inside the block."""
    global _observer
    before, _observer = _observer, callback
    try:
        yield
    finally:
        _observer = before


def is_observed() -> bool:
    """Return whether anybody listens, so that a method may spare itself the work of a record."""
    return _observer is not None


class InitialisedModule(nn.Module):
    """A leaf module that states the initial value of each of its parameters."""

    def initial_values(self) -> dict[str, Tensor]:
        """Return parameter name -> initial value."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Write the initial values into the parameters."""
        with torch.no_grad():
            for name, value in self.initial_values().items():
                getattr(self, name).copy_(value)


class SparseMethod(nn.Module):
    """One layer's sparse attention: owns what is learned and scored, and chooses patterns.

    A subclass sets ``spec`` and ``Settings`` and implements ``forward``.

    Args:
        settings: Checked settings of the method.
        geometry: Sizes of the layer.
        layer_index: Index of the layer in the model.
    """

    spec: ClassVar[MethodSpec]
    Settings: ClassVar[type]
    stage_losses: ClassVar[Mapping[str, Mapping[str, float]]] = {"align": {"output_error": 1.0}}
    """Kind of training stage -> auxiliary losses with their usual weights; a recipe may choose others."""
    dual_stream: ClassVar[bool] = False
    """Whether pretraining draws, step by step, sparse or full attention for the residual stream."""
    runs_full: ClassVar[bool] = False
    """Whether dense attention over the same keys and values is a mode of the method."""
    couples_heads: ClassVar[bool] = False
    """Whether the heads of a layer choose together, so that a hybrid must not split them."""
    cached_streams: tuple[str, ...] = ()
    """Names of the :meth:`streams` that are kept in the cache."""
    key_taps: int = 1
    """Neighbouring tokens whose keys :meth:`mix_keys` reads, the token's own included."""

    def __init__(self, settings: Any, geometry: AttentionGeometry, layer_index: int) -> None:
        super().__init__()
        self.settings = settings
        self.geometry = geometry
        self.layer_index = layer_index
        self.heads: tuple[int, ...] | None = None
        """Key/value heads of the layer this method serves in a hybrid; None for all."""
        self.cover: int | None = None
        """While set, the sparse path runs with a budget that covers this many tokens and with gates at their
        starting values, so that its output must equal dense attention (see ``verify``)."""

    @classmethod
    def read_settings(cls, values: Mapping[str, Any], where: str) -> Any:
        """Return checked settings; raises ConfigError that lists every problem."""
        return strict_dataclass(cls.Settings, values, where)

    def choice_losses(self) -> dict[str, float]:
        """Return the auxiliary losses that teach the method to choose, with their usual weights.

        An ordinary forward with labels adds them in training. Empty where nothing that chooses has weights.
        """
        usual = self.stage_losses.get("pretrain", {})
        return {name: usual[name] for name in CHOICE_LOSSES if usual.get(name, 0.0) > 0}

    def pools(self) -> tuple[Pool, ...]:
        """Return the streams of compressed cells the method needs."""
        return ()

    def loss_pools(self) -> tuple[Pool, ...]:
        """Return further cells that auxiliary losses read: made in training alone, never cached."""
        return ()

    def compress(self, name: str, windows: Tensor) -> Tensor:
        """Compress cells of pool ``name``.

        Args:
            name: Pool name.
            windows: ``[B, N, l, H, D]`` tokens of N cells.

        Returns:
            ``[B, N, H, D]``.
        """
        raise NotImplementedError

    def extra_kv(self, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return further keys and values ``[B, T, He, D]`` before norm and RoPE, or None."""
        return None

    def mix_keys(self, taps: Sequence[Tensor]) -> Tensor:
        """Return the keys of the new tokens before RoPE.

        Args:
            taps: :attr:`key_taps` tensors ``[B, T, H, D]``: the keys of the tokens themselves, of the tokens
                before them, and so on; 0 where the document has no such token.
        """
        return taps[0]

    def streams(self, hidden: Tensor, rotate: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Return per-token vectors of the new tokens, such as index keys and index queries.

        Args:
            hidden: ``[B, T, hidden]`` input of the attention layer.
            rotate: Applies RoPE at the tokens' positions to ``[B, T, h, D]``.

        Returns:
            Name -> ``[B, T, h, d]``; :attr:`cached_streams` arrives in ``forward`` with its past in front.
        """
        return {}

    def dense_copies(self) -> dict[str, str]:
        """Return own parameter name -> parameter of the dense attention whose rows it starts with.

        More rows than the dense parameter has are repeats of them; fewer are means over neighbouring heads.
        """
        return {}

    def initial_rows(self, own: str, dense: str, rows: Tensor) -> Tensor:
        """Return where the parameter ``own`` starts, from the rows of the dense parameter ``dense``."""
        count = self.get_parameter(own).shape[0]
        if count >= rows.shape[0]:
            return torch.cat([rows] * (count // rows.shape[0]))
        heads = rows.float().unflatten(0, (count // self.geometry.head_dim, -1, self.geometry.head_dim))
        return heads.mean(1).flatten(0, 1).to(rows.dtype)

    def leaves(self) -> Iterator[SparseMethod]:
        """Yield the methods that choose: this one, or those of the heads of a hybrid layer."""
        yield self

    def chooses_causally(self) -> bool:
        """Return whether no query's keys are chosen by later tokens."""
        return self.spec.causal_selection

    def cached_heads(self) -> list[tuple[int, ...]]:
        """Return the cached heads of each of the :meth:`leaves`, its further ones included."""
        return [tuple(range(self.geometry.num_kv_heads * (1 + self.extra_head_sets())))]

    def cache_policy(self) -> CachePolicy | None:
        """Return what of the cache may be forgotten; None keeps every token."""
        return None

    def visible_budget(self) -> int:
        """Return the longest context at which a freshly converted layer equals dense attention."""
        raise NotImplementedError

    def keys_per_query(self) -> int | None:
        """Return the most raw keys one query reads over all branches; None when it reads all of them."""
        return None

    def keys_per_prompt_query(self) -> int | None:
        """Return what :meth:`keys_per_query` is while a prompt is read, where that differs."""
        return self.keys_per_query()

    def adapts_to_prompt(self) -> bool:
        """Return whether how much of a prompt is read depends on its text, so that none can say before."""
        return False

    def index_size(self) -> IndexSize | None:
        """Return what choosing reads of every earlier token, or None for methods that read cells only."""
        return None

    def forward(self, x: AttentionInputs) -> Tensor:
        """Attend; returns ``[B, TQ, HQ, D]``."""
        raise NotImplementedError

    def train_forward(self, x: AttentionInputs, mode: TrainingMode) -> tuple[Tensor, dict[str, Tensor]]:
        """Attend as ``mode`` asks, and return its auxiliary losses.

        Args:
            x: Inputs of the layer.
            mode: What the step asks for.

        Returns:
            The output for the residual stream ``[B, TQ, HQ, D]``, and each of ``mode.losses`` that the
            method has: scalars in float32 (float64 for float64 inputs), means over tokens and heads.

        Raises:
            ValueError: The method has no full mode.
        """
        if mode.stream == "full" and not self.runs_full:
            raise ValueError(f"{self.spec.name} cannot run as dense attention with its own weights")
        compared = "output_error" in mode.losses
        sparse = self(x) if compared or mode.stream in ("ordinary", "sparse") else None
        dense = self.teacher(x) if compared or mode.stream == "teacher" else None
        if mode.stream == "teacher":
            o = dense.detach()
        elif mode.stream == "full":
            o = self.dense(x) if dense is None or x.plain_keys is not None else dense
        else:
            o = sparse
        return o, self.auxiliary_losses(x, sparse, dense, mode)

    def teacher(self, x: AttentionInputs) -> Tensor:
        """Return the dense model's attention, ``[B, TQ, HQ, D]``."""
        return self.dense(x if x.plain_keys is None else dataclasses.replace(x, k=x.plain_keys))

    def dense(self, x: AttentionInputs) -> Tensor:
        """Return dense attention over the keys and values of the method, ``[B, TQ, HQ, D]``."""
        heads = x.k.shape[2] // (1 + self.extra_head_sets())
        return dense_attention(x.q, x.k[:, :, :heads], x.v[:, :, :heads], layout=x.layout, scale=x.scale)

    def extra_head_sets(self) -> int:
        """Return how many further sets of H keys and values :meth:`extra_kv` adds."""
        return 0

    def auxiliary_losses(
        self, x: AttentionInputs, sparse: Tensor | None, dense: Tensor | None, mode: TrainingMode
    ) -> dict[str, Tensor]:
        """Return the losses of ``mode.losses`` that the method has; a method with its own extends this.

        Args:
            x: Inputs of the layer.
            sparse: ``[B, TQ, HQ, D]`` output of the method; None where ``output_error`` is not wanted.
            dense: ``[B, TQ, HQ, D]`` dense attention; None likewise.
            mode: What the step asks for.
        """
        return (
            {"output_error": output_error(sparse, dense, mode.total)} if "output_error" in mode.losses else {}
        )

    def fits(self, x: AttentionInputs, budget: int) -> bool:
        """Return whether no query can have more keys than ``budget``, so that dense attention is the same."""
        return self.cover is None and x.layout.longest(x.k.shape[1]) <= budget

    def block_rule(self) -> BlockTopK:
        """Return the block budget of the settings, widened while ``cover`` is set."""
        rule = self.settings.rule
        if self.cover is None:
            return rule
        return dataclasses.replace(rule, num_blocks=max(rule.num_blocks, -(-self.cover // rule.block_size)))

    def record(
        self, x: AttentionInputs, k: Tensor, patterns: Mapping[str, Pattern], gates: Tensor | None = None
    ) -> None:
        """Report to :func:`observe` what this call attends to."""
        if _observer is not None:
            _observer(
                AttentionRecord(
                    layer_index=self.layer_index,
                    q=x.q,
                    k=k,
                    patterns=patterns,
                    layout=x.layout,
                    scale=x.scale,
                    gates=gates,
                    heads=self.heads,
                )
            )
