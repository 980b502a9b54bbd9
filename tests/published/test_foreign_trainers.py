"""axolotl and ms-swift train a converted model as docs/howto/other_trainers.md prints it, where installed.

A stand-in for the model of the page is converted from a random one, and a run has a few steps.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.checkpoints import SIZES
from tests.guards.test_docs import commands
from tests.published.bases import byte_tokenizer
from tests.published.pages import ELSEWHERE, ROOT, blocks, section
from tests.published.places import run_command

PAGE = "docs/howto/other_trainers.md"
TEMPLATE = "{% for turn in messages %}<{{ turn['role'] }}>{{ turn['content'] }}{{ eos_token }}{% endfor %}"
METHODS = {
    "nsa": {
        "compression_block": 8,
        "compression_stride": 4,
        "block_size": 8,
        "num_blocks": 4,
        "window_size": 8,
        "key_compressor": "linear",
    },
    "dsa": {"num_tokens": 16, "window_size": 8},
}
"""Method -> settings with which a row of the data is longer than what it sees."""


@dataclasses.dataclass(frozen=True)
class Trainer:
    """How the trainer of a section is run.

    Attributes:
        program: First word of its command.
        few: What is added to the command for four steps.
        out: Where the trained model then lies; the page says ``N`` for the number of steps.
    """

    program: str
    few: str
    out: str


TRAINERS = {
    "axolotl": Trainer("axolotl", "--max-steps 4 --learning-rate 1e-2 --logging-steps 1", "trained"),
    "ms-swift": Trainer(
        "swift", "--max_steps 4 --learning_rate 1e-2 --logging_steps 1", "trained/checkpoint-4"
    ),
}
"""Heading of a section -> its trainer."""


def write_places(folder: Path, method: str) -> None:
    """Write the model and the chats that the page names."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = TEMPLATE
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = AutoConfig.for_model("llama", **{**SIZES, "vocab_size": 264, **ids})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / "MODEL")
    tokenizer.save_pretrained(folder / "MODEL")
    settings = [word for key, value in METHODS[method].items() for word in ("--set", f"{key}={value}")]
    run_command(["nsa-convert", "convert", "MODEL", "my-sparse-model", "--method", method, *settings])
    turns = [(f"What is {i} squared? " * 3, f"It is {i * i}. " * 6) for i in range(32)]
    chats = [
        {"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]}
        for ask, answer in turns
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))


def run_program(words: list[str]) -> None:
    """Run a program of this environment, which starts others by their names."""
    programs = Path(sys.executable).parent
    env = {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}:.",
        "DO_NOT_TRACK": "1",
    }
    ran = subprocess.run(
        [str(programs / words[0]), *words[1:]], env=env, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, f"{' '.join(words)}\n{(ran.stdout + ran.stderr)[-6000:]}"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize("heading", ELSEWHERE[PAGE])
def test_a_section_prints_the_trainer_and_checks(heading):
    """This much is known where the trainer is not installed."""
    printed = [body for language, body in blocks(section(PAGE, heading)) if language == "bash"]
    programs = [words[0] for body in printed for words in commands(body)]
    assert programs == [TRAINERS[heading].program, "nsa-convert", "nsa-convert"]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("heading", ELSEWHERE[PAGE])
def test_a_foreign_trainer_trains_what_is_new(heading, method, tmp_path, monkeypatch):
    trainer = TRAINERS[heading]
    if importlib.util.find_spec(ELSEWHERE[PAGE][heading]) is None:
        pytest.skip(f"{heading} is not installed; {PAGE} says with which versions it runs")
    monkeypatch.chdir(tmp_path)
    write_places(tmp_path, method)

    for language, body in blocks(section(PAGE, heading)):
        if language != "bash":
            # The first line of a file says its name.
            Path(body.partition("\n")[0].removeprefix("# ")).write_text(body)
            continue
        for words in commands(body):
            if words[0] == trainer.program:
                run_program([*words, *shlex.split(trainer.few)])
            else:
                run_command([trainer.out if word.startswith("trained") else word for word in words])

    state = json.loads((tmp_path / "trained" / "checkpoint-4" / "trainer_state.json").read_text())
    losses = [row["loss"] for row in state["log_history"] if "loss" in row]
    assert len(losses) == 4
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]
    before, after = weights(tmp_path / "my-sparse-model"), weights(tmp_path / trainer.out)
    assert set(before) == set(after)
    assert [name for name in before if torch.equal(before[name], after[name])] == []
