"""What all commands share: errors and exit statuses, JSON, progress, signals."""

from __future__ import annotations

import contextlib
import difflib
import functools
import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import click

from nsa_convert.errors import MachineError, NsaConvertError, UsageError
from nsa_convert.extras import missing_hint
from nsa_convert.redaction import redact

SCHEMA = 1
"""Version of the JSON that --json prints."""

INTERRUPTED = 130
TERMINATED = 143


class Commands(click.Group):
    """A group that suggests names, and turns every failure into one clear paragraph and an exit status."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Return the command; an unknown one is answered with the nearest name."""
        name = args[0] if args else ""
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            near = difflib.get_close_matches(name, self.list_commands(ctx), n=1)
            hint = f"did you mean '{near[0]}'?" if near else "`nsa-convert --help` lists the commands"
            raise UsageError(f"there is no command '{name}'", code="CL02", found=name, hint=hint)
        return super().resolve_command(ctx, args)

    # click promises that main never returns unless standalone_mode is False, as it always is here.
    def main(  # type: ignore[override]
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any
    ) -> Any:
        """Run the command line and exit."""
        words = list(sys.argv[1:] if args is None else args)
        _prepare_process()
        status = 0
        with _exit_on_terminate():
            try:
                super().main(words, prog_name or "nsa-convert", **{**extra, "standalone_mode": False})
                sys.stdout.flush()
            except click.exceptions.Exit as error:
                status = error.exit_code
            except BrokenPipeError:
                # why: the reader has gone; Python must not flush into the closed pipe at its end
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            except (KeyboardInterrupt, click.Abort):
                # why: whoever pressed Ctrl-C wants the program to end, with a status of its own
                click.echo("interrupted; nothing half-written is left", err=True)
                status = INTERRUPTED
            except Exception as error:  # why: the last stop: one paragraph, a traceback file, exit status 1
                if "--debug" in words:
                    raise
                status = _print_error(_known_error(error), as_json="--json" in words)

        sys.exit(status)


def _prepare_process() -> None:
    """Keep libraries quiet and text printable; only a terminal sees progress bars."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def _exit_on_terminate() -> Iterator[None]:
    """Let SIGTERM unwind the stack, so that what was begun is cleaned up."""

    def stop(*_: Any) -> None:
        raise SystemExit(TERMINATED)

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # why: outside the main thread there are no signals to handle
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _known_error(error: Exception) -> NsaConvertError:
    """Return the error as one of ours."""
    if isinstance(error, NsaConvertError):
        return error

    # Bad options and arguments.
    if isinstance(error, click.UsageError):
        command = f"`{error.ctx.command_path} --help`" if error.ctx else "`nsa-convert --help`"
        code = "CL03" if isinstance(error, click.BadParameter) else "CL02"
        return UsageError(error.format_message(), code=code, hint=f"see {command}")
    if isinstance(error, click.ClickException):
        return UsageError(error.format_message(), code="CL02")

    # Too little memory: some libraries say so in the message alone.
    if (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "t allocate memory" in str(error)
        or "can't start new thread" in str(error)
    ):
        return MachineError(
            "not enough memory", code="SV07", hint="close other programs or use a bigger machine"
        )

    if isinstance(error, ModuleNotFoundError) and error.name:
        module = error.name.split(".")[0]
        return MachineError(f"the package {module} is missing", code="CL11", hint=missing_hint(module))

    if isinstance(error, OSError) and error.errno:
        from nsa_convert.checkpoint.staging import machine_error

        return machine_error(error)

    # Anything else is a fault of this program.
    text = str(error).strip().splitlines()
    where = _traceback_file(error)
    return NsaConvertError(
        f"{type(error).__name__}: {text[0] if text else 'no message'}",
        where=where,
        hint="run again with --debug and report it" if where is None else f"report it with {where}",
    )


def _traceback_file(error: Exception) -> str | None:
    """Write the traceback to a file and return its path, or None where no file can be written."""
    options: dict[str, Any] = {"prefix": "nsa-convert-", "suffix": ".txt", "encoding": "utf-8"}
    try:
        # why: the traceback of an internal error, in the temporary folder, tokens taken out
        with tempfile.NamedTemporaryFile("w", delete=False, **options) as file:
            file.write(redact("".join(traceback.format_exception(error))))
    except OSError:  # why: where no file can be written the error is told without one
        return None
    return file.name


def _print_error(error: NsaConvertError, *, as_json: bool) -> int:
    """Print an error and return its exit status."""
    from nsa_convert.error_codes import ERROR_CODES

    known = ERROR_CODES.get(error.code)
    error.hint = error.hint or (known.remedy if known else None)

    if as_json:
        values = {key: getattr(error, key) for key in ("message", "where", "expected", "found", "hint")}
        values["problems"] = [{"code": p.code, "message": p.message} for p in error.problems]
        print_json({"ok": False, "code": error.code, "exit": error.exit_status, **values})
        return error.exit_status

    lines = [f"Error [{error.code}]: {error.message}"]
    if error.expected and error.found:
        lines.append(f"  expected {error.expected}, found {error.found}")
    if error.hint:
        lines.append(f"Hint: {error.hint}")

    click.echo(redact("\n".join(lines)), err=True)
    return error.exit_status


def print_json(values: dict[str, Any]) -> None:
    """Print one JSON object to stdout."""
    click.echo(redact(json.dumps({"schema": SCHEMA, **values}, default=str)))


def show(report: Any, as_json: bool) -> None:
    """Print a report to stdout and its warnings to stderr."""
    for line in getattr(report, "warnings", ()):
        click.echo(f"Warning: {line}", err=True)

    if as_json:
        print_json({"ok": True, **report.to_dict()})
    else:
        click.echo(report.to_text())


def hint(text: str) -> None:
    """Print the next step to stderr."""
    click.echo(f"Hint: {text}", err=True)


def say(line: str) -> None:
    """Print a line of progress to stderr."""
    click.echo(f"... {redact(line)}", err=True)


def common(function: Callable) -> Callable:
    """Add the options every command has; a command gets ``as_json``."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
    @click.option("--debug", is_flag=True, help="Show the traceback of an error.")
    @functools.wraps(function)
    def command(*args: Any, debug: bool, **kwargs: Any) -> None:
        function(*args, **kwargs)

    return command


def show_tables(tables: Sequence[Any]) -> None:
    """Print rich tables to stderr."""
    from rich.console import Console

    console = Console(stderr=True)
    for table in tables:
        console.print(table)


@contextlib.contextmanager
def shard_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Yield a callback: a bar on a terminal, elsewhere one line for every tenth of the shards."""
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as bars:
            task = bars.add_task("weights", total=None)
            yield lambda name, done, total: bars.update(task, completed=done, total=total, description=name)
        return

    def line(name: str, done: int, total: int) -> None:
        if done * 10 // total > (done - 1) * 10 // total:
            say(f"{name} ({done}/{total} weight files)")

    yield line
