"""Help pages: options under headings, names at the left, sentences wrapped at the right; readable at 80 columns."""

from __future__ import annotations

import re
import shutil
import textwrap
from typing import Any

import typer
from typer.core import TyperCommand

EPILOG = (
    "Results go to stdout, progress and errors to stderr. An error is one line; --debug, anywhere on the line, adds "
    "the traceback. Exit codes: 0 done, 1 failed while running, 2 wrong usage or input, 130 interrupted (Ctrl-C)."
)

_LEFT = 28
_WIDEST = 120
CONTEXT = {"help_option_names": ["-h", "--help"]}


class Page(TyperCommand):
    """A command whose help is written by `page`."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Writes the page."""
        formatter.write(page(self, ctx))


def new_app() -> typer.Typer:
    """A typer app for one command."""
    return typer.Typer(add_completion=False, rich_markup_mode=None, context_settings=CONTEXT)


def page(command: Any, ctx: Any, commands: dict[str, str] | None = None) -> str:
    """A command's help as text; `commands` are listed with what they do."""
    width = min(shutil.get_terminal_size().columns, _WIDEST) - 1
    pieces = " ".join(command.collect_usage_pieces(ctx))
    parts = [f"{_title('Usage:')} {ctx.command_path} {pieces}"]
    for paragraph in (command.help or "").strip().split("\n\n"):
        lines = textwrap.dedent(paragraph).splitlines()
        if lines and lines[0].startswith("deltaw "):
            parts.append("\n".join(f"  {line}" for line in lines))
        else:
            parts.append(_wrapped(" ".join(lines), width))
    if commands:
        parts.append(_section("Commands", list(commands.items()), width))
    panels: dict[str, list[tuple[str, str]]] = {}
    for param in command.get_params(ctx):
        if getattr(param, "hidden", False):
            continue
        is_option = param.param_type_name == "option"
        panel = getattr(param, "rich_help_panel", None) or ("Options" if is_option else "Arguments")
        panels.setdefault(panel, []).append((_left(param), _sentence(param.help or "")))
    for title, rows in panels.items():
        parts.append(_section(title, rows, width))
    parts.append(_wrapped(command.epilog or "", width))
    return "\n\n".join(part for part in parts if part) + "\n"


def _left(param: Any) -> str:
    if param.param_type_name == "argument":
        return str(param.metavar)
    name = ", ".join(sorted(param.opts, key=len))
    if param.secondary_opts:
        name = "--[no-]" + param.opts[0].removeprefix("--")
    return f"{name} {param.metavar}" if param.metavar else name


def _sentence(text: str) -> str:
    """As all lines of a section look: no full stop (and typer's own no capital); a default stays on one line."""
    text = text.rstrip(".").replace("Show this", "show this")
    return re.sub(r"\[default: .*\]$", lambda found: found[0].replace(" ", "\xa0"), text)


def _section(title: str, rows: list[tuple[str, str]], width: int) -> str:
    lines = [_title(title)] if rows else []
    for left, right in rows:
        wrapped = textwrap.wrap(right, max(width - _LEFT, 24), break_on_hyphens=False) or [""]
        if len(left) > _LEFT - 4:
            lines.append(f"  {left}")
        else:
            lines.append(f"  {left:<{_LEFT - 2}}{wrapped.pop(0)}")
        lines += [" " * _LEFT + line for line in wrapped]
    return "\n".join(lines).replace("\xa0", " ")


def _wrapped(text: str, width: int) -> str:
    return textwrap.fill(text, width, break_on_hyphens=False)


def _title(text: str) -> str:
    return typer.style(text, bold=True)
