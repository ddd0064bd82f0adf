"""The entry point: finds the command, keeps other libraries quiet, turns every error into one line and an exit code."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from deltaw import __version__
from deltaw.cli.errors import explain
from deltaw.cli.pages import CONTEXT, EPILOG, page
from deltaw.core.allocator import use_expandable_segments
from deltaw.core.errors import EXIT_DONE, unknown_name

#: Commands and what the overview says of them; `deltaw.cli.<name>` has the command itself.
COMMANDS = {
    "quickstart": "Train a small real model on small real data, and show what it learnt.",
    "train": "Train an adapter (or the whole model) on your rows, measured before and after.",
    "evaluate": "Measure a run, a model or an adapter on held-out rows.",
    "compare": "Compare methods over data sets and seeds, from one YAML file, with intervals and plots.",
    "federate": "Train one adapter among several organisations that do not show each other their rows.",
    "merge": "Write adapters into the weights of their base: a folder that plain transformers loads.",
    "shrink": "Cut an adapter to a lower rank with the error printed, or say which rank to take.",
    "combine": "Add, subtract, scale and mix adapters into one, with the error printed.",
    "quantize": "Write a model in 4 bits (NF4): a folder that transformers with bitsandbytes loads, and deltaw.",
    "export": "Write a run for transformers, vLLM or bitsandbytes, or its adapter as plain LoRA.",
    "report": "Write a run's report.html again.",
    "models": "List the models that come with deltaw, and the modules that targets would adapt.",
}

_QUIET = {
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


class _Commands(TyperGroup):
    """Knows names and one-line helps; imports a command's module when that command is used."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return TyperCommand(cmd_name, help=COMMANDS[cmd_name]) if cmd_name in COMMANDS else None

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.write(page(self, ctx, COMMANDS))

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, *rest = args
        if name not in COMMANDS:
            raise unknown_name("command", name, COMMANDS)
        return name, load_command(name), rest


def load_command(name: str) -> Any:
    """The command of `deltaw.cli.<name>`."""
    return typer.main.get_command(importlib.import_module(f"deltaw.cli.{name}").app)


def _version(value: bool) -> None:
    if value:
        print(f"deltaw {__version__}")
        raise typer.Exit


def _root() -> Any:
    app = typer.Typer(cls=_Commands, add_completion=False, rich_markup_mode=None, context_settings=CONTEXT)

    @app.callback(epilog=EPILOG, help="ΔW: low-rank adaptation of large language models.")
    def root(
        version: Annotated[
            bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version and exit")
        ] = False,
        debug: Annotated[
            bool, typer.Option("--debug", help="show tracebacks and other libraries' messages; anywhere on the line")
        ] = False,
    ) -> None:
        pass

    return typer.main.get_command(app)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line.

    Args:
        argv: the words after `deltaw`; None means the process' own.

    Returns:
        The exit code: 0 done, 1 failed while running, 2 wrong usage or input, 130 interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [_dashed(word) for word in words if word != "--debug"] or ["--help"]
    try:
        with _quiet(debug):
            root = _root()
            with root.make_context("deltaw", list(words), obj=words) as context:
                root.invoke(context)
        sys.stdout.flush()
        return EXIT_DONE
    except typer.Exit as done:
        return int(done.exit_code)
    except BrokenPipeError:
        # The reader (`| head`) has gone: nobody is left to be told, and flushing at exit would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except BaseException as error:
        if debug:
            traceback.print_exc()
        line, code = explain(error, " ".join(["deltaw", *(word for word in words[:1] if word in COMMANDS)]))
        if line:
            print(line, file=sys.stderr)
        return code


def _dashed(word: str) -> str:
    """A flag as it is spelt here, where it was typed as the file's key: `--max_steps=3`."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if re.fullmatch(r"--[a-z][a-z0-9_-]*", name) else word


@contextlib.contextmanager
def _quiet(debug: bool) -> Iterator[None]:
    """Leaves stderr to deltaw's own lines: no warnings, and of the logs only deltaw's from WARNING on."""
    if debug:
        yield
        return
    own, handler, silent = logging.getLogger("deltaw"), logging.StreamHandler(sys.stderr), logging.NullHandler()
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter("warning: %(message)s"))
    own.addHandler(handler)
    # With a handler on the root logger, Python's own last resort no longer prints what libraries log.
    logging.getLogger().addHandler(silent)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        own.removeHandler(handler)
        logging.getLogger().removeHandler(silent)


class _Terminated(KeyboardInterrupt):
    """SIGTERM, so that a run that is stopped by its scheduler is recorded as one stopped by Ctrl-C is."""

    exit_code = 128 + signal.SIGTERM


def _terminate(signum: int, frame: Any) -> None:
    raise _Terminated


def run() -> None:
    """The `deltaw` command."""
    signal.signal(signal.SIGTERM, _terminate)
    if "--debug" not in sys.argv:
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
    use_expandable_segments()
    code = main()
    # A second Ctrl-C while the interpreter closes down would print a traceback after the one line.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    sys.exit(code)
