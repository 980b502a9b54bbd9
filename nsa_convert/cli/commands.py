"""The commands: each parses, calls one function and prints; everything heavy is imported inside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from nsa_convert import __version__
from nsa_convert.cli.frame import Commands, common, hint, print_json, say, shard_progress, show
from nsa_convert.cli.training import recipes, train
from nsa_convert.errors import ConfigError, MachineError, UsageError

BENCH_SETTINGS = {"dtype": str, "repeats": int, "dense": bool}


@click.group(
    cls=Commands, context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=True
)
@click.version_option(__version__, prog_name="nsa-convert")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Turn a dense Llama, Qwen or Mistral checkpoint into a sparse one that starts as the same model.

    MODEL is a folder, a .gguf file, a Hub id, or demo. Start with: nsa-convert inspect demo
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


main.add_command(train)
main.add_command(recipes)


@main.command()
@common
def doctor(as_json: bool) -> None:
    """Show versions, device, a tiny kernel run, memory, disk and missing packages."""
    from nsa_convert.doctor import examine_machine

    report = examine_machine()
    if not report.kernel_ok:
        raise MachineError(
            f"the kernel run {report.kernel}", code="KN14", hint="check the installation of torch"
        )
    show(report, as_json)


@main.command()
@common
def methods(as_json: bool) -> None:
    """List the sparse attention methods and their settings."""
    import dataclasses

    from nsa_convert.methods.parts.registry import METHODS

    rows = []
    for method in METHODS.values():
        defaults = {field.name: field.default for field in dataclasses.fields(method.Settings)}
        rows.append({**dataclasses.asdict(method.spec), "defaults": defaults})

    if as_json:
        print_json({"ok": True, "methods": rows})
        return

    for row in rows:
        paper = f" ({row['paper']})" if row["paper"] else ""
        click.echo(f"{row['name']:6} {row['title']}{paper}: {row['summary']}")
        for key, value in row["defaults"].items():
            click.echo(f"         --set {key}={value}  ({row['sources'].get(key, '')})")


@main.command()
@click.argument("code")
@common
def explain(code: str, as_json: bool) -> None:
    """Say what an error CODE means and what to do."""
    import dataclasses

    from nsa_convert.error_codes import explain_code

    entry = explain_code(code)
    if as_json:
        print_json({"ok": True, **dataclasses.asdict(entry)})
        return
    status = f"exit status {entry.exit}" if entry.exit else "a warning"
    click.echo(f"{entry.code} ({status}): {entry.title}\n{entry.remedy}")


@main.command()
@click.argument("model")
@click.option("--method", help="Look at this method only.")
@click.option("--context", default="8192,32768,131072", show_default=True, help="Lengths for the cost table.")
@click.option(
    "--measure", type=click.Path(path_type=Path), help="Run MODEL and write a head profile to this file."
)
@click.option(
    "--set",
    "pairs",
    multiple=True,
    metavar="KEY=VALUE",
    help="With --measure: kind=budgets|razor|duo|distance|import, dtype, settings.",
)
@common
def inspect(
    model: str, method: str | None, context: str, measure: Path | None, pairs: tuple[str, ...], as_json: bool
) -> None:
    """Show what MODEL is, which methods fit, and what they cost; reads headers only, unless measuring."""
    if measure is not None:
        from nsa_convert.cli.profiles import write_profile

        write_profile(model, method, measure, pairs, as_json)
        return
    if pairs:
        raise UsageError("--set belongs to --measure", code="CL02")
    from nsa_convert.cli.options import parse_lengths
    from nsa_convert.hub import resolve_model
    from nsa_convert.inspection import inspect_checkpoint

    lengths = parse_lengths(context, "--context")
    show(inspect_checkpoint(resolve_model(model, say=say).path, method, lengths), as_json)


@main.command()
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--method", help="Sparse attention method; see `nsa-convert methods`.")
@click.option(
    "--config", help="YAML or JSON file with a whole plan under sparse_attention, as recipe.yaml has."
)
@click.option(
    "--set", "pairs", multiple=True, metavar="KEY=VALUE", help="A setting of the method; repeatable."
)
@click.option("--layers", help="Layers that become sparse, such as 0-3,7; the others stay dense.")
@click.option("--profile", help="Head profile from `inspect --measure`: budgets, or which heads stay dense.")
@click.option("--density", type=float, help="With --profile: share of pairs to keep, or of heads.")
@click.option("--dtype", default="float32", show_default=True, help="Dtype for the weights of a .gguf file.")
@click.option("--revision", help="Branch, tag or commit of a Hub model.")
@click.option("--copy", is_flag=True, help="Copy the weight files instead of hard-linking them.")
@click.option("--overwrite", is_flag=True, help="Replace the checkpoint at OUT.")
@click.option("--allow-extra-tensors", is_flag=True, help="Keep tensors the architecture does not have.")
@click.option("--allow-pickle", is_flag=True, help="Read pickled weights, by torch's restricted unpickler.")
@click.option("--dry-run", is_flag=True, help="Do every check and all arithmetic, write nothing.")
@common
def convert(
    model: str,
    out: Path,
    method: str | None,
    config: str | None,
    pairs: tuple[str, ...],
    layers: str | None,
    profile: str | None,
    density: float | None,
    revision: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Write the sparse form of MODEL to the new folder OUT."""
    from nsa_convert.cli.options import read_plan
    from nsa_convert.convert import convert_checkpoint
    from nsa_convert.hub import resolve_model

    plan = read_plan(method, config, pairs, layers, profile, density)
    source = resolve_model(model, revision=revision, say=say)

    with shard_progress() as progress:
        report = convert_checkpoint(
            source.path,
            out,
            plan,
            source_id=source.id,
            revision=source.revision,
            progress=progress,
            **options,
        )

    show(report, as_json)
    if report.out is not None:
        hint(f"untrained, it differs from the dense model beyond its budget; next: nsa-convert verify {out}")


@main.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--against", help="The dense MODEL it was made from: compare every tensor with it.")
@click.option(
    "--trust-remote-code", is_flag=True, help="Also run code files of OUT that are not this version's."
)
@common
def verify(out: Path, against: str | None, trust_remote_code: bool, as_json: bool) -> None:
    """Check the converted folder OUT: files, values, kept tensors, full budget = dense, bare loading."""
    from nsa_convert.hub import resolve_model
    from nsa_convert.verification import verify_checkpoint

    source = None if against is None else resolve_model(against, say=say).path
    report = verify_checkpoint(out, source, trust_remote_code=trust_remote_code, say=say)

    if report.ok or not as_json:
        show(report, as_json)

    report.raise_failed()


@main.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("dense", type=click.Path(path_type=Path))
@click.option("--copy", is_flag=True, help="Copy the weight files instead of hard-linking them.")
@click.option("--overwrite", is_flag=True, help="Replace the checkpoint at DENSE.")
@common
def revert(out: Path, dense: Path, copy: bool, overwrite: bool, as_json: bool) -> None:
    """Write the dense checkpoint that OUT was made from to the new folder DENSE, bit by bit."""
    from nsa_convert.verification import revert_checkpoint

    show(revert_checkpoint(out, dense, copy=copy, overwrite=overwrite), as_json)


@main.command()
@click.option(
    "--geometry", default="14/2/64", show_default=True, help="Query heads/key-value heads/head dim."
)
@click.option("--lengths", help="Sequence lengths, such as 4096,32768.")
@click.option("--method", help="Time this method instead of NSA and SSA and their parts.")
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option(
    "--set",
    "pairs",
    multiple=True,
    metavar="KEY=VALUE",
    help="dtype, repeats, dense, or a setting of the --method.",
)
@click.option("--check", is_flag=True, help="First compare every op with the reference on this device.")
@click.option("--csv", "csv_file", type=click.Path(path_type=Path), help="Also write the rows to this file.")
@common
def bench(
    geometry: str,
    lengths: str | None,
    method: str | None,
    device: str,
    pairs: tuple[str, ...],
    check: bool,
    csv_file: Path | None,
    as_json: bool,
) -> None:
    """Time sparse against dense attention on this machine."""
    from nsa_convert.bench import run_bench
    from nsa_convert.cli.options import parse_lengths, read_method
    from nsa_convert.settings import read_values

    settings, plan = read_method(method, pairs, BENCH_SETTINGS)
    settings = read_values(BENCH_SETTINGS, settings, "--set")

    if lengths is not None:
        settings["lengths"] = parse_lengths(lengths, "--lengths")

    report = run_bench(geometry, device=device, check=check, plan=plan, **settings)

    if csv_file is not None:
        report.write_csv(csv_file)

    if as_json:
        print_json({"ok": True, **report.to_dict()})
    else:
        click.echo(report.to_table())


@main.command()
@click.argument("model")
@click.option("--method", help="Run the unmodified dense MODEL with this method.")
@click.option("--set", "pairs", multiple=True, metavar="KEY=VALUE", help="A setting of the --method.")
@click.option("--prompt", help="Text to continue.")
@click.option("--prompt-file", type=click.Path(path_type=Path), help="File with the text to continue.")
@click.option(
    "--max-new-tokens", default=128, show_default=True, type=click.IntRange(1), help="Length limit."
)
@click.option(
    "--chat", is_flag=True, help="The prompt is a question: put it into the tokenizer's chat template."
)
@common
def generate(
    model: str,
    method: str | None,
    pairs: tuple[str, ...],
    prompt: str | None,
    prompt_file: Path | None,
    max_new_tokens: int,
    chat: bool,
    as_json: bool,
) -> None:
    """Continue a prompt with MODEL, greedily, or answer it with --chat."""
    import dataclasses

    from nsa_convert.cli.options import read_method
    from nsa_convert.evaluation.models import load_model, read_model_facts
    from nsa_convert.generation import generate_text
    from nsa_convert.hub import dense_folder, resolve_model
    from nsa_convert.loading import load_tokenizer

    if pairs and method is None:
        raise UsageError("--set belongs to --method", code="CL02")
    _, plan = read_method(method, pairs, ())

    if (prompt is None) == (prompt_file is None):
        raise UsageError("give either --prompt or --prompt-file", code="CL02")
    text = prompt if prompt_file is None else read_prompt(prompt_file)
    assert text is not None

    folder = dense_folder(resolve_model(model, say=say), say)
    tokenizer = load_tokenizer(folder)
    stream = None if as_json else lambda piece: click.echo(piece, nl=False)

    # A plan that does not fit is refused before the model, which may be large, is loaded.
    if plan is not None:
        read_model_facts(folder, plan)

    result = generate_text(
        load_model(folder, plan=plan),
        tokenizer,
        text,
        max_new_tokens=max_new_tokens,
        stream=stream,
        chat=chat,
    )

    if as_json:
        print_json({"ok": True, **dataclasses.asdict(result)})
    else:
        click.echo()


def read_prompt(path: Path) -> str:
    """Return the text of a prompt file.

    Raises:
        ConfigError: It is missing or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError) as error:
        reason = "is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else "is not there"
        raise ConfigError(f"the prompt file {path} {reason}", code="DA01", where=str(path)) from error
