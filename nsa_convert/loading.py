"""Load models and tokenizers from untrusted folders: checked first, and no code in them is run.

transformers alone would follow an index out of the folder, make up missing weights, take pickles, fetch the
attention kernels a config names, and ask on the terminal whether to run code files.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nsa_convert.checkpoint.source import Checkpoint, open_checkpoint, open_converted
from nsa_convert.checkpoint.source_config import FOREIGN_CODE, read_source_config
from nsa_convert.errors import CheckpointError
from nsa_convert.patch.registration import register

SAFE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def check_folder(folder: Path) -> Checkpoint:
    """Check a dense or converted folder from its config and its headers.

    Raises:
        UnsupportedModelError: The architecture is not supported.
        CheckpointError: The folder is damaged or hostile; all problems in one message.
        MachineError: A file may not be read.
    """
    converted = "sparse_attention" in read_source_config(folder)
    return open_converted(folder) if converted else open_checkpoint(folder, allow_extra_tensors=True)


def safe_config(folder: Path) -> Any:
    """Return transformers' config of a checked folder, without the keys that would fetch or run code."""
    from transformers import AutoConfig

    register()
    config = AutoConfig.from_pretrained(folder, **SAFE)

    for name in FOREIGN_CODE:
        if hasattr(config, name):
            setattr(config, name, None)

    return config


def load_causal_model(folder: Path, dtype: torch.dtype, **options: Any) -> nn.Module:
    """Load a dense or converted folder with this package's own classes.

    Raises:
        UnsupportedModelError: See :func:`check_folder`.
        CheckpointError: See :func:`check_folder`.
    """
    from transformers import AutoModelForCausalLM

    check_folder(folder)
    options |= {"config": safe_config(folder), "dtype": dtype, "use_safetensors": True, **SAFE}
    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder, **options)


def load_tokenizer(folder: str | Path) -> Any:
    """Load the tokenizer of a checkpoint folder.

    Raises:
        CheckpointError: The folder has no usable tokenizer, or is damaged.
    """
    from transformers import AutoTokenizer

    check_folder(Path(folder))
    try:
        return AutoTokenizer.from_pretrained(folder, **SAFE)
    except Exception as error:  # why: the tokenizers library raises nothing more precise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"no usable tokenizer in {str(folder)!r}: {reason}",
            code="TK01",
            where=str(folder),
            hint="copy tokenizer.json and tokenizer_config.json of the source model there",
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from drawing bars inside the block."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
