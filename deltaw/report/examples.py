"""The parts of the page that show answers: the confusion matrices and the held-out examples."""

from __future__ import annotations

from typing import Any

from deltaw.report.markup import Html, el, join
from deltaw.report.tables import MISSING, PERCENT, format_count, format_share, number, ordered_metrics, part, plain

MOST_LABELS = 20
MOST_CONFUSIONS = 20
MOST_EXAMPLES = 10
MOST_CHARACTERS = 4000
WHEN = ("before", "after")


def matrices(run: dict[str, Any]) -> tuple[list[str], dict[str, list[list[float]]]]:
    """The labels, and the well-formed confusion matrices before and after (rows true, columns predicted)."""
    found: dict[str, list[list[float]]] = {}
    named = part(run, "metrics").get("labels")
    labels = [plain(name) for name in named] if isinstance(named, list) else []
    for when in WHEN:
        rows = part(run, "metrics", "confusion").get(when)
        if not isinstance(rows, list) or not rows or not all(isinstance(row, list) for row in rows):
            continue
        values = [[number(value) or 0.0 for value in row] for row in rows]
        labels = labels or [str(i) for i in range(len(values))]
        if len(values) == len(labels) and all(len(row) == len(labels) for row in values):
            found[when] = values
    return labels, found


def confusion_section(run: dict[str, Any]) -> Html | None:
    """Both matrices side by side; with many labels, the most frequent confusions instead."""
    labels, found = matrices(run)
    if not found:
        return None
    if len(labels) > MOST_LABELS:
        return frequent_confusions(labels, found)
    boxes = [el("div", confusion_table(labels, values, when), cls="card") for when, values in found.items()]
    note = "Rows are true labels, columns predicted ones. Shading is the share of the row; outlined cells are right."
    return join(el("p", note, cls="muted"), el("div", boxes, cls="grid"))


def confusion_table(labels: list[str], values: list[list[float]], when: str) -> Html:
    """One matrix with shaded counts and, at the right, the share of each row that is right."""
    title = f"{when.capitalize()} training"
    top = el(
        "thead",
        el("tr", el("td"), el("th", "predicted", cls="axis", scope="colgroup", colspan=len(labels)), el("td")),
        el(
            "tr",
            el("th", "true", cls="axis", scope="col"),
            [el("th", el("bdi", name), scope="col") for name in labels],
            el("th", "recall", cls="axis", scope="col"),
        ),
    )
    lines = []
    for i, row in enumerate(values):
        total = sum(row)
        cells = []
        for j, count in enumerate(row):
            share = count / total if total else 0.0
            tip = f"true {labels[i]}, predicted {labels[j]}: {format_count(count)} ({format_share(share)} of the row)"
            kind = "cell hit" if i == j else "cell"
            cells.append(
                el("td", format_count(count), cls=kind, style=f"--a:{min(max(share, 0.0), 1.0):.3f}", title=tip)
            )
        recall = format_share(row[i] / total) if total else MISSING
        lines.append(el("tr", el("th", el("bdi", labels[i]), scope="row"), cells, el("td", recall, cls="recall")))
    grid = el("table", el("caption", title), top, el("tbody", lines), cls="confusion")
    return el("div", grid, cls="scroll", tabindex=0, role="region", aria_label=f"Confusion matrix, {title.lower()}")


def frequent_confusions(labels: list[str], found: dict[str, list[list[float]]]) -> Html:
    """The pairs of labels that are most often confused, for sets of labels that are too large for a matrix."""
    last = list(found.values())[-1]
    pairs = [(last[i][j], i, j) for i in range(len(labels)) for j in range(len(labels)) if i != j and last[i][j]]
    top = sorted(pairs, key=lambda pair: (-pair[0], pair[1], pair[2]))[:MOST_CONFUSIONS]
    if not top:
        return el("p", f"No row of the {len(labels)} labels was predicted wrong {list(found)[-1]} training.")
    header = [el("th", name, scope="col") for name in ("True", "Predicted")]
    header += [el("th", when.capitalize(), scope="col", cls="num") for when in found]
    lines = [
        el(
            "tr",
            el("th", el("bdi", labels[i]), scope="row"),
            el("td", el("bdi", labels[j])),
            [el("td", format_count(values[i][j]), cls="num") for values in found.values()],
        )
        for _, i, j in top
    ]
    caption = f"The most frequent confusions of {len(labels)} labels, in rows (run.json holds the whole matrix)"
    grid = el("table", el("caption", el("span", caption)), el("thead", el("tr", header)), el("tbody", lines))
    return el("div", el("div", grid, cls="scroll", tabindex=0, role="region", aria_label=caption), cls="card")


def same_answer(answer: Any, reference: Any) -> bool:
    """Whether an answer is the reference, case and white space aside, as `exact_match` counts it."""
    if isinstance(answer, str) and isinstance(reference, str):
        return answer.casefold().split() == reference.casefold().split()
    return bool(answer == reference)


def shortened(value: Any) -> str:
    """A user's text, cut where it is very long, saying so."""
    written = plain(value)
    if len(written) <= MOST_CHARACTERS:
        return written
    return f"{written[:MOST_CHARACTERS]}… ({format_count(len(written) - MOST_CHARACTERS)} more characters)"


def examples_section(run: dict[str, Any], examples: list[dict[str, Any]]) -> Html | None:
    """Up to ten held-out rows with the reference and the answers before and after."""
    shown = examples[:MOST_EXAMPLES]
    if not shown:
        return None
    # Where only the loss was measured, a free continuation is not right or wrong.
    marked = any(PERCENT.search(name) for name in ordered_metrics(run))
    counts = []
    for when in WHEN if marked else ():
        answered = [row for row in shown if row.get(when) is not None and row.get("reference") is not None]
        if answered:
            right = sum(same_answer(row[when], row["reference"]) for row in answered)
            counts.append(f"{right} of {len(answered)} right {when} training")
    note = el("p", f"{', '.join(counts)}.", cls="muted") if counts else None
    return join(note, el("ol", [example(row, marked) for row in shown], cls="examples"))


def example(row: dict[str, Any], marked: bool) -> Html:
    """One held-out row: its prompt, and beside it the reference and the answers."""
    answers = []
    for key in ("reference", *WHEN):
        if row.get(key) is None:
            continue
        mark = None
        if marked and key != "reference" and row.get("reference") is not None:
            right = same_answer(row[key], row["reference"])
            mark = el("span", "✓ right" if right else "✗ wrong", cls=f"mark {'right' if right else 'wrong'}")
        written = el("span", shortened(row[key]), cls="user", dir="auto")
        answers.append(
            join(
                el("dt", key.capitalize()), el("dd", mark, written, tabindex=0 if len(plain(row[key])) > 300 else None)
            )
        )
    prompt = shortened(row.get("prompt"))
    box = el("div", prompt, cls="user prompt", dir="auto", tabindex=0 if len(prompt) > 300 else None)
    return el("li", box, el("dl", answers, cls="answers"), cls="card example")
