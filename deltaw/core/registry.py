"""One literal registry: a duplicate raises, an unknown name lists the known ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

from deltaw.core.errors import unknown_name

T = TypeVar("T")


class Registry(Generic[T]):
    """Names to things of one kind.

    Args:
        what: the kind in the singular, used in errors ("method").
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._items: dict[str, T] = {}

    def register(self, name: str, item: T) -> T:
        """Adds `item` under `name`; a name that is taken is a programming error."""
        if name in self._items:
            raise ValueError(f"{self.what} {name!r} is registered twice")
        self._items[name] = item
        return item

    def __getitem__(self, name: str) -> T:
        try:
            return self._items[name]
        except KeyError:
            raise unknown_name(self.what, name, self._items) from None

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)
