"""The rows of a forward pass, where a recipe asks for as many as fit."""

from __future__ import annotations

import bisect
import dataclasses
import os
from collections.abc import Callable

import torch

from nsa_convert.checkpoint.staging import gigabytes
from nsa_convert.doctor import host_memory
from nsa_convert.notices import Say, silent
from nsa_convert.training.recipe.schema import Recipe, Stage
from nsa_convert.training.recipe.sections import Machine
from nsa_convert.training.run.forecast import empty_model, weight_sizes
from nsa_convert.training.run.models import Start
from nsa_convert.training.run.needs import SPARE, device_memory
from nsa_convert.training.run.parallel import Parallel


def one_by_one(recipe: Recipe) -> Recipe:
    """Return a recipe whose open micro-batches have one row: what can be checked before any is chosen."""
    return _with_rows(recipe, lambda _: 1)


def fit_micro_batches(
    recipe: Recipe, start: Start, parallel: Parallel, limit: float, say: Say = silent
) -> Recipe:
    """Return a recipe in which every ``micro_batch: 0`` is the most rows that fit.

    It is a divisor of the rows that a process takes in a step, so that the numbers of the run stay the same.

    Args:
        recipe: The recipe, without a problem.
        start: The model it starts from.
        parallel: How the processes share the work.
        limit: Bytes of memory of one device.
        say: Called with a line for each choice.
    """
    if all(stage.micro_batch for stage in recipe.stages):
        return recipe
    shapes = {name: parameter.numel() for name, parameter in empty_model(start).named_parameters()}

    def choose(stage: Stage) -> int:
        weights = weight_sizes(stage, recipe, start, shapes)

        def memory(rows: int) -> int:
            own = dataclasses.replace(stage, micro_batch=rows)
            return device_memory(recipe, own, start, weights, parallel)

        # Processes that share a row take rows one by one.
        each = stage.rows_per_step // parallel.data
        sizes = [n for n in range(1, each + 1) if each % n == 0 and (n == 1 or parallel.context == 1)]
        fitting = bisect.bisect_right(sizes, limit * (1 - SPARE), key=memory)
        rows = sizes[max(0, fitting - 1)]

        # Too little for one row may still do: the estimate leaves some memory to spare.
        if fitting:
            say(f"{stage.name}: micro_batch {rows}")
        else:
            need, given = gigabytes(memory(1)), gigabytes(int(limit))
            say(f"warning: {stage.name}: one row takes about {need} on a device of {given}")
        return rows

    return _with_rows(recipe, choose)


def _with_rows(recipe: Recipe, choose: Callable[[Stage], int]) -> Recipe:
    """Return a recipe whose open micro-batches are chosen."""
    stages = tuple(
        stage if stage.micro_batch else dataclasses.replace(stage, micro_batch=choose(stage))
        for stage in recipe.stages
    )
    return dataclasses.replace(recipe, stages=stages)


def device_bytes(machine: Machine | None = None) -> float:
    """Return the memory of a device: the GPU at hand, the machine of a plan, or the share of a CPU process.

    Args:
        machine: What a recipe is meant for; used where there is no GPU.
    """
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory)
    if machine is not None:
        return machine.memory * 1e9

    here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    sizes = host_memory()
    return float("inf") if sizes is None else sizes[1] * 1e9 / here
