"""How the processes of a run share its work: weights (FSDP2), heads of a layer, tokens of a row."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import transformers

from nsa_convert.methods.parts.base import SparseMethod
from nsa_convert.methods.parts.mix import leaves_of
from nsa_convert.methods.parts.registry import parallel_problems
from nsa_convert.patch.tensor_parallel import tensor_problems

if TYPE_CHECKING:
    from nsa_convert.training.recipe.schema import Recipe, Stage

SHARDING_SINCE = (5, 19)
"""Version of transformers since which the Trainer accepts a model that is already sharded."""


REPLICAS = "dp_replicate_size"
"""Field of transformers' DistributedConfig: copies of weights that are shared themselves (HSDP)."""
GATHERED = "fsdp_mixed_precision"
"""Field of transformers' DistributedConfig: weights are sent to the others in bfloat16."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parallel:
    """How processes share the work.

    Attributes:
        processes: All processes of the run.
        fsdp: Number of neighbouring processes that share each weight (FSDP2).
        tensor: Number of neighbouring processes that share the heads and the MLP width of every layer.
        context: Number of neighbouring processes that share the tokens of every row.
    """

    processes: int = 1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1

    @property
    def data(self) -> int:
        """Number of process groups that read different rows."""
        return max(1, self.processes // (self.tensor * self.context))

    @property
    def replicas(self) -> int:
        """Number of copies of the weights that are each shared by ``fsdp`` processes; several are HSDP."""
        return max(1, self.processes // self.fsdp) if self.fsdp > 1 else 1

    @property
    def sharded(self) -> bool:
        """Whether weights are sharded while they are loaded."""
        return self.fsdp > 1 or self.tensor > 1

    @property
    def weight_parts(self) -> int:
        """Number of processes over which one copy of the weights is spread."""
        return self.fsdp * self.tensor

    def to_text(self) -> str:
        """Return one line that says how the work is shared."""
        count = f"{self.processes} process" + ("es" if self.processes > 1 else "")
        each = {
            "every weight shared by {} (FSDP2)": self.fsdp,
            "the heads of a layer by {} (tensor)": self.tensor,
            "a row by {} (context)": self.context,
        }
        parts = [text.format(size) for text, size in each.items() if size > 1]
        parts += [f"{self.replicas} such copies (HSDP)"] if self.replicas > 1 else []

        if self.processes > 1:
            parts.append(f"{self.data} of them read different rows" if self.data > 1 else "all read one row")
        return "; ".join([count, *parts])


def world_size() -> int:
    """Return how many processes torchrun or accelerate started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def parallel_of(recipe: Recipe, processes: int | None = None) -> Parallel:
    """Return how the run of a recipe shares its work.

    Args:
        recipe: The recipe.
        processes: Number of processes; that of this run when left out.
    """
    count = world_size() if processes is None else processes
    return Parallel(processes=count, fsdp=recipe.fsdp, tensor=recipe.tensor, context=recipe.context)


def planned(recipe: Recipe) -> Parallel:
    """Return what ``--dry-run`` assumes: the processes of this run, or the fewest that the recipe needs."""
    count = world_size()
    if count == 1:
        count = max(recipe.tensor, recipe.fsdp, recipe.context)
    return parallel_of(recipe, count)


def can_shard() -> bool:
    """Return whether the installed transformers can train a model sharded at load time."""
    return tuple(map(int, transformers.__version__.split(".")[:2])) >= SHARDING_SINCE


def has_sharding_option(name: str) -> bool:
    """Return whether transformers' DistributedConfig has a field: versions before 5.23 lack some."""
    try:
        from transformers.distributed import DistributedConfig
    except ImportError:  # why: without the class no option is there, which the caller tells
        return False
    return any(field.name == name for field in dataclasses.fields(DistributedConfig))


def size_problems(parallel: Parallel) -> list[str]:
    """Return why the sizes do not fit the number of processes or each other."""
    count, fsdp, tensor, context = dataclasses.astuple(parallel)
    how = f"start it with torchrun --nproc-per-node N, or change the keys (the run has {count})"
    if tensor > 1 and context > 1:
        return [f"tensor {tensor} and context {context} cannot be combined; set one of them to 1"]

    # Sharded weights need support by the Trainer.
    problems = []
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("1", "true"):
        problems.append(
            "DeepSpeed brings an optimizer of its own, which knows no rate for new weights; start with "
            "torchrun, and share weights with fsdp"
        )
    if parallel.sharded and not can_shard():
        problems.append(
            "fsdp and tensor need transformers {}.{} or newer, ".format(*SHARDING_SINCE)
            + f"whose Trainer takes models that are cut while they load; this is {transformers.__version__}"
        )

    # Each size must divide the processes; tensor and FSDP take all of them.
    if tensor > 1 and (count != tensor or fsdp > 1):
        problems.append(f"tensor {tensor} takes {tensor} processes and fsdp 1 (got fsdp {fsdp}); {how}")
    elif count % fsdp:
        problems.append(f"fsdp {fsdp} does not divide the {count} processes; {how}")
    elif parallel.replicas > 1 and not has_sharding_option(REPLICAS):
        problems.append(
            f"fsdp {fsdp} of {count} processes needs a newer transformers, whose DistributedConfig has "
            f"{REPLICAS}; with {transformers.__version__} it can be 1 or {count}"
        )
    if context > 1 and count % context:
        problems.append(f"context {context} takes a multiple of {context} processes; {how}")

    return problems


def sending_problems(recipe: Recipe) -> list[str]:
    """Return why FSDP2 cannot send the weights of a recipe as it says."""
    if recipe.fsdp_send == "float32" or has_sharding_option(GATHERED):
        return []
    return [
        f"fsdp_send {recipe.fsdp_send} needs a newer transformers, whose DistributedConfig has {GATHERED}; "
        f"leave it out with {transformers.__version__}"
    ]


def method_problems(
    parallel: Parallel, methods: Sequence[SparseMethod], config: Mapping[str, Any]
) -> list[str]:
    """Return why the layers of this model cannot be shared like this."""
    problems = []

    # torch pads both of the two parameters it sees, each for itself: one of them misses every update.
    rows = config["vocab_size"]
    if parallel.fsdp > 1 and config.get("tie_word_embeddings") and rows % parallel.fsdp:
        problems.append(f"fsdp {parallel.fsdp} has to divide the {rows} rows of tied embeddings")

    if parallel.tensor > 1:
        problems += tensor_problems(methods, config, parallel.tensor)
    if parallel.context > 1:
        problems += context_problems(methods)
    return problems


def context_problems(methods: Sequence[SparseMethod]) -> list[str]:
    """Return why the layers cannot run with queries of only a part of the row."""
    if not methods:
        return ["context needs a sparse model: the attention of a dense one sees its own tokens only"]

    # Every method must support it, and none may mix neighbouring keys, which another process may have.
    leaves = leaves_of(methods)
    problems = parallel_problems("context", leaves, "context")
    mixing = sorted({m.spec.name for m in leaves if m.cache_needs().key_taps > 1})
    if mixing:
        problems.append(
            f"context: key_conv of {', '.join(mixing)} needs tokens of other processes; set it to 0"
        )
    return problems


def sharing_problems(parallel: Parallel, stage: Stage) -> list[str]:
    """Return why a stage cannot be shared like this."""
    problems = []

    # Every group of processes takes the same number of micro-batches in a step.
    if stage.rows_per_step % (stage.micro_batch * parallel.data):
        problems.append(
            f"a step of {stage.rows_per_step} rows cannot be shared by {parallel.data} processes with "
            f"micro_batch {stage.micro_batch}"
        )

    if parallel.tensor > 1 and stage.train == "lora":
        problems.append("tensor cannot be combined with train: lora; use fsdp or context")

    if parallel.context == 1:
        return problems

    # What context parallelism needs of a stage.
    if stage.kind == "sft":
        problems.append("context cannot be combined with kind sft, whose rows TRL packs; use fsdp or tensor")
    if stage.micro_batch > 1:
        problems.append(f"context takes rows one by one: micro_batch must be 1, got {stage.micro_batch}")
    if stage.seq_len % parallel.context:
        problems.append(f"seq_len {stage.seq_len} is not a multiple of context {parallel.context}")
    return problems
