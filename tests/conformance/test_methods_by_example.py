"""Every registered method under differential privacy: gradients by example equal those of a pass for each example."""

import dataclasses

import pytest
import tiny
import torch
from cases import CASES

import deltaw as dw
from deltaw.core.contexts import ForwardContext, in_context
from deltaw.methods import adapter_parameters
from deltaw.methods.by_example import whole_modules_by_example
from deltaw.privacy.clipping import ExampleGradients
from deltaw.train.loop import _checkpointing
from deltaw.train.losses import SummedLoss, loss_share

ALL = [(method, name) for method in CASES for name in CASES[method]]
#: Where the drawn masks are those of the plain pass: one function with and without a sink.
KEEPS_DROPOUT = {("lora", "dropout"), ("lora", "encoder"), ("dora", "encoder-with-dropout")}
ROWS = 5


def task_of(name):
    if name.endswith("-seq"):
        return "sequence-classification"
    if name.endswith("-tok"):
        return "token-classification"
    return "masked-lm" if name.endswith("-mlm") else "instruct"


def prepared(method, name, dtype=torch.float64):
    case = CASES[method][name]
    config = case.config
    if getattr(config, "dropout", 0.0) and (method, name) not in KEEPS_DROPOUT:
        config = dataclasses.replace(config, dropout=0.0)
    model = tiny.tiny(case.model, dtype)
    dw.adapt(model, config, dtype=dtype)
    if not method == "full":
        tiny.randomise(model)
    model.train()
    return model


def batch(model_name):
    given = tiny.inputs(model_name, batch=ROWS)
    given.pop("decoder_input_ids", None)
    labels = tiny.labels(model_name, given).clone()
    for row in range(1, ROWS):
        given["attention_mask"][row, 7 - row % 3 :] = 0
        if labels.dim() > 1:
            labels[row, 7 - row % 3 :] = -100
            labels[row, :row] = -100
    return given | {"labels": labels}


def one_by_one(model, loss, given, state):
    """Gradients by row of the mean loss over the row's labels, each from a pass of its own over the whole batch."""
    parameters = {n: p for n, p in adapter_parameters(model, "default").items() if p.requires_grad}
    found = []
    counts = loss.counts(given["labels"])
    for row in range(ROWS):
        only = given["labels"].clone()
        only[torch.arange(ROWS) != row] = -100
        torch.set_rng_state(state)
        model.zero_grad()
        (loss(model, given | {"labels": only}) / counts[row]).backward()
        found.append({n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in parameters.items()})
    model.zero_grad()
    return found


def clipped_sum(gradients, bound):
    norms = [torch.stack([g.norm() for g in one.values()]).norm() for one in gradients]
    factors = [min(1.0, bound / (float(norm) + 1e-6)) for norm in norms]
    names = gradients[0]
    return norms, {n: sum(f * one[n] for f, one in zip(factors, gradients, strict=True)) for n in names}


def by_sink(model, loss, given, state, bound, *, units=None, groups=None):
    """Norms and clipped sums; `groups`: rows of each micro-batch with whether its last unit stays open."""
    parameters = adapter_parameters(model, "default")
    sink = ExampleGradients(parameters, max_grad_norm=bound)
    norms = []
    with whole_modules_by_example(model, "default"):
        for rows, own_units, shares, stays_open in groups or [(list(range(ROWS)), units, None, False)]:
            part = {key: value[rows] for key, value in given.items()}
            torch.set_rng_state(state)
            weights = loss_share(loss.counts(part["labels"])).double()
            weights = weights if shares is None else weights * torch.tensor(shares)
            sink.begin(weights, units=None if own_units is None else torch.tensor(own_units), stays_open=stays_open)
            context = ForwardContext(rows=len(rows), positions=part["input_ids"].shape[1], sink=sink)
            with in_context(context):
                loss(model, part).backward()
            sink.end()
            norms.extend(sink.norms)
    assert all(p.grad is None for p in parameters.values())
    assert sink.fed == set(sink.parameters)
    return norms, sink.take()


def assert_close(got, expected, tolerance):
    whole = torch.stack([value.norm() for value in expected.values()]).norm()
    for name, value in expected.items():
        assert float((got[name].double() - value.double()).norm()) <= tolerance * float(whole), name


@pytest.mark.parametrize(("method", "name"), ALL, ids=[f"{m}-{n}" for m, n in ALL])
def test_norms_and_clipped_sums_are_those_of_one_pass_for_each_example(method, name):
    model_name = CASES[method][name].model
    model = prepared(method, name)
    loss = SummedLoss(model, task_of(model_name))
    given, state = batch(model_name), torch.get_rng_state()
    expected = one_by_one(model, loss, given, state)
    bound = float(torch.stack([g.norm() for g in expected[0].values()]).norm()) * 1.01
    norms, sums = clipped_sum(expected, bound)
    got_norms, got = by_sink(model, loss, given, state, bound)
    # Weights and the constants of some models are float32.
    torch.testing.assert_close(torch.stack(got_norms), torch.stack(norms).double(), rtol=1e-6, atol=0.0)
    assert_close(got, sums, 1e-6)


@pytest.mark.parametrize("method", ["lora", "dora", "adalora"])
def test_micro_batches_and_units_that_span_them_change_nothing(method):
    model = prepared(method, "linear")
    loss = SummedLoss(model, "instruct")
    given, state = batch("llama"), torch.get_rng_state()
    rows = one_by_one(model, loss, given, state)
    # Units: row 0; rows 1, 2 and 3; row 4.
    units = [[0], [1, 2, 3], [4]]
    merged = [{n: sum(rows[i][n] for i in unit) / len(unit) for n in rows[0]} for unit in units]
    norms, sums = clipped_sum(merged, 0.7 * float(torch.stack([g.norm() for g in merged[1].values()]).norm()))
    bound = 0.7 * float(norms[1])
    third = 1 / 3
    groups = [([0, 1], [0, 1], [1.0, third], True), ([2, 3], [0, 0], [third] * 2, False), ([4], [0], [1.0], False)]
    got_norms, got = by_sink(model, loss, given, state, bound, groups=groups)
    torch.testing.assert_close(torch.stack(got_norms), torch.stack(norms).double(), rtol=1e-6, atol=0.0)
    assert_close(got, sums, 1e-6)
    whole = [([0, 1, 2, 3, 4], [0, 1, 1, 1, 2], [1.0, third, third, third, 1.0], False)]
    _, again = by_sink(model, loss, given, state, bound, groups=whole)
    assert_close(again, sums, 1e-6)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_on_four_bits_and_with_recomputation(method, checkpointing):
    from deltaw.quant import NF4, quantize_model

    model = tiny.tiny("llama", torch.float32)
    quantize_model(model, NF4())
    dw.adapt(model, CASES[method]["linear"].config)
    tiny.randomise(model)
    model.train()
    if checkpointing:
        _checkpointing(model, on=True)
    loss = SummedLoss(model, "instruct")
    given, state = batch("llama"), torch.get_rng_state()
    expected = one_by_one(model, loss, given, state)
    bound = float(torch.stack([g.norm() for g in expected[0].values()]).norm())
    norms, sums = clipped_sum(expected, bound)
    got_norms, got = by_sink(model, loss, given, state, bound)
    torch.testing.assert_close(torch.stack(got_norms).float(), torch.stack(norms), rtol=2e-5, atol=0.0)
    assert_close(got, sums, 2e-5)
