"""What a stage is judged by while it trains: figures on rows and needles that training never sees."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nsa_convert.errors import ConfigError
from nsa_convert.evaluation.metrics.mass import LayerMass, MassProbe
from nsa_convert.evaluation.tasks.needle import NeedleCase, build_needles
from nsa_convert.methods.parts.base import SparseMethod
from nsa_convert.methods.parts.training_mode import TrainingMode
from nsa_convert.training.data.documents import Order
from nsa_convert.training.data.rows import PackedRows, Row, collate
from nsa_convert.training.losses import StageLosses
from nsa_convert.training.recipe.schema import Stage
from nsa_convert.training.run.distributed import split_tokens
from nsa_convert.training.run.parallel import Parallel

DEPTHS = (0.1, 0.5, 0.85)
"""Where in a row the needles lie."""
MASS_ROWS = 2
"""Rows on which the captured attention mass is measured."""
NEEDLE_TOKENS = 256
"""Rows must be longer for a needle's question to leave room for a haystack."""
PREFIX = "eval_"
"""Begins the name of every figure in a log."""
GROWS = ("needles",)
"""Figures of which more is better; of the others less is."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Rows and needles that are read again at every evaluation of a stage.

    Attributes:
        rows: Packed rows of held-out documents, those of this process.
        needles: Prompts as long as a row with a number hidden in them, the same in every process.
        budget: Keys that a query of the model may see: only queries with more have a choice.
        group: Context-parallel group whose processes share every row, or None.
    """

    rows: tuple[Row, ...]
    needles: tuple[NeedleCase, ...] = ()
    budget: int = 0
    group: Any = None

    def figures(self, model: nn.Module, losses: StageLosses, *, sparse: bool) -> dict[str, float]:
        """Return name -> figure of a model in eval mode, means over the rows of this process.

        ``loss`` is the next-token loss, ``needles`` the share of numbers found by teacher forcing. A
        converted model has ``dense_loss`` and ``dense_needles``, those of dense attention over the same
        weights; ``kl`` to its distributions; the auxiliary losses of the stage; ``captured``, the dense
        attention mass that queries beyond the budget read, and ``oracle``, the most that as many keys could
        hold.
        """
        with _judged(model), torch.no_grad():
            rows = [self._row(model, row, losses, sparse=sparse) for row in self.rows]
            found = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
            if sparse:
                found |= self._mass(model)
            for name, mode in self._kinds(sparse=sparse):
                if self.needles:
                    hits = [_found(model, case, mode) for case in self.needles]
                    found[f"{name}needles"] = sum(hits) / len(hits)
        return found

    def _kinds(self, *, sparse: bool) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield prefix of the figures and arguments of the call, for each kind of attention."""
        yield "", {}
        if sparse:
            yield "dense_", {"training_mode": TrainingMode(stream="teacher")}

    def _row(self, model: nn.Module, row: Row, losses: StageLosses, *, sparse: bool) -> dict[str, float]:
        """Return the losses on one row."""
        batch = collate([row])
        count = (batch["labels"][:, 1:] != -100).sum()
        inputs = _moved(batch if self.group is None else split_tokens(batch, self.group), model)
        inputs["num_items_in_batch"] = count.to(inputs["input_ids"].device)

        if not sparse:
            return self._summed({"loss": model(**inputs, use_cache=False).loss})

        # One pass through the sparse attention with its losses, one through the dense.
        mode = TrainingMode(losses=losses.names, teacher_kl=1.0)
        out = model(**inputs, training_mode=mode)
        dense = model(**inputs, training_mode=TrainingMode(stream="teacher"))
        values = {"loss": out.cross_entropy, "dense_loss": dense.cross_entropy, "kl": out.teacher_kl}
        auxiliary = dict(zip(losses.names, losses.means(out.auxiliary).tolist(), strict=True))
        return self._summed(values) | auxiliary

    def _summed(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """Add up the parts of the processes that share a row."""
        parts = torch.stack([value.detach().float() for value in values.values()])
        if self.group is not None:
            torch.distributed.all_reduce(parts, group=self.group)
        return dict(zip(values, parts.tolist(), strict=True))

    def _mass(self, model: nn.Module) -> dict[str, float]:
        """Return captured and best possible mass, mean over the layers that choose; a row is one document."""
        probe = MassProbe(self.budget)
        if self.group is None:
            with probe.watch():
                for row in self.rows[:MASS_ROWS]:
                    model(**_moved({"input_ids": torch.tensor([row["input_ids"]])}, model), use_cache=False)

        chosen: list[LayerMass] = [row for row in probe.rows if row.oracle is not None]
        if not chosen:
            return {}
        names = ("captured", "oracle")
        return {name: sum(getattr(row, name) for row in chosen) / len(chosen) for name in names}


@contextmanager
def _judged(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode inside the block."""
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)


def _moved(batch: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return a batch on the device of a model."""
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in batch.items()}


def _found(model: nn.Module, case: NeedleCase, mode: Mapping[str, Any]) -> bool:
    """Return whether each token of the answer is the most likely one after those before it."""
    ids = torch.tensor([case.prompt_ids + case.answer_ids])
    count = len(case.answer_ids)
    inputs = _moved({"input_ids": ids}, model)
    logits = model(**inputs, **mode, use_cache=False, logits_to_keep=count + 1).logits[0, :count]
    return bool((logits.argmax(-1) == inputs["input_ids"][0, -count:]).all())


def open_held_out(
    stage: Stage,
    tokenizer: Any,
    base: Path,
    budget: int,
    *,
    rank: int = 0,
    processes: int = 1,
    group: Any = None,
) -> HeldOut:
    """Return what a stage is judged by.

    Args:
        stage: The stage; its sources with ``hold_out``, and its generated ones, give the rows.
        tokenizer: Tokenizer of transformers.
        base: Folder that relative paths start from.
        budget: Keys that a query of the model may see; 0 of a dense one.
        rank: Number of this process among those that read rows of their own.
        processes: How many these are.
        group: Context-parallel group of this process, or None.

    Raises:
        ConfigError: There is no text among the held-out documents (DA01).
    """
    sources = [source for source in stage.data if source.hold_out or source.kind == "recall"]

    # Every process reads the rows at its places, as many as the others.
    each = -(-stage.eval_rows // processes)
    order = Order(stage=stage.name)
    data = PackedRows(sources, tokenizer, stage.seq_len, order, base, held_out=True)
    try:
        rows = list(islice(data, each * processes))[rank::processes]
    except ConfigError as error:
        if error.code != "DA01":
            raise
        raise ConfigError(
            f"stage {stage.name}: eval_every found no text among the held-out documents ({error.message})",
            code="DA01",
            hint="raise hold_out, the share of the documents that training never sees",
        ) from error

    # Needles need no group: a prompt is no multiple of its processes.
    needles: list[NeedleCase] = []
    if group is None and has_needles(stage, budget):
        needles = build_needles(tokenizer, [stage.seq_len], DEPTHS)
    return HeldOut(rows=tuple(rows), needles=tuple(needles), budget=budget, group=group)


def has_needles(stage: Stage, budget: int) -> bool:
    """Return whether the rows of a stage have room for a needle that lies beyond the budget."""
    return stage.seq_len > max(budget, NEEDLE_TOKENS)


def evaluation_problems(stage: Stage, methods: Sequence[SparseMethod], parallel: Parallel) -> list[str]:
    """Return why a stage cannot be evaluated as it asks; one sentence for each problem."""
    if not stage.eval_every:
        return []
    problems = []
    if not any(source.hold_out for source in stage.data):
        problems.append(
            "eval_every reads held-out documents, and no source holds any out; give one hold_out, the share "
            "of its documents that training never sees"
        )

    # Not every figure is there for every run.
    figure = stage.keep_best
    if figure == "kl" and not methods:
        problems.append("keep_best: kl compares with dense attention, and the model is dense; take loss")
    if figure == "needles" and (parallel.context > 1 or not has_needles(stage, largest_budget(methods))):
        least = max(largest_budget(methods), NEEDLE_TOKENS)
        problems.append(
            f"keep_best: needles takes rows of more than {least} tokens and no context parallelism; take loss"
        )
    return problems


def largest_budget(methods: Sequence[SparseMethod]) -> int:
    """Return the most keys that a query of any limited layer may see; 0 where no layer is limited."""
    reaches = [method.reach() for method in methods]
    return max((reach.visible_budget for reach in reaches if reach.decode_keys is not None), default=0)


def evaluations(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the entries of a stage's log that are evaluations, in their order."""
    return [row for row in rows if f"{PREFIX}loss" in row]


def best_step(rows: Sequence[Mapping[str, Any]], figure: str) -> tuple[int, int]:
    """Return the step of the best evaluation after the start (0: there is none) and how many followed it.

    Args:
        rows: Evaluations of a stage.
        figure: Name of the figure that decides; of equal ones the first is the best.
    """
    later = [row for row in rows if row["step"] > 0]
    if not later:
        return 0, 0

    sign = -1 if figure in GROWS else 1
    values = [sign * row[f"{PREFIX}{figure}"] for row in later]
    best = values.index(min(values))
    return later[best]["step"], len(later) - 1 - best


def start_was_better(rows: Sequence[Mapping[str, Any]], figure: str) -> str | None:
    """Return a sentence where no evaluation after the start is better than it, else None.

    Args:
        rows: Evaluations of a stage, that of its start among them.
        figure: Name of the figure that decides.
    """
    start = next((row for row in rows if row["step"] == 0), None)
    best = best_step(rows, figure)[0]
    if start is None or not best:
        return None

    key, sign = f"{PREFIX}{figure}", -1 if figure in GROWS else 1
    found = next(row for row in rows if row["step"] == best)
    if sign * found[key] <= sign * start[key]:
        return None
    return f"{figure} is {start[key]:.4f} at the start and {found[key]:.4f} at best after it"


def compare_control(run: Mapping[str, Any], control: Mapping[str, Any]) -> str:
    """Return how a stage's figures moved beside those of its dense control, in one line; empty without any.

    Args:
        run: Report of the stage: ``evaluations``, and ``weights_of_step``, the step whose weights were kept.
        control: Report of the same stage of the control.
    """
    ends = []
    for report in (run, control):
        rows = report.get("evaluations", ())
        last = next((row for row in rows if row["step"] == report.get("weights_of_step")), None)
        if len(rows) < 2 or last is None:
            return ""
        ends.append((rows[0], last))

    (start, sparse), (dense, trained) = ends
    names = [name for name in start if name.startswith(PREFIX) and all(name in row for row in ends[1])]
    parts = [
        f"{name.removeprefix(PREFIX)} {start[name]:.4g} -> {sparse[name]:.4g}, of the dense control "
        f"{dense[name]:.4g} -> {trained[name]:.4g} (apart {start[name] - dense[name]:+.4f} -> "
        f"{sparse[name] - trained[name]:+.4f})"
        for name in names
    ]
    return f"held out, sparse from start to end: {'; '.join(parts)}"


def compare_ends(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return how the figures moved from the first evaluation of a stage to the last, in one line."""
    if len(rows) < 2:
        return ""
    first, last = rows[0], rows[-1]
    names = [name for name in first if name.startswith(PREFIX) and name in last]
    moves = [f"{name.removeprefix(PREFIX)} {first[name]:.4g} -> {last[name]:.4g}" for name in names]
    return f"held out, step {first['step']} -> {last['step']}: {', '.join(moves)}"
