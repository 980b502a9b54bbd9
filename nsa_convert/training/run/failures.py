"""Turn failures of memory and of kernels during training into errors that say what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from nsa_convert.errors import BackendError, MachineError, NsaConvertError
from nsa_convert.kernels.common.backend import is_kernel_failure
from nsa_convert.training.recipe.schema import Stage
from nsa_convert.training.run.needs import memory_advice


class KernelFailure(BackendError):
    """A kernel cannot be compiled or launched here; the run may go on without kernels."""


@contextlib.contextmanager
def explained(stage: Stage, *, context: int = 1, shareable: bool = False) -> Iterator[None]:
    """Turn failures of memory and kernels inside the block into errors that say what to do.

    Args:
        stage: The stage that runs.
        context: Processes that share a row.
        shareable: Whether more of them can share one.

    Raises:
        MachineError: There is not enough memory (TR11).
        KernelFailure: A kernel does not compile or does not fit the device (TR20).
    """
    try:
        yield
    except NsaConvertError:
        raise
    except Exception as error:  # why: told apart into kernels and memory, and raised again
        if is_kernel_failure(error):
            text = str(error).strip().splitlines() or [type(error).__name__]
            raise KernelFailure(
                f"stage {stage.name}: a kernel failed: {text[-1]}",
                code="TR20",
                hint="the last checkpoint is good: --resume --allow-eager-fallback goes on with plain torch",
            ) from error

        if out_of_memory(error):
            advice = "; or ".join(memory_advice(stage, context, shareable=shareable))
            way = "with" if stage.checkpointing else "without"
            raise MachineError(
                f"stage {stage.name}: not enough memory for rows of {stage.seq_len} tokens, "
                f"{stage.micro_batch} at a time, {way} checkpointing",
                code="TR11",
                hint=f"the last checkpoint is good: --resume with {advice}",
            ) from error
        raise


def out_of_memory(error: BaseException) -> bool:
    """Return whether an allocation failed, on a GPU or on the machine."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "t allocate memory" in str(error)
    )
