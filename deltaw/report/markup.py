"""Building HTML so that nothing is left unescaped by accident: text is escaped unless it is `Html` already."""

from __future__ import annotations

import html
import re
from typing import Any

VOID = {"meta", "link", "br", "col"}
# Control characters are errors in HTML, and lone surrogates (JSON can carry them) cannot be written as UTF-8.
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


class Html(str):
    """A piece of finished HTML."""

    __slots__ = ()


def text(value: Any) -> Html:
    """`value` as escaped text; what is `Html` already stays as it is."""
    if isinstance(value, Html):
        return value
    plain = str(value).replace("\r\n", "\n").replace("\r", "\n")
    return Html(html.escape(UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", plain), quote=True))


def join(*children: Any) -> Html:
    """Children one after the other: lists are flattened, None is left out, strings are escaped."""
    pieces = []
    for child in children:
        if isinstance(child, list | tuple):
            pieces.append(join(*child))
        elif child is not None:
            pieces.append(text(child))
    return Html("".join(pieces))


def el(tag: str, *children: Any, **attributes: Any) -> Html:
    """One element. `cls` is class, an underscore in an attribute's name is a hyphen, None and False leave it out."""
    written = [tag]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        name = "class" if key == "cls" else key.strip("_").replace("_", "-")
        written.append(name if value is True else f'{name}="{text(value)}"')
    opening = f"<{' '.join(written)}>"
    return Html(opening if tag in VOID else f"{opening}{join(*children)}</{tag}>")
