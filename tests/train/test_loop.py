"""The loop: its steps, rates and gradients against plain torch, and how it stops."""

from __future__ import annotations

import collections
import math
import shutil
import sys

import pytest
import small_runs
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.training_args import OptimizerNames

import deltaw.fuse.head
import deltaw.studies.job
import deltaw.train.loop
from deltaw.checkpoint import load_model, load_tokenizer
from deltaw.core.errors import InputError, MissingExtraError, RunError
from deltaw.data import Collator, encode, read_rows
from deltaw.evaluate.task import AnswerCollator, masking_collator, split_answers
from deltaw.methods import LoRA, adapt, adapter_parameters
from deltaw.studies.job import resume
from deltaw.studies.job import run_training as train
from deltaw.train import TrainConfig
from deltaw.train.order import StepOrder
from deltaw.train.run_folder import RunFolder
from deltaw.train.trainer import DeltawTrainer

KEYS = {
    "r": 2, "epochs": 1, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 5e-3, "log_every": 1, "held_out": 0,
    "dtype": "float32", "device": "cpu", "max_length": 64, "evaluate_before": False, "baselines": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loop")
    for family in ("llama", "gpt2", "bert", "t5"):
        small_runs.make_model(folder / family, family, std=0.1)
    for layout in ("label", "text", "tags", "prompt"):
        small_runs.write_rows(folder / f"{layout}.jsonl", small_runs.rows_of(layout, 24))
    small_runs.write_rows(folder / "eval.jsonl", small_runs.rows_of("label", 6, seed=1))
    return folder


def keys_for(place, output, *, family="llama", rows="label", **changes):
    given = {"model": str(place / family), "data": str(place / f"{rows}.jsonl"), "output": str(output)}
    return KEYS | given | changes


@pytest.fixture
def spy(monkeypatch):
    """Calls a function with the trainer before each step (`steps`) or micro-batch (`micro`); keeps the trainer."""

    class Spy:
        trainer = None
        micro = staticmethod(lambda trainer, inputs: None)
        step = staticmethod(lambda trainer: None)

    found = Spy()
    own_step, own_check = DeltawTrainer.training_step, DeltawTrainer.check_finite

    def training_step(self, model, inputs, num_items_in_batch=None):
        found.trainer = self
        found.micro(self, inputs)
        return own_step(self, model, inputs, num_items_in_batch)

    def check_finite(self):
        own_check(self)
        found.step(self)

    monkeypatch.setattr(DeltawTrainer, "training_step", training_step)
    monkeypatch.setattr(DeltawTrainer, "check_finite", check_finite)
    return found


def fuse_adamw(monkeypatch):
    """Runs take the AdamW of GPUs, which skips an update by itself."""
    own = deltaw.train.loop.training_arguments

    def training_arguments(*args, **kwargs):
        made = own(*args, **kwargs)
        made.optim = OptimizerNames.ADAMW_TORCH_FUSED
        return made

    monkeypatch.setattr(deltaw.train.loop, "training_arguments", training_arguments)


@pytest.fixture(params=[False, True], ids=["plain", "fused"])
def fused(request, monkeypatch):
    if request.param:
        fuse_adamw(monkeypatch)
    return request.param


def weights_of(trainer):
    return {name: p.detach().clone() for name, p in adapter_parameters(trainer.model, "default").items()}


# Rates and batches.


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_rates_follow_the_formula(place, tmp_path, schedule):
    keys = keys_for(place, tmp_path / "run", epochs=5, warmup_ratio=0.1, schedule=schedule, r=1)
    run = train(**keys)
    lines = small_runs.logged(run)
    total, warm, top = 30, 3, keys["learning_rate"]
    assert [line["step"] for line in lines] == list(range(1, total + 1))
    for done, line in enumerate(lines):
        progress = (done - warm) / (total - warm)
        after = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}[schedule]
        assert line["learning_rate"] == pytest.approx(top * (done / warm if done < warm else after), rel=1e-9)
        assert line["epoch"] == pytest.approx((done + 1) / 6, abs=1e-6)
    assert lines[-1]["tokens"] == 5 * small_runs.record(run)["data"]["train"]["tokens"]


def test_the_defaults():
    config = TrainConfig(data="x")
    assert (config.batch_size, config.warmup_ratio, config.schedule, config.learning_rate) == (32, 0.05, "cosine", 2e-4)
    assert 1e-5 <= TrainConfig(data="x", method="full").learning_rate <= 5e-5


def test_a_step_takes_32_rows(place, tmp_path, spy):
    rows = small_runs.write_rows(tmp_path / "rows.jsonl", small_runs.rows_of("label", 70))
    seen = collections.Counter()
    spy.micro = lambda trainer, inputs: seen.update({trainer.state.global_step: len(inputs["input_ids"])})
    train(**{k: v for k, v in keys_for(place, tmp_path / "run").items() if "batch" not in k} | {"data": rows})
    assert seen == {0: 32, 1: 32, 2: 6}


@pytest.mark.parametrize("log_every", [1, 100])
def test_batches_made_ahead_are_those_of_the_order(place, tmp_path, spy, monkeypatch, log_every):
    rows = small_runs.write_rows(tmp_path / "rows.jsonl", small_runs.rows_of("text", 21))
    made, seen, told, own, write = [], [], [], Collator.__call__, RunFolder.log

    def collate(self, examples):
        made.append([example["input_ids"] for example in examples])
        return own(self, examples)

    def log(self, line):
        told.append((line["step"], len(made)))
        write(self, line)

    monkeypatch.setattr(Collator, "__call__", collate)
    monkeypatch.setattr(RunFolder, "log", log)
    spy.micro = lambda trainer, inputs: seen.append((trainer.state.global_step, inputs))
    keys = {"rows": "text", "task": "causal-lm", "epochs": 2, "batch_size": 6, "log_every": log_every}
    train(**keys_for(place, tmp_path / "run", **keys) | {"data": rows})
    trainer, wanted = spy.trainer, []
    lengths = [len(example["input_ids"]) for example in trainer.train_dataset]
    order = StepOrder(lengths, step_rows=6, seed=trainer.args.data_seed)
    for order.epoch in (0, 1):
        # 6 + 6 + 6 + 3 rows, in micro-batches of 2.
        epoch = list(order)
        pieces = [epoch[i : i + 2] for i in range(0, 21, 2)]
        wanted += [(4 * order.epoch + i // 3, piece) for i, piece in enumerate(pieces)]
    assert [step for step, _ in seen] == [step for step, _ in wanted]
    for (_, inputs), (_, piece) in zip(seen, wanted, strict=True):
        batch = own(trainer.data_collator, [trainer.train_dataset[row] for row in piece])
        assert all(torch.equal(inputs[name], batch[name]) for name in batch)
    if log_every == 1:
        # Of a step inside an epoch the next one's three are there when its line is written.
        assert [count for step, count in told if step % 4 and step % 4 != 3] == [7, 10, 18, 21]


def test_every_module_trains_whatever_an_evaluation_leaves(place, tmp_path, spy, monkeypatch):
    own = DeltawTrainer.evaluate

    def evaluate(self, *args, **kwargs):
        found = own(self, *args, **kwargs)
        self.model.eval()
        return found

    modes = []
    spy.micro = lambda trainer, inputs: trainer.model.register_forward_pre_hook(
        lambda model, args: modes.append({module.training for module in model.modules()})
    )
    monkeypatch.setattr(DeltawTrainer, "evaluate", evaluate)
    keys = keys_for(place, tmp_path / "run", eval_every=2, micro_batch_size=4)
    train(**{key: value for key, value in keys.items() if key != "held_out"} | {"eval_data": str(place / "eval.jsonl")})
    assert len(modes) >= 6 and modes.count({True}) >= 6


CASES = {
    "llama causal-lm": ("llama", "text", "causal-lm"),
    "gpt2 causal-lm": ("gpt2", "text", "causal-lm"),
    "llama instruct": ("llama", "label", "instruct"),
    "t5 instruct": ("t5", "prompt", "instruct"),
    "llama classes": ("llama", "label", "sequence-classification"),
    "gpt2 classes": ("gpt2", "label", "sequence-classification"),
    "bert classes": ("bert", "label", "sequence-classification"),
    "t5 classes": ("t5", "label", "sequence-classification"),
    "llama tags": ("llama", "tags", "token-classification"),
    "bert tags": ("bert", "tags", "token-classification"),
    "bert masked-lm": ("bert", "text", "masked-lm"),
}


@pytest.mark.parametrize("micro", [1, 4])
@pytest.mark.parametrize("name", CASES)
def test_a_steps_gradient_is_that_of_one_batch(place, tmp_path, spy, name, micro):
    """Rows differ in how many tokens carry loss: a mean of means would be something else."""
    family, layout, task = CASES[name]
    data = small_runs.write_rows(tmp_path / "rows.jsonl", small_runs.rows_of(layout, 8))
    found = {}

    def gather(trainer):
        parameters = adapter_parameters(trainer.model, "default").items()
        found.update({name: p.grad.clone() for name, p in parameters if p.requires_grad})

    spy.step = gather
    keys = keys_for(place, tmp_path / "run", family=family, task=task, batch_size=8, micro_batch_size=micro)
    train(**keys | {"data": data, "max_grad_norm": 0.0, "warmup_ratio": 0.0})
    line = small_runs.logged(tmp_path / "run")[0]

    rows = read_rows(data)
    tokenizer = load_tokenizer(keys["model"])
    labels = small_runs.record(tmp_path / "run")["metrics"].get("labels")
    encoded = encode(rows, tokenizer, task, max_length=64, labels=labels).examples
    collator = Collator(task, tokenizer.pad_token_id) if task != "masked-lm" else masking_collator(tokenizer, 0)
    if family == "t5" and task == "instruct":
        encoded, collator = split_answers(encoded, tokenizer), AnswerCollator(tokenizer.pad_token_id)
    names = labels if task.endswith("classification") else None
    model = load_model(keys["model"], task=task, labels=names, dtype="float32", device="cpu", seed=0)
    head = [h for h in ("score", "classifier", "classification_head") if hasattr(model, h)]
    head += ["bert.pooler"] if name == "bert classes" else []
    adapt(model, LoRA(r=2, modules_to_save=head or None), seed=0)
    loss = model.train()(**collator(encoded)).loss
    loss.backward()
    assert line["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    own = {name: p.grad for name, p in adapter_parameters(model, "default").items()}
    assert own.keys() == found.keys()
    norm = math.sqrt(sum(float(grad.square().sum()) for grad in own.values()))
    assert line["grad_norm"] == pytest.approx(norm, rel=1e-4)
    for key, grad in own.items():
        torch.testing.assert_close(found[key], grad, rtol=0.0, atol=2e-5 * norm, msg=key)


def test_a_loss_that_is_told_nothing_is_made_from_the_logits(place, tmp_path, spy, monkeypatch):
    """A model whose own loss is a mean over its micro-batch, whatever the whole step holds."""
    own = deltaw.studies.job.load_job_model

    def load(*args, **kwargs):
        model = own(*args, **kwargs)
        usual = model.loss_function
        model.loss_function = lambda num_items_in_batch=None, **kwargs: usual(**kwargs)
        return model

    train(**keys_for(place, tmp_path / "usual", rows="text", task="causal-lm"))
    monkeypatch.setattr(deltaw.studies.job, "load_job_model", load)
    lines = []
    train(**keys_for(place, tmp_path / "mean", rows="text", task="causal-lm"), say=lines.append)
    assert any("loss computed from the logits of every position" in line for line in lines)
    pairs = zip(small_runs.logged(tmp_path / "mean"), small_runs.logged(tmp_path / "usual"), strict=True)
    for line, other in pairs:
        assert line == pytest.approx(other, rel=1e-3)


def test_packed_rows_give_the_gradient_of_single_ones(place, tmp_path, spy):
    norms = {}
    for pack in (False, True):
        output = tmp_path / str(pack)
        train(**keys_for(place, output, rows="text", task="causal-lm", pack=pack, batch_size=24, micro_batch_size=24))
        norms[pack] = {k: small_runs.logged(output)[0][k] for k in ("loss", "grad_norm")}
    assert norms[True] == pytest.approx(norms[False], rel=1e-4)


def test_masks_are_drawn_anew_each_epoch(place, tmp_path, spy):
    seen = collections.defaultdict(set)

    def note(trainer, inputs):
        rows = torch.where(inputs["labels"] == -100, inputs["input_ids"], inputs["labels"])
        for row, labels in zip(rows.tolist(), inputs["labels"].tolist(), strict=True):
            words = tuple(token for token in row if token)
            seen[words].add((trainer.state.global_step // 6, tuple(labels[: len(words)])))

    spy.micro = note
    train(**keys_for(place, tmp_path / "run", family="bert", rows="text", task="masked-lm", epochs=3))
    # Of three epochs two may agree by chance, in a text of a few words.
    several = [len({labels for _, labels in found}) for found in seen.values()]
    assert sum(count > 1 for count in several) > 0.8 * len(several)


def test_evaluations_and_checkpoints_once_an_epoch(place, tmp_path):
    keys = keys_for(place, tmp_path / "run", epochs=3, log_every=100, keep_checkpoints=9)
    del keys["held_out"]
    run = train(**keys | {"eval_data": str(place / "eval.jsonl")})
    lines = small_runs.logged(run)
    wanted = [(step, kind) for step in (6, 12, 18) for kind in (True, False)]
    assert [(line["step"], "loss" in line) for line in lines] == wanted
    assert all("eval_loss" in line for line in lines if "loss" not in line)
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"checkpoint-6", "checkpoint-12", "checkpoint-18"}


# The loss head.


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_loss_comes_from_the_positions_that_carry_it(place, tmp_path, spy, monkeypatch, family):
    rows, own = [], deltaw.fuse.head._loss_sum

    def loss_sum(head, state, hidden, targets):
        rows.append(len(targets))
        return own(head, state, hidden, targets)

    monkeypatch.setattr(deltaw.fuse.head, "_loss_sum", loss_sum)
    batches = []
    spy.micro = lambda trainer, inputs: batches.append(int((inputs["labels"][:, 1:] != -100).sum()))
    lines = []
    run = train(**keys_for(place, tmp_path / "run", family=family), say=lines.append)
    # The last calls; the ones before are trials of the installation.
    assert rows[-len(batches) :] == batches and max(batches) < 40
    model = spy.trainer.model
    assert not {"forward", "zero_grad"} & model.__dict__.keys()
    assert not [key for key in model.__dict__ if "loss_head" in key]
    assert model.config.use_cache and not any("logits of every position" in line for line in lines)
    assert small_runs.record(run)["status"] == "done"


def test_no_forward_is_left_behind_by_a_failure(place, tmp_path, spy):
    def fail(trainer, inputs):
        raise RuntimeError("no more")

    spy.micro = fail
    with pytest.raises(RuntimeError, match="no more"):
        train(**keys_for(place, tmp_path / "run", gradient_checkpointing=True))
    model = spy.trainer.model
    assert not {"forward", "zero_grad"} & model.__dict__.keys() and model.config.use_cache
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert small_runs.record(tmp_path / "run")["status"] == "failed"
    assert small_runs.record(tmp_path / "run")["error"] == "no more"


def test_recomputing_activations_changes_nothing(place, tmp_path):
    keys = {"epochs": 2, "dropout": 0.2}
    train(**keys_for(place, tmp_path / "plain", **keys))
    train(**keys_for(place, tmp_path / "again", gradient_checkpointing=True, **keys))
    assert small_runs.logged(tmp_path / "again") == small_runs.logged(tmp_path / "plain")
    assert small_runs.adapter_bytes(tmp_path / "again") == small_runs.adapter_bytes(tmp_path / "plain")


def test_a_bfloat16_base_with_float32_adapters(place, tmp_path, spy):
    run = train(**keys_for(place, tmp_path / "run", dtype="bfloat16", epochs=8, rows="text", learning_rate=2e-2))
    model = spy.trainer.model
    kinds = {"adapted" in name.split("."): p.dtype for name, p in model.named_parameters()}
    assert kinds == {False: torch.bfloat16, True: torch.float32}
    assert {t.dtype for t in load_file(run / "adapter" / "adapter_model.safetensors").values()} == {torch.float32}
    losses = [line["loss"] for line in small_runs.logged(run)]
    assert sum(losses[-6:]) < 0.9 * sum(losses[:6])
    assert small_runs.record(run)["device"]["dtype"] == "bfloat16"


# How it stops.


def test_a_nan_stops_before_the_update(place, tmp_path, spy, monkeypatch, fused):
    whole, run = tmp_path / "whole", tmp_path / "run"
    keys = {"epochs": 2, "save_every": 2, "keep_checkpoints": 9}
    train(**keys_for(place, whole, **keys))
    own, before = DeltawTrainer.compute_loss, {}

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = own(self, model, inputs, *args, **kwargs)
        if self.state.global_step != 7:
            return loss
        before.update(weights_of(self))
        return loss * math.nan

    monkeypatch.setattr(DeltawTrainer, "compute_loss", compute_loss)
    with pytest.raises(RunError) as caught:
        train(**keys_for(place, run, **keys))
    line = str(caught.value)
    assert "loss is NaN or infinite at step 8" in line and str(run / "checkpoints" / "checkpoint-6") in line
    assert "\n" not in line
    record = small_runs.record(run)
    assert record["status"] == "failed" and record["error"] == line
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    for name in ("checkpoint-2", "checkpoint-6"):
        good = [folder / "checkpoints" / name / "adapter" / "adapter_model.safetensors" for folder in (run, whole)]
        assert good[0].read_bytes() == good[1].read_bytes()
    held = weights_of(spy.trainer)
    assert held.keys() == before.keys() and all(torch.equal(held[name], p) for name, p in before.items())
    assert [line["step"] for line in small_runs.logged(run)] == list(range(1, 8))
    monkeypatch.setattr(DeltawTrainer, "compute_loss", own)
    resume(run)
    assert small_runs.outcome(run) == small_runs.outcome(whole)


ON_A_GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
)


@pytest.mark.parametrize("kind", ["plain", "fused", ON_A_GPU])
@pytest.mark.parametrize("changes", [{}, {"method": "adalora", "init_r": 4, "target_r": 2}], ids=["lora", "adalora"])
def test_a_gradient_that_is_not_finite_stops(place, tmp_path, spy, monkeypatch, kind, changes):
    hooks, before = [], {}
    if kind == "fused":
        fuse_adamw(monkeypatch)

    def poison(trainer, inputs):
        if trainer.state.global_step == 3 and not hooks:
            before.update(weights_of(trainer))
            parameter = next(iter(adapter_parameters(trainer.model, "default").values()))
            hooks.append(parameter.register_hook(lambda grad: grad * math.inf))
        elif trainer.state.global_step == 4:
            # The optimizer goes on skipping.
            hooks[0].remove()

    spy.micro = poison
    device = "cuda" if kind == "cuda" else "cpu"
    keys = keys_for(place, tmp_path / "run", log_every=100, device=device) | changes
    if changes:
        del keys["r"]
    with pytest.raises(RunError, match="the gradient is NaN or infinite at step 4: there is no checkpoint yet"):
        train(**keys)
    held = weights_of(spy.trainer)
    assert held.keys() == before.keys() and all(torch.equal(held[name], p) for name, p in before.items())
    # Without a line due nobody waits for the device: the host hears of it at the end of the next step.
    assert spy.trainer.state.global_step == (3 if kind == "plain" or changes else 5)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_flag_of_a_fused_update_changes_nothing_else(place, tmp_path, spy, monkeypatch):
    plain = train(**keys_for(place, tmp_path / "plain", epochs=2, log_every=5))
    fuse_adamw(monkeypatch)
    flags = []
    spy.step = lambda trainer: flags.append(float(trainer.optimizer.optimizer.found_inf))
    run = train(**keys_for(place, tmp_path / "run", epochs=2, log_every=5))
    assert flags == [0.0] * 12
    assert [line["step"] for line in small_runs.logged(run)] == [5, 6, 10, 12]
    for line, other in zip(small_runs.logged(run), small_runs.logged(plain), strict=True):
        assert line == pytest.approx(other, rel=1e-4)
    states = [torch.load(folder / "checkpoints" / "checkpoint-12" / "optimizer.pt") for folder in (run, plain)]
    assert [{float(state["step"]) for state in found["state"].values()} for found in states] == [{12.0}, {12.0}]


def test_diverging_ends_in_one_line(place, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(RunError, match=r"NaN or infinite at step \d+"):
        train(**keys_for(place, run, learning_rate=1e30, warmup_ratio=0.0, save_every=1, epochs=3))
    assert small_runs.record(run)["status"] == "failed"
    for folder in (run / "checkpoints").glob("checkpoint-*"):
        tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
        assert all(bool(torch.isfinite(t).all()) for t in tensors.values())
    with pytest.raises(InputError, match="learning_rate is inf"):
        train(**keys_for(place, tmp_path / "other", learning_rate=math.inf))


def test_a_module_that_is_never_called_is_named(place, tmp_path, monkeypatch):
    own = deltaw.studies.job.load_job_model

    def load(*args, **kwargs):
        model = own(*args, **kwargs)
        model.model.layers[1].idle = nn.Linear(32, 32)
        return model

    monkeypatch.setattr(deltaw.studies.job, "load_job_model", load)
    with pytest.raises(
        RunError, match=r"get no gradient \(model\.layers\.1\.idle\..*leave those out of target_modules"
    ):
        train(**keys_for(place, tmp_path / "run"))
    assert "layers.1.idle" in small_runs.record(tmp_path / "run")["error"]
    train(**keys_for(place, tmp_path / "other", exclude_modules=["idle"]))


SCRIPT = {2: 5.0, 4: 3.0, 6: 4.0, 8: 3.5, 10: 1.0, 12: 0.5}


@pytest.fixture
def scripted(monkeypatch):
    """Evaluations by step; accuracy is the loss turned round."""
    own = DeltawTrainer.evaluate

    def evaluate(self, *args, **kwargs):
        loss = SCRIPT[self.state.global_step]
        self.evaluate_fn = lambda model: {"loss": loss, "accuracy": 1 - loss / 10}
        return own(self, *args, **kwargs)

    monkeypatch.setattr(DeltawTrainer, "evaluate", evaluate)


def stopping_keys(place, output, **changes):
    more = {"early_stopping": 2, "eval_every": 2, "keep_checkpoints": 1, "epochs": 2, "dropout": 0.1}
    given = keys_for(place, output, **more | changes) | {"eval_data": str(place / "eval.jsonl")}
    return {key: value for key, value in given.items() if key != "held_out"}


@pytest.mark.parametrize("metric", [None, "accuracy"])
def test_early_stopping_goes_back_to_the_best(place, tmp_path, scripted, metric):
    run = train(**stopping_keys(place, tmp_path / "run", metric=metric))
    record = small_runs.record(run)
    assert record["cost"]["steps"] == 8 and record["cost"]["best_step"] == 4
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["checkpoint-4", "checkpoint-8"]
    best = run / "checkpoints" / "checkpoint-4" / "adapter" / "adapter_model.safetensors"
    last = run / "checkpoints" / "checkpoint-8" / "adapter" / "adapter_model.safetensors"
    assert small_runs.adapter_bytes(run) == best.read_bytes() != last.read_bytes()
    assert [line["step"] for line in small_runs.logged(run) if "eval_loss" in line] == [2, 4, 6, 8]


@pytest.mark.parametrize("stop_at", [3, 7])
def test_early_stopping_resumes(place, tmp_path, scripted, spy, stop_at):
    train(**stopping_keys(place, tmp_path / "whole"))

    def stop(trainer, inputs):
        if trainer.state.global_step == stop_at:
            raise KeyboardInterrupt

    spy.micro = stop
    with pytest.raises(KeyboardInterrupt):
        train(**stopping_keys(place, tmp_path / "run"))
    assert small_runs.record(tmp_path / "run")["error"] == "interrupted"
    spy.micro = lambda trainer, inputs: None
    resume(tmp_path / "run")
    assert small_runs.outcome(tmp_path / "run") == small_runs.outcome(tmp_path / "whole")
    assert small_runs.record(tmp_path / "run")["cost"]["best_step"] == 4


def test_a_moved_run_finds_its_best(place, tmp_path, scripted, spy):
    train(**stopping_keys(place, tmp_path / "whole"))

    def stop(trainer, inputs):
        if trainer.state.global_step == 7:
            raise KeyboardInterrupt

    spy.micro = stop
    with pytest.raises(KeyboardInterrupt):
        train(**stopping_keys(place, tmp_path / "run"))
    spy.micro = lambda trainer, inputs: None
    shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    resume(tmp_path / "elsewhere")
    assert small_runs.outcome(tmp_path / "elsewhere") == small_runs.outcome(tmp_path / "whole")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes", [{}, {"early_stopping": 0, "max_steps": 4}], ids=["early stop", "max_steps"])
def test_what_had_ended_is_not_trained_further(place, tmp_path, scripted, monkeypatch, spy, changes):
    train(**stopping_keys(place, tmp_path / "whole", **changes))

    def die(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(deltaw.studies.job, "_save", die)
        with pytest.raises(KeyboardInterrupt):
            train(**stopping_keys(place, tmp_path / "run", **changes))
    assert not (tmp_path / "run" / "adapter").exists()

    def never(trainer, inputs):
        raise AssertionError("trained further")

    spy.micro = never
    lines = []
    resume(tmp_path / "run", say=lines.append)
    assert any("training had ended at step" in line for line in lines)
    assert small_runs.outcome(tmp_path / "run") == small_runs.outcome(tmp_path / "whole")


def test_checkpoints_are_kept_as_asked(place, tmp_path):
    for keep, left in ((1, [6]), (2, [5, 6]), (9, [1, 2, 3, 4, 5, 6])):
        run = train(**keys_for(place, tmp_path / str(keep), save_every=1, keep_checkpoints=keep))
        assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [f"checkpoint-{step}" for step in left]
    saved = run / "checkpoints" / "checkpoint-6"
    # Nothing of the frozen base is in a checkpoint.
    assert not list(saved.glob("model*")) and (saved / "adapter" / "adapter_model.safetensors").exists()


def test_a_metric_that_is_not_measured(place, tmp_path):
    keys = stopping_keys(place, tmp_path / "run", metric="f1")
    with pytest.raises(InputError, match=r"metric 'f1' is not measured: expected one of loss, accuracy"):
        train(**keys)
    with pytest.raises(InputError, match="early_stopping needs evaluation rows"):
        train(**keys_for(place, tmp_path / "other", early_stopping=1))


# TensorBoard.


def test_tensorboard(place, tmp_path, spy):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def stop(trainer, inputs):
        if trainer.state.global_step == 4:
            raise KeyboardInterrupt

    spy.micro = stop
    with pytest.raises(KeyboardInterrupt):
        train(**keys_for(place, tmp_path / "run", tensorboard=True, save_every=3))
    spy.micro = lambda trainer, inputs: None
    run = resume(tmp_path / "run").path
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    for tag, key in (("train/loss", "loss"), ("train/learning_rate", "learning_rate")):
        wanted = {line["step"]: line[key] for line in small_runs.logged(run)}
        assert {e.step: e.value for e in events.Scalars(tag)} == pytest.approx(wanted, rel=1e-6)
        assert len(events.Scalars(tag)) == 6


def test_tensorboard_is_an_extra(place, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'deltaw\[tensorboard\]'"):
        train(**keys_for(place, tmp_path / "run", tensorboard=True))
    assert not (tmp_path / "run").exists()
