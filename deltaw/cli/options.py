"""Flags from configuration classes: names, types, defaults and help come from the dataclass and its docstring.

Every value arrives as text and is converted here, so that a wrong one is one line in the flag's own name. A flag that
is not given is None, so that it never overrides what a file says.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from deltaw.core.configs import aliases_of
from deltaw.core.errors import InputError


@dataclass(frozen=True)
class Flag:
    """One field as a flag.

    Attributes:
        name: the field's name; the flag is `--` and the name with dashes.
        kind: `bool`, `int`, `float`, `number`, `text`, `list`, `pairs` or `rows` (a list, or names to lists).
        item: what the entries of a list or the values of pairs are read as.
        help: what the docstring says of the field.
        default: as text; "" where there is none to show.
        panel: the heading under which `--help` shows it.
        aliases: other accepted spellings; they work and are not shown.
        owners: names of the methods that have the field; () for the run's own.
    """

    name: str
    kind: str
    item: type
    help: str
    default: str
    panel: str
    aliases: tuple[str, ...] = ()
    owners: tuple[str, ...] = ()

    @property
    def option(self) -> str:
        """The flag as it is typed."""
        return dashed(self.name)

    @property
    def metavar(self) -> str | None:
        """What stands for the value in help."""
        return "N,N,..." if self.kind == "list" and self.item is int else _METAVARS.get(self.kind)


_METAVARS = {
    "int": "N",
    "float": "X",
    "number": "X|N",
    "text": "TEXT",
    "list": "A,B,...",
    "pairs": "KEY=VALUE",
    "rows": "N,N|KEY=N,N",
}

#: Text in which a typed \n means a new line, as their defaults have them.
_ESCAPED = ("label_prompt",)


def dashed(name: str) -> str:
    """A field's name as a flag."""
    return "--" + name.replace("_", "-")


def flags_of(
    config: type, panel: Callable[[str], str], *, owner: str = "", leave_out: Iterable[str] = ()
) -> list[Flag]:
    """The flags of a dataclass, in its order.

    Args:
        config: the dataclass.
        panel: a field's name to the heading it is shown under.
        owner: the method whose configuration this is.
        leave_out: fields that are no flags.
    """
    helps = attribute_docs(config)
    hints = typing.get_type_hints(config)
    other: dict[str, list[str]] = {}
    for alias, name in aliases_of(config).items():
        other.setdefault(name, []).append(alias)
    flags = []
    for field in dataclasses.fields(config):
        if field.name in leave_out:
            continue
        kind, item = _kind(hints[field.name])
        flags.append(
            Flag(
                field.name,
                kind,
                item,
                helps[field.name],
                _default(field),
                panel(field.name),
                tuple(other.get(field.name, ())),
                (owner,) if owner else (),
            )
        )
    return flags


def joined(flags: Iterable[Flag]) -> list[Flag]:
    """The flags with those of one name made one, which belongs to all the methods that have it."""
    found: dict[str, Flag] = {}
    for flag in flags:
        known = found.get(flag.name)
        owners = flag.owners if known is None else (*known.owners, *flag.owners)
        found[flag.name] = dataclasses.replace(known or flag, owners=owners)
    return list(found.values())


def attribute_docs(config: type) -> dict[str, str]:
    """What the docstring's Attributes section says of each field, the class's own or that of one it comes from.

    A line may speak of several fields: `a, b: ...` of both alike, `a: ...; b: ...` of each.
    """
    names = [field.name for field in dataclasses.fields(config)]
    entries: list[str] = []
    for origin in reversed(config.__mro__):
        section = inspect.cleandoc(origin.__dict__.get("__doc__") or "").partition("Attributes:\n")[2]
        for line in section.splitlines():
            if line.startswith("    ") and not line.startswith("     "):
                entries.append(line.strip())
            elif entries and line.strip():
                entries[-1] += " " + line.strip()
    found: dict[str, str] = {}
    listed = "|".join(names)
    for entry in entries:
        for part in re.split(rf"; (?=(?:{listed}): )", entry):
            head, _, text = part.partition(": ")
            for name in head.split(", "):
                found[name] = _sentence(text)
    missing = [name for name in names if name not in found]
    assert not missing, f"{config.__name__}'s docstring says nothing of {missing}"
    return found


def _sentence(text: str) -> str:
    text = text.replace("`", "").replace('"', "").rstrip(".")
    return re.sub(r"([;:] |^)None means (that )?", lambda found: "; by default " if found[1] else "by default ", text)


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if value is None or value == {} or value == "" or value is dataclasses.MISSING:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return (
        value.replace("\n", "\\n")
        if isinstance(value, str)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def _kind(hint: Any) -> tuple[str, type]:
    members = [m for m in _members(hint) if m is not type(None)]
    origins = [typing.get_origin(member) or member for member in members]
    mappings = [m for m, o in zip(members, origins, strict=True) if isinstance(o, type) and issubclass(o, Mapping)]
    sequences = [
        m
        for m, o in zip(members, origins, strict=True)
        if isinstance(o, type) and o is not str and issubclass(o, Sequence)
    ]
    if mappings and sequences:
        return "rows", typing.get_args(sequences[0])[0]
    if mappings:
        return "pairs", typing.get_args(mappings[0])[1]
    if sequences:
        return "list", typing.get_args(sequences[0])[0]
    if members == [bool]:
        return "bool", bool
    if str in members:
        return "text", str
    if int in members and float in members:
        return "number", float
    if float in members:
        return "float", float
    return ("int", int) if int in members else ("text", str)


def _members(hint: Any) -> list[Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [inner for member in typing.get_args(hint) for inner in _members(member)]
    return [str] if typing.get_origin(hint) is Literal else [hint]


def with_flags(command: Callable[..., None], flags: Sequence[Flag]) -> Callable[..., None]:
    """`command` with the flags in place of its `**given`, as typer reads parameters."""
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.kind is not p.VAR_KEYWORD]
    # What a command has of its own comes first in its help.
    parameters = [*own, *(parameter for flag in flags for parameter in _parameters(flag))]

    def wrapped(**given: Any) -> None:
        command(**given)

    wrapped.__doc__ = command.__doc__
    wrapped.__name__ = command.__name__
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapped


def _parameters(flag: Flag) -> list[inspect.Parameter]:
    found = []
    for name in (flag.name, *flag.aliases):
        option = dashed(name)
        kind: Any = bool | None if flag.kind == "bool" else str | None
        if flag.kind in ("list", "pairs", "rows"):
            kind = list[str] | None
        shown = f" [default: {flag.default}]" if flag.default else ""
        info = typer.Option(
            f"{option}/--no-{option.removeprefix('--')}" if flag.kind == "bool" else option,
            help=flag.help + shown,
            metavar=flag.metavar,
            rich_help_panel=flag.panel,
            show_default=False,
            hidden=name != flag.name,
        )
        found.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, info])
        )
    return found


def given_values(flags: Sequence[Flag], given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the flags that were given, under their fields' names.

    Raises:
        InputError: a value that cannot be read, or a field given under two names.
    """
    found: dict[str, Any] = {}
    for flag in flags:
        named = [name for name in (flag.name, *flag.aliases) if given.get(name) is not None]
        if len(named) > 1:
            raise InputError(f"{' and '.join(map(dashed, named))} mean the same: give one")
        for name in named:
            found[flag.name] = _value(flag, dashed(name), given[name])
    return found


def _value(flag: Flag, option: str, value: Any) -> Any:
    if flag.kind == "bool":
        return value
    if flag.kind == "text":
        return value.replace("\\n", "\n") if flag.name in _ESCAPED else value
    if flag.kind in ("int", "float", "number"):
        return typed_number(option, value, flag.kind)
    entries = [part.strip() for text in value for part in split_commas(text)]
    if flag.kind == "rows" and not any("=" in entry for entry in entries):
        return [_item(option, entry, flag.item) for entry in entries]
    if flag.kind == "pairs":
        return pairs(option, entries, flag.item)
    if flag.kind == "list":
        made = [_item(option, entry, flag.item) for entry in entries]
        return made[0] if flag.name == "target_modules" and len(made) == 1 else made
    rows: dict[str, Any] = {}
    for entry in entries:
        if "=" not in entry and rows:
            rows[next(reversed(rows))].append(_item(option, entry, flag.item))
        else:
            rows |= {name: [made] for name, made in pairs(option, [entry], flag.item).items()}
    return rows


def pairs(option: str, texts: Iterable[str], kind: type) -> dict[str, Any]:
    """`KEY=VALUE`, several between commas or given again, as a dictionary of values of `kind`."""
    found: dict[str, Any] = {}
    for entry in (part.strip() for text in texts for part in split_commas(text)):
        name, equals, text = entry.partition("=")
        if not equals or not name:
            raise InputError(f"{option} is {entry!r}: expected KEY=VALUE")
        found[name] = _item(option, text, kind)
    return found


def split_commas(text: str) -> list[str]:
    """The parts between commas that stand outside brackets, so that a regular expression keeps its own."""
    return re.split(r",(?![^(\[{]*[)\]}])", text)


def adapter_weight(text: str) -> tuple[str, float]:
    """`FOLDER=0.3` as a folder and a weight, 1 by default; a folder whose own name has an `=` is taken as it is."""
    path, equals, weight = text.rpartition("=")
    if not equals or Path(text).exists():
        return text, 1.0
    if not path or not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", weight):
        raise InputError(f"--adapter is {text!r}: expected FOLDER or FOLDER=WEIGHT, with a number as weight")
    return path, float(weight)


def _item(option: str, text: str, kind: type) -> Any:
    return text if kind is str else typed_number(option, text, "int" if kind is int else "float")


def typed_number(option: str, text: str, kind: str) -> int | float:
    """A typed number; `kind` is `int`, `float` or `number`, which is either."""
    try:
        if kind == "int" or (kind == "number" and re.fullmatch(r"[+-]?\d+", text)):
            return int(text)
        return float(text)
    except ValueError:
        raise InputError(f"{option} is {text!r}: expected a {'whole ' if kind == 'int' else ''}number") from None


def merged_keys(file: Mapping[str, Any], flags: Mapping[str, Any], aliases: Mapping[str, str]) -> dict[str, Any]:
    """A file's keys with the flags winning, whichever spelling the file uses.

    Args:
        file: keys of a YAML file.
        flags: what `given_values` gave.
        aliases: accepted spellings to fields' names.
    """
    return {**{key: value for key, value in file.items() if aliases.get(key, key) not in flags}, **flags}
