"""What the names in capitals of pages and presets stand for, and how their commands are run here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from click.testing import CliRunner

from nsa_convert.cli import main
from tests.evaluation.tiny import byte_tokenizer, save, tiny_dense
from tests.published.pages import ROOT
from tests.training.processes import free_port
from tests.training.recipes import SSA, recipe_values, stage


def write_model(folder: Path, **sizes: Any) -> None:
    """Write MODEL: a tiny dense model with a licence, a chat template and an end token."""
    dense = save(tiny_dense(**sizes).float(), folder / "MODEL")
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(0)
    tokenizer.save_pretrained(dense)
    (dense / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (dense / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")


def write_recipe(folder: Path) -> None:
    """Write RECIPE: two steps of SSA, whose heads, rows and weights can be shared by two processes."""
    values = recipe_values(Path("runs/recipe"), SSA, stage(tokens=128))
    values["model"]["vocab"] = 258
    shape = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    values["model"]["config"] |= {**shape, "max_position_embeddings": 256}
    (folder / "RECIPE").write_text(yaml.safe_dump(values))


def two_processes(words: list[str]) -> list[str]:
    """Return a command of torchrun or accelerate that starts two processes where it says eight."""
    words = [re.sub(r"^((?:fsdp|context|tensor)=)?8$", r"\g<1>2", word) for word in words]
    if words[0] == "torchrun":
        return [words[0], "--master-port", str(free_port()), *words[1:]]
    place = words.index("-m")
    port = ["--num_processes", "2", "--main_process_port", str(free_port())]
    return [*words[:place], *port, *words[place:]]


def run_command(words: list[str]) -> str:
    """Run one command line as printed; it has to succeed. Return what it printed to stdout."""
    if words[0] == "nsa-convert":
        done = CliRunner().invoke(main, words[1:])
        status, output, printed = done.exit_code, done.output, done.stdout
    else:
        command = [str(Path(sys.executable).parent / words[0]), *words[1:]]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
        status, output, printed = ran.returncode, ran.stdout + ran.stderr, ran.stdout
    assert status == 0, f"{' '.join(words)}\n{output[-6000:]}"
    assert "Traceback" not in output
    return printed
