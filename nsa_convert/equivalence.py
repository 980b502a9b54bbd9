"""Logits of a converted folder: against the dense model, and in a Python without this package."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nsa_convert.checkpoint.source import open_converted
from nsa_convert.config import SparseAttentionConfig
from nsa_convert.errors import CheckFailedError
from nsa_convert.patch.patching import with_full_budget
from nsa_convert.patch.registration import register
from nsa_convert.plan import visible_budget

SEED = 0
AFFORDABLE_FLOPS = 800_000_000_000
"""What one forward pass of the comparison may cost."""

_BARE_SCRIPT = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "nsa_convert":
            raise ImportError("nsa_convert is hidden for this check")

sys.meta_path.insert(0, Blocker())
folder, result, tokens, seed = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(
    folder, trust_remote_code=True, dtype=torch.float32, local_files_only=True
).eval()
assert "nsa_convert" not in sys.modules
ids = torch.randint(model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(seed))
with torch.no_grad():
    torch.save(model(ids).logits, result)
"""


def compare_with_dense(
    folder: Path, dense_config: Mapping[str, Any], lengths: Sequence[int] | None
) -> tuple[float, list[int]]:
    """Return the largest difference of fp32 logits between the full budget and the dense model.

    Args:
        folder: Converted folder.
        dense_config: config.json of the source.
        lengths: Context lengths; chosen by the size of the model when left out.

    Returns:
        The difference and the lengths that were compared.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {
        k: v for k, v in dense_config.items() if k not in ("model_type", "auto_map", "quantization_config")
    }
    config = AutoConfig.for_model(dense_config["model_type"], **values)

    lengths = list(lengths or probe_lengths(folder))
    inputs = [_random_ids(config.vocab_size, length) for length in lengths]

    # One model at a time, so that memory holds one.
    dense = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, local_files_only=True, attn_implementation="sdpa"
    ).eval()
    expected = [_logits(dense, ids) for ids in inputs]
    del dense

    model = _load_sparse(folder)
    worst = 0.0
    for ids, logits in zip(inputs, expected, strict=True):
        with with_full_budget(model, ids.shape[1]):
            worst = max(worst, float((_logits(model, ids) - logits).abs().max()))
    return worst, lengths


def sparse_logits(folder: Path, length: int) -> Tensor:
    """Return fp32 logits ``[1, T, vocabulary]`` of random tokens, by this package's classes."""
    model = _load_sparse(folder)
    return _logits(model, _random_ids(model.config.vocab_size, length))


def bare_logits(folder: Path, length: int) -> Tensor:
    """Return the same logits from a process that loads the folder's own code and cannot import this package.

    Raises:
        CheckFailedError: It does not load there.
    """
    # why: the logits of the other process, removed after they are read
    with tempfile.TemporaryDirectory(prefix="nsa-verify-") as scratch:
        result = Path(scratch) / "logits.pt"
        command = [sys.executable, "-I", "-c", _BARE_SCRIPT, str(folder.resolve()), str(result)]
        environment = {**os.environ, "HF_MODULES_CACHE": scratch, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}

        # why: the folder has to load in a Python that cannot see this package
        done = subprocess.run(
            [*command, str(length), str(SEED)], env=environment, capture_output=True, text=True, check=False
        )

        if done.returncode or not result.is_file():
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            reason = lines[-1] if lines else f"exit status {done.returncode}"
            raise CheckFailedError(f"does not load without this package: {reason}")
        return torch.load(result, weights_only=True)


def probe_lengths(folder: Path) -> list[int]:
    """Return a short, an odd and a long length; the long one passes the visible budget where time allows."""
    checkpoint = open_converted(folder)
    plan = SparseAttentionConfig.from_dict(checkpoint.config["sparse_attention"])
    budget = visible_budget(plan, checkpoint.num_layers, checkpoint.geometry)

    # A forward pass takes about two operations per weight and token.
    affordable = max(64, min(2048, AFFORDABLE_FLOPS // max(1, 2 * checkpoint.parameters)))
    limit = min(checkpoint.config.get("max_position_embeddings") or affordable, affordable)

    return sorted({min(7, limit), min(130, limit), min(budget + 77, limit)})


def _load_sparse(folder: Path) -> Any:
    """Load a converted folder in fp32 by this package's own classes."""
    from transformers import AutoModelForCausalLM

    register()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


def _random_ids(vocabulary: int, length: int) -> Tensor:
    return torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(SEED))


def _logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits
