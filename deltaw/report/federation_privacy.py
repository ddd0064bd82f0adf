"""What a federation's page says about privacy: who sees what, epsilon by silo and round, collusion."""

from __future__ import annotations

import math
from typing import Any

from deltaw.report.federation_charts import Level, silos_chart
from deltaw.report.federation_rounds import lines_of
from deltaw.report.federation_tables import MANY, Federation, brief, by_silo, last, over_rounds
from deltaw.report.markup import Html, el, join
from deltaw.report.page import card, folded, table
from deltaw.report.tables import (
    MISSING,
    Table,
    format_count,
    format_share,
    number,
    part,
    plain,
    without_empty_columns,
)

#: Beyond this e^epsilon is no promise, and writing it out would look like one.
LARGE_EPSILON = 10
ADJACENCY = {"add-or-remove-one": "adding or removing", "replace-one": "replacing"}
SAMPLING = {"poisson": "Poisson sampling", "full": "no sampling", "full-batch": "no sampling"}


def format_epsilon(value: Any) -> str:
    """Epsilon in five digits, rounded up: a promise is never stated better than it is."""
    found = number(value)
    if found is None:
        return MISSING
    if found <= 0:
        return f"{found:g}"
    digits = 4 - math.floor(math.log10(found))
    # Decimal fractions lie a little above or below their value as doubles; that is not to be rounded up.
    above = math.ceil(round(found * 10.0**digits, 6)) / 10.0**digits
    return f"{above:.{max(0, digits)}f}".rstrip("0").rstrip(".") if digits > 0 else f"{above:,.0f}"


def format_delta(value: Any) -> str:
    """Delta as a power of ten where it is small: 1e-5."""
    found = number(value)
    return MISSING if found is None else f"{found:.3g}".replace("e-0", "e-")


def epsilons(fed: Federation) -> dict[str, float]:
    """Epsilon by silo: run.json's, else what the last round logged."""
    clients, logged = part(fed.run, "privacy", "clients"), by_silo(fed, "epsilon")
    found: dict[str, float] = {}
    for silo in fed.silos:
        value = number(part(clients, silo).get("epsilon"))
        value = last(logged.get(silo, [])) if value is None else value
        if value is not None:
            found[silo] = value
    return found


def unit(fed: Federation) -> str:
    """What the promise is for: an example, a customer."""
    said = plain(part(fed.run, "privacy").get("unit"))
    return "unit" if said == MISSING else said


def statement(fed: Federation) -> str:
    """The promise in one sentence, for the silo whose epsilon is largest."""
    privacy, spent = part(fed.run, "privacy"), epsilons(fed)
    if not spent:
        return "Epsilon is not recorded yet."
    worst = max(spent, key=lambda silo: spent[silo])
    pair = f"(epsilon, delta) = ({format_epsilon(spent[worst])}, {format_delta(privacy.get('delta'))})"
    how = [f"{pair} for one {unit(fed)}", plain(privacy.get("adjacency"))]
    how.append(SAMPLING.get(plain(privacy.get("sampling")), plain(privacy.get("sampling"))))
    said = ", ".join(text for text in how if text != MISSING)
    rdp = number(part(privacy, "clients", worst).get("epsilon_rdp"))
    # Integer noise is accounted for by RDP alone, which is then the statement itself.
    if rdp == spent[worst]:
        return f"{said}; RDP accounting."
    return f"{said}; PLD accounting{f'; RDP gives {format_epsilon(rdp)}' if rdp is not None else ''}."


def privacy_section(fed: Federation) -> Html:
    """Who saw what, the promise, epsilon by round and silo, what collusion and a second silo make of it."""
    privacy = part(fed.run, "privacy")
    server = el("p", _seen_by_server(fed), cls="said")
    if "privacy" not in fed.run:
        return card(el("p", "Whether this federation had differential privacy is not recorded."), server)
    if not privacy:
        said = (
            "This federation ran without differential privacy: there is no epsilon, and nothing bounds what the "
            "adapter tells of a single row."
        )
        return card(el("p", said), server)
    boxes = [
        card(
            el("p", statement(fed), cls="statement"),
            [el("p", said, cls=css) for said, css in _in_words(fed)],
            server,
        )
    ]
    boxes.append(el("div", _spent(fed), _collusion(fed), cls="grid"))
    if rows := epsilon_table(fed):
        of = f"Epsilon at delta {format_delta(privacy.get('delta'))}; that by RDP is a cross-check"
        grid = table(rows, of)
        boxes.append(folded(f"Epsilon by silo ({len(rows) - 1})", grid) if len(rows) > MANY + 1 else card(grid))
    return join(boxes)


def _seen_by_server(fed: Federation) -> str:
    threshold = number(fed.settings.get("threshold"))
    if fed.secure:
        least = f" The sum opens when at least {format_count(threshold)} silos are there." if threshold else ""
        return (
            "Secure aggregation is on: the server sees only the sum of the updates, no silo's own. "
            f"All silos but one together could subtract theirs and learn the remaining one's.{least}"
        )
    if "secure" not in fed.settings:
        return "Whether secure aggregation was on is not recorded."
    return "Secure aggregation is off: the server sees each silo's update."


def _in_words(fed: Federation) -> list[tuple[str, str | None]]:
    """What the promise means, how it is kept, and where a target was passed."""
    privacy, spent, one = part(fed.run, "privacy"), epsilons(fed), unit(fed)
    said: list[tuple[str, str | None]] = []
    largest = max(spent.values(), default=None)
    verb = ADJACENCY.get(plain(privacy.get("adjacency")))
    if largest is not None and verb:
        chance = f"but for a chance of {format_delta(privacy.get('delta'))}"
        factor = f"a factor of e^epsilon = {math.exp(min(largest, LARGE_EPSILON)):,.3g}"
        weak = f"epsilon is above {LARGE_EPSILON}: this promises little."
        bound = f"{verb} one {one} changes the probability of any outcome by at most {factor}, {chance}."
        said.append((f"In words: {weak if largest > LARGE_EPSILON else bound}", None))
    clip, noise = number(privacy.get("max_grad_norm")), number(privacy.get("noise_multiplier"))
    what = {"example": f"each {one}'s gradient", "update": "each silo's update"}.get(plain(privacy.get("level")))
    if what:
        bound = f" to a norm of {clip:g}" if clip is not None else ""
        times = f" with {noise:g} times that norm as its standard deviation" if noise is not None and bound else ""
        said.append((f"How: {what} is clipped{bound}, and noise{times} is added.", "muted"))
    over = [
        silo
        for silo, value in spent.items()
        if (goal := number(part(privacy, "clients", silo).get("target_epsilon"))) is not None
        and value > goal * (1 + 1e-9)
    ]
    if over:
        which = brief(over[0]) if len(over) == 1 else f"{len(over)} silos ({brief(over[0])} and others)"
        said.append((f"The target was passed by {which}: the table says by how much.", "over"))
    return said


def epsilon_table(fed: Federation) -> Table:
    """One row a silo: epsilon spent, its target, what is left, RDP's, steps and sampling rate."""
    rows = [["Silo", "Epsilon", "Target", "Left", "By RDP", "Steps", "Sampling rate"]]
    for silo, spent in epsilons(fed).items():
        found = part(fed.run, "privacy", "clients", silo)
        goal = number(found.get("target_epsilon"))
        left = MISSING
        if goal is not None:
            over = spent > goal * (1 + 1e-9)
            left = f"{format_epsilon(spent - goal)} over" if over else f"{max(0.0, goal - spent):.4g}"
        cells = [format_epsilon(spent), format_epsilon(goal), left, format_epsilon(found.get("epsilon_rdp"))]
        rows.append([silo, *cells, format_count(found.get("steps")), format_share(found.get("sampling_rate"))])
    return without_empty_columns(rows)


def _spent(fed: Federation) -> Html | None:
    """Epsilon by round and silo beside the target, where all silos have the same, with its numbers folded."""
    found = by_silo(fed, "epsilon")
    goals = {number(part(fed.run, "privacy", "clients", silo).get("target_epsilon")) for silo in found}
    goal = goals.pop() if len(goals) == 1 else None
    ends = {silo: value for silo, points in found.items() if (value := last(points)) is not None}
    if not ends:
        return None
    most = max(ends, key=lambda silo: ends[silo])
    target = f" The target is {format_epsilon(goal)}." if goal is not None else ""
    said = f"Most was spent by {brief(most)}: {format_epsilon(ends[most])}.{target}"
    summary = f"Line chart of epsilon by round for {len(ends)} silos. {said}"
    level = None if goal is None else Level(f"target {format_epsilon(goal)}", goal)
    drawn = silos_chart(lines_of(fed, found), y_label="epsilon", summary=summary, from_zero=True, level=level)
    if drawn is None:
        return None
    rows = table(over_rounds(found, format_epsilon), "Epsilon spent up to a round")
    folds = folded("Epsilon by round and silo", rows)
    return card(el("h3", "Epsilon spent by round"), drawn, el("p", said, cls="muted said"), folds)


def collusion_table(fed: Federation) -> Table:
    """One row a silo, one column a number of colluding peers: none, one, all others, and some between."""
    found = {silo: part(fed.run, "privacy", "clients", silo, "collusion") for silo in fed.silos}
    counts = sorted({int(key) for peers in found.values() for key in peers if key.isdecimal() and len(key) < 7})
    if len(counts) > 6:
        counts = [*counts[:3], counts[len(counts) // 2], *counts[-2:]]
    others = len(fed.silos) - 1
    names = {n: f"{n} collude{'s' if n == 1 else ''}" for n in counts} | {0: "None colludes"}
    names |= {others: f"All {others} others collude"} if others > 1 else {}
    head = ["Silo", *(names[n] for n in counts)]
    rows = [[silo, *(format_epsilon(peers.get(str(n))) for n in counts)] for silo, peers in found.items() if peers]
    return without_empty_columns([head, *rows])


def _collusion(fed: Federation) -> Html:
    """What becomes of epsilon if peers pool what they know, and if a customer is at two silos."""
    rows, privacy = collusion_table(fed), part(fed.run, "privacy")
    why = {
        ("example", False): "Every silo adds all of its noise itself: peers that pool what they know take none away.",
        ("example", True): "Every silo adds all of its noise itself: peers that pool what they know take none away.",
        ("update", False): "Every silo noises its own update: peers that pool what they know take none away.",
        ("update", True): "Every silo adds a share of the sum's noise. Peers that collude know theirs and can take "
        "it off, so epsilon grows with their number.",
    }.get((plain(privacy.get("level")), fed.secure))
    parts: list[Html] = [el("h3", "If peers collude")]
    if why:
        parts.append(el("p", why))
    if rows:
        grid = table(rows, "Epsilon against peers that pool what they know with the server, at the same delta")
        parts.append(folded(f"By silo ({len(rows) - 1})", grid) if len(rows) > MANY else grid)
        if len(rows) > MANY:
            parts.insert(-1, el("p", _collusion_in_words(rows)))
    else:
        parts.append(el("p", "What epsilon becomes then is not recorded.", cls="muted"))
    return card(*parts, el("h3", "If a customer is at two silos"), el("p", _two_silos(fed)))


def _collusion_in_words(rows: Table) -> str:
    head, *body = rows
    largest = [
        max((row[i] for row in body), key=lambda text: float(text.replace(",", "")) if text != MISSING else 0)
        for i in range(1, len(head))
    ]
    said = (f"{name[:1].lower()}{name[1:]}: {value}" for name, value in zip(head[1:], largest, strict=True))
    return f"The largest epsilon of any silo: {'; '.join(said)}."


def _two_silos(fed: Federation) -> str:
    """What a promise becomes for somebody who is at two silos."""
    privacy, spent = part(fed.run, "privacy"), sorted(epsilons(fed).values())
    whose = "a whole silo" if unit(fed) == "client" else f"one {unit(fed)}'s rows at one silo"
    said = f"Each promise is for {whose}. Of a customer at two silos both trainings tell"
    delta = number(privacy.get("delta"))
    if len(spent) < 2 or delta is None:
        return f"{said}, so the promise is weaker there."
    if plain(privacy.get("level")) == "update" and fed.secure:
        # Both updates are in the one noised sum: a group of two (Dwork and Roth 2014, theorem 2.2, with its delta).
        largest = spent[-1]
        if largest > LARGE_EPSILON:
            return f"{said} in the same noised sum, and epsilon doubles: this promises little."
        grown = min(1.0, (1 + math.exp(largest)) * delta)
        pair = f"({format_epsilon(2 * largest)}, {format_delta(grown)})"
        return f"{said} in the same noised sum: for a group of two it is at most {pair}."
    pair = f"({format_epsilon(spent[-1] + spent[-2])}, {format_delta(2 * delta)})"
    return f"{said}: they compose. At the two silos with the largest epsilons that is at most {pair}, both added up."
