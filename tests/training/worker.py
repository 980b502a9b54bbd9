"""One of two processes of tests/training/test_distributed.py: ``python -m tests.training.worker FOLDER``.

Every check compares a model shared by the processes with the same model in one process, and process 0 writes
the largest differences to ``FOLDER/result.json``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from transformers.distributed import DistributedConfig

from nsa_convert.errors import ConfigError
from nsa_convert.loading import load_causal_model
from nsa_convert.methods.parts.training_mode import TrainingMode
from nsa_convert.patch import chunked_loss
from nsa_convert.training.losses import known_losses, stage_losses
from nsa_convert.training.recipe.schema import recipe_from_dict
from nsa_convert.training.run.distributed import distributed_config, share_tokens, split_tokens
from nsa_convert.training.run.models import methods_of
from nsa_convert.training.run.parallel import can_shard
from tests.models import tokens
from tests.training.processes import PLAIN

transformers.logging.set_verbosity_error()
LENGTH = 48
LOSSES = {"nsa": ("output_error", "score_kl"), "ssa": ("output_error", "alignment")}


def whole(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def asked(names: tuple[str, ...], **more) -> TrainingMode:
    return TrainingMode(losses=names, weights=(1 / 3,) * len(names), draw=1, keep_logits=False, **more)


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: whole(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}


def compare(found: dict, wanted: dict) -> dict[str, float]:
    """Return the largest difference relative to the largest gradient, and that of the new weights alone."""
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    size = max(x.abs().max() for x in wanted.values())
    worst = {name: ((found[name] - wanted[name]).abs().max() / size).item() for name in wanted}
    new = [worst[name] for name in worst if ".sparse." in name]
    assert all(
        wanted[name].abs().max() > 0 for name in worst if ".sparse." in name and "position" not in name
    )
    return {"gradient": max(worst.values()), "gradient_new": max(new, default=0.0)}


def reference(folder: Path, batch: dict, mode: TrainingMode):
    model = load_causal_model(folder, torch.float64).train()
    out = model(**batch, training_mode=mode)
    out.loss.backward()
    return out, gradients(model)


def check_tensor(folder: Path, method: str) -> dict[str, float]:
    ids = tokens(2, LENGTH)
    mode = asked(LOSSES.get(method, ("output_error",)))
    want, grads = reference(folder, {"input_ids": ids, "labels": ids}, mode)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, distributed_config=DistributedConfig(tp_plan="auto", tp_size=2)
    )
    out = model.train()(input_ids=ids, labels=ids, training_mode=mode)
    out.loss.backward()
    return {
        "loss": (out.loss - want.loss).abs().item(),
        "auxiliary": (out.auxiliary - want.auxiliary).abs().max().item(),
        **compare(gradients(model), grads),
    }


def check_refused(folder: Path) -> dict[str, float]:
    """Tensor parallel of a method that is not known to it ends before a weight is loaded."""
    config = DistributedConfig(tp_plan="auto", tp_size=2)
    try:
        transformers.AutoModelForCausalLM.from_pretrained(folder, distributed_config=config)
    except ConfigError as error:
        return {"says nothing": float("tensor parallel" not in error.message)}
    return {"was loaded": 1.0}


def load_empty(folder: Path):
    config = transformers.AutoConfig.from_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_config(config)


def check_sharded(folder: Path, method: str, stream: str = "sparse") -> dict[str, float]:
    ids = tokens(2, LENGTH)
    with torch.device("meta"):
        plain = load_empty(folder)
    names = LOSSES.get(method) or tuple(sorted({n for m in methods_of(plain) for n in known_losses(m)}))
    mode = asked(names, stream=stream)
    rows = [reference(folder, {"input_ids": row, "labels": row}, mode) for row in ids.split(1)]
    loss_wanted, auxiliary_wanted = (sum(out[name] for out, _ in rows) / 2 for name in ("loss", "auxiliary"))
    grads = {name: sum(found[name] for _, found in rows) / 2 for name in rows[0][1]}
    mine = ids[dist.get_rank() :][:1]
    config = distributed_config(plain, fsdp=2)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, distributed_config=config
    )
    out = model.train()(input_ids=mine, labels=mine, training_mode=mode)
    out.loss.backward()  # FSDP takes the mean over the processes
    loss, auxiliary = out.loss.detach().clone(), out.auxiliary.detach().clone()
    for value in (loss, auxiliary):
        dist.all_reduce(value)
    return {
        "loss": (loss / 2 - loss_wanted).abs().item(),
        "auxiliary": (auxiliary / 2 - auxiliary_wanted).abs().max().item(),
        **compare(gradients(model), grads),
    }


def check_context(folder: Path, method: str, packed: bool = True) -> dict[str, float]:
    """Share each row; a packed one holds a document across its middle."""
    ids = tokens(1 if packed else 2, LENGTH)
    batch = {"input_ids": ids, "labels": ids}
    if packed:
        positions = torch.cat([torch.arange(n) for n in (9, 31, LENGTH - 40)])[None]
        batch |= {"position_ids": positions, "labels": ids.masked_fill(positions == 0, -100)}
    group = dist.new_group([0, 1])
    model = load_causal_model(folder, torch.float64).train()
    names = tuple(sorted({name for m in methods_of(model) for name in known_losses(m)}))
    mode = asked(names)
    count = int((batch["labels"][:, 1:] != -100).sum())
    want, grads = reference(folder, batch, mode)
    share_tokens(model, group)
    out = model(
        **split_tokens(batch, group), training_mode=asked(names, cross_entropy=2.0), num_items_in_batch=count
    )
    out.loss.backward()
    found = {name: p.grad.clone() / 2 for name, p in model.named_parameters() if p.grad is not None}
    for grad in found.values():
        dist.all_reduce(grad)
    loss = out.cross_entropy.detach().clone()
    dist.all_reduce(loss)
    return {
        "loss": (loss - want.cross_entropy).abs().item(),
        "auxiliary": (out.auxiliary - want.auxiliary).abs().max().item(),
        **compare(found, grads),
    }


def check_streams() -> dict[str, float]:
    """Every process draws the same streams, whatever its own random state is."""
    torch.manual_seed(dist.get_rank())
    stage = {
        "name": "a",
        "kind": "pretrain",
        "train": "all",
        "seq_len": 8,
        "tokens": 8,
        "batch_tokens": 8,
        "full_ratio": 0.5,
        "data": [{"kind": "recall"}],
    }
    recipe = recipe_from_dict({"model": "x", "out": "y", "stages": [stage]})
    plan = stage_losses(recipe.stages[0], [], 3, 0)
    drawn = torch.tensor([plan.mode(step).stream == "full" for step in range(64)]).int()
    others = [torch.empty_like(drawn) for _ in range(2)]
    dist.all_gather(others, drawn)
    assert 10 < drawn.sum() < 54
    return {"differs": float((others[0] != others[1]).sum())}


def main() -> None:
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    chunked_loss.CHUNK = 7 * 128  # several chunks of each row's logits
    result = {"streams": check_streams()}
    for method in ("nsa", "ssa"):
        assert methods_of(load_empty(folder / method))
        if can_shard():
            for tied in ("", " tied"):
                result[f"fsdp {method}{tied}"] = check_sharded(folder / f"{method}{tied}", method)
            result[f"fsdp {method}, aligned"] = check_sharded(folder / method, method, "teacher")
        result[f"tensor {method}"] = check_tensor(folder / method, method)
        result[f"context {method}, one document"] = check_context(folder / method, method, packed=False)
    for method in PLAIN:
        result[f"tensor {method}"] = check_tensor(folder / method, method)
    for method in ("dsa-shared", "hybrid"):
        result[f"refused {method}"] = check_refused(folder / method)
    for place in sorted(place for place in folder.iterdir() if " " not in place.name):
        if place.name not in ("streaming", "phases"):
            result[f"context {place.name}"] = check_context(place, place.name)
        if can_shard() and place.name not in LOSSES:
            result[f"fsdp {place.name}"] = check_sharded(place, place.name)
    if dist.get_rank() == 0:
        (folder / "result.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
