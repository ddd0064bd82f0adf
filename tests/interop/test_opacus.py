"""Opacus in hooks mode as oracle of private training, on PEFT's LoRA with the same values as ours."""

import copy
import math

import pytest
import tiny
import torch
from opacus import GradSampleModule, PrivacyEngine
from opacus.optimizers import DPOptimizer
from torch.utils.data import DataLoader, TensorDataset

import deltaw as dw
from deltaw.checkpoint.adapters import adapter_state
from deltaw.core.contexts import ForwardContext, in_context
from deltaw.core.generators import generator
from deltaw.methods import adapter_parameters
from deltaw.methods.by_example import whole_modules_by_example
from deltaw.privacy.clipping import ExampleGradients
from deltaw.train.losses import SummedLoss, loss_share
from deltaw.train.private import PrivacyPlan, PrivateGradients, micro_batches

pytestmark = [
    pytest.mark.filterwarnings("ignore:Could not find a config file in.*"),
    pytest.mark.filterwarnings("ignore:Secure RNG turned off.*"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
#: Name: (model of `tiny`, task, our fields).
CASES = {
    "causal": ("llama", "causal-lm", dict(target_modules=LLAMA)),
    "causal-rslora": ("qwen2", "causal-lm", dict(target_modules=["q_proj", "down_proj"], rslora=True)),
    "classifier": ("bert-seq", "sequence-classification", dict(modules_to_save=["classifier"])),
}  # fmt: skip
BATCHES = [[0, 5, 2, 7, 11], [3], [1, 2, 4, 8, 9, 10, 6], [11, 0, 3, 7]]
ROWS, LENGTH = 12, 9


def rows_of(name):
    """Rows of different lengths, padded, of which different shares carry loss."""
    given = tiny.inputs(name, batch=ROWS, length=LENGTH)
    labels = tiny.labels(name, given).clone()
    for row in range(ROWS):
        given["attention_mask"][row, LENGTH - row % 5 :] = 0
        if labels.dim() > 1:
            labels[row, LENGTH - row % 5 :] = -100
            labels[row, : row % 4] = -100
    return given | {"labels": labels}


def chosen(given, rows):
    return {key: value[rows] for key, value in given.items()}


def both(case, tmp_path):
    """Our model, PEFT's under Opacus' hooks, the task and its rows, in float64."""
    from peft import PeftModel

    name, task, fields = CASES[case]
    ours = tiny.tiny(name, torch.float64)
    tiny.randomise(dw.adapt(ours, dw.LoRA(r=3, alpha=5, **fields), dtype=torch.float64))
    dw.save_adapter(ours, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(tiny.tiny(name, torch.float64), str(tmp_path / "adapter"), is_trainable=True)
    tiny.assert_same({key: p.detach() for key, p in trained(theirs.double()).items()}, detached(ours))
    # Else the first factors' hooks warn that nothing before them wants a gradient.
    theirs.enable_input_require_grads()
    hooked = GradSampleModule(theirs.train(), strict=False, loss_reduction="mean")
    return ours.train(), hooked, task, rows_of(name)


def trained(peft_model):
    """What PEFT trains, under the names of its file."""
    found = {key: p for key, p in peft_model.named_parameters() if p.requires_grad}
    return {key.replace(".modules_to_save.default", "").replace(".default", ""): p for key, p in found.items()}


def detached(model):
    """What we train, under those names."""
    return {key: value.detach() for key, value in adapter_state(model, "default").items()}


def ours_by_file_name(model, values):
    """Tensors that go by our parameters' names, under the names of the file."""
    names = {p.data_ptr(): name for name, p in adapter_parameters(model, "default").items()}
    return {key: values[names[t.data_ptr()]] for key, t in adapter_state(model, "default").items()}


def mean_of_row_means(model, task, part):
    """Transformers' logits and torch's cross-entropy alone: a mean over rows of means over each row's labels."""
    logits = model(input_ids=part["input_ids"], attention_mask=part["attention_mask"]).logits
    if task == "sequence-classification":
        return torch.nn.functional.cross_entropy(logits, part["labels"])
    each = torch.nn.functional.cross_entropy(logits[:, :-1].mT, part["labels"][:, 1:], reduction="none")
    counted = part["labels"][:, 1:].ne(-100)
    return (each.sum(1) / counted.sum(1)).mean()


def assert_close(got, expected, tolerance=1e-6):
    """Models keep some constants, and clipping its weights, in float32; all else is float64."""
    whole = torch.stack([value.norm() for value in expected.values()]).norm()
    assert got.keys() == expected.keys() and whole > 0
    for key, value in expected.items():
        assert (got[key] - value).norm() <= tolerance * whole, key


@pytest.mark.parametrize("case", CASES)
def test_norms_and_clipped_sums(case, tmp_path):
    ours, theirs, task, given = both(case, tmp_path)
    mean_of_row_means(theirs, task, given).backward()
    by_file = trained(theirs._module)
    expected = torch.stack([p.grad_sample.flatten(1).norm(dim=1) for p in by_file.values()]).norm(dim=0)
    bound = float(expected.median())
    clipping = DPOptimizer(
        torch.optim.SGD(by_file.values(), lr=1.0), noise_multiplier=0.0, max_grad_norm=bound, expected_batch_size=ROWS
    )
    clipping.clip_and_accumulate()

    loss, sink = SummedLoss(ours, task), ExampleGradients(adapter_parameters(ours, "default"), max_grad_norm=bound)
    norms = torch.zeros(ROWS, dtype=torch.float64)
    with whole_modules_by_example(ours, "default"):
        for rows in (list(range(0, ROWS, 2)), [1, 3, 5, 7], [9, 11]):
            part = chosen(given, rows)
            sink.begin(loss_share(loss.counts(part["labels"])))
            with in_context(ForwardContext(rows=len(rows), positions=LENGTH, sink=sink)):
                loss(ours, part).backward()
            sink.end()
            norms[rows] = sink.norms.double()
    torch.testing.assert_close(norms, expected, rtol=1e-6, atol=0.0)
    assert 3 < int((norms > bound).sum()) < 9
    assert_close(ours_by_file_name(ours, sink.take()), {key: p.summed_grad for key, p in by_file.items()})


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bound", [0.05, 1e6])
def test_whole_updates(case, bound, tmp_path):
    ours, theirs, task, given = both(case, tmp_path)
    by_file = trained(theirs._module)
    expected_units = 4.5
    # Adam divides by what it saw: an epsilon far below the gradients would turn their last bits into signs.
    adam = dict(lr=1e-2, weight_decay=0.1, eps=1e-3)
    oracle = DPOptimizer(
        torch.optim.AdamW(by_file.values(), **adam),
        noise_multiplier=0.0, max_grad_norm=bound, expected_batch_size=expected_units,
    )  # fmt: skip
    plan = PrivacyPlan(0.0, bound, expected_units / ROWS, len(BATCHES), 1e-5, "example", [[i] for i in range(ROWS)])
    gradients = PrivateGradients(ours, "default", plan, SummedLoss(ours, task))
    own = adapter_parameters(ours, "default")
    optimizer = torch.optim.AdamW(own.values(), **adam)
    start = {key: p.detach().clone() for key, p in by_file.items()}
    for rows in BATCHES:
        oracle.zero_grad()
        mean_of_row_means(theirs, task, chosen(given, rows)).backward()
        oracle.step()
        split = micro_batches([[i] for i in rows], [LENGTH - i % 5 for i in range(ROWS)], micro_batch_size=3)
        gradients([(micro, chosen(given, list(micro.rows))) for micro in split])
        got = ours_by_file_name(ours, {name: p.grad for name, p in own.items()})
        assert_close(got, {key: p.grad for key, p in by_file.items()})
        optimizer.step()
    moved = {key: p.detach() - start[key] for key, p in by_file.items()}
    assert_close({key: value - start[key] for key, value in detached(ours).items()}, moved, tolerance=1e-5)


def test_a_customers_rows_are_one_example_that_opacus_sees_joined(tmp_path):
    """Several rows of one customer are averaged before they are clipped: so are gradients that Opacus accumulates."""
    ours, theirs, task, given = both("causal", tmp_path)
    customers = [[0, 4, 5], [1], [2, 3, 6, 7, 8], [9, 10], [11]]
    mean_of_row_means(theirs, task, given).backward()
    by_file = trained(theirs._module)
    for p in by_file.values():
        p.grad_sample = torch.stack([p.grad_sample[rows].mean(0) for rows in customers])
    norms = torch.stack([p.grad_sample.flatten(1).norm(dim=1) for p in by_file.values()]).norm(dim=0)
    bound = float(norms.median())
    oracle = DPOptimizer(
        torch.optim.SGD(by_file.values(), lr=1.0), noise_multiplier=0.0, max_grad_norm=bound, expected_batch_size=2
    )
    oracle.clip_and_accumulate()
    plan = PrivacyPlan(0.0, bound, 0.4, 1, 1e-5, "customer", customers)
    gradients = PrivateGradients(ours, "default", plan, SummedLoss(ours, task))
    split = micro_batches(customers, [LENGTH] * ROWS, micro_batch_size=5)
    assert any(micro.stays_open for micro in split)
    gradients([(micro, chosen(given, list(micro.rows))) for micro in split])
    got = ours_by_file_name(ours, {name: p.grad for name, p in adapter_parameters(ours, "default").items()})
    assert_close(got, {key: p.summed_grad / 2 for key, p in by_file.items()})


@pytest.mark.parametrize("rows, batch", [(40, 8), (30, 5)])
def test_poissons_divisor_is_opacus_expected_batch_size(rows, batch, tmp_path):
    _, hooked, _, _ = both("classifier", tmp_path)
    plain = copy.deepcopy(hooked.to_standard_module())
    data = DataLoader(TensorDataset(torch.arange(rows)), batch_size=batch)
    _, private, loader = PrivacyEngine().make_private(
        module=plain, optimizer=torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=1.0),
        data_loader=data, noise_multiplier=1.0, max_grad_norm=1.0,
    )  # fmt: skip
    plan = PrivacyPlan(1.0, 1.0, batch / rows, 1, 1e-5, "example", [[i] for i in range(rows)])
    assert plan.expected_units == private.expected_batch_size == batch
    assert plan.sampling_rate == pytest.approx(loader.sample_rate)


def test_noise_has_opacus_scale(tmp_path):
    """Of an empty step, which is noise alone: sigma C / (q N) in both."""
    ours, theirs, task, given = both("causal", tmp_path)
    by_file = trained(theirs._module)
    sigma, bound, units = 1.7, 0.3, 4
    oracle = DPOptimizer(
        torch.optim.SGD(by_file.values(), lr=1.0),
        noise_multiplier=sigma, max_grad_norm=bound, expected_batch_size=units, generator=generator(0, "noise"),
    )  # fmt: skip
    mean_of_row_means(theirs, task, given).backward()
    for p in by_file.values():
        p.grad_sample = p.grad_sample[:0]
    oracle.pre_step()
    plan = PrivacyPlan(sigma, bound, units / ROWS, 1, 1e-5, "example", [[i] for i in range(ROWS)])
    PrivateGradients(ours, "default", plan, SummedLoss(ours, task))([])
    for parameters in (by_file, adapter_parameters(ours, "default")):
        noise = torch.cat([p.grad.flatten() for p in parameters.values()])
        # A sample's standard deviation has a relative error of 1 / sqrt(2 n): four of them.
        assert float(noise.std()) == pytest.approx(sigma * bound / units, rel=4 / math.sqrt(2 * len(noise)))


def test_epsilon_is_that_of_opacus_prv_accountant():
    from opacus.accountants import PRVAccountant

    from deltaw.privacy.accounting import PrivacySpec, epsilon

    other = PRVAccountant()
    other.history = [(1.0, 0.01, 1000)]
    spec = PrivacySpec(unit="example", sampling_rate=0.01, noise_multiplier=1.0, steps=1000, delta=1e-5)
    # Opacus states the upper end of an interval that is at most 0.01 wide.
    above = other.get_epsilon(1e-5, eps_error=0.01)
    assert epsilon(spec).epsilon <= above <= epsilon(spec).epsilon + 0.02
