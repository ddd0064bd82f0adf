"""A federation's page: its folder in, one HTML file without scripts and without anything from a network out."""

from __future__ import annotations

import os
import shlex
from pathlib import Path, PurePosixPath
from typing import Any

from deltaw.core.files import write_text
from deltaw.report.charts import Series, line_chart
from deltaw.report.federation_charts import CSS
from deltaw.report.federation_privacy import (
    epsilons,
    format_delta,
    format_epsilon,
    privacy_section,
    unit,
)
from deltaw.report.federation_rounds import bars, bytes_section, drift_section, quality_section
from deltaw.report.federation_tables import (
    FACTS,
    MANY,
    ROUNDS,
    RULES,
    Federation,
    best_alone,
    brief,
    by_round,
    entries,
    fact_names,
    final,
    last,
    left_out_table,
    short,
    silos_table,
    total,
    uploads_facts,
    view,
)
from deltaw.report.folder import read_folder, read_lines
from deltaw.report.markup import Html, el, join
from deltaw.report.page import (
    REPORT,
    card,
    command,
    cost_section,
    folded,
    footer,
    method_name,
    metrics_section,
    model_name,
    moment,
    setup_section,
    table,
    verdict,
)
from deltaw.report.shell import document
from deltaw.report.tables import (
    LOWER_IS_BETTER,
    MISSING,
    baselines,
    format_bytes,
    format_count,
    format_metric,
    format_seconds,
    label,
    number,
    part,
    plain,
)

#: A smaller relative error is rounding, which needs no chart.
DRAWN_ERROR = 1e-5


def write_federation(folder: str | os.PathLike[str]) -> Path:
    """Writes `report.html` into a federation's folder, from its run.json, rounds.jsonl and config.yaml.

    Only run.json must exist; of what is absent the page says so. The same folder gives the same bytes.

    Args:
        folder: what the federation's server wrote.

    Returns:
        The path of the page.

    Raises:
        InputError: the folder or its run.json is missing or malformed, or the page may not be written there.
        RunError: the page could not be written.
    """
    found = read_folder(Path(folder))
    lines = read_lines(Path(folder) / ROUNDS, found.notes)
    path = Path(folder) / REPORT
    write_text(path, federation_page(view(found, lines)))
    return path


def federation_page(fed: Federation) -> str:
    """The whole page."""
    run = fed.run
    sections = [
        ("result", "Result", _result(fed)),
        ("rounds", "Quality by round", quality_section(fed)),
        ("metrics", "Before and after", metrics_section(run)),
        ("drift", "Drift between silos", drift_section(fed)),
        ("bytes", "Bytes on the wire", bytes_section(fed)),
        ("privacy", "Privacy", privacy_section(fed)),
        ("left-out", "Updates left out", _left_out(fed)),
        ("rule", "Aggregation rule", _rule(fed)),
        ("silos", "Silos", _silos(fed)),
        ("cost", "Cost", _cost(fed)),
        ("setup", "Configuration", _setup(fed)),
        ("reproduce", "Reproduce", _reproduce(fed)),
    ]
    title = f"{model_name(run)} over {_silo_count(fed)}"
    return document(
        f"{title}: {method_name(run)}",
        sections,
        kind="federation",
        heading=title,
        top=[_facts(fed), _banner(fed)],
        footer=footer(fed.found),
        version=plain(run.get("deltaw", "")),
        css=CSS,
    )


def _silo_count(fed: Federation) -> str:
    return f"{format_count(len(fed.silos))} silo{'s' if len(fed.silos) != 1 else ''}"


def _facts(fed: Federation) -> Html:
    run, settings = fed.run, fed.settings
    shown = [
        ("Rule", plain(settings.get("rule"))),
        ("Method", method_name(run) if part(run, "method") else MISSING),
        ("Task", plain(run.get("task"))),
        ("Transport", plain(settings.get("transport"))),
        ("Secure aggregation", {"yes": "on", "no": "off"}.get(plain(settings.get("secure")), MISSING)),
        ("Differential privacy", _protected(run)),
        ("Status", plain(run.get("status"))),
        ("Started", moment(run.get("started"))),
    ]
    items = [el("div", el("dt", name), el("dd", value)) for name, value in shown if value != MISSING]
    return el("dl", items, cls="facts")


def _protected(run: dict[str, Any]) -> str:
    """The level of differential privacy; a dash where run.json does not tell."""
    if "privacy" not in run:
        return MISSING
    return f"{plain(run['privacy'].get('level', 'on'))} level" if part(run, "privacy") else "off"


def _banner(fed: Federation) -> Html | None:
    """What stands above everything when the federation failed or has not ended."""
    status = fed.run.get("status")
    if status == "done":
        return None
    planned = number(fed.settings.get("rounds"))
    of = f" of {format_count(planned)}" if planned is not None else ""
    done = fed.trained[-1]["round"] if fed.trained else None
    reached = f"The last whole round is {done}{of}." if done is not None else "No round was completed."
    if status == "failed":
        error = plain(fed.run.get("error", ""))
        said = error if error != MISSING else "The federation left no error message."
        note = f"{reached} Numbers below are those written before it stopped."
        return el(
            "div",
            el("h2", "This federation failed"),
            el("p", said, dir="auto", cls="user"),
            el("p", note),
            cls="banner failed",
        )
    unfinished = status in ("running", None, "")
    title = "This federation has not finished" if unfinished else f"This federation's status is {plain(status)}"
    said = f"{reached} Numbers below are those written so far; write the report again when it is done."
    return el("div", el("h2", title), el("p", said), cls="banner unfinished")


def _result(fed: Federation) -> Html:
    """The main metric before and after on the shared test set, and what the federation took."""
    tiles = [
        el("div", el("dt", name), el("dd", value, cls="value"), el("dd", note, cls="note") if note else None)
        for name, value, note in _tiles(fed)
        if value != MISSING
    ]
    name = fed.main
    before, after = (number(part(fed.run, "metrics", key).get(name or "")) for key in ("before", "after"))
    if name is None or (before is None and after is None):
        said = "There is no shared test set (test_data), or it was not evaluated yet: quality is not known here."
        return el("div", card(el("p", said)), el("dl", tiles, cls="tiles wide"), cls="top")
    big = []
    if before is not None:
        big.append(el("span", format_metric(name, before), cls="was"))
    if before is not None and after is not None:
        big.append(el("span", " → ", cls="arrow", aria_hidden="true"))
    if after is not None:
        big.append(el("span", format_metric(name, after)))
    done = fed.trained[-1]["round"] if fed.trained else None
    when = f"before and after {format_count(done)} round{'s' if done != 1 else ''}" if done else "before training"
    main = card(
        el("h3", f"{fed.name} on the shared test set, {when}"),
        el("p", big, cls="big"),
        el("p", verdict(fed.run, name), cls="muted"),
        el("p", _ends(fed), cls="muted") if final(fed) else None,
        _beside(fed, name),
    )
    return el("div", main, el("dl", tiles, cls="tiles"), cls="top two")


def _beside(fed: Federation, name: str) -> Html | None:
    """A metric between 0 and 1 as bars: before, the baselines, after."""
    columns = {"Before": part(fed.run, "metrics", "before")}
    columns |= {label(key): column for key, column in baselines(fed.run).items()}
    columns |= {"After": part(fed.run, "metrics", "after")}
    found = {key: value for key, column in columns.items() if (value := number(column.get(name))) is not None}
    if len(found) < 2 or LOWER_IS_BETTER.search(name) or not all(0 <= value <= 1 for value in found.values()):
        return None
    rows = [(key, value, format_metric(name, value)) for key, value in found.items()]
    return bars(f"{fed.name}, axis from 0 to {format_metric(name, 1.0)}", rows, strong="After")


def _ends(fed: Federation) -> str:
    """Between what the silos' own results lie, in a sentence."""
    ends = final(fed)
    best, worst = next(iter(ends)), next(reversed(ends))
    written = [format_metric(fed.main or "", ends[silo]) for silo in (best, worst)]
    best, worst = brief(best), brief(worst)
    if len(ends) == 1:
        return f"On {best}'s own rows: {written[0]}."
    return f"On their own rows the silos end between {written[1]} ({worst}) and {written[0]} ({best})."


def _tiles(fed: Federation) -> list[tuple[str, str, str]]:
    """(label, value, note) of what the federation took and of the best single silo."""
    planned, privacy, spent = number(fed.settings.get("rounds")), part(fed.run, "privacy"), epsilons(fed)
    up, down = total(fed, "bytes_up"), total(fed, "bytes_down")
    states = [status for _, _, _, status in entries(fed)]
    lost = len(states) - states.count("ok") - states.count("absent")
    alone = best_alone(fed)
    tiles = []
    if alone is not None:
        value = part(fed.run, "metrics", "silos", alone, "alone").get(fed.main or "")
        tiles.append(("Best single silo", format_metric(fed.main or "", value), f"{brief(alone)}, trained by itself"))
    rounds = format_count(len(fed.trained)) + (f" of {format_count(planned)}" if planned is not None else "")
    both = (up or 0) + (down or 0) if up is not None or down is not None else None
    tiles += [
        ("Rounds", rounds, f"rule {plain(fed.settings['rule'])}" if fed.settings.get("rule") else ""),
        ("Bytes in all", format_bytes(both), f"{format_bytes(up)} up, {format_bytes(down)} down"),
    ]
    if spent:
        adjacency = plain(privacy.get("adjacency"))
        note = f"delta {format_delta(privacy.get('delta'))}, for one {unit(fed)}"
        note += f", {adjacency}" if adjacency != MISSING else ""
        tiles.append(("Epsilon", format_epsilon(max(spent.values())), note + ("; the largest" * (len(spent) > 1))))
    if states:
        taken = f"{format_count(states.count('ok'))} of {format_count(len(states) - states.count('absent'))}"
        tiles.append(("Updates taken in", taken, f"{format_count(lost)} left out" if lost else "none left out"))
    cost = part(fed.run, "cost")
    tiles.append(("Time", format_seconds(cost.get("total_s")), ""))
    tiles.append(("Peak memory", format_bytes(cost.get("peak_memory_bytes")), ""))
    return tiles


def _left_out(fed: Federation) -> Html | None:
    """Refused, late and crashed updates, with the reasons; rounds that took several attempts."""
    if not fed.trained:
        return None
    states = [status for _, _, _, status in entries(fed)]
    asked = len(states) - states.count("absent")
    kinds = [
        f"{states.count(kind)} {word}"
        for kind, word in (("refused", "refused"), ("late", "late"), ("crashed", "crashed"))
        if kind in states
    ]
    again = [line for line in fed.trained if (number(line.get("attempts")) or 1) > 1]
    said = f"Of {format_count(asked)} updates asked for, {format_count(states.count('ok'))} were taken in"
    said = f"{said}; {', '.join(kinds)}." if kinds else "Every update that was asked for was taken in."
    if not states:
        said = "Which silos took part in which round was not recorded."
    if again:
        which = ", ".join(f"{line['round']} ({format_count(line['attempts'])})" for line in again[:20])
        more = f" and {len(again) - 20} more" if len(again) > 20 else ""
        said = f"{said} Rounds that took more than one attempt: {which}{more}."
    rows = left_out_table(fed)
    if not rows:
        return card(el("p", said))
    grid = table(rows, "A round goes on without what is refused, late or crashed", text_columns=4)
    if len(rows) <= MANY + 1:
        return card(el("p", said), grid)
    return join(card(el("p", said)), folded(f"All updates left out ({len(rows) - 1})", grid))


def _rule(fed: Federation) -> Html | None:
    """What the rule does, and how exact it was."""
    rule = plain(fed.settings.get("rule"))
    names = fact_names(fed)
    if rule == MISSING and not names:
        return None
    words = [el("p", el("b", rule), f": {RULES[rule]}" if rule in RULES else "")]
    figures = []
    for name in names:
        points = by_round(fed, "facts", name)
        end = last(points)
        if end is None:
            continue
        top = max(y for _, y in points if y is not None)
        said = f"{label(name)} is {short(end)} in round {points[-1][0]:,.0f}, at most {short(top)}"
        words.append(el("p", f"{said}{f': {FACTS[name]}' if name in FACTS else ''}.", cls="muted"))
        if name.endswith("_error") and top > DRAWN_ERROR and len(points) > 1:
            drawn = line_chart(
                [Series(label(name).lower(), points)],
                x_label="round",
                y_label="relative error",
                summary=f"Line chart by round. {said}.",
                from_zero=True,
            )
            figures.append(card(el("h3", label(name)), drawn))
    for name, uploads in uploads_facts(fed).items():
        often = ", ".join(f"{brief(upload)} in {format_count(count)}" for upload, count in uploads.most_common(MANY))
        words.append(el("p", f"{label(name)}, by rounds (at most {MANY} shown): {often}.", cls="muted"))
    if not names:
        unseen = "no error is known, since the server sees only the sum" if fed.secure else "the rule recorded no error"
        words.append(el("p", f"Here {unseen}.", cls="muted"))
    return el("div", card(words), figures, cls="grid") if figures else card(words)


def _silos(fed: Federation) -> Html | None:
    """Each silo with its examples, base and part in the rounds."""
    rows = silos_table(fed)
    if not rows:
        return None
    bases = {plain(part(fed.settings, "clients", silo).get("base")) for silo in fed.silos} - {MISSING}
    if len(bases) > 1:
        same = f"The silos' frozen bases differ ({len(bases)} hashes): those that differ from the server's are refused."
    else:
        same = "The frozen base is the same at all silos" if bases else "The bases' hashes were not recorded"
        same = f"{same}: {next(iter(bases))}." if bases else f"{same}."
    grid = table(rows, "Rounds: how many took the silo's update in")
    note = el("p", same, cls="muted said")
    if len(rows) <= MANY + 1:
        return card(grid, note)
    examples = sum(number(part(fed.settings, "clients", silo).get("examples")) or 0 for silo in fed.silos)
    counted = f"{_silo_count(fed)} with {format_count(examples)} examples together."
    return join(card(el("p", counted), note), folded(f"All silos ({len(rows) - 1})", grid))


def _cost(fed: Federation) -> Html | None:
    """The cost section, bytes under names that state their unit."""
    names = {"bytes_up": "uploaded_bytes", "bytes_down": "downloaded_bytes"}
    cost = {names.get(key, key): value for key, value in part(fed.run, "cost").items() if key != "bytes_up_float32"}
    return cost_section({"cost": cost})


def _setup(fed: Federation) -> Html | None:
    """The resolved configuration, the federation's and privacy's settings, and what it ran on."""
    rows = [
        [f"{name}: {label(key).lower()}", plain(value)]
        for name in ("federation", "privacy")
        for key, value in part(fed.run, name).items()
        if key != "clients" and plain(value) != MISSING
    ]
    rows = [[name[:1].upper() + name[1:], value] for name, value in rows]
    settings = folded("Federation and privacy", table([["Item", "Value"], *rows], "Recorded in run.json"))
    return join(settings if rows else None, setup_section(fed.found)) or None


def _reproduce(fed: Federation) -> Html | None:
    """The command that started this federation, and the one that repeats it from its resolved configuration."""
    run, found = fed.run, fed.found
    parts: list[Html] = []
    if isinstance(run.get("command"), str) and run["command"].strip():
        parts += [el("p", "This federation was started with:"), command(run["command"])]
    if found.config.strip():
        folder = PurePosixPath(found.output)
        config, output = shlex.quote(str(folder / "config.yaml")), shlex.quote(f"{folder}-again")
        noise = " Privacy's noise and sampling come from the operating system: with them no two runs are the same."
        note = "config.yaml is fully resolved. Another device or thread count may change the last digits."
        parts += [
            el("p", "The same again, from where it was started:"),
            command(f"deltaw federate --config {config} --output {output}"),
            el("p", note + (noise if part(run, "privacy") else ""), cls="muted"),
        ]
    return join(parts) if parts else None
