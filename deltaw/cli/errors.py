"""Any exception as one line for stderr and an exit code."""

from __future__ import annotations

import os
import re
import sys
from typing import Any

from deltaw.core.errors import EXIT_FAILED, EXIT_INPUT, EXIT_INTERRUPTED, DeltawError, near

_MEMORY_ADVICE = "lower --micro-batch-size, --eval-batch-size or --max-length, or add --gradient-checkpointing"


def explain(error: BaseException, command: str = "deltaw") -> tuple[str, int]:
    """The line to print, which begins `deltaw: ` ("" where another process prints it), and the exit code.

    Args:
        error: what was raised.
        command: the command as it was typed (`deltaw train`), where the error does not know.
    """
    text, code = _text(error, command)
    text = "; ".join([text, *getattr(error, "__notes__", ())])
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        # Every process meets the same wrong input; what failed in this one alone must be told.
        return ("" if code in (EXIT_INPUT, EXIT_INTERRUPTED) else f"deltaw: process {rank}: {_line(text)}"), code
    return f"deltaw: {_line(text)}", code


def _line(text: str) -> str:
    return " ".join(text.split())


def _text(error: BaseException, command: str) -> tuple[str, int]:
    if isinstance(error, DeltawError):
        return str(error), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        code = int(getattr(error, "exit_code", EXIT_INTERRUPTED))
        return ("interrupted" if code == EXIT_INTERRUPTED else "terminated"), code
    if hasattr(error, "format_message"):
        return _usage(error, command), EXIT_INPUT
    system = _system_error(error)
    if system is not None:
        from deltaw.core.files import explain_os_error

        known = explain_os_error(system)
        return str(known), known.exit_code
    memory = _memory(error)
    if memory:
        return memory, EXIT_FAILED
    what = type(error).__name__
    return f"unexpected {what}: {error or 'no message'}; run again with --debug for the traceback", EXIT_FAILED


def _system_error(error: BaseException) -> OSError | None:
    """The operating system's refusal in `error`, also where a library wrapped it in an exception of its own."""
    if isinstance(error, OSError):
        return error
    number = re.search(r"\(os error (\d+)\)", str(error))
    if number:
        return OSError(int(number[1]), os.strerror(int(number[1])))
    # torch.save says no more than where in its file it came to a stop.
    if re.search(r"PytorchStreamWriter failed writing|inline_container.*unexpected pos", str(error)):
        from errno import ENOSPC

        return OSError(ENOSPC, os.strerror(ENOSPC))
    return None


def _memory(error: BaseException) -> str:
    torch: Any = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return f"the GPU is out of memory: {_MEMORY_ADVICE}, or use --dtype bfloat16"
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        return f"out of memory: {_MEMORY_ADVICE}"
    return ""


def _usage(error: Any, command: str) -> str:
    """The command-line parser's complaint: with near names for a mistyped flag, and where to look."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else command
    params = context.command.params if context is not None else []
    known = [name for param in params for name in (*param.opts, *param.secondary_opts) if name.startswith("--")]
    given = getattr(error, "option_name", None)
    if type(error).__name__ == "NoSuchOption" and given:
        close = near(given, known)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        return f"unknown option {given}: {hint}{path} --help lists them"
    message = error.format_message().rstrip(".")
    extra = re.search(r"unexpected extra argument\S* \((.*)\)", message)
    if extra:
        example = f"--data {extra[1]}" if "--data" in known else "--name value"
        message = f"unexpected {extra[1]!r}: options are given by name, such as {example}"
    number = re.search(r"value for '(\S+)':.* valid (integer|float|number)", message)
    if number:
        message = f"{number[1]}: expected a {'whole ' if number[2] == 'integer' else ''}number"
    return f"{message[:1].lower()}{message[1:]}; see {path} --help"
