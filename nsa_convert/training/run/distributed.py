"""Several processes for one model: FSDP2, tensor parallel and context parallel, on engines that exist.

FSDP2 and tensor parallel are transformers' own (``DistributedConfig``); a converted model brings the plan for
its new weights itself (:mod:`nsa_convert.patch.tensor_parallel`). Context parallel splits the tokens of a
row: queries stay local, keys and values are gathered, so a layer sees the layout it knows, a run of queries
at an offset among all keys.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nsa_convert.config import raise_problems
from nsa_convert.errors import NsaConvertError
from nsa_convert.loading import load_causal_model, safe_config
from nsa_convert.patch.attention import SparseAttention
from nsa_convert.patch.collectives import Processes
from nsa_convert.patch.modeling import SparseModelMixin
from nsa_convert.patch.patching import sparse_methods
from nsa_convert.patch.tensor_parallel import tensor_problems
from nsa_convert.training.run.parallel import Parallel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")


def distributed_config(plain: PreTrainedModel, *, fsdp: int = 1, tensor: int = 1) -> Any:
    """Return transformers' DistributedConfig for a dense or converted model.

    Args:
        plain: The model on the meta device, for the names of its new weights.
        fsdp: Processes that share each weight.
        tensor: Processes that share each layer.

    Raises:
        ConfigError: A method cannot be shared that way.
    """
    from transformers.distributed import DistributedConfig

    if tensor > 1:
        raise_problems(tensor_problems(sparse_methods(plain), plain.config.to_dict(), tensor), code="RC09")
    return DistributedConfig(fsdp_size=fsdp, tp_size=tensor)


def join_processes() -> None:
    """Join the processes that torchrun or accelerate started."""
    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def from_main(work: Callable[[], T]) -> T:
    """Return in every process what the main one computes, or raise the error it raises."""
    if not dist.is_initialized():
        return work()
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


def load_sharded(folder: Path, dtype: torch.dtype, parallel: Parallel) -> PreTrainedModel:
    """Load a checkpoint with its weights cut among the processes as ``parallel`` says."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(safe_config(folder))
    config = distributed_config(plain, fsdp=parallel.fsdp, tensor=parallel.tensor)
    model = load_causal_model(folder, dtype, distributed_config=config)
    _save_tied_once(model)
    return model


def _save_tied_once(model: PreTrainedModel) -> None:
    """Keep copies of tied weights out of what a cut model saves: gathered, they no longer share memory."""
    gather = model.gather_sharded_state_dict_for_save

    def gather_once(*args: Any, **kwargs: Any) -> dict[str, Any]:
        state = gather(*args, **kwargs)
        return {name: x for name, x in state.items() if name not in model.all_tied_weights_keys}

    model.gather_sharded_state_dict_for_save = gather_once


def row_mesh(parallel: Parallel) -> Any:
    """Return the mesh of the processes by the rows they read, or None where each reads its own.

    Its dimensions have the names by which accelerate's data loader knows that processes read the same rows.
    """
    from torch.distributed.device_mesh import init_device_mesh

    if parallel.data == parallel.processes:
        return None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shared = parallel.processes // parallel.data
    names = ("dp_shard", "cp" if parallel.context > 1 else "tp")
    return init_device_mesh(device, (parallel.data, shared), mesh_dim_names=names)


def whole_optimizer_state(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """Return the optimizer's state with whole tensors, by parameter name; every process has to call this."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    return get_optimizer_state_dict(
        model, inner, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )


def load_optimizer_state(model: nn.Module, optimizer: Any, state: dict[str, Any]) -> None:
    """Give an optimizer the state that :func:`whole_optimizer_state` returned, cut to this process's part."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    inner = getattr(optimizer, "optimizer", optimizer)
    set_optimizer_state_dict(model, inner, state, options=StateDictOptions(full_state_dict=True))


def share_tokens(model: nn.Module, group: Any) -> None:
    """Let the layers of a model attend across the processes of a group, each with its run of every row.

    Auxiliary losses are those of the whole rows then; gradients have to be averaged over the group.
    """
    processes = Processes(group)
    for module in model.modules():
        if isinstance(module, (SparseAttention, SparseModelMixin)):
            module.context_group = processes


def split_tokens(batch: dict[str, Tensor], group: Any) -> dict[str, Tensor]:
    """Return this process's run of every row, with the labels of the tokens that follow.

    Args:
        batch: ``input_ids`` and ``labels`` ``[B, T]``, and ``position_ids`` that restart at 0 in each packed
            document; without them a row is one document. Packed rows come one by one, B = 1.
        group: The context group; T must be a multiple of its size.

    Returns:
        ``input_ids``, ``position_ids`` and ``shift_labels`` of this process; ``cu_seq_lens_q`` of the whole
        row where it holds several documents.
    """
    ids, labels, positions = batch["input_ids"], batch["labels"], batch.get("position_ids")
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    length = ids.shape[1] // size
    here = slice(rank * length, (rank + 1) * length)
    following = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    if positions is None:
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    part = {
        "input_ids": ids[:, here],
        "position_ids": positions[:, here],
        "shift_labels": following[:, here].contiguous(),
    }
    begins = (positions == 0).nonzero()[:, 1]
    if len(begins) > len(ids):
        part["cu_seq_lens_q"] = torch.cat([begins, begins.new_tensor([ids.shape[1]])])
    return part
