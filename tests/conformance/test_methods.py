"""One suite over every registered method: what the contract promises, on every kind of site."""

import copy
import json

import pytest
import tiny
import torch
from cases import CASES
from dense import dense_call
from safetensors.torch import load_file

import deltaw as dw
from deltaw.checkpoint.adapters import adapter_state
from deltaw.core.errors import InputError
from deltaw.core.generators import generator
from deltaw.methods import METHODS
from deltaw.methods.host import parts_of, sites_of, steady_parts
from deltaw.models.sites import SiteWeight, kind_of

ALL = {f"{method}-{name}": case for method, cases in CASES.items() for name, case in cases.items()}
METHOD = {key: METHODS[key.split("-")[0]] for key in ALL}
ADDED = [key for key in ALL if not METHOD[key].trains_base]
DENSE = [key for key in ADDED if ALL[key].dense]
SUMMED = [key for key in DENSE if ALL[key].adds]
#: Models whose forward computes in float64 throughout; others' norms go through float32.
EXACT = ("gpt2", "bert-seq", "bert-tok", "bert-mlm")
# Relative error of logits. float32: some hundred roundings of 6e-8. bfloat16: a few layers of roundings of 4e-3, which
# add up like a random walk, and a merged weight is rounded once more.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}


def build(key, *, dtype=torch.float32, adapter_dtype=None, trained=True, name="default", **options):
    """The case's model with its adapter; `trained` fills the adapter with random values."""
    case = ALL[key]
    model = tiny.tiny(case.model, dtype)
    dw.adapt(model, case.config, name=name, dtype=adapter_dtype, **options)
    if trained and not METHOD[key].trains_base:
        tiny.randomise(model, name)
    return model


def loss_of(logits):
    """A smooth loss in float64, which transformers' own is not."""
    return (torch.tanh(logits.double()) * torch.randn(logits.shape, generator=generator(0, "loss")).double()).sum()


def loss(model, key):
    return loss_of(model(**tiny.inputs(ALL[key].model)).logits)


def gradients(model, key, name="default"):
    """Gradients of the loss in the adapter's parameters, by name."""
    model.zero_grad(set_to_none=True)
    loss(model, key).backward()
    return {name: p.grad.clone() for name, p in dw.adapter_parameters(model, name).items() if p.grad is not None}


def assert_close(got, expected, tolerance):
    """Each tensor by the norm of the difference; what is zero by its nature (a key's bias) against all the others."""
    assert got.keys() == expected.keys() and got
    whole = torch.cat([value.flatten() for value in expected.values()]).norm()
    for name, value in got.items():
        error = (value - expected[name]).norm()
        assert error <= tolerance * max(expected[name].norm(), 1e-3 * whole), name


def test_every_registered_method_has_cases():
    assert set(CASES) == set(METHODS)
    for name, cases in CASES.items():
        assert cases and all(type(case.config) is METHODS[name].config for case in cases.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("key", ALL)
def test_starts_bit_identical_to_the_base(key, dtype):
    if not METHOD[key].identity_at_start:
        pytest.skip("not promised")
    name = ALL[key].model
    expected = tiny.logits(tiny.tiny(name, dtype), name)
    for adapter_dtype in (None, torch.bfloat16):
        model = build(key, dtype=dtype, adapter_dtype=adapter_dtype, trained=False)
        assert torch.equal(tiny.logits(model, name), expected)
        assert expected.dtype == dtype


@pytest.mark.parametrize("key", ADDED)
def test_a_trained_adapter_changes_the_output(key):
    name = ALL[key].model
    assert tiny.relative(tiny.logits(build(key), name), tiny.logits(tiny.tiny(name), name)) > 0.05


@pytest.mark.parametrize("key", DENSE)
def test_logits_and_gradients_equal_the_dense_reference_in_float64(key):
    model = build(key, dtype=torch.float64, adapter_dtype=torch.float64)
    got = gradients(model, key)
    assert got.keys() == dw.adapter_parameters(model, "default").keys()
    plain, parameters = tiny.tiny(ALL[key].model, torch.float64), dw.adapter_parameters(model, "default")
    out = dense_call(plain, model, {"default": 1.0}, **tiny.inputs(ALL[key].model))
    expected = torch.autograd.grad(loss_of(out.logits), list(parameters.values()))
    # Norms that go through float32 may round one way here and another there.
    tolerance = 1e-11 if ALL[key].model in EXACT else 1e-6
    assert tiny.relative(tiny.logits(model, ALL[key].model), out.logits.detach()) < tolerance
    assert_close(got, dict(zip(parameters, expected, strict=True)), tolerance)


@pytest.mark.parametrize("key", [key for key in ADDED if ALL[key].model in EXACT])
def test_gradients_equal_finite_differences(key):
    """Along random directions, in training mode: where the case has dropout, its mask is drawn again alike."""
    model = build(key, dtype=torch.float64, adapter_dtype=torch.float64).train()
    parameters, state = dw.adapter_parameters(model, "default"), torch.get_rng_state()
    # DoRA's norm is a constant in its gradient, and so here.
    for part in steady_parts(model):
        part.steady(True)

    def value():
        torch.set_rng_state(state)
        return loss(model, key)

    torch.set_rng_state(state)
    got = gradients(model, key)
    step = 1e-5
    for name, parameter in parameters.items():
        direction = torch.randn(parameter.shape, generator=generator(2, name), dtype=torch.float64)
        with torch.no_grad():
            parameter.add_(direction, alpha=step)
            above = value()
            parameter.add_(direction, alpha=-2 * step)
            below = value()
            parameter.add_(direction, alpha=step)
        slope, expected = float(above - below) / (2 * step), float((got[name] * direction).sum())
        # A step's error grows with the gradient, which may be all but orthogonal to the direction.
        assert abs(slope - expected) < 1e-6 * max(1.0, float(got[name].norm() * direction.norm())), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("key", DENSE)
def test_dtypes_of_base_and_adapter_are_independent(key, dtype, adapter_dtype):
    name = ALL[key].model
    model = build(key, dtype=dtype, adapter_dtype=adapter_dtype)
    wide = torch.promote_types(dtype, adapter_dtype)
    for _, _, part in parts_of(model, "default"):
        dtypes = {p.dtype for key, p in part.named_parameters() if key != "magnitude"}
        assert dtypes == {wide if "part" in part.described() else adapter_dtype}
        if hasattr(part, "magnitude"):
            assert part.magnitude.dtype == torch.float32
    got = tiny.logits(model, name)
    assert got.dtype == dtype
    plain = tiny.tiny(name, dtype).double()
    with torch.no_grad():
        expected = dense_call(plain, model, {"default": 1.0}, **tiny.inputs(name)).logits
    assert tiny.relative(got, expected) < TOLERANCE[dtype]
    grads, parameters = gradients(model, key), dw.adapter_parameters(model, "default")
    assert grads.keys() == parameters.keys()
    assert all(g.dtype == parameters[k].dtype and torch.isfinite(g).all() and g.any() for k, g in grads.items())
    assert all(p.grad is None for n, p in model.named_parameters() if "adapted" not in n.split("."))


@pytest.mark.parametrize("key", [key for key in ADDED if not ALL[key].dense])
def test_what_no_weights_can_express_is_not_merged(key):
    model = build(key)
    expected = tiny.logits(model, ALL[key].model)
    with pytest.raises(InputError, match=r"cannot be merged|cannot merge a bias|merge that adapter alone"):
        dw.merge(model)
    assert torch.equal(tiny.logits(model, ALL[key].model), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("key", DENSE)
def test_merge_equals_the_unmerged_forward_and_unmerge_restores_every_bit(key, dtype):
    name = ALL[key].model
    model = tiny.tiny(name, dtype)
    before, identities = tiny.base_state(model), {k: id(p) for k, p in model.named_parameters(remove_duplicate=False)}
    config_before = model.config.to_dict()
    dw.adapt(model, ALL[key].config)
    tiny.randomise(model)
    expected, trained = tiny.logits(model, name), adapter_state(model, "default")
    assert dw.merge(model) is model
    assert model.state_dict().keys() == before.keys()
    assert not any("forward" in m.__dict__ or "adapted" in m._modules for m in model.modules())
    assert tiny.relative(tiny.logits(model, name), expected) < TOLERANCE[dtype]
    assert {p.dtype for p in model.parameters()} == {dtype}
    dw.unmerge(model)
    tiny.assert_same(tiny.base_state(model), before)
    tiny.assert_same(adapter_state(model, "default"), trained)
    assert torch.equal(tiny.logits(model, name), expected)
    assert model.config.to_dict() == config_before
    dw.unload(model)
    assert {k: id(p) for k, p in model.named_parameters(remove_duplicate=False)} == identities


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("key", ADDED)
def test_saving_and_loading_keeps_every_bit(key, adapter_dtype, tmp_path):
    name = ALL[key].model
    model = build(key, adapter_dtype=adapter_dtype)
    state = {k: v.clone() for k, v in adapter_state(model, "default").items()}
    expected = tiny.logits(model, name)
    dw.save_adapter(model, tmp_path / "a")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    tiny.assert_same(load_file(tmp_path / "a" / "adapter_model.safetensors"), state)
    for trainable in (False, True):
        loaded = dw.load_adapter(tiny.tiny(name), tmp_path / "a", trainable=trainable)
        assert dw.adapter_names(loaded) == ["a"]
        assert torch.equal(tiny.logits(loaded, name), expected)
        parameters = dw.adapter_parameters(loaded, "a").values()
        assert all(p.requires_grad == trainable for p in parameters)
        again = adapter_state(loaded, "a")
        if trainable:
            assert all(p.dtype in (torch.float32, torch.float64) for p in parameters)
            again = {k: v.to(state[k].dtype) for k, v in again.items()}
        elif not ALL[key].adds:
            # A whole copy computes in its own dtype, which is not made narrower than the base's.
            again = {k: v.to(state[k].dtype) for k, v in again.items()}
        tiny.assert_same(again, state)
    dw.save_adapter(loaded, tmp_path / "b")
    first, second = (json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in "ab")
    assert set(first.pop("target_modules", ())) == set(second.pop("target_modules", ())) and first == second


@pytest.mark.parametrize("key", ADDED)
def test_parameter_count_follows_the_formula(key):
    model, method = build(key, trained=False), METHOD[key]
    summary = dw.summary(model)
    counted = {id(p): p.numel() for _, _, part in parts_of(model, "default") for p in part.parameters()}
    assert summary.trainable_parameters == sum(site.parameters for site in summary.sites) == sum(counted.values())
    assert summary.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    base = tiny.tiny(ALL[key].model)
    assert summary.base_parameters == sum(p.numel() for p in base.parameters())
    assert summary.adapter_bytes == sum(tensor.nbytes for tensor in adapter_state(model, "default").values())
    frozen = getattr(ALL[key].config, "freeze_a", False) or "pissa" in key or "olora" in key
    assert frozen == (summary.adapter_bytes > 4 * summary.trainable_parameters)
    if ALL[key].counted:
        expected = sum(
            method.param_count(ALL[key].config, kind_of(module), SiteWeight(module, kind_of(module)).shape)
            for _, module, _ in parts_of(model, "default")
        )
        assert summary.trainable_parameters == expected
    assert "adapter 'default'" in str(summary) and len(str(summary).splitlines()) == len(summary.sites) + 2


@pytest.mark.parametrize("key", ALL)
def test_a_training_step_moves_all_of_the_adapter_and_nothing_of_the_base(key):
    model = build(key, trained=False).train()
    tiny.randomise(model, std=0.02)
    before, own = tiny.base_state(model), {k: p.clone() for k, p in dw.adapter_parameters(model, "default").items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loss(model, key).backward()
    optimizer.step()
    moved = {k for k, p in dw.adapter_parameters(model, "default").items() if not torch.equal(p, own[k])}
    if METHOD[key].trains_base:
        assert moved == {k for k, _ in model.named_parameters()}
    else:
        assert moved == own.keys()
        tiny.assert_same(tiny.base_state(model), before)


@pytest.mark.parametrize("key", ADDED)
def test_unloading_leaves_no_trace(key):
    model = tiny.tiny(ALL[key].model)
    frozen = next(iter(dict(model.named_parameters())))
    model.get_parameter(frozen).requires_grad_(False)
    before = tiny.base_state(model)
    wants = {k: p.requires_grad for k, p in model.named_parameters()}
    inside = {k: set(m.__dict__) for k, m in model.named_modules()}
    expected = tiny.logits(model, ALL[key].model)
    dw.adapt(model, ALL[key].config)
    dw.adapt(model, ALL[key].config, name="second", seed=3)
    tiny.randomise(model, "second")
    loss(model.train(), key).backward()
    assert dw.unload(model) is model
    model.eval()
    assert list(model.state_dict()) == list(before)
    tiny.assert_same(tiny.base_state(model), before)
    assert {k: p.requires_grad for k, p in model.named_parameters()} == wants
    assert {k: set(m.__dict__) for k, m in model.named_modules()} == inside
    assert torch.equal(tiny.logits(model, ALL[key].model), expected)


@pytest.mark.parametrize("key", ADDED)
def test_switching_between_two_adapters_and_the_bare_base(key):
    name = ALL[key].model
    model = tiny.tiny(name)
    base, alone = tiny.logits(model, name), {}
    for adapter, seed in (("one", 1), ("two", 2)):
        dw.adapt(model, ALL[key].config, name=adapter, seed=seed)
        tiny.randomise(model, adapter, seed=seed)
        alone[adapter] = tiny.logits(model, name)
        single = tiny.randomise(dw.adapt(tiny.tiny(name), ALL[key].config, name=adapter, seed=seed), adapter, seed=seed)
        assert torch.equal(tiny.logits(single, name), alone[adapter])
    assert not torch.equal(alone["one"], alone["two"])
    for active, expected in [
        ("one", alone["one"]),
        (None, base),
        (["two"], alone["two"]),
        ({"one": 1.0}, alone["one"]),
    ]:
        dw.set_adapter(model, active)
        assert torch.equal(tiny.logits(model, name), expected)
        wanted = {n for n in ("one", "two") if any(p.requires_grad for p in dw.adapter_parameters(model, n).values())}
        assert wanted == ({active} if isinstance(active, str) else set(active or ()))
    dw.delete_adapter(model, "one")
    assert dw.adapter_names(model) == ["two"]
    dw.set_adapter(model, "two")
    assert torch.equal(tiny.logits(model, name), alone["two"])


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("weights", [{"one": 1.0, "two": 1.0}, {"one": 0.7, "two": -0.3}, {"one": 0.5}])
@pytest.mark.parametrize("key", SUMMED)
def test_sums_and_weighted_sums_equal_the_dense_reference(key, weights, mode):
    name = ALL[key].model
    model = tiny.tiny(name, torch.float64)
    for adapter, seed in (("one", 1), ("two", 2)):
        dw.adapt(model, ALL[key].config, name=adapter, seed=seed, dtype=torch.float64)
        tiny.randomise(model, adapter, seed=seed)
    dw.set_adapter(model, list(weights) if set(weights.values()) == {1.0} else weights)
    # Dropout off, and yet the training path.
    for _, _, site in sites_of(model):
        for part in (part for parts in site.parts.values() for part in parts):
            part.dropout = 0.0
    getattr(model, mode)()
    parameters = {f"{n}/{k}": p for n in weights for k, p in dw.adapter_parameters(model, n).items()}
    out = dense_call(tiny.tiny(name, torch.float64), model, weights, **tiny.inputs(name))
    expected = torch.autograd.grad(loss_of(out.logits), list(parameters.values()))
    result = model(**tiny.inputs(name))
    got = torch.autograd.grad(loss_of(result.logits), list(parameters.values()))
    tolerance = 1e-10 if name in EXACT else 1e-6
    assert tiny.relative(result.logits.detach(), out.logits.detach()) < tolerance
    assert_close(dict(zip(parameters, got, strict=True)), dict(zip(parameters, expected, strict=True)), tolerance)
    dw.merge(model)
    assert tiny.relative(tiny.logits(model, name), out.logits.detach()) < tolerance


@pytest.mark.parametrize("key", [key for key in DENSE if not ALL[key].adds])
def test_two_whole_copies_of_one_module_are_refused(key):
    model = build(key)
    dw.adapt(model, ALL[key].config, name="second")
    for active in (["default", "second"], {"default": 0.5}):
        dw.set_adapter(model, active)
        with pytest.raises(InputError, match="train a whole copy of the same module"):
            tiny.logits(model, ALL[key].model)
        with pytest.raises(InputError, match="merge that adapter alone"):
            dw.merge(model)


@pytest.mark.parametrize("key", ADDED)
def test_starting_values_follow_the_seed_alone(key):
    def started(**options):
        return {
            k: p.detach().clone() for k, p in build(key, trained=False, **options).named_parameters() if "adapted" in k
        }

    before = torch.get_rng_state()
    first = started(seed=5)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    tiny.assert_same(first, started(seed=5))
    other = started(seed=6)
    assert any(not torch.equal(first[k], other[k]) for k in first) == ALL[key].drawn
    # Another site more or fewer changes no other's values.
    narrow = {k: v for k, v in started(seed=5, adapter_dtype=torch.bfloat16).items()}
    assert all(torch.equal(first[k].bfloat16(), narrow[k].bfloat16()) for k in first)


@pytest.mark.parametrize("key", [key for key in ALL if ALL[key].recomputes])
def test_gradient_checkpointing_gives_the_same_gradients(key):
    model = build(key, dtype=torch.float64, adapter_dtype=torch.float64).train()
    state, calls = torch.get_rng_state(), []
    for module in model.modules():
        if type(module).__name__.endswith("Norm"):
            module.register_forward_hook(lambda *_: calls.append(1))
    expected, once = gradients(model, key), len(calls)
    # transformers renamed it; the old name warns.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    torch.set_rng_state(state)
    got = gradients(model, key)
    assert len(calls) - once > once
    # Not bit-equal everywhere: T5 turns its cache off when checkpointing, and then adds up in another order.
    assert_close(got, expected, 1e-6)


@pytest.mark.parametrize("key", ALL)
def test_training_mode_without_dropout_equals_eval(key):
    model = build(key)
    for _, _, site in sites_of(model):
        for part in (part for parts in site.parts.values() for part in parts):
            part.dropout = 0.0
    expected = tiny.logits(model, ALL[key].model)
    assert torch.equal(tiny.logits(model.train(), ALL[key].model), expected)


@pytest.mark.parametrize("key", ALL)
def test_a_deep_copy_is_independent(key):
    model = build(key)
    before = tiny.logits(model, ALL[key].model)
    twin = copy.deepcopy(model)
    assert torch.equal(tiny.logits(twin, ALL[key].model), before)
    tiny.randomise(twin, seed=9)
    with torch.no_grad():
        next(twin.parameters()).add_(1.0)
    assert torch.equal(tiny.logits(model, ALL[key].model), before)
    assert not torch.equal(tiny.logits(twin, ALL[key].model), before)
    if key in ADDED:
        dw.unload(twin)
        assert dw.adapter_names(model) == ["default"] and dw.adapter_names(twin) == []
        assert torch.equal(tiny.logits(model, ALL[key].model), before)


@pytest.mark.parametrize("key", ALL)
def test_a_state_dict_goes_into_another_model(key):
    model = build(key)
    if METHOD[key].trains_base:
        tiny.randomise(model)
    other = build(key, trained=False, seed=8)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    assert not other.load_state_dict(state).missing_keys
    tiny.assert_same(dict(other.state_dict()), state)
    assert torch.equal(tiny.logits(other, ALL[key].model), tiny.logits(model, ALL[key].model))


@pytest.mark.parametrize("key", ALL)
def test_two_models_in_one_process_do_not_disturb_each_other(key):
    name = ALL[key].model
    bare, first, second = tiny.tiny(name), build(key), build(key, trained=False)
    expected = [tiny.logits(model, name) for model in (bare, first, second)]
    loss(second.train(), key).backward()
    second.eval()
    if key in ADDED and METHOD[key].identity_at_start:
        dw.unload(second)
    assert all(p.grad is None for model in (bare, first) for p in model.parameters())
    assert all(torch.equal(tiny.logits(m, name), e) for m, e in zip((bare, first, second), expected, strict=True))


@pytest.mark.parametrize("key", [key for key in ALL if METHOD[key].trains_base])
def test_a_method_that_trains_the_base_stands_alone(key, tmp_path):
    model = tiny.tiny(ALL[key].model).requires_grad_(False)
    dw.adapt(model, ALL[key].config)
    assert all(p.requires_grad for p in model.parameters())
    summary = dw.summary(model)
    assert summary.trainable_parameters == summary.base_parameters == sum(p.numel() for p in model.parameters())
    assert summary.share == 1.0
    assert not any("adapted" in m._modules for m in model.modules())
    for refused, says in [
        (lambda: dw.adapt(model, dw.LoRA(), name="x"), "stands alone"),
        (lambda: dw.set_adapter(model, None), "no bare base"),
        (lambda: dw.merge(model), "in the weights already"),
        (lambda: dw.unload(model), "cannot be taken off"),
        (lambda: dw.save_adapter(model, tmp_path / "a"), "save the model with"),
    ]:
        with pytest.raises(InputError, match=says):
            refused()
    assert not (tmp_path / "a").exists()
    adapted = dw.adapt(tiny.tiny(ALL[key].model), dw.LoRA())
    with pytest.raises(InputError, match="stands alone"):
        dw.adapt(adapted, ALL[key].config, name="full")
    assert not any(p.requires_grad for k, p in adapted.named_parameters() if "adapted" not in k)
    dw.save_model(model, tmp_path / "m")
    loaded = type(model).from_pretrained(tmp_path / "m")
    assert torch.equal(tiny.logits(loaded, ALL[key].model), tiny.logits(model, ALL[key].model))
