"""Render chat templates in a child process with limits: they are programs of a model's author."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from nsa_convert.errors import ConfigError

SECONDS = 10
MEMORY_BYTES = 512_000_000
"""What a template may take beyond what this process has already."""
TEXT_BYTES = 64_000_000


def render_chat(tokenizer: Any, turns: Sequence[Mapping[str, str]], **options: Any) -> str:
    """Return the text of a chat, ready for an answer.

    The sandbox of transformers keeps a template from the machine's files, but not from its time and memory.

    Args:
        tokenizer: A tokenizer of transformers.
        turns: Messages with ``role`` and ``content``.
        options: Further arguments of ``apply_chat_template``.

    Raises:
        ConfigError: There is no template, it fails, or it takes too much time or memory (TK04).
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError("this tokenizer has no chat template", code="TK04", hint="leave out --chat")

    # The child renders and writes the answer into a pipe.
    reader, writer = os.pipe()
    child = os.fork()  # why: a child with limits renders a stranger's chat template
    if child == 0:
        os.close(reader)
        _render_and_exit(writer, tokenizer, turns, {"add_generation_prompt": True, **options})

    # The parent reads the answer, and ends the child whatever came.
    os.close(writer)
    try:
        answer = _read_all(reader)
    finally:
        os.close(reader)
        os.kill(child, signal.SIGKILL)  # why: the child is done or past its limits
        os.waitpid(child, 0)

    if answer is None:
        raise _failed(f"takes more than {SECONDS} s, {MEMORY_BYTES / 1e6:.0f} MB, or writes without end")
    if "error" in answer:
        raise _failed(f"fails: {answer['error']}")
    return answer["text"]


def _render_and_exit(
    writer: int, tokenizer: Any, turns: Sequence[Mapping[str, str]], options: dict
) -> NoReturn:
    """Render under limits, send the result, and leave without running anything of the parent's at exit."""
    try:
        # A memory limit above what the process, a copy of the parent, has mapped already; without /proc there
        # is none.
        sizes = Path("/proc/self/statm")
        if sizes.exists():
            limit = int(sizes.read_text().split()[0]) * resource.getpagesize() + MEMORY_BYTES
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

        # No more processor time than allowed, and no core file of a crash.
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

        # The text, the error, or None for too much memory.
        result: dict[str, str] | None
        try:
            result = {"text": tokenizer.apply_chat_template(list(turns), tokenize=False, **options)}
        except MemoryError:  # why: the parent takes an empty answer for too much memory
            result = None
        except Exception as error:  # why: a stranger's template may raise anything; it goes back as text
            result = {"error": f"{type(error).__name__}: {str(error)[:300]}"}

        # A pipe takes only part of a long answer at a time.
        left = memoryview(json.dumps(result).encode())
        while left:
            left = left[os.write(writer, left) :]
    finally:
        os._exit(0)  # why: the child ends without running the parent's exit handlers


def _read_all(reader: int) -> dict[str, str] | None:
    """Return what the child sends; None when it takes too long, sends too much, or dies."""
    content = bytearray()
    end = time.monotonic() + SECONDS

    while (left := end - time.monotonic()) > 0 and len(content) < TEXT_BYTES:
        # Wait until there is something to read, or the time is over.
        if not select.select([reader], [], [], left)[0]:
            break

        # An empty read is the end: the child has closed its side of the pipe.
        piece = os.read(reader, 1 << 20)
        if not piece:
            with contextlib.suppress(ValueError):  # why: a child that dies leaves half an answer
                return json.loads(content)
            break
        content += piece
    return None


def _failed(reason: str) -> ConfigError:
    return ConfigError(
        f"the chat template {reason}",
        code="TK04",
        where="chat template",
        hint="leave out --chat, or put a template that you trust into chat_template.jinja",
    )
