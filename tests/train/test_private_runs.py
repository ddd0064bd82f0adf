"""Runs under differential privacy: what a step is, what is told of it, what is charged, and what is refused."""

from __future__ import annotations

import itertools
import json
import math
import re

import pytest
import small_runs
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.checkpoint import load_model, load_tokenizer
from deltaw.core.errors import InputError, RunError
from deltaw.data import Collator, encode, read_rows
from deltaw.methods import LoRA, adapt, adapter_parameters
from deltaw.privacy.ledger import BudgetError, Ledger
from deltaw.privacy.noise import SecureNoise
from deltaw.studies.job import resume
from deltaw.studies.job import run_training as train
from deltaw.train import TrainConfig
from deltaw.train.losses import SummedLoss
from deltaw.train.private import micro_batches, plan_privacy, rows_of_units
from deltaw.train.trainer import DeltawTrainer

KEYS = {
    "r": 2, "max_steps": 3, "batch_size": 8, "micro_batch_size": 4, "learning_rate": 5e-3, "warmup_ratio": 0.0,
    "schedule": "constant", "log_every": 1, "held_out": 0, "dtype": "float32", "device": "cpu", "max_length": 48,
    "evaluate_before": False, "baselines": False, "dp": True, "noise_multiplier": 1.0,
}  # fmt: skip
#: No noise and no clipping.
PLAIN = {"noise_multiplier": 0.0, "max_grad_norm": 1e6}
CUSTOMERS = ["a", "b", "a", "c", "d", "a", "c", "a"]
ALL_ROWS = 8


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("private")
    for family in ("llama", "bert", "gpt2"):
        small_runs.make_model(folder / family, family, layers=1, std=0.1)
    rows = small_runs.rows_of("label", ALL_ROWS)
    rows = [row | {"who": who} for row, who in zip(rows, CUSTOMERS, strict=True)]
    small_runs.write_rows(folder / "label.jsonl", rows)
    small_runs.write_rows(folder / "many.jsonl", small_runs.rows_of("label", 40))
    small_runs.write_rows(folder / "eval.jsonl", small_runs.rows_of("label", 6, seed=1))
    return folder


def keys_for(place, output, *, family="llama", rows="label", **changes):
    given = {"model": str(place / family), "data": str(place / f"{rows}.jsonl"), "output": str(output)}
    return {key: value for key, value in (KEYS | given | changes).items() if value is not None}


@pytest.fixture
def steps(monkeypatch):
    """The gradients that each optimizer step takes."""
    found, own = [], DeltawTrainer.check_finite

    def check_finite(self):
        own(self)
        found.append({n: p.grad.clone() for n, p in adapter_parameters(self.model, "default").items()})

    monkeypatch.setattr(DeltawTrainer, "check_finite", check_finite)
    return found


class ByHand:
    """The run's model at its start and its rows, each a batch of its own, with transformers' own loss."""

    def __init__(self, place, family, task):
        source = str(place / family)
        rows, tokenizer = read_rows(str(place / "label.jsonl")), load_tokenizer(source)
        labels = ["bad", "good"] if task == "sequence-classification" else None
        self.model = load_model(source, task=task, labels=labels, dtype="float32", device="cpu", seed=0)
        heads = ["classifier", "bert.pooler"] if labels else None
        adapt(self.model, LoRA(r=2, modules_to_save=heads), seed=0)
        self.model.train()
        self.parameters = adapter_parameters(self.model, "default")
        collator = Collator(task, tokenizer.pad_token_id)
        self.rows = [collator([one]) for one in encode(rows, tokenizer, task, max_length=48, labels=labels).examples]

    def gradients(self, rows):
        """Of the mean over rows of their losses, each a mean over the row's labels."""
        self.model.zero_grad()
        torch.stack([self.model(**self.rows[i]).loss for i in rows]).mean().backward()
        return {name: p.grad.clone() for name, p in self.parameters.items()}


def assert_close(got, expected, tolerance):
    whole = torch.stack([value.norm() for value in expected.values()]).norm()
    assert got.keys() == expected.keys() and whole > 0
    for name, value in expected.items():
        assert (got[name] - value).norm() <= tolerance * whole, name


# A step.


TASKS = [("llama", "instruct"), ("gpt2", "instruct"), ("bert", "sequence-classification")]


@pytest.mark.parametrize(("family", "task"), TASKS)
@pytest.mark.parametrize("micro", [8, 2])
def test_all_rows_without_noise_and_clipping_are_plain_training(place, tmp_path, steps, family, task, micro):
    train(**keys_for(place, tmp_path / "run", family=family, task=task, micro_batch_size=micro, **PLAIN))
    hand = ByHand(place, family, task)
    optimizer = torch.optim.AdamW(hand.parameters.values(), lr=5e-3, weight_decay=0.0)
    assert len(steps) == 3
    for number, got in enumerate(steps):
        expected = hand.gradients(range(ALL_ROWS))
        # Sums in another order in float32; later steps start from weights that Adam has moved by those differences.
        assert_close(got, expected, 2e-5 if number == 0 else 2e-3)
        optimizer.step()


def test_a_customers_rows_are_clipped_as_one(place, tmp_path, steps):
    """Sum over customers of their rows' mean gradient, none longer than the bound, over the number of customers."""
    hand = ByHand(place, "llama", "instruct")
    units = [[i for i, who in enumerate(CUSTOMERS) if who == name] for name in "abcd"]
    each = [hand.gradients(rows) for rows in units]
    norms = [torch.stack([g.norm() for g in one.values()]).norm() for one in each]
    bound = float(sorted(norms)[1]) * 1.01
    factors = [min(1.0, bound / (float(norm) + 1e-6)) for norm in norms]
    expected = {n: sum(f * one[n] for f, one in zip(factors, each, strict=True)) / len(units) for n in each[0]}
    changes = {"noise_multiplier": 0.0, "max_grad_norm": bound, "unit": "who", "batch_size": 4, "max_steps": 1}
    run = train(**keys_for(place, tmp_path / "run", micro_batch_size=2, **changes))
    assert_close(steps[0], expected, 2e-5)
    assert small_runs.record(run)["privacy"]["unit"] == "customer"


def test_an_empty_step_is_noise_alone(place, tmp_path, steps, monkeypatch):
    monkeypatch.setattr(SecureNoise, "bernoulli", lambda self, n, p: torch.zeros(n, dtype=torch.bool))
    train(**keys_for(place, tmp_path / "run", rows="many", noise_multiplier=1.5, max_grad_norm=0.4, r=8))
    values = torch.cat([g.flatten() for step in steps for g in step.values()])
    std = 1.5 * 0.4 / 8
    # Four standard errors of a normal sample's deviation and mean; the worst of n values lies below 6 deviations.
    assert float(values.std()) == pytest.approx(std, rel=4 / math.sqrt(2 * len(values)))
    assert abs(float(values.mean())) < 4 * std / math.sqrt(len(values))
    assert 3 * std < float(values.abs().max()) < 6 * std
    assert not any(torch.equal(steps[0][name], steps[1][name]) for name in steps[0])


def test_units_are_drawn_each_by_itself(place, tmp_path, monkeypatch):
    seen, own = [], DeltawTrainer.training_step

    def note(self, model, inputs, num_items_in_batch=None):
        seen.append([row for micro in inputs for row in micro.rows])
        return own(self, model, inputs, num_items_in_batch)

    monkeypatch.setattr(DeltawTrainer, "training_step", note)
    train(**keys_for(place, tmp_path / "run", rows="many", max_steps=40, target_modules=["q_proj"]))
    counts = [len(rows) for rows in seen]
    assert len(counts) == 40 and all(len(set(rows)) == len(rows) for rows in seen)
    # 1600 draws of probability 0.2; a number of rows that is the same each time would be no Poisson sampling.
    assert abs(sum(counts) - 320) < 5 * math.sqrt(1600 * 0.2 * 0.8)
    assert len(set(counts)) > 3 and seen[0] != seen[1]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=0, max_size=8), st.integers(1, 6), st.data())
def test_micro_batches_hold_every_row_once(sizes, micro_batch_size, data):
    numbers = iter(range(sum(sizes)))
    units = [[next(numbers) for _ in range(size)] for size in sizes]
    lengths = [data.draw(st.integers(1, 9)) for _ in range(sum(sizes))]
    made = micro_batches(units, lengths, micro_batch_size=micro_batch_size)
    found, unit, fresh = {}, -1, True
    for micro in made:
        assert 1 <= len(micro.rows) <= micro_batch_size
        own = list(range(len(micro.rows))) if micro.units is None else micro.units
        assert own[0] == 0 and all(0 <= b - a <= 1 for a, b in itertools.pairwise(own))
        first = unit + fresh
        for row, number, share in zip(micro.rows, own, micro.shares, strict=True):
            unit = first + number
            found.setdefault(unit, []).append((row, share))
        fresh = not micro.stays_open
    assert fresh
    assert sorted([row for row, _ in rows] for rows in found.values()) == sorted(units)
    assert all(share == 1 / len(rows) for rows in found.values() for _, share in rows)


# What is told.


def test_no_loss_is_told(place, tmp_path):
    lines = []
    run = train(**keys_for(place, tmp_path / "run", save_every=1, max_steps=4), say=lines.append)
    logged = small_runs.logged(run)
    assert [line["step"] for line in logged] == [1, 2, 3, 4]
    assert {key for line in logged for key in line} <= {"step", "epoch", "grad_norm", "learning_rate"}
    said = "\n".join(lines)
    assert not re.search(r"\bloss\b|perplexity|tokens/s", said)
    assert "private: noise multiplier 1, clipping norm 1" in said
    record = small_runs.record(run)
    assert not {"tokens", "tokens_per_s"} & record["cost"].keys() and "baselines" not in record["metrics"]
    for file in [*run.rglob("*.json"), *run.rglob("*.jsonl")]:
        text = file.read_text()
        keys = set(re.findall(r'"([^"]*(?:loss|perplexity)[^"]*)":', text))
        # How many labels the data has, and names of settings.
        assert keys <= {"loss_tokens"}, (file, keys)
    for file in run.rglob("trainer_state.json"):
        assert json.loads(file.read_text())["log_history"]


def test_evaluation_is_of_other_rows_only(place, tmp_path):
    given = {"eval_data": str(place / "eval.jsonl"), "baselines": True, "held_out": None}
    lines = []
    run = train(**keys_for(place, tmp_path / "run", **given), say=lines.append)
    assert any("eval_loss" in line for line in small_runs.logged(run))
    assert not any("loss" in line for line in small_runs.logged(run))
    assert "baselines" not in small_runs.record(run)["metrics"]
    assert any("baselines are not measured under dp" in line for line in lines)


def test_the_statement_is_in_the_record(place, tmp_path):
    run = train(**keys_for(place, tmp_path / "run", rows="many", noise_multiplier=None, target_epsilon=0.5))
    privacy = small_runs.record(run)["privacy"]
    assert 0.49 < privacy["epsilon"] <= 0.5 <= privacy["epsilon_rdp"] and privacy["target_epsilon"] == 0.5
    expected = {"level": "example", "unit": "example", "adjacency": "add-or-remove-one", "sampling": "poisson"}
    expected |= {"sampling_rate": 0.2, "steps": 3, "delta": 1e-5, "max_grad_norm": 1.0}
    assert {key: privacy[key] for key in expected} == expected
    none = train(**keys_for(place, tmp_path / "none", **PLAIN))
    privacy = small_runs.record(none)["privacy"]
    assert "epsilon" not in privacy and "nothing is hidden" in privacy["statement"]
    assert privacy["sampling"] == "full"


# The ledger, and runs that die.


class Stopped(BaseException):
    """Stands for the death of the process."""


@pytest.mark.parametrize("moment", ["between the record and the charge", "after the charge", "in the third step"])
def test_a_killed_run_goes_on_and_is_charged_once(place, tmp_path, monkeypatch, moment):
    ledger = tmp_path / "ledger.jsonl"
    budget = {"ledger": str(ledger), "budget_epsilon": 8.0, "noise_multiplier": 4.0}
    if moment == "in the third step":
        # The noise that was charged for is the run's, and the whole budget with it.
        budget |= {"noise_multiplier": None, "target_epsilon": 0.5, "budget_epsilon": 0.5}
    keys = keys_for(place, tmp_path / "run", rows="many", max_steps=5, save_every=2, **budget)
    step, charge = DeltawTrainer.training_step, Ledger.charge

    def dying_step(self, *args, **kwargs):
        if self.state.global_step == 2:
            raise Stopped
        return step(self, *args, **kwargs)

    def dying_charge(self, *args, **kwargs):
        if moment.startswith("after"):
            charge(self, *args, **kwargs)
        raise Stopped

    with monkeypatch.context() as patched:
        if moment == "in the third step":
            patched.setattr(DeltawTrainer, "training_step", dying_step)
        else:
            patched.setattr(Ledger, "charge", dying_charge)
        with pytest.raises(Stopped):
            train(**keys)
    before = small_runs.record(tmp_path / "run")["privacy"]
    run = resume(tmp_path / "run").path
    after = small_runs.record(run)["privacy"]
    assert after.pop("ledger_head") == Ledger.open(ledger).head
    before.pop("ledger_head", None)
    assert after == before and small_runs.record(run)["status"] == "done"
    assert [line["step"] for line in small_runs.logged(run)] == [1, 2, 3, 4, 5]
    (entry,) = Ledger.open(ledger).entries()
    assert entry.spec.steps == 5 and entry.spec.noise_multiplier == after["noise_multiplier"]
    assert entry.spec.sampling_rate == 0.2 and entry.epsilon <= 0.5


def test_a_ledger_that_is_full_refuses_the_run(place, tmp_path, steps):
    ledger = tmp_path / "ledger.jsonl"
    keys = keys_for(place, tmp_path / "first", rows="many", ledger=str(ledger), budget_epsilon=0.6)
    lines = []
    train(**keys | {"noise_multiplier": 4.0}, say=lines.append)
    assert any(re.search(r"epsilon \S+ of 0.6 is spent with this run", line) for line in lines)
    before, taken = ledger.read_bytes(), len(steps)
    with pytest.raises(BudgetError, match=r"over the budget of 0.6 in .*is spent: take fewer steps"):
        train(**keys | {"output": str(tmp_path / "second"), "max_steps": 200})
    assert len(steps) == taken and not (tmp_path / "second").exists()
    # A target is the run's alone; the budget is of all.
    target = keys | {"output": str(tmp_path / "third"), "noise_multiplier": None, "target_epsilon": 0.6}
    with pytest.raises(BudgetError, match=r"over the budget of 0\.6"):
        train(**target)
    third = train(**target | {"target_epsilon": 0.25})
    opened = Ledger.open(ledger)
    assert opened.spent().epsilon <= 0.6 and len(opened.entries()) == 2
    assert 0.2 < small_runs.record(third)["privacy"]["epsilon"] <= 0.25
    assert ledger.read_bytes().startswith(before)


# Refusals.


WRONG = [
    ({"dp": False, "noise_multiplier": 1.0}, "noise_multiplier is given and dp is off"),
    ({"dp": False, "noise_multiplier": None, "unit": "who"}, "unit is given and dp is off"),
    ({"dp": False, "noise_multiplier": None, "ledger": "x"}, "ledger is given and dp is off"),
    ({"dp": False, "noise_multiplier": None, "target_epsilon": 3.0}, "target_epsilon is given and dp is off"),
    ({"dp": False, "noise_multiplier": None, "delta": 1e-5}, "delta is given and dp is off"),
    ({"dp": False, "noise_multiplier": None, "budget_epsilon": 1.0}, "budget_epsilon is given and dp is off"),
    ({"noise_multiplier": None}, "dp needs noise_multiplier or target_epsilon"),
    ({"target_epsilon": 3.0}, "dp needs noise_multiplier or target_epsilon"),
    ({"noise_multiplier": -1.0}, "noise_multiplier is -1.0: expected a number above 0"),
    ({"noise_multiplier": math.inf}, "noise_multiplier is inf"),
    ({"noise_multiplier": None, "target_epsilon": 0.0}, "target_epsilon is 0.0"),
    ({"ledger": "x", "budget_epsilon": -2.0}, "budget_epsilon is -2.0"),
    ({"delta": 1.0}, "delta is 1.0: expected a probability"),
    ({"max_grad_norm": 0.0}, "max_grad_norm is 0, and under dp"),
    ({"pack": True}, "pack does not go with dp, as packed rows share one gradient"),
    ({"merge_aware": 0.5}, "merge_aware does not go with dp"),
    ({"sharding": "fsdp2"}, "sharding fsdp2 does not go with dp"),
    ({"budget_epsilon": 3.0}, "budget_epsilon is that of a ledger"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "said"), WRONG, ids=[said[:40] for _, said in WRONG])
def test_keys_that_contradict_each_other(changes, said):
    with pytest.raises(InputError) as raised:
        TrainConfig(data="x", **({"dp": True, "noise_multiplier": 1.0} | changes))
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_what_the_rows_refuse(place, tmp_path):
    cases = [
        ({"unit": "customer"}, "found the columns 'text', 'label', 'who', and not 'customer', which unit names"),
        ({"batch_size": 16}, "batch_size is 16, the units that a step has on average, and there are 8"),
        ({"unit": "who"}, "batch_size is 8, .* and there are 4"),
        ({"delta": 0.2}, "delta 0.2 with 8 units"),
        ({"noise_multiplier": None, "target_epsilon": 1e-5}, "no noise keeps 3 steps"),
    ]
    for number, (changes, said) in enumerate(cases):
        with pytest.raises(InputError, match=said) as raised:
            train(**keys_for(place, tmp_path / str(number), **changes))
        assert "\n" not in str(raised.value)


def test_a_row_without_a_customer_is_refused(place, tmp_path):
    rows = [row | ({"who": "a"} if i else {}) for i, row in enumerate(small_runs.rows_of("label", 8))]
    data = small_runs.write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(InputError, match="who"):
        train(**keys_for(place, tmp_path / "run", unit="who", data=data, batch_size=1, micro_batch_size=1))


def test_delta_is_below_a_tenth_of_one_over_the_units():
    config = TrainConfig(data="x", dp=True, noise_multiplier=1.0)
    units = rows_of_units(None, 50_000)
    assert plan_privacy(config, units, steps=1).delta == 0.1 / 50_000
    assert plan_privacy(config, units[:100], steps=1).delta == 1e-5
    assert rows_of_units(CUSTOMERS, 8) == [[0, 2, 5, 7], [1], [3, 6], [4]]


def test_a_loss_that_couples_rows_is_refused(place, tmp_path):
    tokenizer = small_runs.byte_tokenizer()
    shape = dict(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, max_position_embeddings=64,
    )  # fmt: skip
    for balanced in (True, False):
        with torch.random.fork_rng(devices=[]):
            model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**shape, output_router_logits=balanced))
        model.save_pretrained(tmp_path / "mixtral")
        tokenizer.save_pretrained(tmp_path / "mixtral")
        keys = keys_for(place, tmp_path / str(balanced), target_modules="attention", max_steps=1)
        keys["model"] = str(tmp_path / "mixtral")
        if balanced:
            with pytest.raises(InputError, match="balances its experts over a whole batch"):
                train(**keys)
        else:
            train(**keys)


# Guards.


def test_a_gradient_that_no_clipping_sees_is_refused(place, tmp_path, monkeypatch):
    own = SummedLoss.__call__

    def with_decay(self, model, inputs, *, over=1):
        factor = next(p for n, p in adapter_parameters(model, "default").items() if "lora_A" in n)
        return own(self, model, inputs, over=over) + 1e-3 * factor.square().sum()

    monkeypatch.setattr(SummedLoss, "__call__", with_decay)
    with pytest.raises(RunError, match=r"1 trained tensors \(.*lora_A.*\) got a gradient that is not clipped"):
        train(**keys_for(place, tmp_path / "run", max_steps=1))
    assert not (tmp_path / "run" / "adapter").exists()
    assert small_runs.record(tmp_path / "run")["status"] == "failed"


def test_a_tensor_that_gets_no_gradient_is_refused(place, tmp_path, monkeypatch):
    """A sink that is fed by nothing must not pass for a tensor that needs no clipping."""
    from deltaw.privacy.clipping import ExampleGradients

    own = ExampleGradients.feed

    def forgetful(self, parameter, gradients):
        if "q_proj" not in self._names[id(parameter)]:
            own(self, parameter, gradients)

    monkeypatch.setattr(ExampleGradients, "feed", forgetful)
    with pytest.raises(RunError, match=r"trained tensors get no gradient .*q_proj"):
        train(**keys_for(place, tmp_path / "run", max_steps=1))


@pytest.mark.parametrize("changes", [{"learning_rate": 1e-60}, {"learning_rate": 1e-60, "max_steps": 1}])
def test_a_run_that_moved_nothing_fails(place, tmp_path, changes):
    with pytest.raises(RunError, match="training has not moved any of the 14 trained tensors"):
        train(**keys_for(place, tmp_path / "run", **changes))
    assert small_runs.record(tmp_path / "run")["status"] == "failed"
    assert not (tmp_path / "run" / "adapter").exists()


# With other things.


def test_adalora_cuts_its_ranks_by_noised_gradients(place, tmp_path, steps):
    changes = {"method": "adalora", "r": None, "init_r": 4, "target_r": 2, "max_steps": 12, "log_every": 4}
    run = train(**keys_for(place, tmp_path / "run", rows="many", noise_multiplier=0.7, **changes))
    sites = {site["name"]: site["r"] for site in small_runs.record(run)["method"]["sites"] if "r" in site}
    assert len(sites) == 7 and sum(sites.values()) == 14 and max(sites.values()) <= 4
    assert small_runs.record(run)["privacy"]["steps"] == 12
    assert len(steps) == 12 and all(bool(g.abs().max() > 0) for step in steps for g in step.values())


def test_four_bits_and_recomputation_change_nothing(place, tmp_path, steps):
    for checkpointing in (False, True):
        changes = {"method": "qlora", "gradient_checkpointing": checkpointing, "max_steps": 2, "noise_multiplier": 0.0}
        run = train(**keys_for(place, tmp_path / str(checkpointing), max_grad_norm=0.05, **changes))
        assert small_runs.record(run)["model"]["four_bit_parameters"] > 0
    first, second, again_first, again_second = steps
    assert_close(again_first, first, 1e-5)
    assert_close(again_second, second, 1e-3)
    noised = train(**keys_for(place, tmp_path / "noised", method="qlora", gradient_checkpointing=True))
    assert small_runs.record(noised)["status"] == "done"
