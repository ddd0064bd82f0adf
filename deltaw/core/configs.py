"""Configuration objects: frozen dataclasses that accept other libraries' spellings and complain in the name given."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from deltaw.core.errors import InputError, unknown_name

T = TypeVar("T")


def accepts(**aliases: str) -> Callable[[type[T]], type[T]]:
    """Lets a dataclass be built with other spellings of its fields too: `accepts(lora_alpha="alpha")`.

    Unknown names are an `InputError` that lists near ones. `spelling(config, field)` then gives the name that was used.
    """

    def wrap(cls: type[T]) -> type[T]:
        names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        original = cls.__init__

        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            given: dict[str, str] = {}
            for name in list(kwargs):
                field = aliases.get(name, name)
                if field not in names:
                    raise unknown_name(f"{cls.__name__} option", name, [*names, *aliases])
                if name != field:
                    if field in kwargs:
                        raise InputError(
                            f"{cls.__name__} was given both {field} and {name}, which mean one thing: give one"
                        )
                    kwargs[field] = kwargs.pop(name)
                    given[field] = name
            object.__setattr__(self, "_given", given)
            original(self, *args, **kwargs)

        __init__.__wrapped__ = original  # type: ignore[attr-defined]
        cls.__init__ = __init__  # type: ignore[method-assign]
        cls._aliases = aliases  # type: ignore[attr-defined]
        return cls

    return wrap


def spelling(config: Any, field: str) -> str:
    """The name under which the user gave `field`, the field's own where it was a default."""
    given: dict[str, str] = getattr(config, "_given", {})
    return given.get(field, field)


def aliases_of(config_type: type) -> dict[str, str]:
    """Accepted spellings of a configuration type, to its own field names."""
    found: dict[str, str] = getattr(config_type, "_aliases", {})
    return found


def to_plain(config: Any) -> dict[str, Any]:
    """A configuration's fields as plain lists, dicts and numbers, for YAML and JSON."""

    def plain(value: Any) -> Any:
        if isinstance(value, (list, tuple, set, frozenset)):
            return [plain(item) for item in value]
        if isinstance(value, dict):
            return {str(key): plain(item) for key, item in value.items()}
        return value

    return {field.name: plain(getattr(config, field.name)) for field in dataclasses.fields(config)}
