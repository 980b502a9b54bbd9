"""How processes can share a run, against what the run does: each pair runs, or is refused with a reason.

The table of docs/howto/train.md is written from here; test_combinations.py runs every pair that it says runs.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from nsa_convert.errors import ConfigError
from nsa_convert.training.recipe.schema import recipe_from_dict
from nsa_convert.training.run.forecast import forecast_recipe
from nsa_convert.training.run.models import read_start
from nsa_convert.training.run.parallel import parallel_of
from tests.models import MOBA
from tests.training.recipes import ALIGN, FRESH, NSA, ROOT, SSA, recipe_values, stage

PROCESSES = 2
MODEL = {
    **FRESH,
    "vocab": 258,
    "config": {
        **FRESH["config"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
    },
}
LORA = {"train": "lora", "lora": {"rank": 2, "alpha": 4.0, "targets": ["q_proj", "o_proj", "down_proj"]}}
CHATS = {
    "kind": "sft",
    "seq_len": 256,
    "tokens": 512 * 3,
    "batch_tokens": 512,
    "save_every": 0,
    "data": [{"kind": "jsonl", "path": str(ROOT / "recipes/tiny/chats.jsonl"), "column": "messages"}],
}
HELD_OUT = {
    "data": [{"kind": "reference", "hold_out": 0.1}],
    "eval_every": 2,
    "eval_rows": 4,
}

SHARINGS: dict[str, dict[str, int]] = {
    "rows alone (DDP)": {},
    "`fsdp`": {"fsdp": 2},
    "`tensor`": {"tensor": 2},
    "`context`": {"context": 2},
    "`fsdp`, `context`": {"fsdp": 2, "context": 2},
    "`fsdp`, `tensor`": {"fsdp": 2, "tensor": 2},
    "`tensor`, `context`": {"tensor": 2, "context": 2},
}
"""How two processes share a run -> the keys of the recipe."""

WORK: dict[str, tuple[dict[str, Any] | None, dict[str, Any], dict[str, Any]]] = {
    "`align`, new weights": (NSA, ALIGN, {}),
    "`pretrain`, all weights": (NSA, stage(), {}),
    "the same with `checkpointing`": (NSA, stage(checkpointing=True), {}),
    "the same in `bf16-mixed`": (NSA, stage(), {"precision": "bf16-mixed"}),
    "the same in `bf16`": (NSA, stage(), {"precision": "bf16"}),
    "SSA with `teacher_kl`": (SSA, stage(teacher_kl=0.5), {}),
    "`pretrain`, LoRA": (NSA, stage(**LORA), {}),
    "LoRA with `checkpointing` in `bf16-mixed`": (
        NSA,
        stage(**LORA, checkpointing=True),
        {"precision": "bf16-mixed"},
    ),
    "`extend` with `rope`": (MOBA, stage(kind="extend", rope={"type": "linear", "factor": 2}), {}),
    "chats (`sft`), all weights": (NSA, stage(**CHATS), {}),
    "chats, LoRA": (NSA, stage(**CHATS, **LORA), {}),
    "`eval_every`": (NSA, stage(**HELD_OUT), {}),
    "`keep_best`": (NSA, stage(**HELD_OUT, keep_best="loss"), {}),
    "`micro_batch` of several rows": (NSA, stage(micro_batch=2, batch_tokens=128, tokens=640), {}),
    "a dense model": (None, stage(), {}),
}
"""What a run does -> its method, its stage and further keys."""


def values(out: Path, work: str, sharing: str | None) -> dict[str, Any]:
    """Return the recipe of a pair, or of the same work in one process."""
    method, part, keys = WORK[work]
    sizes = {} if sharing is None else SHARINGS[sharing]
    return recipe_values(out, method, copy.deepcopy(part), model=copy.deepcopy(MODEL), **keys, **sizes)


def refusal(work: str, sharing: str) -> str | None:
    """Return why a pair is refused, or None where it runs."""
    recipe = recipe_from_dict(values(Path("out"), work, sharing))
    try:
        forecast_recipe(recipe, read_start(recipe, None), ROOT, parallel=parallel_of(recipe, PROCESSES))
    except ConfigError as error:
        return error.message
    return None


def combinations_table() -> str:
    """Return the table of the guide: what runs, and the numbered reasons of what is refused."""
    reasons: dict[str, int] = {}
    lines = [["", *SHARINGS], ["---"] * (len(SHARINGS) + 1)]
    for work in WORK:
        cells = []
        for sharing in SHARINGS:
            said = refusal(work, sharing)
            number = None if said is None else reasons.setdefault(reason_of(said), len(reasons) + 1)
            cells.append("runs" if number is None else f"no ({number})")
        lines.append([work, *cells])

    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join([table, "", *(f"{number}. {text}" for text, number in reasons.items())])


def reason_of(message: str) -> str:
    """Return a refusal as a line of the guide, without the stage of the example and how to start it."""
    text = message.split("; start it with")[0].removeprefix("stage align: ").removeprefix("stage pretrain: ")
    return text.replace("\n", " ")
