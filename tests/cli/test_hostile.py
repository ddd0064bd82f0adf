"""Wrong input, broken files, full disks, Ctrl-C: one line, the documented exit code, earlier outputs as they were."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import time

import pytest
from command_line import QUICK, digest, process, tiny_model, write_rows


@pytest.fixture
def train(here, deltaw, finished):
    """Trains the tiny model beside an earlier run, which must come out as it went in; and no half a run is left."""

    def call(*words, code=2, data="rows.jsonl", left=False):
        earlier = digest(finished)
        done = deltaw("train", "--model", "model", "--data", data, "--output", "run", *QUICK, *words)
        assert digest(finished) == earlier
        if not left:
            assert not (here / "run").exists()
        return done.error(code) if not left else done

    return call


def rows_file(here, text):
    (here / "data.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    return "data.jsonl"


GOOD = '{"text": "a", "label": "x"}\n'


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (b"", "data.jsonl is empty: expected at least one row"),
        (b"\n\n", "data.jsonl is empty"),
        (GOOD + '{"txt": "b", "label": "x"}\n', "data.jsonl:2: the row has no 'text'"),
        (GOOD.encode() + b'{"text": "caf\xe9", "label": "x"}\n', "data.jsonl:2: not UTF-8: byte 0xe9"),
        (GOOD + "{oops\n", "data.jsonl:2: malformed JSON"),
    ],
    ids=["empty", "blank", "no field", "encoding", "json"],
)
def test_broken_rows(here, train, text, wanted):
    assert wanted in train(data=rows_file(here, text))


def test_missing_file_names_near_ones(train):
    assert "no such file: row.jsonl; did you mean rows.jsonl?" in train(data="row.jsonl")


def test_no_model_and_no_data(here, train, deltaw):
    assert "no such model: './modle': did you mean model?" in train("--model", "./modle")
    assert "no training data: give --data" in deltaw("train", "--model", "model").error(2)


def test_label_outside_the_set(here, train):
    data = rows_file(here, '{"text": "a", "label": "fine"}\n')
    assert "data.jsonl:1: label 'fine' is not one of bad, good" in train("--test-data", data)


def test_longer_than_the_model(train):
    assert "max_length is 4096 and model has 128 positions: choose at most 128" in train("--max-length", "4096")


def test_long_rows_are_cut_and_counted(here, train):
    lines = (here / "rows.jsonl").read_text() + json.dumps({"text": "rain " * 200, "label": "bad"}) + "\n"
    done = train(data=rows_file(here, lines), left=True)
    assert done.code == 0, done.err
    data = json.loads((here / "run" / "run.json").read_text())["data"]
    assert sum(record["truncated"] for record in data.values()) == 1
    assert "1 truncated" in done.err


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--learning-rate", "abc"], "--learning-rate is 'abc': expected a number"),
        (["--lr", "nan"], "learning_rate is nan: expected a number above 0"),
        (["--method", "lorra"], "unknown method 'lorra': did you mean 'lora' or"),
        (
            ["--target-modules", "q_porj"],
            "target 'q_porj' matches no module of LlamaForCausalLM: near names are q_proj",
        ),
        (["--method", "full"], "--r is an option of lora, dora, and the method is full: leave it out"),
        (["--batch-size", "6"], "batch_size 6 is no multiple of micro_batch_size 4"),
        (["--config", "nope.yaml"], "cannot read the configuration nope.yaml"),
    ],
)
def test_wrong_options(train, words, wanted):
    assert wanted in train(*words)


def test_unknown_key_in_a_file(here, train):
    (here / "run.yaml").write_text("modle: model\n")
    assert "unknown configuration key 'modle': did you mean 'model'" in train("--config", "run.yaml")


def test_an_output_that_holds_a_run_is_left_alone(deltaw, here, finished):
    before = digest(finished)
    done = deltaw("train", "--model", "model", "--data", "rows.jsonl", "--output", finished, *QUICK)
    assert f"holds a run already: choose another output, or go on with --resume {finished}" in done.error(2)
    assert digest(finished) == before


class Trap:
    """Leaves a mark when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def test_a_truncated_model(here, train):
    shutil.copytree(here / "model", here / "cut")
    file = here / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert "damaged safetensors file" in train("--model", "cut")


def test_a_pickled_model_is_never_loaded(here, train):
    shutil.copytree(here / "model", here / "pickled")
    (here / "pickled" / "model.safetensors").unlink()
    (here / "pickled" / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    assert "pickle (pytorch_model.bin), which can run code and is never loaded" in train("--model", "pickled")
    (here / "pickled" / "model.safetensors").write_bytes(pickle.dumps(Trap()))
    assert "damaged safetensors file" in train("--model", "pickled")
    assert not (here / "unpickled").exists()


@pytest.fixture
def adapter(here, finished):
    """A copy of the run's adapter."""
    shutil.copytree(finished / "adapter", here / "adapter")
    return here / "adapter"


def evaluated(deltaw, *words):
    done = deltaw("evaluate", "--data", "rows.jsonl", *words)
    assert done.code == 2 and done.out == ""
    return done.line()


def test_a_truncated_adapter(here, deltaw, adapter):
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "is damaged or no safetensors file" in evaluated(deltaw, "--model", "model", "--adapter", "adapter")
    done = deltaw("merge", "--model", "model", "--adapter", "adapter", "--output", "merged")
    assert done.code == 2 and "is damaged or no safetensors file" in done.line()
    assert not (here / "merged").exists()


def test_a_pickled_adapter_is_never_loaded(here, deltaw, adapter):
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Trap()))
    wanted = "adapter_model.bin is a pickle, which can run code and is never loaded"
    assert wanted in evaluated(deltaw, "--model", "model", "--adapter", "adapter")
    assert not (here / "unpickled").exists()


def test_an_adapter_of_another_model(here, deltaw, adapter):
    tiny_model(here / "wide", hidden=64)
    before = digest(here)
    line = evaluated(deltaw, "--model", "wide", "--adapter", "adapter")
    assert "does not fit LlamaForCausalLM" in line and "of another shape" in line
    tiny_model(here / "bert", kind="Bert")
    assert "match no module of BertFor" in evaluated(
        deltaw, "--model", "bert", "--adapter", "adapter", "--task", "masked-lm", "--layout", "text"
    )
    assert {name: value for name, value in digest(here).items() if not name.startswith("bert")} == before


@pytest.mark.parametrize("words", [["evaluate", "nope"], ["train", "--resume", "nope"], ["report", "nope"]])
def test_no_such_run(here, deltaw, words):
    assert "no run" in deltaw(*words).error(2)


def test_runs_models_and_adapters_are_told_apart(here, deltaw, finished):
    assert "model is no run but a model: give it as --model" in deltaw("evaluate", "model").error(2)
    folder = finished / "adapter"
    assert "is no run but an adapter: give it as --adapter" in deltaw("evaluate", folder).error(2)
    assert "give one" in deltaw("evaluate", finished, "--adapter", folder).error(2)
    assert "nothing to evaluate" in deltaw("evaluate").error(2)
    assert "no rows to measure on" in deltaw("evaluate", "--model", "model").error(2)
    assert "nothing to merge" in deltaw("merge").error(2)
    assert "no output" in deltaw("merge", finished).error(2)
    assert "no such folder: nope" in deltaw("merge", "nope", "--output", "x").error(2)
    assert "with a number as weight" in deltaw("merge", "--adapter", f"{folder}=half", "--output", "x").error(2)


def test_rows_that_changed_since_the_run_are_not_its_test_rows(here, deltaw, finished, work, monkeypatch):
    copy = here / "copy"
    copy.mkdir()
    shutil.copytree(finished, copy / "finished")
    shutil.copytree(work / "model", copy / "model")
    write_rows(copy / "rows.jsonl", count=26)
    monkeypatch.chdir(copy)
    assert "rows.jsonl has changed since the run" in deltaw("evaluate", "finished").error(2)
    assert deltaw("evaluate", "finished", "--data", "rows.jsonl").code == 0


@pytest.mark.parametrize("output", ["rows.jsonl/run", "/proc/deltaw/run"])
def test_an_output_that_cannot_be_written(here, deltaw, finished, output):
    if output.startswith("/proc") and not os.path.isdir("/proc/self"):
        pytest.skip("no /proc")
    rows = (here / "rows.jsonl").read_bytes()
    done = deltaw("train", "--model", "model", "--data", "rows.jsonl", "--output", output, *QUICK)
    assert output in done.error(2)
    done = deltaw("merge", finished, "--model", "model", "--output", output)
    assert done.code == 2 and output.rpartition("/")[0] in done.line()
    assert (here / "rows.jsonl").read_bytes() == rows


@pytest.fixture
def disk(here):
    """Mounts a small disk at `here/disk`; skips where that is not permitted."""
    folder = here / "disk"
    folder.mkdir()

    def mount(options):
        if (
            os.geteuid() != 0
            or subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True).returncode
        ):
            pytest.skip("mounting is not permitted")
        return folder

    yield mount
    subprocess.run(["umount", folder], capture_output=True)


def test_a_read_only_disk(deltaw, disk, finished):
    disk("size=100k,ro")
    words = ["--model", "model", "--data", "rows.jsonl", *QUICK]
    assert "Read-only file system; choose a folder that you may write to" in deltaw(
        "train", "--output", "disk/run", *words
    ).error(2)
    done = deltaw("merge", finished, "--model", "model", "--output", "disk/merged")
    assert done.code == 2 and "Read-only file system" in done.line()


@pytest.mark.parametrize("size", [24, 60, 100])
def test_a_full_disk_while_training(deltaw, disk, size):
    folder = disk(f"size={size}k")
    (folder / "earlier").write_text("kept")
    words = ["--model", "model", "--data", "rows.jsonl", "--output", "disk/run", *QUICK]
    done = deltaw("train", *words, "--r", "16", "--save-every", "1")
    assert done.code == 1, done.err
    assert "no space left on the device" in done.line()
    assert (folder / "earlier").read_text() == "kept"
    for checkpoint in folder.glob("run/checkpoints/checkpoint-*"):
        assert (checkpoint / "trainer_state.json").is_file()


def test_a_full_disk_while_merging(deltaw, disk, finished):
    folder = disk("size=60k")
    (folder / "earlier").write_text("kept")
    done = deltaw("merge", finished, "--model", "model", "--output", "disk/merged")
    assert done.code == 1
    assert "disk/merged" in done.line() and "pace" in done.line()
    assert [entry.name for entry in folder.iterdir()] == ["earlier"]


def wait_for(found, running):
    deadline = time.monotonic() + 120
    while not found():
        assert running.poll() is None and time.monotonic() < deadline, running.communicate()
        time.sleep(0.02)


def test_ctrl_c_leaves_a_run_that_goes_on(here, deltaw):
    steps = ["--max-steps", "100000", "--save-every", "2", "--log-every", "1"]
    words = ["--model", "model", "--data", "rows.jsonl", "--output", "run", *QUICK, *steps, "--no-baselines"]
    with process("train", *words, cwd=here) as running:
        wait_for(lambda: list(here.glob("run/checkpoints/checkpoint-4")), running)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=60)
    assert running.returncode == 130, err
    last = err.splitlines()[-1]
    assert last == "deltaw: interrupted; go on with deltaw train --resume run"
    assert sum(line.startswith("deltaw: ") for line in err.splitlines()) == 1
    assert "Traceback" not in err and out == ""
    stopped = json.loads((here / "run" / "run.json").read_text())
    assert (stopped["status"], stopped["error"]) == ("failed", "interrupted")
    kept = sorted(int(path.name.removeprefix("checkpoint-")) for path in here.glob("run/checkpoints/checkpoint-*"))
    config = (here / "run" / "config.yaml").read_text()
    (here / "run" / "config.yaml").write_text(config.replace("max_steps: 100000", f"max_steps: {kept[-1] + 2}"))
    done = deltaw("train", "--resume", "run")
    assert done.code == 0, done.err
    assert f"resuming from step {kept[-1]}" in done.err
    assert json.loads((here / "run" / "run.json").read_text())["status"] == "done"
