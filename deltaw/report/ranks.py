"""The ranks of an adapter's sites as a heat map, layers by kinds of module. Colours are the page's CSS variables."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from deltaw.report.markup import Html, el, join
from deltaw.report.tables import format_count, number, plain, site_list, split_name

LEFT, CELL_WIDTH, CELL_HEIGHT, GAP = 46, 56, 24, 2
#: Width of a character of a column's name, in the drawing's units.
CHARACTER = 8.6

Cells = dict[tuple[int | None, str], list[float]]


def ranks_figures(run: dict[str, Any]) -> list[Html]:
    """A figure for each stack of layers of run.json's sites (an encoder and a decoder are two); [] if ranks are alike.

    Experts of one layer share a cell, which shows their lowest and highest rank.
    """
    stacks: dict[str, Cells] = {}
    for site in site_list(run):
        r = number(site.get("r"))
        if r is not None and 0 <= r < 1e6:
            stack, layer, kind = split_name(plain(site["name"]))
            stacks.setdefault(stack if layer is not None else "", {}).setdefault((layer, kind), []).append(r)
    ranks = [r for cells in stacks.values() for found in cells.values() for r in found]
    if len(set(ranks)) < 2:
        return []
    began = [r for site in site_list(run) if (r := number(site.get("init_r"))) is not None]
    top = max(ranks + began)
    return [_figure(stack, cells, top, titled=len(stacks) > 1) for stack, cells in stacks.items()]


def ranks_caption(run: dict[str, Any]) -> str:
    """The ranks in words: how many in all, the mean, the extremes and where they are."""
    sites = [(r, plain(site["name"])) for site in site_list(run) if (r := number(site.get("r"))) is not None]
    total, (low, lowest), (high, highest) = sum(r for r, _ in sites), min(sites), max(sites)
    counts = Counter(r for r, _ in sites)
    began = sum(found for site in site_list(run) if (found := number(site.get("init_r"))) is not None)
    of = f" of the {format_count(began)} at first" if began and began > total else ""

    def at(r: float, name: str) -> str:
        return f"{format_count(r)} at {name if counts[r] == 1 else f'{format_count(counts[r])} sites'}"

    return (
        f"{format_count(total)} ranks{of} over {format_count(len(sites))} sites, {total / len(sites):.3g} on average; "
        f"the lowest {at(low, lowest)}, the highest {at(high, highest)}."
    )


def _figure(stack: str, cells: Cells, top: float, *, titled: bool) -> Html:
    layers = sorted({layer for layer, _ in cells}, key=lambda layer: -1 if layer is None else layer)
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    names = _short(kinds)
    # Names stand at 45 degrees where they are wider than a column.
    slanted = max(map(len, names)) * CHARACTER > CELL_WIDTH
    head = 44 + (math.ceil(max(map(len, names)) * CHARACTER * 0.72) if slanted else 4)
    room = math.ceil(len(names[-1]) * CHARACTER * 0.72) if slanted else 0
    right, bottom = LEFT + len(kinds) * CELL_WIDTH, head + len(layers) * CELL_HEIGHT
    parts = _legend(top)
    for column, name in enumerate(names):
        x, y = LEFT + (column + 0.5) * CELL_WIDTH, head - 6
        turn = f"rotate(-45 {x:.1f} {y:.1f})" if slanted else None
        parts.append(el("text", name, x=f"{x:.1f}", y=y, transform=turn, text_anchor=None if slanted else "middle"))
    for row, layer in enumerate(layers):
        y = head + row * CELL_HEIGHT
        if layer is not None:
            parts.append(el("text", layer, x=LEFT - 8, y=y + CELL_HEIGHT / 2, dy="0.35em", text_anchor="end"))
        for column, kind in enumerate(kinds):
            if found := cells.get((layer, kind)):
                where = kind if layer is None else f"layer {layer}, {kind}"
                parts.append(_cell(found, where, LEFT + column * CELL_WIDTH, y, top))
    if layers != [None]:
        parts.append(el("text", "layer", x=LEFT - 8, y=head - 6, text_anchor="end"))
    width = right + max(room - CELL_WIDTH // 2, 4)
    place = stack if stack and titled else "outside the layers" if layers == [None] else ""
    said = f"Heat map of the rank at every site{f' of {place}' if place else ''}: " + _spoken(cells, layers, kinds)
    drawing = el(
        "svg",
        parts,
        viewBox=f"0 0 {max(width, LEFT + 4 * CELL_WIDTH)} {bottom + 4}",
        role="img",
        aria_label=said,
        cls="chart",
        style=f"max-width:{max(width, LEFT + 4 * CELL_WIDTH) * 1.3:.0f}px",
    )
    return el("figure", join(el("h3", place) if place else None, drawing))


def _cell(found: list[float], where: str, x: float, y: float, top: float) -> Html:
    low, high = min(found), max(found)
    shown = format_count(low) if low == high else f"{format_count(low)}–{format_count(high)}"
    box = el(
        "rect",
        x=x + GAP / 2,
        y=y + GAP / 2,
        width=CELL_WIDTH - GAP,
        height=CELL_HEIGHT - GAP,
        rx=3,
        style=f"fill:{_shade(sum(found) / len(found), top)}",
        cls="cell",
    )
    middle = {"x": x + CELL_WIDTH / 2, "y": y + CELL_HEIGHT / 2, "dy": "0.35em", "text_anchor": "middle"}
    return el("g", el("title", f"{where}: rank {shown}"), box, el("text", shown, cls="name", **middle))


def _shade(r: float, top: float) -> str:
    return f"color-mix(in srgb, var(--shade) {100 * r / top:.0f}%, var(--soft))" if top else "var(--soft)"


def _legend(top: float) -> list[Html]:
    """Boxes from rank 0 to the highest."""
    steps = sorted({round(top * part / 4) for part in range(5)})
    parts = [el("text", "rank", x=LEFT - 8, y=15.5, text_anchor="end", cls="name")]
    for place, r in enumerate(steps):
        x = LEFT + place * 38
        parts.append(el("rect", x=x, y=3, width=36, height=17, rx=3, style=f"fill:{_shade(r, top)}", cls="cell"))
        parts.append(el("text", format_count(r), x=x + 18, y=15.5, text_anchor="middle", cls="name"))
    return parts


def _short(kinds: list[str]) -> list[str]:
    """The shortest endings that tell the kinds apart."""
    names = []
    for kind in kinds:
        words = kind.split(".")
        endings = [".".join(words[-length:]) for length in range(1, len(words) + 1)]
        names.append(next((e for e in endings if sum(f".{k}".endswith(f".{e}") for k in kinds) == 1), kind))
    return [name if len(name) <= 24 else f"…{name[-23:]}" for name in names]


def _spoken(cells: Cells, layers: list[int | None], kinds: list[str]) -> str:
    """The mean of each column, for those who cannot see it."""
    said = []
    for kind in kinds:
        found = [r for layer in layers for r in cells.get((layer, kind), [])]
        said.append(f"{kind} {sum(found) / len(found):.3g} on average, {min(found):.0f} to {max(found):.0f}")
    return "; ".join(said) + "."
