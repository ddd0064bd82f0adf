"""A federation's numbers, out of run.json and rounds.jsonl: series over the rounds, tables of strings, sentences."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from deltaw.report.federation_charts import MOST_LETTERS
from deltaw.report.folder import RunFolder
from deltaw.report.page import DRAWABLE
from deltaw.report.tables import (
    LOWER_IS_BETTER,
    MISSING,
    Table,
    format_bytes,
    format_change,
    format_count,
    format_metric,
    format_seconds,
    format_share,
    label,
    main_metric,
    metric_label,
    number,
    part,
    plain,
    without_empty_columns,
)

ROUNDS = "rounds.jsonl"
#: Of so many silos each has a colour of its own; of more, so many of the best and of the worst.
MOST_COLOURED, EXTREMES = 8, 3
#: Tables of more silos are folded.
MANY = 12
#: A table over the rounds has at most so many columns.
MOST_COLUMNS = 12
STATUS = {"late": "Late", "crashed": "Crashed", "refused": "Refused", "absent": "Not there"}
RULES = {
    "fedavg-ab": "Weighted means of A and of B. The product of the means is not the mean of the products.",
    "product": "The weighted mean of the products B A, exact, kept as stacked factors.",
    "fedex": "Means of A and of B, and the residual that makes their product the mean of the products.",
    "ffa": "A is the same everywhere and frozen; the mean of B is then exact.",
    "rolora": "A and B are trained and averaged in turn, which is exact in every round.",
    "sketch": "Two linear sums give the top of the mean product, so it works where only sums are seen.",
    "trimmed-mean": "Value by value, the mean without the largest and the smallest.",
    "median": "Value by value, the median.",
    "norm-bound": "The weighted mean of the updates, each shortened to a bound.",
    "multi-krum": "The mean of those updates that lie closest to each other.",
}
FACTS = {
    "product_error": "how far the product of the averaged factors is from the mean of the silos' products, "
    "as a share of the latter's Frobenius norm; 0 is exact",
    "truncation_error": "what was cut off when the aggregate was brought down to its rank, as a share of its "
    "Frobenius norm; 0 means that nothing was",
    "sketch_error": "what the sketch's columns miss of the mean product, as a share of its Frobenius norm",
    "sketch_exact": "1 where the sketch has columns enough to miss nothing",
    "carried_rank": "the largest rank of the updates that stand beside the adapter",
    "bound": "the norm to which updates were shortened",
    "clipped": "how many updates were shortened",
    "left_out": "how many updates, or values of each number, were left out",
}
#: What a value of an upload takes, in bits, before scales and the message's header.
BITS = {"bfloat16": 16, "int8": 8, "nf4": 4}

Points = list[tuple[float, float | None]]


@dataclass(frozen=True)
class Federation:
    """What the page shows.

    Attributes:
        found: the folder's contents; its run's metrics are completed from the rounds.
        rounds: the lines of rounds.jsonl by their number, round 0 (before training) first where it is there.
        silos: the silos' names.
        main: the metric that stands for the federation.
    """

    found: RunFolder
    rounds: list[dict[str, Any]]
    silos: list[str]
    main: str | None

    @property
    def run(self) -> dict[str, Any]:
        """run.json."""
        return self.found.run

    @property
    def settings(self) -> dict[str, Any]:
        """run.json's `federation`."""
        return part(self.run, "federation")

    @property
    def secure(self) -> bool:
        """Whether the server saw sums only."""
        return self.settings.get("secure") is True

    @property
    def trained(self) -> list[dict[str, Any]]:
        """The rounds that trained: all but round 0."""
        return [line for line in self.rounds if line["round"] > 0]

    @property
    def name(self) -> str:
        """The main metric's name as a person would write it."""
        return metric_label(self.run, self.main or "")


def view(found: RunFolder, lines: Sequence[dict[str, Any]]) -> Federation:
    """The federation of a folder; of a round logged twice (a resumed server) the later line counts."""
    by_number: dict[int, dict[str, Any]] = {}
    for line in lines:
        index = number(line.get("round"))
        if index is not None and index >= 0:
            by_number[int(index)] = line | {"round": int(index)}
    rounds = [by_number[index] for index in sorted(by_number)]
    metrics = part(found.run, "metrics")
    of_rounds = [(line["round"], part(line, "metrics")) for line in rounds if part(line, "metrics")]
    before = part(metrics, "before") or next((value for index, value in of_rounds if index == 0), {})
    after = part(metrics, "after") or next((value for index, value in reversed(of_rounds) if index > 0), {})
    run = found.run | {"metrics": metrics | {"before": before, "after": after}}
    # Where the silos' labels are skewed, accuracy says little.
    main = next((name for name in ("macro_auroc",) if number((after or before).get(name)) is not None), None)
    main = main or main_metric(run)
    names = [part(run, "federation", "clients"), part(metrics, "silos"), *(part(line, "silos") for line in rounds)]
    silos = list(dict.fromkeys(name for group in names for name in group))
    made = Federation(RunFolder(**vars(found) | {"run": run}), rounds, silos, main)
    if (alone := best_alone(made)) is not None:
        found_alone = part(metrics, "silos", alone, "alone")
        baselines = part(metrics, "baselines") | {"best_single_silo": found_alone}
        run["metrics"] = run["metrics"] | {"baselines": baselines}
    return made


def better(name: str | None) -> int:
    """1 where more of a metric is better, -1 where less is."""
    return -1 if name and LOWER_IS_BETTER.search(name) else 1


def best_alone(fed: Federation) -> str | None:
    """The silo whose adapter, trained by itself (`alone`), does best; None where no silo trained by itself."""
    value = {
        silo: found
        for silo in fed.silos
        if (found := number(part(fed.run, "metrics", "silos", silo, "alone").get(fed.main or ""))) is not None
    }
    return max(value, key=lambda silo: better(fed.main) * value[silo]) if value else None


def entries(fed: Federation) -> Iterator[tuple[int, str, dict[str, Any], str]]:
    """(round, silo, what the round's line has of it, its status) of every silo in every round of training."""
    for line in fed.trained:
        for silo, entry in part(line, "silos").items():
            if isinstance(entry, dict):
                # Without a status the silo was there and was not asked for an update.
                yield line["round"], silo, entry, str(entry.get("status", "absent"))


def by_round(fed: Federation, *keys: str) -> Points:
    """(round, value) of the rounds in which the value at `keys` was measured."""
    *path, last = keys
    found = [(float(line["round"]), drawable(part(line, *path).get(last))) for line in fed.rounds]
    return [(x, y) for x, y in found if y is not None]


def by_silo(fed: Federation, *keys: str) -> dict[str, Points]:
    """By silo (round, value), None where others were measured in that round and it was not."""
    *path, last = keys
    found: dict[str, Points] = {silo: [] for silo in fed.silos}
    for line in fed.rounds:
        values = {silo: drawable(part(line, "silos", silo, *path).get(last)) for silo in fed.silos}
        if any(value is not None for value in values.values()):
            for silo, value in values.items():
                found[silo].append((float(line["round"]), value))
    return {silo: points for silo, points in found.items() if any(y is not None for _, y in points)}


def drawable(value: Any) -> float | None:
    """A number that an axis can take."""
    found = number(value)
    return found if found is not None and abs(found) < DRAWABLE else None


def last(points: Points) -> float | None:
    """The last measured value."""
    return next((y for _, y in reversed(points) if y is not None), None)


def medians(found: dict[str, Points]) -> Points:
    """(round, the median of the silos' measured values)."""
    by_number: dict[float, list[float]] = {}
    for points in found.values():
        for x, y in points:
            if y is not None:
                by_number.setdefault(x, []).append(y)
    return [(x, statistics.median(values)) for x, values in sorted(by_number.items())]


def final(fed: Federation) -> dict[str, float]:
    """The main metric at the end on each silo's own rows, best first."""
    if fed.main is None:
        return {}
    found = {silo: last(points) for silo, points in by_silo(fed, "metrics", fed.main).items()}
    for silo in fed.silos:
        recorded = number(part(fed.run, "metrics", "silos", silo, "after").get(fed.main))
        found[silo] = found.get(silo) if recorded is None else recorded
    measured = {silo: value for silo, value in found.items() if value is not None}
    return dict(sorted(measured.items(), key=lambda item: -better(fed.main) * item[1]))


def coloured(fed: Federation) -> list[str]:
    """The silos with a colour: all where they are few, else the best and the worst at the end.

    Where no silo measured quality: those whose updates agree least with the others'.
    """
    if len(fed.silos) <= MOST_COLOURED:
        return fed.silos
    if len(ranked := list(final(fed))) >= 2 * EXTREMES:
        return ranked[:EXTREMES] + ranked[-EXTREMES:]
    cosine = {silo: last(points) or 0.0 for silo, points in by_silo(fed, "cosine").items()}
    return [*sorted(cosine, key=lambda silo: cosine[silo]), *fed.silos][: 2 * EXTREMES]


def rounds_table(fed: Federation) -> Table:
    """One row a round: quality, drift, the rule's facts, bytes, time, attempts, how many updates were taken in."""
    facts = fact_names(fed)
    table = [["Round", fed.name or "Metric", "Drift", *map(label, facts), "Up", "Down", "Time", "Attempts", "Taken in"]]
    for line in fed.rounds:
        states = [status for index, _, _, status in entries(fed) if index == line["round"]]
        table.append(
            [
                format_count(line["round"]),
                format_metric(fed.main or "", part(line, "metrics").get(fed.main or "")),
                short(line.get("drift")),
                *(short(part(line, "facts").get(name)) for name in facts),
                format_bytes(line.get("bytes_up")),
                format_bytes(line.get("bytes_down")),
                format_seconds(line.get("seconds")),
                format_count(line.get("attempts")),
                f"{states.count('ok')} of {len(states) - states.count('absent')}" if states else MISSING,
            ]
        )
    return without_empty_columns(table)


def brief(silo: str) -> str:
    """A silo's name for a sentence or a legend; tables have it whole."""
    return silo if len(silo) <= MOST_LETTERS else f"{silo[: MOST_LETTERS - 1]}…"


def short(value: Any) -> str:
    """A number in three digits."""
    found = number(value)
    return MISSING if found is None else f"{found:.3g}".replace("-", "\N{MINUS SIGN}").replace("e\N{MINUS SIGN}0", "e−")


def over_rounds(found: dict[str, Points], write: Any = short) -> Table:
    """One row a silo, one column a round; of many rounds a few at equal distances, the last one among them."""
    numbers = sorted({x for points in found.values() for x, _ in points})
    if not numbers:
        return []
    count = min(MOST_COLUMNS, len(numbers))
    chosen = sorted({numbers[round(i * (len(numbers) - 1) / max(1, count - 1))] for i in range(count)})
    table = [["Silo", *(f"Round {x:,.0f}" for x in chosen)]]
    return table + [[silo, *(write(dict(points).get(x)) for x in chosen)] for silo, points in found.items()]


def fact_names(fed: Federation) -> list[str]:
    """The names of what the rule said of its rounds, in numbers; not what it said of single uploads."""
    said = ((key, value) for line in fed.trained for key, value in part(line, "facts").items())
    return list(dict.fromkeys(key for key, value in said if ":" not in key and number(value) is not None))


def uploads_facts(fed: Federation) -> dict[str, Counter[str]]:
    """What the rule did to single uploads (`clipped:3`): by fact, in how many rounds to which one."""
    found: dict[str, Counter[str]] = {}
    for line in fed.trained:
        for key, value in part(line, "facts").items():
            fact, _, upload = key.partition(":")
            if upload and number(value):
                found.setdefault(fact, Counter())[f"upload {upload}" if upload.isdecimal() else upload] += 1
    return found


def quality_table(fed: Federation) -> Table:
    """One row a silo: the main metric before and after on its own rows, and of its adapter trained by itself."""
    if fed.main is None:
        return []
    table = [["Silo", "Before", "After", "Change", "Trained alone, shared test set"]]
    ends = final(fed)
    starts = {
        silo: next((y for x, y in points if x == 0), None) for silo, points in by_silo(fed, "metrics", fed.main).items()
    }
    for silo in fed.silos:
        found = part(fed.run, "metrics", "silos", silo)
        before = part(found, "before").get(fed.main, starts.get(silo))
        values = [format_metric(fed.main, value) for value in (before, ends.get(silo))]
        alone = format_metric(fed.main, part(found, "alone").get(fed.main))
        table.append([silo, *values, format_change(fed.main, before, ends.get(silo)), alone])
    return without_empty_columns(table)


def silos_table(fed: Federation) -> Table:
    """One row a silo: examples, weight, base, rounds taken part in, what failed, bytes up, time a round."""
    clients = part(fed.settings, "clients")
    examples = {silo: number(part(clients, silo).get("examples")) for silo in fed.silos}
    total = sum(value or 0 for value in examples.values())
    equal = fed.settings.get("weighting") == "equal"
    done: dict[str, list[dict[str, Any]]] = {silo: [] for silo in fed.silos}
    lost = dict.fromkeys(fed.silos, 0)
    for _, silo, entry, status in entries(fed):
        if status == "ok":
            done[silo].append(entry)
        elif status != "absent":
            lost[silo] += 1
    table = [["Silo", "Examples", "Weight", "Base", "Rounds", "Left out", "Up", "Down", "Time a round"]]
    for silo in fed.silos:
        weight = 1 / len(fed.silos) if equal else (examples[silo] or 0) / total if total else None
        times = [value for entry in done[silo] if (value := number(entry.get("seconds"))) is not None]
        table.append(
            [
                silo,
                format_count(examples[silo]),
                format_share(weight),
                plain(part(clients, silo).get("base")).removeprefix("sha256:")[:12],
                f"{len(done[silo])} of {len(fed.trained)}" if fed.trained else MISSING,
                format_count(lost[silo]) if fed.trained else MISSING,
                format_bytes(sent(fed, silo)),
                format_bytes(sent(fed, silo, "bytes_down")),
                format_seconds(sum(times) / len(times)) if times else MISSING,
            ]
        )
    return without_empty_columns(table)


def left_out_table(fed: Federation) -> Table:
    """One row an update that was not taken in, or an attempt at a round, with the reason; not silos not asked."""
    rows = [
        (index, silo, STATUS.get(status, status), plain(entry.get("reason")))
        for index, silo, entry, status in entries(fed)
        if status != "ok" and (status != "absent" or entry.get("reason"))
    ]
    for line in fed.trained:
        failed = line.get("failed_attempts")
        for reason in failed if isinstance(failed, list) else []:
            rows.append((line["round"], "all", "Attempt given up", plain(reason)))
    rows.sort(key=lambda row: row[0])
    return [["Round", "Silo", "What", "Reason"], *([format_count(row[0]), *row[1:]] for row in rows)] if rows else []


def sent(fed: Federation, silo: str, key: str = "bytes_up") -> float | None:
    """The bytes of a silo over all rounds."""
    found = [value for line in fed.rounds if (value := number(part(line, "silos", silo).get(key))) is not None]
    return sum(found) if found else None


def total(fed: Federation, key: str) -> float | None:
    """The bytes of all rounds: run.json's number, else the rounds' sum."""
    recorded = number(part(fed.run, "cost").get(key))
    if recorded is not None:
        return recorded
    found = [value for line in fed.rounds if (value := number(line.get(key))) is not None]
    return sum(found) if found else None


def saving(fed: Federation) -> str:
    """What compression saved, in a sentence."""
    kind = plain(fed.settings.get("compression"))
    up, bare = total(fed, "bytes_up"), total(fed, "bytes_up_float32")
    if fed.secure:
        return "Under secure aggregation every value travels as a masked 32-bit word, which cannot be compressed."
    if kind in ("none", MISSING):
        return "Uploads were not compressed." if kind == "none" else ""
    if up is not None and bare:
        return (
            f"Uploads were compressed ({kind}): {format_bytes(up)} where float32 takes {format_bytes(bare)}, "
            f"{format_share(1 - up / bare)} saved."
        )
    if kind in BITS:
        return (
            f"Uploads were compressed ({kind}): {BITS[kind]} bits a value in place of 32, and what scales and headers "
            "take. What they would have taken uncompressed was not recorded."
        )
    return f"Uploads were compressed ({kind}). What they would have taken uncompressed was not recorded."
