"""What a stage needs of its machine: memory of a device, disk, memory of the host, time."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from nsa_convert.checkpoint.staging import gigabytes
from nsa_convert.training.recipe.schema import Recipe, Stage
from nsa_convert.training.recipe.sections import Machine
from nsa_convert.training.run.flops import PEAKS
from nsa_convert.training.run.models import DTYPES, Start
from nsa_convert.training.run.optimizer_states import FILE_BYTES
from nsa_convert.training.run.parallel import Parallel
from nsa_convert.training.run.rehearsal import step_memory

SPARE = 0.1
"""Share of a device's memory that a plan leaves to what it does not count: the driver, buffers of the
network, gaps between allocations."""
ASSUMED_MFU = 0.3
"""Share of a device's peak that estimates of time assume; the log of a run has the real one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """Numbers of weights, and the bytes of one of each kind of copy.

    Attributes:
        total: Weights of the model.
        trained: Those that are trained.
        largest_layer: Those of the largest decoder layer.
        outer: Those outside of the layers: embeddings, head, last norm.
        number: Bytes of a weight, and of its gradient.
    """

    total: int
    trained: int
    largest_layer: int
    outer: int
    number: int

    @property
    def state(self) -> int:
        """Bytes of AdamW's state: two moments of each trained weight, in half precision with a master."""
        return self.trained * (2 * self.number if self.number >= 4 else 12)


def weights_of(shapes: Mapping[str, int], trained: int, recipe: Recipe) -> Weights:
    """Return the sizes of a model.

    Args:
        shapes: Parameter name -> number of elements.
        trained: Number of weights that a stage trains.
        recipe: The recipe, for the dtype of the weights.
    """
    layers: dict[str, int] = {}
    for name, size in shapes.items():
        if ".layers." in name:
            layer = name.split(".layers.")[1].split(".")[0]
            layers[layer] = layers.get(layer, 0) + size
    total = sum(shapes.values())
    return Weights(
        total=total,
        trained=trained,
        largest_layer=max(layers.values()),
        outer=total - sum(layers.values()),
        number=DTYPES[recipe.precision].itemsize,
    )


def device_memory(recipe: Recipe, stage: Stage, start: Start, weights: Weights, parallel: Parallel) -> int:
    """Return the bytes that one device needs at most.

    Weights, gradients and moments are divided by the processes that hold one copy together. FSDP2 gathers
    embeddings and head for the whole step, and two layers at a time with one layer's gradient; processes with
    whole copies (DDP) have their gradients once more, in the buckets that are sent.
    """
    w = weights
    parts = parallel.weight_parts
    gradients = w.trained * w.number
    static = (w.total * w.number + gradients + w.state) // parts

    gathered = 0
    if parallel.fsdp > 1:
        whole = stage.train == "all"
        sent = 2 if recipe.fsdp_send == "bfloat16" else w.number
        gathered = sent * (w.outer + 2 * w.largest_layer) + w.number * whole * (w.outer + w.largest_layer)
    elif parallel.data > 1:
        gathered = gradients // parts

    # With one micro-batch in a step gradients come while activations go; in the end all are there.
    step = step_memory(recipe, stage, start, parallel)
    turns = stage.rows_per_step // (stage.micro_batch * parallel.data)
    busiest = static + gathered + step.peak
    if turns == 1:
        busiest = max(busiest - gradients // parts, static + gathered + step.last)

    # AdamW's step makes one more number for each weight it trains; with masters for one weight at a time.
    return max(busiest, static + (gradients // parts if w.number >= 4 else 0))


def disk_bytes(recipe: Recipe, index: int, weights: Sequence[Weights], parallel: Parallel) -> int:
    """Return the bytes that a run has on disk at most until the end of a stage.

    Models of finished stages stay, with their last checkpoints' weights; the stage at work has its
    checkpoints with the optimizer's state, one more while a new one is written.
    """
    own, stage = weights[index], recipe.stages[index]
    first = own.total * own.number if parallel.sharded else 0

    before = 0
    for done, w in zip(recipe.stages[:index], weights[:index], strict=True):
        before += w.total * w.number * (1 + _checkpoints(done))
    state = own.total * own.number + own.state
    if stage.train == "lora":  # a checkpoint holds the adapter and the new weights alone
        state = own.trained * own.number + own.state
    return first + before + own.total * own.number + (_checkpoints(stage) + 1) * state


def _checkpoints(stage: Stage) -> int:
    """Return how many checkpoints a stage keeps at its end."""
    if not stage.save_every:
        return 0
    return min(stage.keep, -(-stage.steps // stage.save_every))


def host_bytes(weights: Weights, parallel: Parallel) -> int:
    """Return the bytes of host memory to load and to save.

    Each process loads all weights, or those that several share are gathered once; to write a file of the
    optimizer's state, the processes copy their parts of it twice.
    """
    copies = 1 if parallel.sharded else parallel.processes
    return max(copies * weights.total * weights.number, 2 * min(weights.state, FILE_BYTES))


def step_hours(flops: float, tokens: int, machine: Machine, devices: int) -> float:
    """Return the hours that some tokens take on a machine at the assumed MFU."""
    return flops * tokens / (PEAKS[machine.gpu] * ASSUMED_MFU * devices) / 3600


def fit_problem(
    memory: int, stage: Stage, machine: Machine, parallel: Parallel, shareable: bool
) -> str | None:
    """Return what to change where a stage does not fit its machine with some memory to spare; else None."""
    limit = machine.memory * 1e9
    if memory <= limit * (1 - SPARE):
        return None
    how = "does not fit" if memory > limit else f"fits with less than {SPARE:.0%} to spare"
    advice = "; or ".join(memory_advice(stage, parallel.context, shareable=shareable))
    return f"about {gigabytes(memory)} on one device of {machine.memory:g} GB {how}: {advice}"


def memory_advice(stage: Stage, context: int, *, shareable: bool) -> list[str]:
    """Return the settings that lower the memory of a stage, those that change least first.

    A resume may change checkpointing and micro_batch; more processes are a run of their own, with the same
    rows; shorter rows are another run.

    Args:
        stage: The stage.
        context: Processes that share a row now.
        shareable: Whether more of them can: the methods of the layers allow it.
    """
    key = f"--set stages.{stage.name}"
    parts = [] if stage.checkpointing else [f"{key}.checkpointing=true"]
    parts += [f"{key}.micro_batch={stage.micro_batch // 2}"] if stage.micro_batch > 1 else []
    if shareable and stage.kind != "sft" and stage.seq_len % (2 * context) == 0:
        parts.append(f"in another out --set context={2 * context}, with processes to share each row")
    return [*parts, f"in another out {key}.seq_len={stage.seq_len // 2}"]
