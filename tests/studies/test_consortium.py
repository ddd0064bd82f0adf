"""Consortium studies of tiny models: cells on equal terms, what is kept, and what the tables are made of."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import statistics
import sys
from collections import Counter
from pathlib import Path

import pytest
import small_runs
from sklearn.metrics import roc_auc_score

from deltaw.checkpoint import load_adapter, load_model, load_tokenizer
from deltaw.core.errors import InputError
from deltaw.data import read_rows
from deltaw.data.fraud import write_fraud
from deltaw.evaluate.baselines import majority, tfidf_logreg
from deltaw.evaluate.task import TaskEvaluator
from deltaw.privacy import accounting
from deltaw.studies import consortium, consortium_cells
from deltaw.studies.consortium import points, run_example, run_study, tables
from deltaw.studies.consortium_cells import read_plan
from deltaw.studies.consortium_data import Example, skewed, write_skewed
from deltaw.studies.consortium_plan import ALL_CELLS, Study, epsilon_of, make_plan

BANKS = ("bank-a", "bank-b", "bank-c")
CELLS = ("alone", "central", "fedavg-ab", "secure", "dp-1", "tfidf", "majority")


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """Three organisations of words, the first of which sees one label only in part."""
    folder = tmp_path_factory.mktemp("model")
    model = small_runs.make_model(folder, "bert", layers=1, std=0.2)

    def write(place, *, seed, share=0.2):
        Path(place).mkdir(parents=True, exist_ok=True)
        paths = {}
        for number, name in enumerate((*BANKS, "test")):
            rows = small_runs.rows_of("label", 32, seed=9 * seed + number)
            if name == "bank-a":
                more = small_runs.rows_of("label", 200, seed=9 * seed + number)
                bad = round(16 * share)
                rows = [row for row in more if row["label"] == "good"][: 32 - bad]
                rows += [row for row in more if row["label"] == "bad"][:bad]
            paths[name] = Path(small_runs.write_rows(Path(place) / f"{name}.jsonl", rows))
        return paths

    keys = {
        "model": model, "task": "sequence-classification", "method": "lora", "r": 2, "alpha": 4, "dtype": "float32",
        "device": "cpu", "target_modules": "all-linear", "learning_rate": 0.02, "batch_size": 8, "micro_batch_size": 8,
        "max_length": 16,
    }  # fmt: skip
    return Example(
        name="words", title="Words", organisations=BANKS, labels=("bad", "good"), write=write, knobs={"share": 0.2},
        rounds=2, keys=keys, private={"rule": "ffa", "freeze_a": True, "batch_size": 8, "delta": 1e-3},
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(example, tmp_path_factory):
    study = Study(example=example, output=str(tmp_path_factory.mktemp("study") / "out"), cells=CELLS, seeds=(0, 1))
    with pytest.MonkeyPatch.context() as patch:
        # The accounts of equal organisations are the same, and take seconds.
        for name in ("calibrate", "epsilon", "collusion"):
            patch.setattr(accounting, name, functools.cache(getattr(accounting, name)))
        return study, run_study(study, command="deltaw federate --example words")


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def entry(results, label, point=0):
    return next(one for one in results["points"][point]["cells"] if one["cell"] == label)


def auroc(study, cell):
    """Macro AUROC of a cell's adapter as a user would load it, by scikit-learn."""
    folder = Path(study.output) / cell
    model = load_model(
        study.example.keys["model"], task="sequence-classification", labels=["bad", "good"], device="cpu",
        dtype="float32", seed=int(cell[5]),
    )  # fmt: skip
    load_adapter(model, folder / "adapter", active=True)
    rows = read_rows(folder.parent / "rows" / "test.jsonl")
    tokenizer = load_tokenizer(study.example.keys["model"])
    ask = TaskEvaluator("sequence-classification", rows, tokenizer, labels=["bad", "good"], max_length=16)
    return ask(model).metrics["macro_auroc"]


def test_every_number_is_what_the_cells_left(finished):
    study, results = finished
    assert results["failed"] == [] and results["missing"] == [] and results["cells"] == {"all": 18, "done": 18}
    assert json.loads(Path(results["numbers"]).read_text()) == results
    for one in results["points"][0]["cells"]:
        runs = [small_runs.record(Path(study.output) / name) for name in one["runs"]]
        assert one["seeds"] == [0, 1] and len(runs) == 2
        for name, summary in one["metrics"].items():
            values = [run["metrics"]["after"][name] for run in runs]
            assert summary["values"] == values and summary["mean"] == pytest.approx(statistics.fmean(values))
            assert summary["sd"] == pytest.approx(statistics.stdev(values), abs=1e-12)
            assert (summary["min"], summary["max"]) == (min(values), max(values))
    for cell in ("alone-bank-a", "central", "fedavg-ab", "secure"):
        value = entry(results, cell)["metrics"]["macro_auroc"]["values"][1]
        assert auroc(study, f"seed-1/{cell}") == pytest.approx(value, abs=1e-6)


def test_differences_are_to_the_best_alone_of_the_same_seed(finished):
    _, results = finished
    alone = [entry(results, f"alone-{bank}")["metrics"]["macro_auroc"]["values"] for bank in BANKS]
    best = [max(values) for values in zip(*alone, strict=True)]
    assert [one["macro_auroc"] for one in results["points"][0]["best_alone"]] == best
    for cell in ("central", "fedavg-ab", "dp-1", "tfidf", "majority"):
        one = entry(results, cell)
        values = one["metrics"].get("macro_auroc", {}).get("values")
        expected = None if values is None else [a - b for a, b in zip(values, best, strict=True)]
        assert one.get("against_best", {}).get("values") == expected
    assert "against_best" not in entry(results, "alone-bank-a")


def test_secure_aggregation_changes_a_federation_by_rounding_only(finished):
    _, results = finished
    plain, secure = (entry(results, cell)["metrics"]["macro_auroc"]["values"] for cell in ("fedavg-ab", "secure"))
    assert secure == pytest.approx(plain, abs=0.02)
    # The private one leaves A at home.
    assert entry(results, "dp-1")["cost"]["bytes_up"]["mean"] < entry(results, "fedavg-ab")["cost"]["bytes_up"]["mean"]


def test_all_make_the_same_passes_with_the_same_settings(finished, tmp_path):
    study, _ = finished
    plan = read_plan(study.output)
    shared = ("learning_rate", "batch_size", "schedule", "r", "seed", "labels", "test_data", "model")
    for seed in (0, 1):
        own = {name.rpartition("/")[2]: cell for name, cell in plan.cells.items() if cell.seed == seed}
        trained = [cell for cell in own.values() if cell.kind in ("alone", "central", "rule", "secure")]
        assert len({json.dumps([cell.keys.get(key) for key in shared]) for cell in trained}) == 1
        assert {own[f"alone-{bank}"].keys["epochs"] for bank in BANKS} == {own["central"].keys["epochs"]} == {2.0}
        folder = Path(study.output) / f"seed-{seed}" / "rows"
        parts = [(folder / f"{bank}.jsonl").read_text() for bank in BANKS]
        assert (folder / "all.jsonl").read_text() == "".join(parts)
        counts = {bank: len(part.splitlines()) for bank, part in zip(BANKS, parts, strict=True)}
        assert own["secure"].keys["secure_weight_bound"] == max(counts.values())
    rows = {seed: (Path(study.output) / f"seed-{seed}" / "rows" / "test.jsonl").read_text() for seed in (0, 1)}
    assert rows[0] != rows[1]
    steps = dataclasses.replace(study, output=str(tmp_path), local_steps=3)
    cells = make_plan(steps, command="").cells
    assert cells["seed-0/alone-bank-a"].keys["max_steps"] == 6 and cells["seed-0/central"].keys["max_steps"] == 18
    assert cells["seed-0/fedavg-ab"].keys["local_steps"] == 3


def test_private_cells_keep_their_epsilon_and_say_what_it_is(finished):
    _, results = finished
    promise = entry(results, "dp-1")["privacy"]
    assert 0.9 < promise["epsilon"] <= 1 and promise["unit"] == "example" and promise["delta"] == 1e-3
    assert promise["noise_multiplier"] > 0 and promise["sampling"] == "poisson"
    assert any("epsilon 1 " in note or "epsilon 0.99" in note for note in results["notes"])
    assert epsilon_of("dp-0.5") == 0.5 and epsilon_of("dp-x") is None and epsilon_of("dp-0") is None


def test_baselines_are_those_of_all_rows(finished):
    study, results = finished
    folder = Path(study.output) / "seed-1" / "rows"
    train, test = (lines(folder / f"{name}.jsonl") for name in ("all", "test"))
    labels = ["bad", "good"]
    pairs = [([row["text"] for row in rows], [row["label"] for row in rows]) for rows in (train, test)]
    expected = tfidf_logreg(*pairs[0], *pairs[1], labels, seed=1)
    found = entry(results, "tfidf")["metrics"]
    assert {name: summary["values"][1] for name, summary in found.items()} == {name: expected[name] for name in found}
    most = majority(pairs[0][1], pairs[1][1], labels)
    assert entry(results, "majority")["metrics"]["accuracy"]["values"][1] == most["accuracy"]


def test_page_and_tables_show_the_cells(finished):
    study, results = finished
    page = Path(results["report"]).read_text()
    for name in ("seed-0/fedavg-ab", "seed-1/dp-1", "seed-0/alone-bank-c"):
        assert f'href="{name}/report.html"' in page and (Path(study.output) / name / "report.html").is_file()
    (_, quality), (_, best) = tables(results)
    assert [row[1] for row in quality[1:4]] == [f"{bank} alone" for bank in BANKS] and len(quality) == 10
    assert {len(row) for row in quality} == {len(quality[0])} and "–" not in quality[-1][2]
    assert len(best) == 3 and best[0][:2] == ["Seed", "Best alone"]
    assert quality[5][1] in Path(results["table"]).read_text()
    assert "<script" not in page
    for part in ("checkpoints", "state", "clients"):
        assert not list(Path(study.output).glob(f"seed-*/*/{part}"))


def test_the_same_study_again_trains_nothing(finished, monkeypatch):
    study, results = finished
    monkeypatch.setattr(consortium_cells, "run_job", None)
    monkeypatch.setattr(consortium_cells, "run_federation", None)
    assert run_study(study, command=results["command"]) == results
    with pytest.raises(InputError, match=r"seed-0/alone-bank-a was made with learning_rate 0\.02, and the study"):
        run_study(dataclasses.replace(study, options={"learning_rate": 0.5}))


def test_a_failed_cell_is_told_of_and_the_rest_finished_and_then_only_that(example, tmp_path, monkeypatch):
    study = Study(example=example, output=str(tmp_path / "out"), cells=("alone", "fedavg-ab"), rounds=1, local_steps=2)
    real, said = consortium_cells.run_federation, []
    monkeypatch.setattr(consortium_cells, "run_federation", lambda *a, **k: 1 / 0)
    results = run_study(study, say=said.append)
    assert results["failed"] == [
        {"cell": "seed-0/fedavg-ab", "error": "ZeroDivisionError: division by zero", "exit_code": 1}
    ]
    assert results["cells"] == {"all": 4, "done": 3} and any("fedavg-ab failed" in line for line in said)
    assert (
        "Failed cells",
        [["Cell", "Exit code", "Error"], ["seed-0/fedavg-ab", "1", results["failed"][0]["error"]]],
    ) in (tables(results))
    monkeypatch.setattr(consortium_cells, "run_federation", real)
    monkeypatch.setattr(consortium_cells, "run_job", None)
    assert run_study(study)["cells"] == {"all": 4, "done": 4}


def test_a_federation_that_was_cut_short_goes_on_from_its_last_round(example, tmp_path):
    cells = ("fedavg-ab",)
    whole = Study(example=example, output=str(tmp_path / "whole"), cells=cells)
    expected = run_study(whole)["points"][0]["cells"][0]["metrics"]
    cut = dataclasses.replace(whole, output=str(tmp_path / "cut"))

    def stops(line):
        if line.startswith("round 1/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_study(cut, say=stops)
    said = []
    assert run_study(cut, say=said.append)["points"][0]["cells"][0]["metrics"] == expected
    assert not any(line.startswith("round 1/") for line in said) and any("round 2/" in line for line in said)


def test_cells_in_processes_of_their_own_give_the_same(example, tmp_path):
    cells = ("central", "majority")
    here = run_study(Study(example=example, output=str(tmp_path / "here"), cells=cells))
    apart = run_study(Study(example=example, output=str(tmp_path / "apart"), cells=cells, parallel=2))
    assert apart["failed"] == []
    for one, other in zip(here["points"][0]["cells"], apart["points"][0]["cells"], strict=True):
        assert one["metrics"] == other["metrics"]
    assert (tmp_path / "apart" / "logs" / "seed-0--central.log").is_file()


def test_a_worker_tells_in_one_line_why_it_failed(example, tmp_path, monkeypatch, capsys):
    study = Study(example=example, output=str(tmp_path), cells=("majority",))
    run_study(study)
    monkeypatch.setattr(sys, "argv", ["-c", "seed-0/central", str(tmp_path)])
    monkeypatch.setattr(consortium_cells.threading, "Thread", lambda **_: type("T", (), {"start": lambda self: None})())
    with pytest.raises(SystemExit) as left:
        consortium_cells.work()
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("deltaw: no cell seed-0/central in ")


def test_a_sweep_has_a_row_for_each_point(example, tmp_path):
    sweep = points(share=[0.1, 1.0])
    assert sweep == {"share-0.1": {"share": 0.1}, "share-1.0": {"share": 1.0}}
    assert list(points(overlap=[0, 1], label_noise=[0.1])) == ["overlap-0_label-noise-0.1", "overlap-1_label-noise-0.1"]
    study = Study(
        example=example, output=str(tmp_path), cells=("alone", "tfidf"), points=sweep, rounds=1, local_steps=2
    )
    results = run_study(study)
    table = dict(tables(results))["Sweep"]
    assert table[0][:2] == ["Share", "Best alone"] and [row[0] for row in table[1:]] == ["0.1", "1.0"]
    for row, point in zip(table[1:], results["points"], strict=True):
        difference = entry({"points": [point]}, "tfidf")["against_best"]["mean"]
        assert float(row[3].replace("\N{MINUS SIGN}", "-")) == pytest.approx(difference, abs=6e-4)
    assert results["rows"]["share-0.1/seed-0"]["bank-a"]["bad"] < results["rows"]["share-1.0/seed-0"]["bank-a"]["bad"]


def test_the_command_s_flags_choose_cells(monkeypatch):
    asked = []
    monkeypatch.setattr(consortium, "run_study", lambda study, **_: asked.append(study) or {})

    def study(full=False, **values):
        said = []
        run_example("fraud", values, full=full, command="", say=said.append)
        assert full or "--full" in said[0]
        return asked[-1]

    plain = study()
    assert plain.cells == ["alone", "central", "fedavg-ab", "tfidf", "majority", "dp-8"]
    assert (plain.seeds, plain.rounds, plain.output) == ((0,), consortium.QUICK_ROUNDS, "runs/example-fraud")
    chosen = study(rule="ffa, sketch", secure=True, target_epsilon=3.0, unit="customer", seed=7, learning_rate=0.1)
    assert chosen.cells == ["alone", "central", "ffa", "sketch", "tfidf", "majority", "secure", "dp-3"]
    assert chosen.private == {"unit": "customer", "learning_rate": 0.1}
    assert chosen.options == {**consortium.QUICK_KEYS, "learning_rate": 0.1}
    assert study(batch_size=4).options["batch_size"] == 4
    assert study(dp=False, weighting="equal", local_steps=2, parallel=3).cells[-1] == "majority"
    assert (asked[-1].federated, asked[-1].local_steps, asked[-1].parallel) == (
        {"evaluate_every": 4, "weighting": "equal"},
        2,
        3,
    )
    whole = study(full=True, secure=True)
    assert set(whole.cells) == set(ALL_CELLS) and len(whole.cells) == len(ALL_CELLS)
    assert (whole.rounds, whole.federated, whole.output) == (None, {}, "runs/example-fraud-full")
    assert (whole.options, whole.local_epochs) == ({}, 1.0)
    for name, values, message in (
        ("fraud", {"test_data": "x"}, "--test-data has no meaning"),
        ("bank", {}, "unknown example 'bank'"),
        ("fraud", {"local_steps": 1, "local_epochs": 1.0}, "both local_steps and local_epochs"),
    ):
        with pytest.raises(InputError, match=message):
            run_example(name, values, command="")


def test_every_cell_of_the_fraud_study_has_a_valid_configuration(tmp_path):
    from deltaw.studies.consortium_data import EXAMPLES

    fraud = dataclasses.replace(EXAMPLES["fraud"], knobs={"rows_per_bank": 80, "test_rows": 30})
    study = Study(example=fraud, output=str(tmp_path), seeds=(100,))
    plan = make_plan(study, command="")
    names = [name.rpartition("/")[2] for name in plan.cells]
    assert names == [f"alone-{bank}" for bank in BANKS] + [cell for cell in ALL_CELLS if cell != "alone"]
    assert set(write_fraud(tmp_path / "x", seed=100, rows_per_bank=20, test_rows=10)) == {*BANKS, "test"}
    with pytest.raises(InputError, match="unknown cell 'fedavg'"):
        make_plan(dataclasses.replace(study, cells=("fedavg",)), command="")


def test_skewed_nodes_have_every_row_once_and_labels_of_their_own(tmp_path):
    rows = small_runs.rows_of("label", 300)
    train = small_runs.write_rows(tmp_path / "train.jsonl", rows)
    test = small_runs.write_rows(tmp_path / "test.jsonl", small_runs.rows_of("prompt", 20, seed=1))
    made = skewed(train, test, nodes=4, concentration=0.3)
    paths = made.write(tmp_path / "a", seed=5, **made.knobs)
    parts = [paths[node].read_text().splitlines() for node in made.organisations]
    assert Counter(itertools.chain(*parts)) == Counter(Path(train).read_text().splitlines())
    assert paths["test"].read_text() == Path(test).read_text() and min(map(len, parts)) >= 10
    again = made.write(tmp_path / "b", seed=5, **made.knobs)
    other = made.write(tmp_path / "c", seed=6, **made.knobs)
    assert all(paths[name].read_bytes() == again[name].read_bytes() for name in paths)
    assert any(paths[name].read_bytes() != other[name].read_bytes() for name in paths)

    def spread(concentration):
        shares = []
        for seed in range(8):
            made = write_skewed(
                tmp_path / "s", train=train, test=test, nodes=("x", "y"), seed=seed, concentration=concentration
            )
            for node in ("x", "y"):
                labels = [row["label"] for row in lines(made[node])]
                shares.append(labels.count("good") / len(labels))
        return statistics.pstdev(shares)

    assert spread(0.3) > 3 * spread(1000.0)
    with pytest.raises(InputError, match="expected an object with label"):
        small_runs.write_rows(tmp_path / "bad.jsonl", [{"text": "x"}])
        skewed(tmp_path / "bad.jsonl", test).write(tmp_path / "d", seed=0, concentration=1.0)


def test_macro_auroc_is_the_mean_over_labels(finished):
    """Of two labels both areas are one, and scikit-learn's own is it."""
    study, results = finished
    rows, train = (lines(Path(study.output) / "seed-0/rows" / f"{name}.jsonl") for name in ("test", "all"))
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    words = TfidfVectorizer(ngram_range=(1, 2))
    model = LogisticRegression(C=10, class_weight="balanced", max_iter=1000, random_state=0)
    model.fit(words.fit_transform([row["text"] for row in train]), [row["label"] for row in train])
    good = model.predict_proba(words.transform([row["text"] for row in rows]))[:, 1]
    area = roc_auc_score([row["label"] == "good" for row in rows], good)
    assert entry(results, "tfidf")["metrics"]["macro_auroc"]["values"][0] == pytest.approx(area, abs=1e-9)
