"""Three banks' payment logs as text, made from a seed: data for learning together what no bank sees alone.

A row is what an analyst gets when an alert is raised: the last few events of one account, the payment to be judged at
the end, and a label. So fraud is half of the rows, not one payment in thousands. Each bank writes in its own way
(currency, wording, marks) and mostly gets alerts about its own kinds of fraud, half of them false: three quarters of
its legitimate rows are honest behaviour that looks like one of these kinds, a quarter is everyday business. Logs of all
labels hold events of other kinds besides. What tells fraud from what looks like it is the order of events, the time
between them, and how amounts and accounts compare (`deltaw.data.fraud_scenes`).

The knobs of `write_fraud`, with their defaults, and what each stands for:

- `rows_per_bank` (800): the alerts that a bank has had judged. All banks are given the same number, which real ones
  are not.
- `test_rows` (600): over all kinds and all banks' ways of writing, half of them legitimate, no label noise, customers
  who are in no bank's rows.
- `overlap` (0.15): the share of a bank's alerts, true and false, that is spread evenly over all five kinds; the rest is
  about its own kinds (`OWN_KINDS`). 0: its own only. 1: all banks alike. Stands for banks' different business; how
  fraudsters move on from a bank that has learnt is not modelled.
- `label_noise` (0.05): the share of training rows whose label is wrong: of wrong labels of fraud seven in ten say
  "legitimate" (nobody complained), the others another kind; legitimate rows get a kind, as often as the bank sees it.
  Mistakes are independent of the row, where real ones cluster on the hard cases.
- `drift` (0.5): how far wordings, shops, devices and the margins of structuring have their season: 0: drawn evenly at
  all times, 1: by the season alone. Training rows lie in the first four fifths of the time, test rows in the last two
  fifths. Trends are smooth; sudden new methods are not modelled.
- `shared_customers` (0.1): the share of a bank's customers who are at one of the other banks too, with the same names
  and payees at both. That banks could tell they share a customer is not modelled: `customer` is there for the
  accounting of privacy by customer.
"""

from __future__ import annotations

import json
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from deltaw.core.errors import InputError
from deltaw.core.files import write_text
from deltaw.core.generators import derived_seed
from deltaw.data import fraud_words as words
from deltaw.data.fraud_scenes import FRAUDS, Customer, Log, aside, everyday, new_account, new_person, new_supplier

LEGITIMATE = "legitimate"
LABELS = (LEGITIMATE, *FRAUDS)
"""Every label, the legitimate one first."""

OWN_KINDS = {
    "bank-a": ("card_not_present_burst", "account_takeover"),
    "bank-b": ("mule_account", "structuring"),
    "bank-c": ("invoice_redirection",),
}
"""A bank to the kinds of fraud that it mostly sees: one of card holders, one of branches, one of firms."""

BANKS = tuple(OWN_KINDS)
BUSINESSES = {"bank-a": 0.15, "bank-b": 0.35, "bank-c": 0.75}
"""A bank to the share of firms among its customers."""

_TRAINING_ENDS, _TEST_BEGINS = 0.8, 0.6
_ROWS_PER_CUSTOMER = 4
_LOOK_ALIKE = 0.75
_ASIDE = 0.7
_UNDETECTED = 0.7
# At most 96 word pieces of an uncased BERT, measured: 0.41 a character where there are most digits and marks.
_MAX_CHARACTERS = 230
_MAX_EVENTS = 6


class FraudRow(TypedDict):
    """One alert.

    Attributes:
        text: the log.
        label: one of `LABELS`.
        customer: a name, the same at all banks where the customer is.
        bank: whose writing it is.
        period: when it was: 0 at the first training row, 1 at the last test row.
    """

    text: str
    label: str
    customer: str
    bank: str
    period: float


def fraud_rows(
    *,
    seed: int,
    rows_per_bank: int = 800,
    test_rows: int = 600,
    overlap: float = 0.15,
    label_noise: float = 0.05,
    drift: float = 0.5,
    shared_customers: float = 0.1,
) -> dict[str, list[FraudRow]]:
    """The rows of each bank, in the order of time, and of the shared test set under "test".

    The same seed and knobs give the same rows; `label_noise` changes labels only.

    Raises:
        InputError: a share outside [0, 1] (label noise: [0, 1)), fewer than 1 row.
    """
    shares = {"overlap": overlap, "label_noise": label_noise, "drift": drift, "shared_customers": shared_customers}
    _check({"rows_per_bank": rows_per_bank, "test_rows": test_rows}, shares)
    crowds = _crowds(seed, max(1, rows_per_bank // _ROWS_PER_CUSTOMER), shared_customers)
    seen: set[str] = set()
    made: dict[str, list[FraudRow]] = {}
    for bank in BANKS:
        rng = _stream(seed, "rows", bank)
        labels = _labels(rng, rows_per_bank, mixture(bank, overlap))
        source = _Source(drift, mixture(bank, overlap), seen)
        rows = [
            source.row(rng, label, bank, rng.choice(crowds[bank]), index * _TRAINING_ENDS / rows_per_bank)
            for index, label in enumerate(labels)
        ]
        _mislabel(rows, label_noise, _stream(seed, "noise", bank), mixture(bank, overlap))
        made[bank] = rows
    made["test"] = _test_rows(seed, test_rows, drift, seen)
    return made


def write_fraud(
    folder: str | os.PathLike[str],
    *,
    seed: int,
    rows_per_bank: int = 800,
    test_rows: int = 600,
    overlap: float = 0.15,
    label_noise: float = 0.05,
    drift: float = 0.5,
    shared_customers: float = 0.1,
) -> dict[str, Path]:
    """Writes `bank-a.jsonl`, `bank-b.jsonl`, `bank-c.jsonl` and `test.jsonl` with the fields of `FraudRow`.

    Returns:
        A bank's name, or "test", to its file.

    Raises:
        InputError, RunError: as `fraud_rows`, or one line for a place that cannot be written to.
    """
    rows = fraud_rows(
        seed=seed,
        rows_per_bank=rows_per_bank,
        test_rows=test_rows,
        overlap=overlap,
        label_noise=label_noise,
        drift=drift,
        shared_customers=shared_customers,
    )
    paths = {}
    for name, part in rows.items():
        paths[name] = Path(folder) / f"{name}.jsonl"
        write_text(paths[name], "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part))
    return paths


def mixture(bank: str, overlap: float) -> dict[str, float]:
    """The probability of each kind among a bank's fraud."""
    own = OWN_KINDS[bank]
    return {kind: (kind in own) * (1 - overlap) / len(own) + overlap / len(FRAUDS) for kind in FRAUDS}


def _check(counts: dict[str, int], shares: dict[str, float]) -> None:
    problems = [
        f"{name} is {value!r}: expected a whole number of at least 1"
        for name, value in counts.items()
        if isinstance(value, bool) or not isinstance(value, int) or value < 1
    ]
    problems += [
        f"{name} is {value!r}: expected a share from 0 to 1"
        for name, value in shares.items()
        if not 0 <= value <= 1 or (name == "label_noise" and value == 1)
    ]
    if problems:
        raise InputError("; ".join(problems))


def _stream(seed: int, *names: str | int) -> random.Random:
    return random.Random(derived_seed(seed, "fraud", *names))


def _labels(rng: random.Random, count: int, kinds: dict[str, float]) -> list[str]:
    """Half legitimate; the kinds by largest remainders, so that rare ones are there in their share; shuffled."""
    fraud = count // 2
    counts = {kind: int(fraud * share) for kind, share in kinds.items()}
    rest = sorted(kinds, key=lambda kind: (counts[kind] - fraud * kinds[kind], kind))
    for kind in rest[: fraud - sum(counts.values())]:
        counts[kind] += 1
    labels = [LEGITIMATE] * (count - fraud) + [kind for kind, n in counts.items() for _ in range(n)]
    rng.shuffle(labels)
    return labels


def _mislabel(rows: list[FraudRow], noise: float, rng: random.Random, kinds: dict[str, float]) -> None:
    """Gives `noise` of the rows (rounded) a wrong label."""
    for index in rng.sample(range(len(rows)), round(noise * len(rows))):
        true = rows[index]["label"]
        if true != LEGITIMATE and rng.random() < _UNDETECTED:
            wrong = LEGITIMATE
        else:
            others = [kind for kind in kinds if kind != true]
            # A bank of one kind alone has no other: any will do.
            weights = [kinds[kind] for kind in others]
            wrong = rng.choices(others, weights if any(weights) else None)[0]
        rows[index]["label"] = wrong


def _test_rows(seed: int, count: int, drift: float, seen: set[str]) -> list[FraudRow]:
    rng = _stream(seed, "rows", "test")
    kinds = dict.fromkeys(FRAUDS, 1 / len(FRAUDS))
    labels = _labels(rng, count, kinds)
    many = max(1, count // (_ROWS_PER_CUSTOMER * len(BANKS)))
    crowds = {bank: [_customer(seed, f"t-{bank}-{number}", bank) for number in range(many)] for bank in BANKS}
    source = _Source(drift, kinds, seen)
    rows = []
    for index, label in enumerate(labels):
        bank = rng.choice(BANKS)
        period = _TEST_BEGINS + (1 - _TEST_BEGINS) * index / count
        rows.append(source.row(rng, label, bank, rng.choice(crowds[bank]), period))
    return rows


def _crowds(seed: int, count: int, shared: float) -> dict[str, list[Customer]]:
    """Each bank's customers, `count` a bank; half of those who are at two banks have the bank itself as their first."""
    common = round(shared * count / 2)
    made: dict[str, list[Customer]] = {bank: [] for bank in BANKS}
    for index, bank in enumerate(BANKS):
        own = [_customer(seed, f"c-{bank}-{number}", bank) for number in range(count - common)]
        made[bank] += own
        made[BANKS[(index + 1) % len(BANKS)]] += own[:common]
    return made


def _customer(seed: int, name: str, bank: str) -> Customer:
    rng = _stream(seed, "customer", name)
    business = rng.random() < BUSINESSES[bank]
    payees = tuple((new_supplier(rng) if business else new_person(rng), new_account(rng)) for _ in range(3))
    return Customer(name, business, payees, new_supplier(rng), tuple(rng.sample(words.GROCERY, 4)))


@dataclass
class _Source:
    """Makes rows that differ from all made before."""

    drift: float
    honest: dict[str, float]
    seen: set[str]

    def row(self, rng: random.Random, label: str, bank: str, customer: Customer, period: float) -> FraudRow:
        while True:
            text = self._text(rng, label, bank, customer, period)
            if text not in self.seen:
                self.seen.add(text)
                return FraudRow(text=text, label=label, customer=customer.name, bank=bank, period=round(period, 4))

    def _text(self, rng: random.Random, label: str, bank: str, customer: Customer, period: float) -> str:
        log = Log(customer, rng, period, self.drift, rng.randint(0, 3 * 24 * 60))
        if rng.random() < _ASIDE:
            aside(log)
        else:
            everyday(log)
        log.later()
        before = len(log.events)
        if label in FRAUDS:
            FRAUDS[label].fraud(log)
        elif rng.random() < _LOOK_ALIKE:
            FRAUDS[rng.choices(list(self.honest), list(self.honest.values()))[0]].honest(log)
        else:
            for _ in range(rng.randint(2, 3)):
                everyday(log)
                log.wait(5, 24 * 60)
            everyday(log, payment=True)
        return _written(log, words.STYLES[bank], before)


def _written(log: Log, style: words.Style, before: int) -> str:
    """The log in a bank's writing; of its first `before` events only as many as the length allows."""
    parts = [
        f"{style.when(event.minute)} "
        + style.event(event.kind, log.rng, who=event.who, amount=event.amount, account=event.account, note=event.note)
        for event in log.events
    ]
    parts[-1] = style.judged + parts[-1]
    head = style.head[log.customer.business]
    for first in range(before + 1):
        text = f"{head} {style.between.join(parts[first:])}"
        if len(text) <= _MAX_CHARACTERS and len(parts) - first <= _MAX_EVENTS:
            break
    return text
