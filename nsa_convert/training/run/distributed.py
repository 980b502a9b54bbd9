"""Several processes for one model: FSDP2, tensor parallelism and context parallelism.

FSDP2 and tensor parallelism are transformers' own (``DistributedConfig``); a converted model brings the
sharding of its new weights itself (:mod:`nsa_convert.patch.tensor_parallel`). Context parallelism splits the
tokens of a row: each process keeps its queries, keys and values are gathered from all. A layer then sees a
layout it knows: a run of queries at an offset among all keys.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nsa_convert.errors import NsaConvertError
from nsa_convert.loading import load_causal_model, safe_config
from nsa_convert.patch.attention import SparseAttention
from nsa_convert.patch.collectives import Processes
from nsa_convert.patch.modeling import SparseModelMixin
from nsa_convert.patch.patching import sparse_methods
from nsa_convert.patch.tensor_parallel import tensor_problems
from nsa_convert.settings import raise_problems
from nsa_convert.training.run.parallel import GATHERED, REPLICAS, Parallel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from nsa_convert.training.data.rows import PackedRows

T = TypeVar("T")


def distributed_config(
    plain: PreTrainedModel, *, fsdp: int = 1, tensor: int = 1, replicas: int = 1, half: bool = False
) -> Any:
    """Return transformers' DistributedConfig for a dense or converted model.

    Args:
        plain: The model on the meta device, for its methods.
        fsdp: Number of processes that share each weight (FSDP2).
        tensor: Number of processes that share the heads of each layer.
        replicas: Number of copies of the weights that are shared so (HSDP).
        half: Send weights to the other processes in bfloat16; gradients come back in float32.

    Raises:
        ConfigError: A method does not support tensor parallelism, or the heads cannot be divided (RC09).
    """
    from transformers.distributed import DistributedConfig

    if tensor > 1:
        raise_problems(tensor_problems(sparse_methods(plain), plain.config.to_dict(), tensor), code="RC09")
    # Versions that lack a field are asked for its default alone.
    more: dict[str, Any] = {REPLICAS: replicas} if replicas > 1 else {}
    more |= {GATHERED: True} if half else {}
    return DistributedConfig(fsdp_size=fsdp, tp_size=tensor, **more)


def join_processes() -> None:
    """Create the process group of the processes that torchrun or accelerate started."""
    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def from_main(work: Callable[[], T]) -> T:
    """Run a function in the main process and return its result, or raise its error, in every process.

    Args:
        work: The function. It may raise :class:`NsaConvertError`; its result is pickled.
    """
    if not dist.is_initialized():
        return work()

    # The result or the error: other processes wait for either.
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = work()
        except NsaConvertError as error:
            box[1] = error

    dist.broadcast_object_list(box)
    if box[1] is not None:
        raise box[1]
    return box[0]


def gather_lanes(rows: PackedRows) -> None:
    """Let every process know the positions of the lanes that the others have read."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return

    found: list[dict[int, dict[str, Any]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, rows.known())
    for states in found:
        # Of a lane that several read the furthest position counts; none is beyond the rows of this step.
        known = rows.known()
        new = {n: x for n, x in states.items() if n not in known or x["rows"] > known[n]["rows"]}
        rows.note(rows.rows, new)


def load_sharded(
    folder: Path, dtype: torch.dtype, parallel: Parallel, *, half: bool = False
) -> PreTrainedModel:
    """Load a checkpoint with its weights sharded over the processes as ``parallel`` says.

    Args:
        folder: Folder of the checkpoint.
        dtype: Of the weights.
        parallel: How the processes share them.
        half: Send weights to the other processes in bfloat16.
    """
    from transformers import AutoModelForCausalLM

    # Without storage: only to check the methods and the sizes before loading.
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(safe_config(folder))

    config = distributed_config(
        plain, fsdp=parallel.fsdp, tensor=parallel.tensor, replicas=parallel.replicas, half=half
    )
    model = load_causal_model(folder, dtype, distributed_config=config)
    _save_tied_once(model)
    return model


def _save_tied_once(model: PreTrainedModel) -> None:
    """Leave copies of tied weights out of a sharded model's saves: gathered, they no longer share memory."""
    gather = model.gather_sharded_state_dict_for_save

    def gather_once(*args: Any, **kwargs: Any) -> dict[str, Any]:
        state = gather(*args, **kwargs)
        return {name: x for name, x in state.items() if name not in model.all_tied_weights_keys}

    model.gather_sharded_state_dict_for_save = gather_once


def row_mesh(parallel: Parallel) -> Any:
    """Return the device mesh by the rows that processes read, or None where each reads its own.

    Its dimensions have the names by which accelerate's data loader knows that processes read the same rows.

    Returns:
        A mesh ``(dp_shard, cp)`` or ``(dp_shard, tp)``.
    """
    from torch.distributed.device_mesh import init_device_mesh

    if parallel.data == parallel.processes:
        return None

    device = "cuda" if torch.cuda.is_available() else "cpu"
    shared = parallel.processes // parallel.data
    names = ("dp_shard", "cp" if parallel.context > 1 else "tp")
    return init_device_mesh(device, (parallel.data, shared), mesh_dim_names=names)


def share_tokens(model: nn.Module, group: Any) -> None:
    """Make layers attend across a context-parallel group, each process with a part of every row.

    Auxiliary losses are then those of the whole rows; gradients have to be averaged over the group.
    """
    processes = Processes(group)
    for module in model.modules():
        if isinstance(module, (SparseAttention, SparseModelMixin)):
            module.context_group = processes


def split_tokens(batch: dict[str, Tensor], group: Any) -> dict[str, Tensor]:
    """Return this process's part of every row, with the labels of the tokens that follow.

    Args:
        batch: ``input_ids`` and ``labels`` ``[B, T]``, and ``position_ids`` that restart at 0 in each packed
            document; without them a row is one document. Packed rows come one by one, B = 1.
        group: The context-parallel group; T must be a multiple of its size.

    Returns:
        ``input_ids``, ``position_ids`` and ``shift_labels`` ``[B, T / size]`` of this process;
        row where it holds several documents.
    """
    ids, labels, positions = batch["input_ids"], batch["labels"], batch.get("position_ids")

    # The tokens of this process.
    size = dist.get_world_size(group)
    rank = dist.get_rank(group)
    length = ids.shape[1] // size
    here = slice(rank * length, (rank + 1) * length)

    # The label of the last local token is the first token of the next process: shift before cutting.
    following = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    if positions is None:
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    part = {
        "input_ids": ids[:, here],
        "position_ids": positions[:, here],
        "shift_labels": following[:, here].contiguous(),
    }

    # More starts than rows: a row holds several documents. [documents + 1] boundaries in the whole row.
    begins = (positions == 0).nonzero()[:, 1]
    if len(begins) > len(ids):
        part["cu_seq_lens_q"] = torch.cat([begins, begins.new_tensor([ids.shape[1]])])
    return part
