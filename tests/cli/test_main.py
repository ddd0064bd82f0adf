"""The frame around every command: help, version, errors as one line, exit codes, quiet streams."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys

import pytest
import torch
from command_line import process

from deltaw import __version__
from deltaw.cli import main as main_module
from deltaw.cli.errors import explain
from deltaw.cli.main import COMMANDS
from deltaw.core.errors import InputError, RunError


def test_help_is_quick_and_imports_nothing_heavy():
    code = "import sys; from deltaw.cli.main import main; main(['--help']); sys.stderr.write(' '.join(sys.modules))"
    times = []
    for _ in range(3):
        # Processor time: the clock's is of whatever else runs on the machine.
        start = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        end = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime)
    loaded = set(done.stderr.split())
    assert not loaded & {"torch", "transformers", "datasets", "numpy", "sklearn", "matplotlib"}
    assert min(times) < 0.5
    assert all(name in done.stdout for name in COMMANDS)
    assert "Exit codes: 0 done, 1 failed while running, 2 wrong usage or input" in " ".join(done.stdout.split())


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("words", [[], *([name] for name in COMMANDS)], ids=lambda words: "-".join(words) or "root")
def test_help_pages_fit_the_terminal(deltaw, monkeypatch, words, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    done = deltaw(*words, "--help")
    assert (done.code, done.err) == (0, "")
    assert max(map(len, done.out.splitlines())) < columns
    assert "Exit codes" in done.out
    assert done.out.startswith(" ".join(["Usage: deltaw", *words]))


def test_no_words_are_help(deltaw):
    assert deltaw().out == deltaw("-h").out


def test_version(deltaw):
    done = deltaw("--version")
    assert (done.code, done.out, done.err) == (0, f"deltaw {__version__}\n", "")


def test_commands_listed_are_those_that_load():
    for name in COMMANDS:
        assert main_module.load_command(name).name == name


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["trian"], "unknown command 'trian': did you mean 'train'"),
        (["train", "--methd", "lora"], "unknown option --methd: did you mean --method"),
        (["--versoin"], "unknown option --versoin: did you mean --version?"),
        (["train", "data.jsonl"], "unexpected 'data.jsonl': options are given by name, such as --data data.jsonl"),
        (["train", "--data"], "'--data' requires an argument; see deltaw train --help"),
        (["report"], "missing argument 'RUN'; see deltaw report --help"),
        (["models", "--r", "x"], "--r: expected a whole number"),
        (["models", "--task", "causal-lm"], "need a model: give one with --sites"),
    ],
)
def test_wrong_usage_is_one_line(deltaw, words, wanted):
    done = deltaw(*words)
    assert wanted in done.error(2)
    assert done.out == ""


def fails_with(monkeypatch, error):
    def load(name):
        raise error

    monkeypatch.setattr(main_module, "load_command", load)


@pytest.mark.parametrize(
    ("error", "code", "wanted"),
    [
        (InputError("wrong\ninput"), 2, "deltaw: wrong input"),
        (RunError("it failed"), 1, "deltaw: it failed"),
        (TypeError("a\nb"), 1, "deltaw: unexpected TypeError: a b; run again with --debug for the traceback"),
        (KeyboardInterrupt(), 130, "deltaw: interrupted"),
        (main_module._Terminated(), 143, "deltaw: terminated"),
        (MemoryError(), 1, "deltaw: out of memory: lower --micro-batch-size"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "deltaw: the GPU is out of memory: lower --micro-batch-size"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 1, "deltaw: out of memory: "),
        (
            OSError(28, "No space left on device", "runs/x"),
            1,
            "deltaw: no space left on the device while writing runs/x",
        ),
        (PermissionError(13, "Permission denied", "runs/x"), 2, "deltaw: cannot write to runs/x: Permission denied"),
        (ValueError("I/O error: No space left on device (os error 28)"), 1, "deltaw: no space left on the device"),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
            1,
            "deltaw: no space left",
        ),
        (RuntimeError("PytorchStreamWriter failed writing file data/0"), 1, "deltaw: no space left on the device"),
        (FileNotFoundError(2, "No such file", "x.json"), 2, "deltaw: no such file or folder: x.json"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_any_exception_is_one_line_and_a_code(deltaw, monkeypatch, error, code, wanted):
    fails_with(monkeypatch, error)
    assert deltaw("train").error(code).startswith(wanted)


@pytest.mark.parametrize("words", [["--debug", "train"], ["train", "--debug"]])
def test_debug_adds_the_traceback_before_or_after_the_command(deltaw, monkeypatch, words):
    fails_with(monkeypatch, TypeError("broken"))
    done = deltaw(*words)
    assert done.code == 1
    assert "Traceback (most recent call last)" in done.err
    assert done.err.splitlines()[-1].startswith("deltaw: unexpected TypeError: broken")


def test_sigterm_ends_as_ctrl_c_does_with_its_own_code():
    code = "import time, deltaw.cli.main as m\n"
    code += "m.load_command = lambda name: print(name, flush=True) or time.sleep(60)\nm.run()"
    words = [sys.executable, "-c", code, "train"]
    with subprocess.Popen(words, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout.readline() == "train\n"
        running.terminate()
        assert running.stderr.read() == "deltaw: terminated\n"
        assert running.wait(10) == 143


def test_notes_are_part_of_the_line():
    error = KeyboardInterrupt()
    error.add_note("go on with this")
    assert explain(error) == ("deltaw: interrupted; go on with this", 130)


def test_of_several_processes_one_tells_of_wrong_input_and_each_of_its_own_failure(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert explain(InputError("wrong")) == ("", 2)
    assert explain(RunError("lost")) == ("deltaw: process 3: lost", 1)


def test_a_reader_that_goes_away_is_no_error():
    with process("models", "--json") as running:
        running.stdout.close()
        assert running.stderr.read() == ""
        assert running.wait(60) == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_behind_stdout_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", "from deltaw.cli.main import run; run()", "--help"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 1
    assert done.stderr.startswith("deltaw: no space left on the device")
    assert done.stderr.count("\n") == 1


def test_quickstart_passes_its_flags_on_and_prints_the_run(deltaw, monkeypatch, finished):
    import deltaw.studies.quickstart as module

    seen = {}

    def quickstart(**given):
        seen.update(given)
        given["say"]("step 1/2  loss 3")
        return finished

    monkeypatch.setattr(module, "quickstart", quickstart)
    done = deltaw("quickstart", "--output", "runs/q", "--seed", "7", "--steps", "3")
    assert done.code == 0
    assert {name: seen[name] for name in ("output", "seed", "steps")} == {"output": "runs/q", "seed": 7, "steps": 3}
    assert done.err == "step 1/2  loss 3\n"
    assert str(finished / "report.html") in done.out
    assert json.loads(deltaw("quickstart", "--json").out)["status"] == "done"


def test_a_terminal_gets_a_bar_and_keeps_other_lines(monkeypatch):
    import io

    from deltaw.cli.console import Say

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(os, "environ", {**os.environ, "TERM": "xterm", "COLUMNS": "100"})
    with Say() as say:
        say("reading rows")
        say("step 3/9  loss 1.5")
        say.bytes("a wheel", 5, 10)
        task = say._bar.tasks[0]
        assert (task.completed, task.total, task.description) == (5, 10, "a wheel")
        say("step 4/9  loss 1.2")
        assert (task.completed, task.total, task.description) == (4, 9, "step 4/9  loss 1.2")
    assert "reading rows\n" in stream.getvalue()
    assert "step 4/9  loss 1.2\n" not in stream.getvalue()


def test_only_the_first_process_speaks(monkeypatch, capsys):
    from deltaw.cli.console import Say

    monkeypatch.setenv("RANK", "1")
    with Say() as say:
        say("reading rows")
        say.bytes("a wheel", 5, 10)
    assert capsys.readouterr().err == ""


def test_a_download_is_told_once_where_there_is_no_terminal(capsys):
    from deltaw.cli.console import Say

    with Say() as say:
        for done in range(3):
            say.bytes("a wheel", done, 3)
    assert capsys.readouterr().err == "a wheel\n"


def test_tables_keep_row_names_whole_and_set_numbers_right(capsys, monkeypatch):
    from deltaw.cli.console import print_table

    monkeypatch.setenv("COLUMNS", "40")
    print_table("Title", [["Name", "N"], ["a name of some length", "1"], ["b", "1,000"]])
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "Title"
    assert [line for line in lines if "1" in line] == [
        " a name of some length       1",
        " b                       1,000",
    ]
    print_table("Nothing", [["Name"]])
    assert capsys.readouterr().out == ""


def test_usage_errors_without_a_context_name_the_command():
    made = type("NoSuchOption", (Exception,), {"option_name": "--x", "format_message": lambda self: "x", "ctx": None})()
    assert explain(made, "deltaw train")[0] == "deltaw: unknown option --x: deltaw train --help lists them"
