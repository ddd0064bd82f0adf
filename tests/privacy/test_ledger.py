import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from deltaw.core.errors import InputError
from deltaw.privacy import ledger as ledger_module
from deltaw.privacy.accounting import IntegerSum, PrivacySpec, epsilon
from deltaw.privacy.ledger import BudgetError, Ledger


def spec(steps=1, multiplier=20.0, **changes):
    """Full batches, whose accounting takes the least time."""
    return PrivacySpec(
        **{
            "unit": "example",
            "sampling_rate": 1.0,
            "noise_multiplier": multiplier,
            "steps": steps,
            "delta": 1e-5,
            **changes,
        }
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "bank" / "ledger.jsonl"


@pytest.fixture
def ledger(path):
    return Ledger.open(path, 3.0, 1e-5)


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_charges_compose_over_runs_and_restarts(ledger, path):
    first, second = spec(2), spec(3, 30.0)
    assert ledger.spent().epsilon == 0
    assert ledger.charge(("run-a", 1), first) == epsilon(first)
    assert ledger.charge(("run-b", 1), second) == epsilon([first, second])
    again = Ledger.open(path)
    assert again.spent() == epsilon([first, second])
    assert again.composed() == [first, second]
    assert [entry.key for entry in again.entries()] == ["run-a/1", "run-b/1"]
    assert [entry.epsilon for entry in again.entries()] == [epsilon(first).epsilon, again.spent().epsilon]
    assert (again.budget_epsilon, again.delta) == (3.0, 1e-5)
    assert path.stat().st_mode & 0o077 == 0


def test_a_key_is_charged_once(ledger, path):
    ledger.charge(("run", 1), spec(4))
    before = path.read_bytes()
    assert ledger.charge(("run", 1), spec(4)) == epsilon(spec(4))
    assert Ledger.open(path, 3.0, 1e-5).charge("run/1", spec(4)) == epsilon(spec(4))
    assert path.read_bytes() == before
    for other in ({"spec": spec(5)}, {"spec": spec(4), "data_sha256": "ab"}):
        with pytest.raises(InputError, match=r"run/1 was charged in .* for other releases"):
            ledger.charge(("run", 1), **other)


def test_a_charge_over_the_budget_is_refused_and_not_written(ledger, path):
    ledger.charge("one", spec(50))
    before, spent = path.read_bytes(), epsilon(spec(50)).epsilon
    with pytest.raises(
        BudgetError, match=r"two would take epsilon to .* over the budget of 3 .* is spent: take fewer"
    ) as info:
        ledger.charge("two", spec(500))
    assert path.read_bytes() == before
    assert info.value.spent == spent and info.value.asked == epsilon(spec(550)).epsilon and info.value.budget == 3.0
    assert isinstance(info.value, InputError) and "\n" not in str(info.value)
    with pytest.raises(BudgetError, match="epsilon to inf"):
        ledger.charge("bare", spec(1, 0.0))
    ledger.charge("three", spec(1))


def test_what_remains_fits_and_one_more_does_not(ledger):
    ledger.charge("one", spec(20))
    steps = ledger.remaining(sampling_rate=1.0, noise_multiplier=15.0)
    with pytest.raises(BudgetError):
        ledger.charge("more", spec(steps + 1, 15.0))
    ledger.charge("all", spec(steps, 15.0))
    assert ledger.remaining(sampling_rate=1.0, noise_multiplier=15.0) == 0


def test_data_compose_one_after_another_unless_said_to_be_disjoint(ledger):
    ledger.charge("a", spec(20), data_sha256="aa")
    ledger.charge("b", spec(20), data_sha256="bb")
    assert ledger.spent() == epsilon(spec(40))
    ledger.charge("c", spec(30), data_sha256="cc", disjoint=True)
    assert ledger.spent() == epsilon(spec(70))
    # A unit of dd has no part in cc; all have a part in what is not marked.
    ledger.charge("d", spec(40), data_sha256="dd", disjoint=True)
    assert ledger.spent() == epsilon(spec(80))
    ledger.charge("c again", spec(25), data_sha256="cc", disjoint=True)
    assert ledger.spent() == epsilon(spec(95))
    fits = ledger.remaining(sampling_rate=1.0, noise_multiplier=20.0)
    assert epsilon(spec(95 + fits)).epsilon <= 3.0 < epsilon(spec(96 + fits)).epsilon
    with pytest.raises(InputError, match="name the data set"):
        ledger.charge("e", spec(1), disjoint=True)


def test_integer_noise_and_other_units_have_their_ledgers(path):
    clients = Ledger.open(path, 9.0, 1e-5, unit="client")
    integer = IntegerSum(name="skellam", clients=3, variance=1e8, l2=1e3, dim=100)
    one = PrivacySpec.of_integers(integer, steps=2, delta=1e-5)
    clients.charge("r1", one)
    assert Ledger.open(path).composed() == [one]
    assert clients.spent() == epsilon(one)
    with pytest.raises(InputError, match="counts by client, not by example"):
        clients.charge("r2", spec())


def test_the_budget_is_changed_in_the_open(ledger, path):
    ledger.charge("one", spec(100))
    with pytest.raises(BudgetError):
        ledger.charge("two", spec(200))
    ledger.amend(budget_epsilon=8.0, reason="board decision of 3 May")
    ledger.charge("two", spec(200))
    assert Ledger.open(path, 8.0).budget_epsilon == 8.0
    assert [(line["kind"], line.get("reason")) for line in lines(path)] == [
        ("budget", None), ("charge", None), ("amend", "board decision of 3 May"), ("charge", None)
    ]  # fmt: skip
    for wrong in ({"budget_epsilon": 0.1, "reason": "less than is spent"}, {"budget_epsilon": 9.0, "reason": " "}):
        with pytest.raises(InputError, match="is spent; give both"):
            ledger.amend(**wrong)


def test_the_table_is_for_people(ledger):
    ledger.charge(("run", 7), spec(3), data_sha256="0123456789abcdef", disjoint=True)
    (row,) = ledger.table()
    assert row["key"] == "run/7" and row["steps"] == "3" and row["data"] == "0123456789ab (disjoint)"
    assert row["epsilon"] == f"{epsilon(spec(3)).epsilon:.4g}"
    assert all(isinstance(value, str) for value in row.values())


@pytest.mark.parametrize(
    "arguments, says",
    [
        ({"budget_epsilon": 4.0}, "with budget_epsilon 3.0, not 4.0"),
        ({"delta": 1e-6}, "with delta 1e-05, not 1e-06"),
        ({"unit": "customer"}, "with unit example, not customer"),
    ],
)
def test_another_budget_than_the_files_is_refused(ledger, path, arguments, says):
    with pytest.raises(InputError, match=says):
        Ledger.open(path, **arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"budget_epsilon": 1.0},
        {"budget_epsilon": 0.0, "delta": 1e-5},
        {"budget_epsilon": float("inf"), "delta": 1e-5},
        {"budget_epsilon": 1.0, "delta": 1.0},
        {"budget_epsilon": 1.0, "delta": 1e-5, "unit": "row"},
    ],
)
def test_a_new_ledger_needs_its_budget(path, arguments):
    with pytest.raises(InputError):
        Ledger.open(path, **arguments)
    assert not path.exists()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        Ledger.open(tmp_path / "file" / "ledger.jsonl", 1.0, 1e-5)


def test_each_line_holds_the_hash_of_the_one_before(ledger, path):
    import hashlib

    for n in range(3):
        ledger.charge(("r", n), spec())
    raw = path.read_bytes().splitlines()
    previous = "0" * 64
    for line in raw:
        assert json.loads(line)["previous"] == previous
        previous = hashlib.sha256(line).hexdigest()
    assert ledger.head == previous


@pytest.mark.parametrize(
    "damage",
    [
        lambda rows: [rows[0].replace(b"3.0", b"9.0"), *rows[1:]],
        lambda rows: [rows[0], rows[1].replace(b'"steps": 1', b'"steps": 0'), *rows[2:]],
        lambda rows: [rows[0], *rows[2:]],
        lambda rows: [rows[0], rows[2], rows[1], rows[3]],
        lambda rows: [rows[0], rows[1], rows[1], *rows[2:]],
        lambda rows: rows[1:],
        lambda rows: [*rows[:3], b""],
        lambda rows: [*rows[:3], b"{}", rows[3]],
        lambda rows: [*rows[:3], rows[3].replace(b"noise", b"no\xffse")],
        lambda rows: [*rows[:3], rows[3][:40]],
    ],
)
def test_a_changed_file_is_found(ledger, path, damage):
    for n in range(3):
        ledger.charge(("r", n), spec())
    rows = damage(path.read_bytes().splitlines())
    path.write_bytes(b"\n".join(rows) + b"\n")
    for use in (ledger.spent, lambda: Ledger.open(path), lambda: ledger.charge("next", spec())):
        with pytest.raises(InputError, match=r"line \d was changed or damaged .* restore the file"):
            use()


@pytest.mark.parametrize("rest", [b"{}", b"x", b'{"previous": "' + b"1" * 64, b'{"previous": "' + b"0" * 64])
def test_an_end_that_is_no_torn_line_is_damage(ledger, path, rest):
    ledger.charge("one", spec())
    with open(path, "ab") as file:
        file.write(rest)
    with pytest.raises(InputError, match="ends in something that is no line of it"):
        ledger.spent()


def test_a_torn_line_is_not_counted_and_written_over(path, ledger):
    """Cut after each byte of the last line, and with zeros where a power cut left space without content."""
    ledger.charge("one", spec(2))
    whole = path.stat().st_size
    ledger.charge("two", spec(3))
    content = path.read_bytes()
    for cut in range(whole, len(content)):
        for rest in (content[:cut], content[:cut] + bytes(7), content[:cut] + bytes(len(content) - cut - 1) + b"\n"):
            if rest == content:
                continue
            path.write_bytes(rest)
            assert [entry.key for entry in ledger.entries()] == ["one"]
    path.write_bytes(content[: whole + 90])
    assert ledger.charge("two", spec(3)) == epsilon(spec(5))
    assert [entry.key for entry in Ledger.open(path).entries()] == ["one", "two"]
    assert len(lines(path)) == 3


def test_a_torn_beginning_begins_again(path, ledger):
    content = path.read_bytes()
    for cut in range(len(content)):
        path.write_bytes(content[:cut])
        assert Ledger.open(path, 3.0, 1e-5).entries() == []
        assert path.read_bytes() == content
    path.write_bytes(b"something else")
    with pytest.raises(InputError, match="no line of it"):
        Ledger.open(path, 3.0, 1e-5)
    assert path.read_bytes() == b"something else"


CHARGING = """
import sys
from deltaw.privacy.accounting import PrivacySpec
from deltaw.privacy.ledger import Ledger

ledger = Ledger.open(sys.argv[1], 1e6, 1e-5)
for n in range(10**6):
    one = PrivacySpec(unit="example", sampling_rate=1.0, noise_multiplier=50.0, steps=1, delta=1e-5)
    ledger.charge(("run", n), one)
    print(n, flush=True)
"""


def test_a_killed_process_leaves_all_that_it_answered_for(path):
    child = subprocess.Popen([sys.executable, "-c", CHARGING, str(path)], stdout=subprocess.PIPE, text=True)
    for _ in range(5):
        assert child.stdout.readline()
    time.sleep(0.13)
    child.send_signal(signal.SIGKILL)
    answered = 5 + len(child.stdout.read().split())
    child.wait()
    child.stdout.close()
    kept = [entry.key for entry in Ledger.open(path).entries()]
    assert kept == [f"run/{n}" for n in range(len(kept))]
    assert len(kept) in (answered, answered + 1)


# Python 3.12 warns of forks beside threads; nothing here waits for one.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_threads_and_processes_take_turns(ledger, path, monkeypatch):
    monkeypatch.setattr(ledger_module, "epsilon", lambda specs, delta: epsilon([], delta=delta))
    children = []
    for _ in range(2):
        children.append(os.fork())
        if not children[-1]:
            for n in range(20):
                Ledger.open(path).charge((os.getpid(), n), spec())
            os._exit(0)
    threads = [threading.Thread(target=lambda k=k: [ledger.charge((k, n), spec()) for n in range(20)]) for k in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for child in children:
        assert os.waitpid(child, 0)[1] == 0
    assert len(ledger.entries()) == 80
