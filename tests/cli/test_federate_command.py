"""deltaw federate on one machine, what newcomers type, and other commands on what it wrote."""

from __future__ import annotations

import json
import signal

import pytest
import transformers
import yaml
from command_line import digest, process
from small_runs import make_model, rows_of, write_rows

from deltaw.checkpoint.algebra import read_stored
from deltaw.studies.consortium_data import EXAMPLES

BANKS = ("bank-a", "bank-b", "bank-c")
QUICK = ["--model", "model", "--rounds", "2", "--batch-size", "8", "--learning-rate", "2e-2", "--r", "2"]
QUICK += ["--dtype", "float32", "--device", "cpu", "--max-length", "16"]
CLIENTS = [word for name in BANKS for word in ("--client", f"{name}={name}.jsonl")]


@pytest.fixture(scope="module")
def banks(tmp_path_factory):
    """A tiny encoder, the rows of three banks, and rows of nobody's."""
    folder = tmp_path_factory.mktemp("banks")
    make_model(folder / "model", "bert")
    for place, name in enumerate(BANKS):
        write_rows(folder / f"{name}.jsonl", rows_of("label", 24 + 8 * place, seed=place))
    write_rows(folder / "test.jsonl", rows_of("label", 24, seed=9))
    return folder


@pytest.fixture(autouse=True)
def there(banks, monkeypatch):
    monkeypatch.chdir(banks)
    monkeypatch.setenv("COLUMNS", "120")
    return banks


@pytest.fixture(scope="module")
def federation(banks):
    """A finished federation, by a process of its own, and what it printed."""
    words = ["federate", *CLIENTS, "--test-data", "test.jsonl", *QUICK, "--output", "fed"]
    with process(*words, cwd=banks) as running:
        out, err = running.communicate(timeout=120)
    assert running.returncode == 0, err
    return banks / "fed", out, err


def record(folder):
    return json.loads((folder / "run.json").read_text())


def test_a_run_prints_its_rounds_on_stderr_and_what_it_came_to_on_stdout(federation):
    folder, out, err = federation
    made, lines = record(folder), err.splitlines()
    assert len(lines) == 3 and all(line.startswith(f"round {n}/2  3 ok") for n, line in enumerate(lines)), err
    assert made["command"].startswith("deltaw federate --client bank-a=bank-a.jsonl ") and made["status"] == "done"
    after = made["metrics"]["after"]
    for said in ("shared test rows: macro_auroc", f"{after['macro_auroc']:.4f}", "fedavg-ab; 2 rounds; bank-a, bank-b"):
        assert said in out
    assert "Report   fed/report.html" in out and (folder / "report.html").is_file()


def test_a_file_gives_keys_beside_it_and_flags_win(banks, deltaw, monkeypatch, tmp_path):
    keys = {"clients": {name: {"data": f"{name}.jsonl"} for name in BANKS}, "test_data": "test.jsonl", "model": "model"}
    keys |= {"rounds": 9, "rule": "product", "rule_options": {"truncate": 4}, "lr": 1e-2, "max_length": 16, "r": 2}
    (banks / "banks.yaml").write_text(yaml.safe_dump({**keys, "batch_size": 8, "dtype": "float32", "device": "cpu"}))
    monkeypatch.chdir(tmp_path)
    words = ["--rounds=1", "--learning_rate", "2e-2", "--rule-options", "truncate=3", "--json"]
    done = deltaw("federate", "--config", banks / "banks.yaml", *words)
    assert done.code == 0, done.err
    folder = tmp_path / "runs" / "federation-1"
    assert json.loads(done.out) == record(folder)
    made = yaml.safe_load((folder / "config.yaml").read_text())
    wanted = {"rounds": 1, "learning_rate": 0.02, "rule": "product", "rule_options": {"truncate": 3}}
    assert {name: made[name] for name in wanted} == wanted
    assert made["clients"]["bank-b"] == {"data": str(banks / "bank-b.jsonl")}
    assert max(low.A.shape[0] for low in read_stored(folder / "adapter").sites.values()) == 5


def test_ctrl_c_leaves_a_run_that_goes_on(banks, deltaw):
    words = ["federate", *CLIENTS, "--test-data", "test.jsonl", *QUICK, "--rounds", "12", "--output", "stopped"]
    with process(*words, cwd=banks) as running:
        said = []
        for line in running.stderr:
            said.append(line)
            if line.startswith("round 1/12"):
                running.send_signal(signal.SIGINT)
        assert running.wait(timeout=60) == 130
    assert said[-1] == "deltaw: interrupted; go on with deltaw federate --resume stopped\n", said
    assert record(banks / "stopped")["status"] == "failed"
    done = deltaw("federate", "--resume", "stopped")
    assert done.code == 0, done.err
    rounds = [json.loads(line)["round"] for line in (banks / "stopped" / "rounds.jsonl").read_text().splitlines()]
    assert rounds == list(range(13)) and record(banks / "stopped")["status"] == "done"
    before = digest(banks / "stopped" / "adapter")
    assert deltaw("federate", "--resume", "stopped").code == 0 and digest(banks / "stopped" / "adapter") == before


TWO = ["--client", "a=bank-a.jsonl", "--client", "b=bank-b.jsonl"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nobody takes part: give --config banks.yaml, or --client NAME=FILE"),
        (["--client", "bank-a"], "--client is 'bank-a': expected NAME=FILE"),
        (["--client", "a=", *TWO[2:]], "--client is 'a=': expected NAME=FILE"),
        ([*TWO, "--client", "a=bank-c.jsonl"], "--client names 'a' twice"),
        (["--client", "../a=bank-a.jsonl"], "a client's name is '../a': expected letters, digits, - and _"),
        ([*TWO[:3], "b=bank-bb.jsonl", "--model", "model"], "no such file: bank-bb.jsonl; did you mean bank-b.jsonl"),
        ([*TWO, "--rule", "fedavg"], "unknown rule 'fedavg': did you mean 'fedavg-ab'"),
        ([*TWO, "--rule", "ffa", "--rule-options", "k"], "--rule-options is 'k': expected KEY=VALUE"),
        ([*TWO, "--secure"], "secure with 2 clients a round hides nothing"),
        ([*CLIENTS, "--secure", "--rule", "median"], "rule median does not go with secure"),
        ([*TWO, "--epochs", "3"], "unknown option --epochs"),
        ([*TWO, "--rounds", "many"], "--rounds is 'many': expected a whole number"),
        ([*TWO, "--bottleneck-dim", "4"], "--bottleneck-dim is an option of bottleneck, and the method is lora"),
        (["--config", "nowhere.yaml"], "cannot read the configuration nowhere.yaml"),
        (["--config", "training.yaml"], "training.yaml is a training's: a federation's has no data but clients"),
        (["--resume", "nowhere"], "no run at nowhere: expected a folder that deltaw federate wrote"),
        (["--resume", "fed", "--rounds", "3", "--config", "x"], "leave out --config, --rounds"),
        (["--resume", "training"], "training is no federation: go on with it by deltaw train --resume training"),
        (["--resume", "remote"], "remote ran over a network: go on with it by deltaw federate start --resume"),
        (["--example", "frauds"], "unknown example 'frauds': did you mean 'fraud'"),
        (["--example", "fraud", *TWO], "--example fraud brings its own organisations and rows: leave out --client"),
        (["--full"], "--full goes with --example, which is fraud or credit: leave it out"),
        (["strat"], "unknown command of deltaw federate 'strat': did you mean 'start'"),
        (["banks.yaml"], "banks.yaml is no command of deltaw federate: give a configuration as --config banks.yaml"),
        (["start"], "missing option '--config'; see deltaw federate start --help"),
        (["credentials", "--folder", "keys"], "give --nodes (for all parties) or --own NAME"),
        (["ledger", "nowhere.jsonl"], "no ledger at nowhere.jsonl"),
        (["superlink", "training.yaml"], "unknown key of a superlink's file 'model'"),
        (["supernode", "node.yaml"], "node.yaml lacks silo"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(words, said, there, deltaw):
    (there / "training.yaml").write_text("model: model\ndata: bank-a.jsonl\n")
    (there / "node.yaml").write_text("{name: bank-a, superlink: 'x:1', credentials: keys, state: state}")
    for name, content in (("training", {}), ("remote", {"kind": "federation", "federation": {"transport": "flower"}})):
        (there / name).mkdir(exist_ok=True)
        (there / name / "run.json").write_text(json.dumps(content))
    assert said in deltaw("federate", *words, *(["--output", "new"] if "--client" in words else [])).error(2)
    made = there / "new"
    assert not made.exists() or record(made)["status"] == "failed"
    if made.exists():
        for file in sorted(made.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        made.rmdir()


def test_help_fits_80_columns_and_names_every_key(deltaw, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for words in ([], ["credentials"], ["superlink"], ["supernode"], ["start"], ["ledger"]):
        done = deltaw("federate", *words, "--help")
        assert done.code == 0 and max(map(len, done.out.splitlines())) <= 80, words
    shown = deltaw("federate", "--help").out
    for said in ("--client NAME=FILE", "--rule TEXT", "--target-epsilon X", "--update-clip X", "  start  "):
        assert said in shown
    assert "fraud or" in shown and set(EXAMPLES) == {"fraud", "credit"}
    assert not any(flag in shown for flag in ("--epochs", "--max-steps", "--data ", "--eval-data", "--early-stopping"))


# Other commands on a federation's folder.


def test_evaluate_gives_the_federations_own_figures_again(federation, deltaw):
    folder, _, _ = federation
    done = deltaw("evaluate", "fed", "--compare-base", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)["metrics"]
    for when in ("before", "after"):
        assert found[when] == pytest.approx(record(folder)["metrics"][when], rel=1e-5)
    # Nobody's training rows are at hand, so that there is nothing to fit a baseline to.
    assert "baselines" not in found
    other = json.loads(
        deltaw("evaluate", "--model", "model", "--adapter", "fed/adapter", "--data", "bank-a.jsonl", "--json").out
    )
    assert other["data"]["test"]["rows"] == 24 and "baselines" not in other["metrics"]


def test_merge_and_export_write_what_plain_transformers_loads(federation, deltaw, tmp_path):
    for words in (["merge", "fed"], ["export", "fed", "--to", "hf"]):
        output = tmp_path / words[0]
        assert deltaw(*words, "--output", output).code == 0
        model = transformers.AutoModelForSequenceClassification.from_pretrained(output)
        assert list(model.config.id2label.values()) == ["bad", "good"]
        found = json.loads(
            deltaw(
                "evaluate", "--model", output, "--data", "test.jsonl", "--max-length", "16", *QUICK[10:14], "--json"
            ).out
        )
        assert found["metrics"]["after"]["loss"] == pytest.approx(
            record(federation[0])["metrics"]["after"]["loss"], rel=1e-4
        )


def test_report_writes_the_page_again(federation, deltaw):
    page = federation[0] / "report.html"
    before = page.read_text()
    page.unlink()
    assert deltaw("report", "fed").out == "fed/report.html\n" and page.read_text() == before


def test_a_federation_without_test_rows_says_what_to_give(banks, deltaw):
    done = deltaw("federate", *CLIENTS, *QUICK, "--rounds", "1", "--output", "untested")
    assert done.code == 0 and "none, so nothing was measured" in done.out
    said = deltaw("evaluate", "untested").error(2)
    assert "the federation at untested has no test rows of its own: give some with data (--data FILE)" in said
    assert deltaw("evaluate", "untested", "--data", "test.jsonl").code == 0


def test_ledger_shows_what_was_spent(banks, deltaw):
    words = ["--dp", "--noise-multiplier", "1.0", "--ledger", "ledgers", "--budget-epsilon", "50", "--rounds", "1"]
    done = deltaw("federate", *CLIENTS, *QUICK, *words, "--output", "private", "--json")
    assert done.code == 0, done.err
    spent = json.loads(done.out)["privacy"]["clients"]["bank-a"]["epsilon"]
    shown = json.loads(deltaw("federate", "ledger", "ledgers/bank-a.jsonl", "--json").out)
    assert shown["epsilon"] == pytest.approx(spent, rel=1e-6) and len(shown["charges"]) == 1
    plain = deltaw("federate", "ledger", "ledgers/bank-a.jsonl").out
    assert f"epsilon {spent:.4g} of 50 at delta 1e-05" in plain and shown["head"] in plain


def test_credentials_says_who_gets_what(deltaw, tmp_path):
    done = deltaw("federate", "credentials", "--folder", tmp_path / "keys", "--nodes", "bank-a, bank-b")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[0].split()[:3] == ["goes", "to", "file"]
    assert any(line.split()[0] == "bank-b" and "node.key" in line and "PRIVATE" in line for line in lines)
    assert (tmp_path / "keys" / "server" / "nodes" / "bank-b.pub").is_file()
