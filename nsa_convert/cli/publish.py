"""The commands that publish: ``card`` and ``push``."""

from __future__ import annotations

from pathlib import Path

import click

from nsa_convert.cli.commands import main
from nsa_convert.cli.frame import common, hint, say, show
from nsa_convert.errors import CheckFailedError


@main.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--license", "licence", help="Licence id of the dense model; read from its card when left out.")
@click.option("--base-model", help="Hub id of the dense model, where it did not come from the Hub.")
@click.option("--name", help="Title of the card; the folder's name when left out.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the card to this file instead.")
@common
def card(
    model: Path,
    licence: str | None,
    base_model: str | None,
    name: str | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Write the model card of the converted folder MODEL from its report, recipe and evaluations."""
    from nsa_convert.card import write_card

    report = write_card(model, license=licence, base_model=base_model, name=name, out=out)
    show(report, as_json)
    if not report.evaluations:
        hint(f"nsa-convert eval {model} --out {model / 'evaluation'}")


@main.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("repo")
@click.option(
    "--private/--public", default=True, show_default=True, help="Visibility of a repository that is created."
)
@click.option("--dry-run", is_flag=True, help="List what would be sent; verify nothing, send nothing.")
@click.option("--allow-unverified", is_flag=True, help="Publish although `verify` fails.")
@click.option("--allow-unevaluated", is_flag=True, help="Publish without an evaluation of these files.")
@common
def push(
    model: Path,
    repo: str,
    private: bool,
    dry_run: bool,
    allow_unverified: bool,
    allow_unevaluated: bool,
    as_json: bool,
) -> None:
    """Publish the converted folder MODEL as the Hub repository REPO (OWNER/NAME), in one commit."""
    from nsa_convert.push import plan_push, push_plan
    from nsa_convert.verification import verify_checkpoint

    plan = plan_push(model, repo, private=private, allow_unevaluated=allow_unevaluated)

    if dry_run:
        show(plan, as_json)
        return
    if not as_json:
        click.echo(plan.to_text(), err=True)

    checks = verify_checkpoint(model, say=say)
    if not checks.ok:
        failed = next(check for check in checks.checks if check.ok is False)
        message = f"verification failed at '{failed.name}': {failed.detail}"
        if not allow_unverified:
            raise CheckFailedError(
                message, code="HB20", where=str(model), hint="convert again, or push with --allow-unverified"
            )
        click.echo(f"Warning: {message}", err=True)

    report = push_plan(plan, say=say)
    show(report, as_json)

    hint(f'AutoModelForCausalLM.from_pretrained("{repo}", trust_remote_code=True)')
