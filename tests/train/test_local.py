"""Local steps of a federation: those of `deltaw train`, from given weights, without a run folder."""

import pytest
import small_runs
import torch

import deltaw as dw
from deltaw.core.errors import RunError
from deltaw.data import Collator, encode, read_rows
from deltaw.methods import adapter_parameters
from deltaw.train import TrainConfig
from deltaw.train.config import make_config
from deltaw.train.local import scheduled_rate, train_steps


def prepared(tmp_path, **keys):
    model_folder = small_runs.make_model(tmp_path / "model", "llama")
    data = small_runs.write_rows(tmp_path / "rows.jsonl", small_runs.rows_of("label", 20))
    options = {
        "batch_size": 8,
        "micro_batch_size": 4,
        "max_length": 32,
        "learning_rate": 1e-2,
        "r": 4,
        "dtype": "float32",
        "device": "cpu",
        "seed": 3,
    }
    config = make_config({"model": model_folder, "data": data, **options, **keys})
    model, tokenizer = dw.load_model(model_folder, dtype="float32"), dw.load_tokenizer(model_folder)
    encoded = encode(read_rows(data), tokenizer, "instruct", max_length=32)
    dw.adapt(model, config.method_config, seed=config.seed)
    return config, model, encoded.examples, Collator("instruct", tokenizer.pad_token_id)


def state(model):
    return {name: p.detach().clone() for name, p in adapter_parameters(model, "default").items()}


def steps(model, config, examples, collator, count, **options):
    given = {"steps": count, "first_step": 0, "all_steps": count, "seed": config.seed} | options
    return train_steps(model, "default", examples, collator, config, **given)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_all_steps_in_one_go_are_those_of_a_training(tmp_path, schedule):
    keys = {"schedule": schedule, "warmup_ratio": 0.2, "weight_decay": 0.1, "max_grad_norm": 0.5}
    config, model, examples, collator = prepared(tmp_path, **keys)
    steps(model, config, examples, collator, 6)
    own = {"output": str(tmp_path / "run"), "held_out": 0, "max_steps": 6, "evaluate_before": False, "baselines": False}
    run = dw.run_training(**config.plain() | own)
    trained = dw.load_model(config.model, dtype="float32")
    dw.load_adapter(trained, run, name="default")
    for name, expected in state(trained).items():
        torch.testing.assert_close(state(model)[name], expected, rtol=1e-5, atol=1e-7, msg=name)


def test_rounds_share_one_schedule(tmp_path):
    config = TrainConfig(learning_rate=1.0, warmup_ratio=0.1, schedule="linear")
    rates = [scheduled_rate(config, step=step, steps=20) for step in range(20)]
    assert rates[:3] == [0.0, 0.5, 1.0]
    assert rates[-1] == pytest.approx(1 / 18)


def test_the_proximal_term_holds_weights_near_their_start(tmp_path):
    moved = []
    for mu in (0.0, 1.0, 1e4):
        config, model, examples, collator = prepared(tmp_path / str(mu), max_grad_norm=0.0)
        before = state(model)
        steps(model, config, examples, collator, 8, proximal_mu=mu)
        after = state(model)
        moved.append(float(torch.stack([(after[n] - before[n]).norm() for n in before]).norm()))
    assert moved[2] < 0.5 * moved[0] and moved[1] < moved[0]


def test_weights_that_are_not_finite_stop_it(tmp_path):
    config, model, examples, collator = prepared(tmp_path)
    with torch.no_grad():
        next(iter(adapter_parameters(model, "default").values())).fill_(float("nan"))
    with pytest.raises(RunError, match="NaN"):
        steps(model, config, examples, collator, 1)


def test_recomputed_attention_is_that_of_the_forward_pass_in_16_bits(tmp_path):
    """On CPUs attention has a backward pass of its own, in a mode that recomputation has to be in too."""
    found = {}
    for on in (False, True):
        config, model, examples, collator = prepared(tmp_path / str(on), gradient_checkpointing=on)
        model.to(torch.bfloat16)
        for parameter in adapter_parameters(model, "default").values():
            parameter.data = parameter.data.float()
        steps(model, config, examples, collator, 3)
        found[on] = state(model)
    for name, expected in found[False].items():
        torch.testing.assert_close(found[True][name], expected, rtol=1e-4, atol=1e-6, msg=name)
