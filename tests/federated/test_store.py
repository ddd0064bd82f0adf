"""Checkpoints and logs: whole after a kill at any disk operation and in any step of a round; a client's books."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from federated_fakes import layout, start_state

from deltaw.core.errors import RunError
from deltaw.core.protocols import LowRank
from deltaw.federated.messages import Message, MessageError
from deltaw.federated.state import GlobalState
from deltaw.federated.store import ClientStore, Progress, ServerStore
from deltaw.federated.wire import digest, layout_of, layout_plain, state_of, state_tensors

HERE = Path(__file__).parents[1]
STEP = 7


def killed(tmp_path, kind):
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, HERE / "federated_kills.py", tmp_path, kind, str(STEP)],
        env=env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def told(line):
    """A line of the log without what differs from run to run: times, and how often was tried."""
    line = json.loads(line)
    silos = {
        name: {k: v for k, v in silo.items() if k not in ("seconds", "bytes_up", "bytes_down", "reason")}
        for name, silo in line["silos"].items()
    }
    left_out = ("silos", "seconds", "bytes_up", "bytes_down", "attempts", "failed_attempts")
    return {k: v for k, v in line.items() if k not in left_out} | {"silos": silos}


@pytest.mark.parametrize("kind", ["plain", "secure"])
def test_a_server_killed_at_any_moment_goes_on_to_the_same_result(tmp_path, kind):
    found = killed(tmp_path, kind)
    whole = found.pop("whole")
    assert whole["codes"] == [0] and len(whole["lines"]) == 3
    assert len(found) >= (6 + whole["count"] // STEP if kind == "plain" else 14)
    for label, run in found.items():
        assert run["codes"] == [-9, 0], label
        assert run["end"] == whole["end"], label
        assert [told(line) for line in run["lines"]] == [told(line) for line in whole["lines"]], label
        assert [name for name in run["states"] if name.startswith("round")] == ["round-000002"], label
        trained = [line for line in run["trained"] if '"train"' in line]
        # Killed between a training and its being kept, a client trains once more; in a step of the round, never.
        assert len(trained) - len(set(trained)) <= (1 if label.startswith("disk") else 0), label
        assert len(set(trained)) == 6, label


def progress(done, **changes):
    low = LowRank(torch.randn(3, 5, dtype=torch.float64), torch.randn(4, 3), 0.5)
    state = GlobalState(start_state().tensors, {"layer": low})
    line = {"round": done, "silos": {}}
    return Progress(state, layout(frozen=frozenset({"layer:lora_A"})), "ab" * 32, done=done, line=line, **changes)


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
    fold = {"layer": LowRank(torch.randn(2, 5), torch.randn(4, 2), 1.0, torch.rand(4))}
    saved = progress(2, optimizer={"first/head:bias": torch.rand(3)}, folds=[fold, fold], totals={"bytes_up": 7})
    store = ServerStore(tmp_path)
    for number in (0, 1):
        store.save(progress(number))
    store.save(saved)
    found = ServerStore(tmp_path).load()
    assert digest(state_tensors(found.state)) == digest(state_tensors(saved.state))
    assert found.state.carried["layer"].scale == 0.5 and found.layout == saved.layout
    assert (found.done, found.base, found.line, found.totals) == (2, saved.base, saved.line, saved.totals)
    assert torch.equal(found.optimizer["first/head:bias"], saved.optimizer["first/head:bias"])
    assert len(found.folds) == 2 and torch.equal(found.folds[1]["layer"].out_scale, fold["layer"].out_scale)
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["round-000002"]


def test_the_log_is_brought_to_the_checkpoint(tmp_path):
    store = ServerStore(tmp_path)
    for number in range(3):
        store.save(progress(number))
    log = tmp_path / "rounds.jsonl"
    whole = log.read_text()
    first = whole.splitlines()[0] + "\n"
    kept = [0, 1, 2]
    for broken, rounds in (
        (whole + '{"round": 3, "si', kept),
        (whole[:-9], kept),
        (whole + '{"round": 3}\n', kept),
        (first, [0, 2]),
    ):
        log.write_text(broken)
        store.load()
        assert [json.loads(line)["round"] for line in log.read_text().splitlines()] == rounds


def test_attempts_are_never_given_twice(tmp_path):
    assert [ServerStore(tmp_path).attempt(round_) for round_ in (0, 0, 1, 1, 1, 2)] == [0, 1, 0, 1, 2, 0]


def test_a_damaged_checkpoint_or_book_is_an_error_that_names_it(tmp_path):
    ServerStore(tmp_path).save(progress(1))
    file = tmp_path / "state" / "round-000001" / "state.message"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(RunError, match=r"round-000001 cannot be read: .*checksum"):
        ServerStore(tmp_path).load()
    store = ClientStore(tmp_path / "books")
    store.save("run-1", "trained", Message("trained", {"round": 1}, {"x": torch.ones(2)}))
    (tmp_path / "books" / "run-1" / "trained.message").write_bytes(b"x" * 50)
    with pytest.raises(RunError, match=r"trained.message.*restore it"):
        store.load("run-1", "trained")


@pytest.mark.parametrize("on_disk", [False, True])
def test_books_keep_the_last_message_of_a_name_by_run(tmp_path, on_disk):
    store = ClientStore(tmp_path / "books" if on_disk else None)
    assert store.load("run-1", "book") is None
    for number in range(2):
        store.save("run-1", "book", Message("book", {"n": number}, {"x": torch.full((2,), float(number))}))
    store.save("run-2", "book", Message("book", {"n": 9}))
    assert store.load("run-1", "book").header == {"n": 1} and store.load("run-1", "book").tensors["x"][0] == 1
    store.drop("run-1", "book", "never-there")
    assert store.load("run-1", "book") is None and store.load("run-2", "book").header == {"n": 9}
    if on_disk:
        assert stat.S_IMODE((tmp_path / "books" / "run-2").stat().st_mode) == 0o700
        with pytest.raises(MessageError, match="a run's id"):
            store.save("../run", "book", Message("book", {}))


def test_states_and_layouts_come_back_from_what_is_written():
    made = progress(0)
    assert layout_of(json.loads(json.dumps(layout_plain(made.layout)))) == made.layout
    back = state_of(state_tensors(made.state))
    assert digest(state_tensors(back)) == digest(state_tensors(made.state))
    other = GlobalState({**made.state.tensors, "head:bias": made.state.tensors["head:bias"] + 1e-6})
    assert digest(state_tensors(other)) != digest(state_tensors(GlobalState(made.state.tensors)))
    cut = {name: value for name, value in state_tensors(made.state).items() if not name.endswith(":B")}
    with pytest.raises(MessageError, match="layer lacks a factor"):
        state_of(cut)
