"""The report's page: a run folder in, one HTML file without scripts and without anything from a network out."""

from __future__ import annotations

import os
import shlex
from datetime import datetime
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from deltaw.core.files import write_text
from deltaw.report.charts import Series, line_chart
from deltaw.report.examples import confusion_section, examples_section, matrices
from deltaw.report.folder import RunFolder, read_folder
from deltaw.report.markup import Html, el, join
from deltaw.report.ranks import ranks_caption, ranks_figures
from deltaw.report.shell import document
from deltaw.report.tables import (
    LOWER_IS_BETTER,
    MISSING,
    PERCENT,
    Table,
    baselines,
    cost_table,
    data_table,
    format_bytes,
    format_change,
    format_count,
    format_metric,
    format_seconds,
    format_share,
    format_short,
    headline,
    label,
    main_metric,
    metric_label,
    metrics_table,
    number,
    ordered_metrics,
    part,
    plain,
    site_list,
    sites_table,
)

REPORT = "report.html"
# Nothing may be fetched and nothing may run, even where escaping were to fail.
# Beyond this a diverged loss would overflow the axes' arithmetic.
DRAWABLE = 1e100
METHODS = {
    "lora": "LoRA",
    "dora": "DoRA",
    "adalora": "AdaLoRA",
    "full": "Full fine-tuning",
    "bitfit": "BitFit",
    "bottleneck": "Bottleneck adapters",
    "prefix": "Prefix tuning",
}


def write_report(run_folder: str | os.PathLike[str]) -> Path:
    """Writes `report.html` into a run folder, from its run.json, config.yaml, metrics.jsonl and examples.jsonl.

    Only run.json must exist; what is absent is left out of the page. The same folder gives the same bytes.

    Args:
        run_folder: the folder that a run wrote.

    Returns:
        The path of the page.

    Raises:
        InputError: the folder or its run.json is missing or malformed, or the page may not be written there.
        RunError: the page could not be written.
    """
    folder = Path(run_folder)
    path = folder / REPORT
    write_text(path, page(read_folder(folder)))
    return path


def page(found: RunFolder) -> str:
    """The whole page."""
    run = found.run
    sections = [
        ("result", "Result", result_section(run)),
        ("curves", "Training curves", curves_section(found.metrics)),
        ("metrics", "Before and after", metrics_section(run)),
        ("confusion", "Confusion matrix", confusion_section(run)),
        ("ranks", "Rank of every layer", ranks_section(run)),
        ("sites", "Adapted sites", sites_section(run)),
        ("cost", "Cost", cost_section(run)),
        ("privacy", "Privacy", privacy_section(run)),
        ("data", "Data", data_section(run)),
        ("examples", "Held-out examples", examples_section(run, found.examples)),
        ("setup", "Configuration", setup_section(found)),
        ("reproduce", "Reproduce", reproduce_section(found)),
    ]
    title = model_name(run)
    return document(
        f"{title}: {method_name(run)}",
        sections,
        kind="run report",
        heading=title,
        top=[facts(run), status_banner(found)],
        footer=footer(found),
        version=plain(run.get("deltaw", "")),
    )


def model_name(run: dict[str, Any]) -> str:
    """The model as a title: a hub name as it is, a path's last part."""
    source = plain(part(run, "model").get("source", "unnamed model")).strip().rstrip("/\\")
    if "\\" in source:
        return PureWindowsPath(source).name or source
    is_path = source.startswith((".", "/", "~")) or source.count("/") > 1
    return (PurePosixPath(source).name if is_path else source) or "unnamed model"


def method_name(run: dict[str, Any]) -> str:
    """The method with what defines it: "LoRA, r 8, alpha 16"."""
    method = part(run, "method")
    config = part(method, "config")
    name = plain(method.get("name", "unknown method"))
    stabilised = {"lora": "rsLoRA", "dora": "rsDoRA"} if config.get("rslora") is True else {}
    shown = stabilised.get(name) or METHODS.get(name, name)
    details = [
        f"{key} {format_count(config[key])}"
        for key in ("r", "init_r", "target_r", "alpha")
        if number(config.get(key)) is not None
    ]
    return ", ".join([shown, *details])


def moment(value: Any) -> str:
    """An ISO time as a person reads it."""
    try:
        found = datetime.fromisoformat(str(value))
    except ValueError:
        return plain(value)
    zone = found.tzname() or ""
    return f"{found.day} {found:%B %Y, %H:%M} {zone}".strip()


def facts(run: dict[str, Any]) -> Html:
    """Method, task, status, start and device under the title."""
    device = part(run, "device")
    shown = [
        ("Method", method_name(run)),
        ("Task", plain(run.get("task"))),
        ("Status", plain(run.get("status"))),
        ("Started", moment(run.get("started"))),
        ("Device", ", ".join(plain(device[key]) for key in ("type", "dtype") if device.get(key)) or MISSING),
    ]
    items = [el("div", el("dt", name), el("dd", value)) for name, value in shown if value != MISSING]
    return el("dl", items, cls="facts")


def status_banner(found: RunFolder) -> Html | None:
    """What stands above everything when the run failed or has not ended; None for a run that is done."""
    status = found.run.get("status")
    if status == "done":
        return None
    steps = [step for line in found.metrics if (step := number(line.get("step"))) is not None]
    reached = f"The last logged step is {format_count(max(steps))}." if steps else "No step was logged."
    if status == "failed":
        error = plain(found.run.get("error", ""))
        said = error if error != MISSING else "The run left no error message."
        lines = [
            el("p", said, dir="auto", cls="user"),
            el("p", f"{reached} Numbers below are those written before it stopped."),
        ]
        return el("div", el("h2", "This run failed"), lines, cls="banner failed")
    title = "This run has not finished" if status == "running" else f"This run's status is {plain(status)}"
    said = f"{reached} Numbers below are those written so far; write the report again when it is done."
    return el("div", el("h2", title), el("p", said), cls="banner unfinished")


def table(rows: Table, caption: str, *, text_columns: int = 1, strong: str = "", code: bool = False) -> Html:
    """A table in a box of its own that scrolls sideways where it is too wide.

    Args:
        rows: the header and the rows; the first cell of a row is its header.
        caption: what the table shows.
        text_columns: this many leading columns are text; the others are numbers, except Layout, Source and Value.
        strong: the column of this name is bold.
        code: the first column holds names of code.
    """
    header, *body = rows
    words = {"Layout", "Source", "Kind", "Value", "Layers"}
    kind = ["" if i < text_columns or name in words else "num" for i, name in enumerate(header)]

    def cell(i: int, value: str) -> Html:
        if i == 0:
            return el("th", el("code", value) if code else el("bdi", value), scope="row")
        long = "long" if not kind[i] and len(value) > 24 else kind[i]
        return el(
            "td",
            value if kind[i] else el("bdi", value),
            cls=f"{long} {'strong' if header[i] == strong else ''}".strip() or None,
        )

    top = el("tr", [el("th", name, scope="col", cls=kind[i] or None) for i, name in enumerate(header)])
    lines = [el("tr", [cell(i, value) for i, value in enumerate(row)]) for row in body]
    said = el("caption", el("span", caption))
    grid = el("table", said, el("thead", top), el("tbody", lines), cls="short" if len(header) == 2 else None)
    return el("div", grid, cls="scroll", tabindex=0, role="region", aria_label=caption)


def card(*content: Any) -> Html:
    """A box."""
    return el("div", *content, cls="card")


def result_section(run: dict[str, Any]) -> Html | None:
    """The main metric before and after, beside the baselines, and what it cost."""
    tiles = [
        el("div", el("dt", name), el("dd", value, cls="value"), el("dd", note, cls="note") if note else None)
        for name, value, note in headline(run)
    ]
    name = main_metric(run)
    if name is None:
        return el("dl", tiles, cls="tiles wide") if tiles else None
    before, after = part(run, "metrics", "before").get(name), part(run, "metrics", "after").get(name)
    big = []
    if number(before) is not None:
        big.append(el("span", format_metric(name, before), cls="was"))
    if number(before) is not None and number(after) is not None:
        big.append(join(el("span", " → ", cls="arrow", aria_hidden="true")))
    if number(after) is not None:
        big.append(el("span", format_metric(name, after)))
    drawn = bars(run, name)
    which = "before and after" if len(big) == 3 else "after" if number(after) is not None else "before"
    main = card(
        el("h3", f"{metric_label(run, name)}, {which} training"),
        el("p", big, cls="big"),
        el("p", verdict(run, name), cls="muted"),
        drawn,
    )
    beside = drawn is not None and bool(tiles)
    tiled = el("dl", tiles, cls="tiles" if beside else "tiles wide") if tiles else None
    return el("div", main, tiled, cls="top two" if beside else "top")


def verdict(run: dict[str, Any], name: str) -> str:
    """The change in words, and how the result stands against the best baseline."""
    before, after = part(run, "metrics", "before").get(name), number(part(run, "metrics", "after").get(name))
    change = format_change(name, before, after)
    counted = [sum(map(sum, values)) for values in matrices(run)[1].values()]
    splits = [number(part(run, "data", split).get("rows")) for split in ("test", "eval")]
    rows = next((count for count in (*counted[-1:], *splits) if count), None)
    said = [] if change == MISSING else [change[:1].upper() + change[1:]]
    if rows:
        said.append(
            f"measured on {format_count(rows)} held-out rows"
            if said
            else f"Measured on {format_count(rows)} held-out rows"
        )
    sentence = f"{', '.join(said)}. " if said else ""
    lower = bool(LOWER_IS_BETTER.search(name))
    measured = {key: value for key, column in baselines(run).items() if (value := number(column.get(name))) is not None}
    if after is None or not measured:
        return sentence.strip()
    best = min(measured, key=lambda key: measured[key] * (1 if lower else -1))
    against = format_change(name, measured[best], after)
    if against == "no change":
        return f"{sentence}As good as the best baseline ({label(best)})."
    amount = against.split(" (")[0].lstrip("+\N{MINUS SIGN}")
    place = "better" if against.endswith("(better)") else "worse"
    return f"{sentence}{amount} {place} than the best baseline ({label(best)})."


def bars(run: dict[str, Any], name: str) -> Html | None:
    """The main metric as horizontal bars from 0 to 100 %; None where it is no share or stands alone."""
    columns = {label(key): column for key, column in baselines(run).items()}
    columns |= {"Before": part(run, "metrics", "before"), "After": part(run, "metrics", "after")}
    shown = {key: value for key, column in columns.items() if (value := number(column.get(name))) is not None}
    if len(shown) < 2 or not PERCENT.search(name) or not all(0 <= value <= 1 for value in shown.values()):
        return None
    rows = []
    for key, value in shown.items():
        fill = el("span", el("span", cls="fill", style=f"--w:{value * 100:.2f}%"), cls="track", aria_hidden="true")
        cells = [el("th", key, scope="row"), el("td", fill), el("td", format_metric(name, value), cls="num")]
        rows.append(el("tr", cells, cls="after" if key == "After" else None))
    caption = el("caption", f"{metric_label(run, name)}, axis from 0 to 100 %")
    return el("table", caption, el("tbody", rows), cls="bars")


def by_step(lines: list[dict[str, Any]], key: str) -> list[tuple[float, float | None]]:
    """(step, value) of the lines that log `key`; of a step logged twice (a resumed run) the later line counts."""
    found: dict[float, float | None] = {}
    for line in lines:
        step, value = number(line.get("step")), number(line.get(key))
        if step is not None and key in line:
            found[step] = value if value is not None and abs(value) < DRAWABLE else None
    return sorted(found.items())


def curves_section(lines: list[dict[str, Any]]) -> Html | None:
    """Train and eval loss, the learning rate, and the evaluations as a table."""
    train, held_out, rate = (by_step(lines, key) for key in ("loss", "eval_loss", "learning_rate"))
    said = []
    for name, points in (("Train loss", train), ("Eval loss", held_out)):
        measured = [(x, y) for x, y in points if y is not None]
        if measured:
            (x0, y0), (x1, y1), (x, low) = measured[0], measured[-1], min(measured, key=lambda point: point[1])
            said.append(
                f"{name} {format_metric('loss', y0)} at step {x0:,.0f}, {format_metric('loss', y1)} at step {x1:,.0f}, "
                f"lowest {format_metric('loss', low)} at step {x:,.0f}."
            )
    figures = []
    loss = line_chart(
        [Series("train loss", train), Series("eval loss", held_out, dashed=True)],
        x_label="step",
        y_label="loss (nats)",
        summary=f"Line chart of the loss by step. {' '.join(said)}",
    )
    if loss:
        figures.append(card(el("figure", loss, el("figcaption", " ".join(said)))))
    rates = [y for _, y in rate if y is not None]
    peak = f"Learning rate peaks at {max(rates):.3g}, ends at {rates[-1]:.3g}." if rates else ""
    drawn = line_chart(
        [Series("learning rate", rate)],
        x_label="step",
        y_label="learning rate",
        summary=f"Line chart of the learning rate by step. {peak}",
        from_zero=True,
    )
    if drawn:
        figures.append(card(el("figure", drawn, el("figcaption", peak))))
    if not figures:
        return None
    return join(el("div", figures, cls="grid"), evaluations(lines))


def evaluations(lines: list[dict[str, Any]]) -> Html | None:
    """The evaluations during training as a folded table."""
    found = [line for line in lines if any(key.startswith("eval_") for key in line)]
    keys = list(
        dict.fromkeys(
            key for line in found for key in line if key.startswith("eval_") and number(line[key]) is not None
        )
    )
    if not keys:
        return None
    rows = [["Step", *(label(key.removeprefix("eval_")) for key in keys)]]
    for line in found:
        values = [evaluation_value(key, line.get(key)) for key in keys]
        rows.append([format_count(line.get("step")), *values])
    return folded(
        f"Evaluations during training ({len(found)})", table(rows, "Measured on the held-out evaluation split")
    )


def evaluation_value(key: str, value: Any) -> str:
    """A value of an evaluation line: transformers adds runtimes and rates to the metrics."""
    if key.endswith("runtime"):
        return format_seconds(value)
    return format_count(value) if key.endswith("per_second") else format_metric(key, value)


def folded(title: str, *content: Any) -> Html:
    """Content behind a line to click."""
    return el("details", el("summary", title), el("div", *content, cls="inside"))


def metrics_section(run: dict[str, Any]) -> Html | None:
    """Every metric before and after, beside the baselines."""
    rows = metrics_table(run)
    if not rows:
        return None
    names = ordered_metrics(run)
    lower = [metric_label(run, name).lower() for name in names if LOWER_IS_BETTER.search(name)]
    note = f"Lower is better for {' and '.join(lower)}; higher is better for the rest."
    if len(lower) in (0, len(names)):
        note = f"{'Lower' if lower else 'Higher'} is better."
    return card(table(rows, f"Metrics on held-out rows. {note}", strong="After"))


def ranks_section(run: dict[str, Any]) -> Html | None:
    """The ranks of all sites as a picture, where they differ."""
    figures = ranks_figures(run)
    return card(el("div", figures, cls="grid"), el("p", ranks_caption(run), cls="muted")) if figures else None


def sites_section(run: dict[str, Any]) -> Html | None:
    """The adapted projections by kind, and each site folded away."""
    rows = sites_table(run)
    if not rows:
        return None
    count = len(site_list(run))
    caption = f"{format_count(count)} adapted site{'s' if count != 1 else ''}, one row for each kind"
    every = folded(
        f"All {format_count(count)} sites", table(sites_table(run, every=True), "Each adapted site", code=True)
    )
    return join(card(table(rows, caption, code=True)), every)


def cost_section(run: dict[str, Any]) -> Html | None:
    """Times, throughput, memory and size."""
    rows = cost_table(run)
    return card(table(rows, "Measured in this run")) if rows else None


def privacy_section(run: dict[str, Any]) -> Html | None:
    """What a differentially private run promises, and by which mechanism."""
    found = part(run, "privacy")
    if not found:
        return None
    rows = [
        ["Statement", plain(found.get("statement"))],
        *(
            [label(key), format_short(found[key])]
            for key in ("noise_multiplier", "max_grad_norm", "sampling_rate", "steps", "delta", "target_epsilon")
            if number(found.get(key)) is not None
        ),
    ]
    note = (
        "No loss on training rows is shown, and no baseline made from them. Figures on held-out rows, and counts of "
        "rows, are exact: the statement is about training rows."
    )
    return card(
        table([["Item", "Value"], *rows], "Differential privacy of the training rows"), el("p", note, cls="muted")
    )


def data_section(run: dict[str, Any]) -> Html | None:
    """The splits with their counts."""
    rows = data_table(run)
    caption = "Rows and tokens of each split; truncated, dropped, empty and bad count rows"
    return card(table(rows, caption)) if rows else None


def setup_section(found: RunFolder) -> Html | None:
    """The resolved configuration, and what it ran on."""
    run = found.run
    model, device, method = part(run, "model"), part(run, "device"), part(run, "method")
    rows = [
        [f"Model: {label(key).lower()}", format_count(value) if number(value) is not None else plain(value)]
        for key, value in model.items()
        if key not in ("weights_bytes", "four_bit_parameters", "four_bit_bits")
    ]
    for name, key, write in (
        ("Trainable parameters", "trainable_parameters", format_count),
        ("Parameters with the adapter", "total_parameters", format_count),
        ("Trainable share", "share", format_share),
        ("Adapter size", "adapter_bytes", format_bytes),
    ):
        if number(method.get(key)) is not None:
            rows.append([name, write(method[key])])
    rows += [[f"Method: {key}", plain(value)] for key, value in part(method, "config").items()]
    rows += [[f"Device: {label(key).lower()}", plain(value)] for key, value in device.items()]
    rows += [
        [f"Version: {key}", plain(value)]
        for key, value in ({"deltaw": run.get("deltaw")} | part(run, "versions")).items()
    ]
    rows += [[label(key), plain(run.get(key))] for key in ("commit", "seed")]
    rows += [
        [f"Data: SHA-256 of {split}", plain(part(run, "data", split).get("sha256"))] for split in part(run, "data")
    ]
    rows = [row for row in rows if row[1] != MISSING]
    boxes = []
    if found.config.strip():
        code = el(
            "pre", el("code", found.config.rstrip(), cls="user", dir="auto"), tabindex=0, aria_label="config.yaml"
        )
        boxes.append(folded("config.yaml", code))
    if rows:
        boxes.append(
            folded("Model, method, device and versions", table([["Item", "Value"], *rows], "Recorded in run.json"))
        )
    return join(boxes) if boxes else None


def reproduce_section(found: RunFolder) -> Html | None:
    """The command that started this run, and the one that repeats it from its resolved configuration."""
    run = found.run
    parts: list[Html] = []
    if isinstance(run.get("command"), str) and run["command"].strip():
        parts += [el("p", "This run was started with:"), command(run["command"])]
    if found.config.strip():
        folder = PurePosixPath(found.output)
        config, output = shlex.quote(str(folder / "config.yaml")), shlex.quote(f"{folder}-again")
        seed = f"The seed is {plain(run['seed'])}. " if number(run.get("seed")) is not None else ""
        needed = [f"{name} {part(run, 'versions')[name]}" for name in ("torch",) if part(run, "versions").get(name)]
        with_ = " and ".join([f"deltaw {run['deltaw']}" if run.get("deltaw") else "the same deltaw", *needed])
        note = f"config.yaml is fully resolved. {seed}Another device or thread count may change the last digits."
        parts += [
            el("p", f"The same again with {with_}, from where it was started:"),
            command(f"deltaw train --config {config} --output {output}"),
            el("p", note, cls="muted"),
        ]
    return join(parts) if parts else None


def command(line: str) -> Html:
    """A line to copy into a terminal."""
    return el("pre", el("code", line.strip()), cls="command", tabindex=0, aria_label="Command")


def footer(found: RunFolder) -> Html:
    """Who wrote the page, and what could not be read."""
    by = f"Written by deltaw {plain(found.run['deltaw'])}." if found.run.get("deltaw") else "Written by deltaw."
    return el("footer", el("p", by), [el("p", note) for note in found.notes])
