"""What every page is: one file that fetches nothing, a head line, links to its sections, the sections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deltaw.report.markup import Html, el
from deltaw.report.style import CSS

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def document(
    title: str,
    sections: Sequence[tuple[str, str, Html | None]],
    *,
    kind: str,
    heading: str,
    top: Sequence[Any],
    footer: Html,
    version: str,
    css: str = "",
) -> str:
    """A whole page.

    Args:
        title: the window's.
        sections: (anchor, title, content); those without content are left out.
        kind: what the page is ("run report").
        heading: its first line.
        top: what stands between the heading and the links.
        footer: its end.
        version: deltaw's, that wrote what the page is of.
        css: rules beside the shared ones.
    """
    shown = [(key, name, content) for key, name, content in sections if content]
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=POLICY),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("meta", name="generator", content=f"deltaw {version}"),
        el("link", rel="icon", href="data:,"),
        el("title", f"{title} · ΔW {kind}"),
        el("style", Html(CSS + css)),
    )
    links = el("ul", [el("li", el("a", name, href=f"#{key}")) for key, name, _ in shown])
    begin = (el("p", el("b", "ΔW"), f" {kind}", cls="eyebrow"), el("h1", el("bdi", heading)), *top)
    body = el(
        "body",
        el("header", *begin, el("nav", links, aria_label="Sections")),
        el("main", [_section(key, name, content) for key, name, content in shown if content]),
        footer,
    )
    return f"<!doctype html>\n{el('html', head, body, lang='en')}\n"


def _section(key: str, title: str, content: Html) -> Html:
    return el("section", el("h2", title, id=key), content, aria_labelledby=key)
