"""The dense control of a run: the dense model, trained on the rows that taught the sparse one.

What training gains is two things: what any model gains of more text, and what a sparse one gets back. The
control has the first alone. It takes the stages that train dense weights for the next token, with their rows
in their order, their steps and rates; what aligns or warms up sparse attention is not for it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from nsa_convert.training.recipe.schema import Recipe, Stage
from nsa_convert.training.run.models import Start

CONTROL = "control"
"""Folder of the control, in that of the run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControlRecipe(Recipe):
    """The recipe of a control.

    Attributes:
        of: All stages of the recipe it is the control of: they share the documents of a source among them.
    """

    of: tuple[Stage, ...]

    @property
    def readers(self) -> tuple[Stage, ...]:
        """Stages that share the documents of a source, those that the control leaves out among them."""
        return self.of

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that :func:`recipe_from_dict` reads as the recipe of a dense model."""
        values = super().to_dict()
        del values["of"]
        return values


def control_of(recipe: Recipe) -> ControlRecipe:
    """Return the recipe of a run's control, which :func:`control_problems` has nothing against."""
    own = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(Recipe)}
    own |= {"sparse_attention": None, CONTROL: False, "out": str(Path(recipe.out) / CONTROL)}
    return ControlRecipe(**own | {"stages": tuple(map(_dense, shared_stages(recipe))), "of": recipe.stages})


def shared_stages(recipe: Recipe) -> list[Stage]:
    """Return the stages that train dense weights for the next token: those that the control has too."""
    return [
        stage
        for stage in recipe.stages
        if stage.kind != "align" and stage.train != "new" and stage.cross_entropy != 0
    ]


def _dense(stage: Stage) -> Stage:
    """Return a stage without what only a sparse model has: losses, rates and figures."""
    best: Literal["loss"] | None = None if stage.keep_best is None else "loss"
    return dataclasses.replace(
        stage, lr_new=None, lr_gate=None, losses=None, teacher_kl=0.0, full_ratio=None, keep_best=best
    )


def dense_start(start: Start) -> Start:
    """Return the start of the control: the same dense model, unconverted."""
    return dataclasses.replace(start, plan=None, convert=False)


def control_problems(recipe: Recipe, start: Start) -> list[str]:
    """Return why a recipe can have no control; one sentence for each problem."""
    if start.plan is None:
        return ["control: the model is trained dense already; leave control out"]
    if not start.convert:
        return [
            "control: the model is converted already, and the control needs the dense one; name that as "
            "model, with its sparse_attention"
        ]

    problems = []
    shared = shared_stages(recipe)
    names = [stage.name for stage in shared]
    if not shared:
        problems.append(
            "control: no stage trains dense weights for the next token, so that there is nothing to compare; "
            "leave control out"
        )
    elif not any(stage.eval_every for stage in shared):
        problems.append(
            f"control: nothing is measured on held-out documents in {', '.join(names)}; set eval_every"
        )

    if any(stage.name == CONTROL for stage in recipe.stages):
        problems.append(f"control: a stage has the name of its folder, {CONTROL}; give it another")
    problems += [
        f"control: {stage.name} sets rope, but the control leaves the stage out; set it in a later stage"
        for stage in recipe.stages
        if stage.rope is not None and stage.name not in names
    ]
    problems += [
        f"control: patience ends {stage.name} at a step of its own, and the control at another; leave it out"
        for stage in shared
        if stage.patience
    ]
    if recipe.context > 1:
        problems.append("control: a dense model cannot share rows; leave control out, or set context to 1")
    return problems
