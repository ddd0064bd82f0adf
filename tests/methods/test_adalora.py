"""AdaLoRA's mathematics against PEFT's own allocator and regulariser, and what pruning and converting must keep."""

import peft
import pytest
import tiny
import torch
from safetensors.torch import load_file

import deltaw as dw
from deltaw.core.errors import InputError, RunError
from deltaw.core.generators import generator
from deltaw.methods.adalora_budget import control, scheduled
from deltaw.methods.host import book_of, parts_of, sites_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to.*"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`.*"),
]

SMALL = {"init_r": 4, "target_r": 2, "target_modules": ["q_proj", "up_proj", "down_proj"]}


def factors(model, name="default"):
    return {path: part for path, _, part in parts_of(model, name)}


def peft_twin(model, config, **options):
    """PEFT's AdaLoRA on the bare base, with the same factors; its layers by path."""
    fields = {"init_r": config.init_r, "target_r": config.target_r, "lora_alpha": config.alpha, "beta1": config.beta1}
    fields |= {"beta2": config.beta2, "orth_reg_weight": config.orth_reg_weight, "deltaT": config.delta_t}
    fields |= {"target_modules": config.target_modules, "total_step": 10} | options
    wrapped = peft.get_peft_model(tiny.tiny("llama"), peft.AdaLoraConfig(**fields))
    layers = {p: m for p, m in wrapped.base_model.model.named_modules() if hasattr(m, "lora_E")}
    own = factors(model)
    assert layers.keys() == own.keys()
    with torch.no_grad():
        for path, layer in layers.items():
            for name in ("lora_A", "lora_B", "lora_E"):
                getattr(layer, name)["default"].copy_(getattr(own[path], name))
    return wrapped, layers


SCHEDULES = {
    "every-step": ({"tinit": 2, "tfinal": 4}, 16),
    "every-third": ({"tinit": 3, "tfinal": 5, "delta_t": 3}, 24),
    "no-ends": ({"tinit": 0, "tfinal": 0}, 9),
    "other-averages": ({"tinit": 1, "tfinal": 2, "beta1": 0.5, "beta2": 0.95, "target_r": 1}, 12),
    "shorter-than-the-run": ({"tinit": 1, "tfinal": 2, "total_steps": 8}, 12),
    "derived": ({}, 20),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_masks_equal_pefts_over_a_whole_schedule(name):
    changes, total = SCHEDULES[name]
    config = dw.AdaLoRA(**SMALL | changes)
    model = tiny.randomise(dw.adapt(tiny.tiny("llama"), config))
    budget = control(model, "default", total)
    filled = book_of(model).configs["default"]
    schedule = {"tinit": filled.tinit, "tfinal": filled.tfinal, "total_step": filled.total_steps}
    wrapped, layers = peft_twin(model, config, **schedule)
    own, sums, masks = factors(model), [], []
    for step in range(1, total + 1):
        for path, part in own.items():
            for factor in ("lora_A", "lora_B", "lora_E"):
                mine, theirs = getattr(part, factor), getattr(layers[path], factor)["default"]
                draw = generator(3, path, factor, step)
                # Sizes differ from site to site, so that ranks do.
                mine.grad = torch.randn(mine.shape, generator=draw) * (1 + len(path) % 5)
                theirs.grad = mine.grad.clone()
                with torch.no_grad():
                    change = 0.05 * torch.randn(mine.shape, generator=draw)
                    mine.add_(change)
                    theirs.add_(change)
        budget.after_update(step)
        wrapped.base_model.update_and_allocate(step)
        for path, part in own.items():
            for factor in ("lora_A", "lora_B", "lora_E"):
                assert torch.equal(getattr(part, factor), getattr(layers[path], factor)["default"]), (step, path)
        masks.append({path: (part.lora_E != 0).view(-1).tolist() for path, part in own.items()})
        sums.append(sum(map(sum, masks[-1].values())))
        pattern = wrapped.peft_config["default"].rank_pattern
        if pattern is not None and (step >= budget.end or step % filled.delta_t == 0):
            assert {key.removesuffix(".lora_E.default"): kept for key, kept in pattern.items()} == masks[-1]
    sites = len(own)
    assert sums[filled.tinit - 1 if filled.tinit else 0] == 4 * sites or filled.tinit == 0
    assert sums[-1] == config.target_r * sites and len({tuple(map(sum, m.values())) for m in masks}) > 2
    assert masks[-1] == masks[budget.end - 1]
    assert len({sum(kept) for kept in masks[-1].values()}) > 1


def test_forward_loss_and_gradients_equal_pefts():
    config = dw.AdaLoRA(**SMALL, alpha=6, orth_reg_weight=0.7)
    model = tiny.randomise(dw.adapt(tiny.tiny("llama"), config))
    wrapped, layers = peft_twin(model, config)
    given = tiny.inputs("llama")
    torch.testing.assert_close(tiny.logits(model, "llama"), wrapped(**given).logits, rtol=1e-5, atol=1e-5)
    plain = model(**given, labels=given["input_ids"]).loss
    whole = plain + torch.stack([part.extra_loss() for part in factors(model).values()]).sum()
    # PEFT's outermost wrapper, where it knows no task, goes past the forward that adds the regulariser.
    theirs = wrapped.base_model(**given, labels=given["input_ids"]).loss
    torch.testing.assert_close(whole, theirs, rtol=1e-5, atol=1e-5)
    whole.backward()
    theirs.backward()
    for path, part in factors(model).items():
        for factor in ("lora_A", "lora_B", "lora_E"):
            expected = getattr(layers[path], factor)["default"].grad
            torch.testing.assert_close(getattr(part, factor).grad, expected, rtol=1e-4, atol=1e-5, msg=path + factor)


def test_starts_as_peft_starts():
    part = factors(dw.adapt(tiny.tiny("llama"), dw.AdaLoRA(init_r=8, target_r=4)))["model.layers.0.mlp.up_proj"]
    assert not part.lora_E.any()
    for factor in (part.lora_A, part.lora_B):
        assert 0.015 < float(factor.detach().std()) < 0.025 and abs(float(factor.detach().mean())) < 0.01


def test_conv1d_outside_the_fused_path():
    model = dw.adapt(tiny.tiny("gpt2"), dw.AdaLoRA(init_r=4, target_r=2))
    tiny.randomise(model)
    expected = tiny.logits(model, "gpt2")
    for _, _, site in sites_of(model):
        site.fusable = False
    torch.testing.assert_close(tiny.logits(model, "gpt2"), expected, rtol=1e-5, atol=1e-5)


def masked(model, ranks):
    """Zeroes singular values so that the sites have these ranks, in turn, the kept ones not all in front."""
    for number, part in enumerate(factors(model).values()):
        r = ranks[number % len(ranks)]
        with torch.no_grad():
            part.lora_E[: len(part.lora_E) - r] = 0
    return [ranks[number % len(ranks)] for number in range(len(factors(model)))]


@pytest.mark.parametrize("base", ["llama", "gpt2", "four-bits"])
def test_pruning_keeps_what_is_computed_and_saved(base, tmp_path):
    family = "gpt2" if base == "gpt2" else "llama"

    def fresh():
        model = tiny.tiny(family)
        return dw.quantize_model(model, dw.NF4()) if base == "four-bits" else model

    model = tiny.randomise(dw.adapt(fresh(), dw.AdaLoRA(init_r=4, target_r=2)))
    budget = control(model, "default", 10)
    ranks = masked(model, [3, 0, 4, 1])
    expected, before = tiny.logits(model, family), {p: part.delta() for p, part in factors(model).items()}
    budget.finish()
    assert [part.described()["r"] for part in factors(model).values()] == ranks
    torch.testing.assert_close(tiny.logits(model, family), expected, rtol=1e-5, atol=1e-5)
    for path, part in factors(model).items():
        torch.testing.assert_close(part.delta(), before[path], rtol=1e-5, atol=1e-6)
        assert part.lora_A.shape[0] == part.lora_B.shape[1] == len(part.lora_E) == part.described()["r"]
    assert all(p.requires_grad and p.numel() for p in dw.adapter_parameters(model, "default").values())
    summary = dw.summary(model)
    assert summary.trainable_parameters == sum(
        r * (sum(s.shape) + 1) for r, s in zip(ranks, summary.sites, strict=True)
    )
    # A step over a site of rank 0, saving, loading, merging.
    model(**tiny.inputs(family)).logits.sum().backward()
    assert all(p.grad is not None for p in dw.adapter_parameters(model, "default").values())
    sum(part.extra_loss() for part in factors(model).values()).backward()
    got = tiny.logits(model, family)
    dw.save_adapter(model, tmp_path / "a")
    for trainable in (False, True):
        loaded = dw.load_adapter(fresh(), tmp_path / "a", name="default", trainable=trainable)
        assert torch.equal(tiny.logits(loaded, family), got)
        assert book_of(loaded).configs["default"].init_r == 4
    dw.save_adapter(loaded, tmp_path / "b")
    saved = [load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab"]
    tiny.assert_same(*saved)
    dw.merge(loaded, into="float32" if base == "four-bits" else None)
    torch.testing.assert_close(tiny.logits(loaded, family), got, rtol=1e-4, atol=1e-4)


def test_a_pruned_adapter_adds_up_with_others():
    model = tiny.randomise(dw.adapt(tiny.tiny("llama"), dw.AdaLoRA(init_r=4, target_r=2), name="one"), "one")
    tiny.randomise(dw.adapt(model, dw.LoRA(r=2), name="two"), "two")
    budget = control(model, "one", 10)
    for number, part in enumerate(factors(model, "one").values()):
        with torch.no_grad():
            part.lora_E[: number % 5] = 0
    dw.set_adapter(model, {"one": 0.5, "two": 1.0})
    expected = tiny.logits(model, "llama")
    budget.finish()
    torch.testing.assert_close(tiny.logits(model, "llama"), expected, rtol=1e-5, atol=1e-5)


# The schedule.


@pytest.mark.parametrize("total", [*range(2, 40), 1000, 12345])
def test_a_derived_schedule_always_has_steps_in_which_ranks_fall(total):
    filled = scheduled(dw.AdaLoRA(), total)
    assert filled.total_steps == total and filled.tinit == total // 8
    assert filled.tinit < total - filled.tfinal and total - filled.tfinal >= 2
    assert filled.tfinal == total // 2 or total < 8


@pytest.mark.parametrize(
    ("options", "total", "says"),
    [
        ({}, 1, "of 1 steps 0 come before the budget falls"),
        ({"tinit": 6, "tfinal": 4}, 10, "of 10 steps 6 come before the budget falls .* and 4 after"),
        ({"tinit": 10}, 10, "of 10 steps 10 come before"),
        ({"total_steps": 20}, 10, "total_steps is 20 and the run has 10 steps"),
        (
            {"rank_pattern": {"q_proj": 2}, "target_modules": ["q_proj"]},
            10,
            "2 sites have 4 in all, and target_r 2 asks",
        ),
    ],
)
def test_a_schedule_in_which_nothing_can_change_is_refused(options, total, says):
    model = dw.adapt(tiny.tiny("llama"), dw.AdaLoRA(**SMALL | options))
    with pytest.raises(InputError, match=says):
        control(model, "default", total)


def test_a_training_in_vain_is_an_error():
    model = tiny.randomise(dw.adapt(tiny.tiny("llama"), dw.AdaLoRA(**SMALL)))
    budget = control(model, "default", 10)
    with pytest.raises(RunError, match=r"no rank has fallen: all 24 singular values .*from step 2 to step 5"):
        budget.finish()
    masked(model, [0])
    with pytest.raises(RunError, match="every rank fell to 0"):
        budget.finish()


def test_the_state_goes_on_where_it_was():
    config = dw.AdaLoRA(**SMALL, tinit=1, tfinal=3)

    def run(model, budget, steps):
        for step in steps:
            for name, p in dw.adapter_parameters(model, "default").items():
                p.grad = torch.randn(p.shape, generator=generator(1, name, step))
                with torch.no_grad():
                    p.sub_(0.1 * p.grad)
            budget.after_update(step)
        return {name: p.detach().clone() for name, p in dw.adapter_parameters(model, "default").items()}

    model = tiny.randomise(dw.adapt(tiny.tiny("llama"), config))
    expected = run(model, control(model, "default", 12), range(1, 13))
    for stop in (1, 5, 9, 11):
        model = tiny.randomise(dw.adapt(tiny.tiny("llama"), config))
        first = control(model, "default", 12)
        run(model, first, range(1, stop + 1))
        second = control(model, "default", 12)
        second.load_state_dict(first.state_dict())
        tiny.assert_same(run(model, second, range(stop + 1, 13)), expected)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"init_r": 0}, "init_r is 0: expected a whole number of at least 1"),
        ({"init_r": 4, "target_r": 4}, "target_r is 4 and init_r 4, so no rank could fall"),
        ({"target_r": 0}, "target_r is 0"),
        ({"deltaT": 0}, "deltaT is 0"),
        ({"tinit": -1, "tfinal": 1.5}, "tinit is -1.*; tfinal is 1.5"),
        ({"total_step": 0}, "total_step is 0"),
        ({"beta1": 1.0, "beta2": 0}, "beta1 is 1.0.*; beta2 is 0"),
        ({"orth_reg_weight": -1}, "orth_reg_weight is -1"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
        ({"rank_pattern": {"q_proj": 13}}, "rank_pattern is .*expected ranks from 0 to init_r"),
        ({"bias": "some"}, "bias is 'some'"),
        ({"r": 8}, "unknown AdaLoRA option 'r'"),
    ],
)
def test_wrong_options(options, says):
    with pytest.raises(InputError, match=says):
        dw.AdaLoRA(**options)


def test_what_it_does_not_adapt():
    with pytest.raises(InputError, match=r"does not adapt embeddings, and model\.embed_tokens is one"):
        dw.adapt(tiny.tiny("llama"), dw.AdaLoRA(target_modules=["q_proj", "embed_tokens"]))
    with pytest.raises(InputError, match="pattern 'nope' of rank_pattern names no adapted module"):
        dw.adapt(tiny.tiny("llama"), dw.AdaLoRA(rank_pattern={"nope": 2}))


# To plain LoRA.


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_to_lora_computes_the_same_bit_for_bit(bias, tmp_path):
    name = "gpt2"
    options = {"bias": bias, "trainable_tokens": [36, 10], "modules_to_save": ["ln_f"], "alpha": 7.0}
    model = tiny.randomise(dw.adapt(tiny.tiny(name), dw.AdaLoRA(init_r=4, target_r=2, **options), name="a"), "a")
    control(model, "a", 10)
    for number, part in enumerate(part for _, _, part in parts_of(model, "a") if part.low_rank() is not None):
        part.prune(torch.arange(4) < (0, 3, 1, 4)[number % 4])
    dw.adapt(model, dw.LoRA(r=2), name="other")
    dw.set_adapter(model, "a")
    expected = tiny.logits(model, name)
    zero = [p for p, _, part in parts_of(model, "a") if part.described().get("r") == 0]
    assert zero and dw.to_lora(model, "a") is model
    assert torch.equal(tiny.logits(model, name), expected)
    plain = book_of(model).configs["a"]
    assert type(plain) is dw.LoRA and dw.adapter_names(model) == ["a", "other"]
    lows = {p: part.low_rank() for p, _, part in parts_of(model, "a") if part.low_rank() is not None}
    assert all(plain.rank_of(p) == len(low.A) and plain.scale_of(p) == low.scale for p, low in lows.items())
    assert (set(zero) & set(lows) == set()) == (bias == "none")
    assert all(p.requires_grad for p in dw.adapter_parameters(model, "a").values())
    dw.save_adapter(model, tmp_path / "a", name="a")
    loaded = dw.load_adapter(tiny.tiny(name), tmp_path / "a")
    assert torch.equal(tiny.logits(loaded, name), expected)
    theirs = peft.PeftModel.from_pretrained(tiny.tiny(name), tmp_path / "a").eval()
    torch.testing.assert_close(tiny.logits(theirs, name), expected, rtol=1e-5, atol=1e-5)
    before = tiny.base_state(tiny.tiny(name))
    tiny.assert_same(tiny.base_state(dw.unload(model)), before)
    assert not any("adapted" in m._modules or "forward" in m.__dict__ for m in model.modules())


def test_what_to_lora_refuses():
    model = dw.adapt(tiny.tiny("llama"), dw.DoRA(r=2), name="dora")
    with pytest.raises(InputError, match=r"'dora' is DoRA, whose update of model\.layers\.0.* no plain product"):
        dw.to_lora(model, "dora")
    with pytest.raises(InputError, match="unknown adapter 'x'"):
        dw.to_lora(model, "x")
    zero = dw.adapt(tiny.tiny("llama"), dw.AdaLoRA(rank_pattern={".*": 0}))
    with pytest.raises(InputError, match="rank 0 at every site"):
        dw.to_lora(zero, "default")
    lora = tiny.randomise(dw.adapt(tiny.tiny("llama"), dw.LoRA(r=2)))
    state = {k: v.clone() for k, v in lora.state_dict().items()}
    tiny.assert_same(dict(dw.to_lora(lora, "default").state_dict()), state)
    dw.merge(lora)
    with pytest.raises(InputError, match="holds a merged adapter"):
        dw.to_lora(lora, "default")
