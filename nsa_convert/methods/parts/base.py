"""What every method shares: its metadata, its settings, what it pools, and how it is called."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from nsa_convert.config import AttentionGeometry
from nsa_convert.kernels.attention import dense_attention
from nsa_convert.methods.parts.cache_policy import CachePolicy
from nsa_convert.methods.parts.inputs import AttentionInputs
from nsa_convert.methods.parts.losses import output_error
from nsa_convert.methods.parts.training_mode import CHOICE_LOSSES, TrainingMode
from nsa_convert.patterns import Pattern, SequenceLayout


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodSpec:
    """Facts about a method, for the method table, model cards and errors.

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
        couples_heads: Whether the heads of a layer choose together, so that a hybrid must not split them.
        parallel: What processes may share in training: ``"tensor"``, the heads of a layer; ``"context"``, the
            tokens of a row.
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
    couples_heads: bool = False
    parallel: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pool:
    """Compressed cells that a method needs, cached and grown every ``stride`` tokens.

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
class CacheNeeds:
    """What a method keeps of every token beside the dense model's keys and values, and what it lets go.

    Attributes:
        pools: Compressed cells.
        loss_pools: Further cells that auxiliary losses read: made in training alone, never cached.
        token_states: Names of the states of :meth:`SparseMethod.project` that are kept in the cache.
        key_taps: Neighbouring tokens whose keys :meth:`SparseMethod.mix_keys` reads, its own included.
        extra_head_sets: Further sets of H keys and values, behind the dense ones.
        policy: What of the cache may be forgotten; None keeps every token.
    """

    pools: tuple[Pool, ...] = ()
    loss_pools: tuple[Pool, ...] = ()
    token_states: tuple[str, ...] = ()
    key_taps: int = 1
    extra_head_sets: int = 0
    policy: CachePolicy | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reach:
    """What one query sees and what choosing it costs.

    Attributes:
        visible_budget: Longest context at which a freshly converted layer equals dense attention.
        decode_keys: The most raw keys a query reads over all branches while decoding; None for all of them.
        prompt_keys: The same while a prompt is read.
        adapts_to_prompt: Whether how much of a prompt is read depends on its text, so that nobody can say it
            before.
        index: What choosing reads of every earlier token; None for methods that read cells only.
        is_causal: Whether no query's keys are chosen by later tokens.
    """

    visible_budget: int
    decode_keys: int | None
    prompt_keys: int | None
    adapts_to_prompt: bool = False
    index: IndexSize | None = None
    is_causal: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingSpec:
    """How a method is trained.

    Attributes:
        stage_losses: Kind of training stage -> auxiliary losses with their usual weights; a recipe may
            choose others.
        dual_stream: Whether pretraining draws, step by step, sparse or dense attention for the residual
            stream.
        has_dense_mode: Whether dense attention over the same keys and values is a mode of the method.
    """

    stage_losses: Mapping[str, Mapping[str, float]] = dataclasses.field(
        default_factory=lambda: {"align": {"output_error": 1.0}}
    )
    dual_stream: bool = False
    has_dense_mode: bool = False

    def choice_losses(self) -> dict[str, float]:
        """Return the auxiliary losses that teach the method to choose, with their usual weights.

        An ordinary forward with labels adds them in training. Empty where nothing that chooses has weights.
        """
        usual = self.stage_losses.get("pretrain", {})
        return {name: usual[name] for name in CHOICE_LOSSES if usual.get(name, 0.0) > 0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Projection:
    """What a method projects from the input of its layer.

    Attributes:
        k: ``[B, T, He, D]`` further keys before norm and RoPE, or None.
        v: ``[B, T, He, D]`` further values, or None.
        token_states: Name -> ``[B, T, h, d]`` vectors of the new tokens, such as index keys and queries;
            those in :attr:`CacheNeeds.token_states` arrive in ``forward`` with their past in front.
    """

    k: Tensor | None = None
    v: Tensor | None = None
    token_states: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseCopy:
    """Where a parameter of a method starts: at rows of a parameter of the dense attention.

    Attributes:
        dense: Name of the dense parameter.
        rows: Returns the rows to start with from those of the dense parameter.
    """

    dense: str
    rows: Callable[[Tensor], Tensor]


def copy_of(dense: str, parameter: Tensor, head_dim: int) -> DenseCopy:
    """Return how ``parameter`` starts from the dense parameter ``dense``.

    More rows than the dense parameter has are repeats of them; fewer are means over neighbouring heads.
    """
    count = parameter.shape[0]

    def rows(dense_rows: Tensor) -> Tensor:
        if count >= dense_rows.shape[0]:
            return torch.cat([dense_rows] * (count // dense_rows.shape[0]))

        # Fewer heads: means over neighbouring ones.
        heads = dense_rows.float().unflatten(0, (count // head_dim, -1, head_dim))
        return heads.mean(1).flatten(0, 1).to(dense_rows.dtype)

    return DenseCopy(dense=dense, rows=rows)


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
    before = _observer
    _observer = callback

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

    A subclass sets ``spec`` and ``Settings`` and implements ``reach`` and ``forward``; the rest is for
    methods that keep something in the cache, learn something, or project something of their own.

    Args:
        settings: Checked settings of the method.
        geometry: Sizes of the layer.
        layer_index: Index of the layer in the model.
    """

    spec: ClassVar[MethodSpec]
    Settings: ClassVar[type]
    training_spec: TrainingSpec = TrainingSpec()

    def __init__(self, settings: Any, geometry: AttentionGeometry, layer_index: int) -> None:
        super().__init__()
        self.settings = settings
        self.geometry = geometry
        self.layer_index = layer_index
        self.heads: tuple[int, ...] | None = None
        """Key/value heads of the layer this method serves in a hybrid; None for all."""
        self.forced_budget: int | None = None
        """While set, the sparse path runs with a budget that covers this many tokens and with gates at their
        starting values, so that its output must equal dense attention (see ``verify``)."""

    def cache_needs(self) -> CacheNeeds:
        """Return what the method keeps of every token, and what it lets go."""
        return CacheNeeds()

    def reach(self) -> Reach:
        """Return what one query sees and what choosing costs."""
        raise NotImplementedError

    def project(self, hidden: Tensor, rotate: Callable[[Tensor], Tensor]) -> Projection:
        """Return what the method projects from the input of its layer.

        Args:
            hidden: ``[B, T, hidden]`` input of the attention layer.
            rotate: Applies RoPE at the tokens' positions to ``[B, T, h, D]``.
        """
        return Projection()

    def compress(self, name: str, windows: Tensor) -> Tensor:
        """Compress cells of pool ``name``.

        Args:
            name: Pool name.
            windows: ``[B, N, l, H, D]`` tokens of N cells.

        Returns:
            ``[B, N, H, D]``.
        """
        raise NotImplementedError

    def mix_keys(self, taps: Sequence[Tensor]) -> Tensor:
        """Return the keys of the new tokens before RoPE.

        Args:
            taps: :attr:`CacheNeeds.key_taps` tensors ``[B, T, H, D]``: the keys of the tokens themselves, of
                the tokens before them, and so on; 0 where the document has no such token.
        """
        return taps[0]

    def dense_copies(self) -> dict[str, DenseCopy]:
        """Return own parameter name -> where it starts, for those that start as dense weights."""
        return {}

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
            ValueError: The method has no dense mode.
        """
        if mode.stream == "full" and not self.training_spec.has_dense_mode:
            raise ValueError(f"{self.spec.name} cannot run as dense attention with its own weights")

        # Both attentions are computed only where the step needs them.
        compared = "output_error" in mode.losses
        sparse = self(x) if compared or mode.stream in ("ordinary", "sparse") else None
        dense = dense_model_output(self, x) if compared or mode.stream == "teacher" else None

        if mode.stream == "full":
            o = dense_output(self, x) if dense is None or x.plain_keys is not None else dense
        elif mode.stream == "teacher":
            assert dense is not None
            o = dense.detach()
        else:
            assert sparse is not None
            o = sparse
        return o, self.auxiliary_losses(x, sparse, dense, mode)

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
        if "output_error" not in mode.losses:
            return {}

        assert sparse is not None
        assert dense is not None
        return {"output_error": output_error(sparse, dense, mode.total)}


def dense_output(method: SparseMethod, x: AttentionInputs) -> Tensor:
    """Return dense attention over the keys and values of a method, ``[B, TQ, HQ, D]``."""
    heads = x.k.shape[2] // (1 + method.cache_needs().extra_head_sets)
    return dense_attention(x.q, x.k[:, :, :heads], x.v[:, :, :heads], layout=x.layout, scale=x.scale)


def dense_model_output(method: SparseMethod, x: AttentionInputs) -> Tensor:
    """Return the dense model's attention, ``[B, TQ, HQ, D]``: over keys that the method has not mixed."""
    return dense_output(method, x if x.plain_keys is None else dataclasses.replace(x, k=x.plain_keys))


def is_within_budget(method: SparseMethod, x: AttentionInputs, budget: int) -> bool:
    """Return whether no query can have more keys than ``budget``, so that dense attention is the same."""
    return method.forced_budget is None and x.layout.longest(x.k.shape[1]) <= budget


def record(
    method: SparseMethod,
    x: AttentionInputs,
    k: Tensor,
    patterns: Mapping[str, Pattern],
    gates: Tensor | None = None,
) -> None:
    """Report to :func:`observe` what a call attends to: ``patterns`` over the keys ``k``."""
    if _observer is None:
        return

    _observer(
        AttentionRecord(
            layer_index=method.layer_index,
            q=x.q,
            k=k,
            patterns=patterns,
            layout=x.layout,
            scale=x.scale,
            gates=gates,
            heads=method.heads,
        )
    )
