"""The same promises on 4-bit bases: every method works on them without knowing it."""

import copy

import pytest
import tiny
import torch
from cases import CASES
from dense import dense_call
from test_methods import ADDED, ALL, DENSE, METHOD, TOLERANCE, assert_close, gradients, loss, loss_of

import deltaw as dw
from deltaw.checkpoint.adapters import adapter_state
from deltaw.core.errors import InputError
from deltaw.methods import METHODS
from deltaw.quant import NF4, NF4Tensor, quantize_model, quantized_sites

EVERYTHING = NF4(embeddings=True, head=True)


def quantized(name, dtype=torch.float32, config=EVERYTHING):
    return quantize_model(tiny.tiny(name, dtype), config)


def dequantized(model):
    """A plain copy of a 4-bit base without adapters: what its matrices stand for."""
    plain = copy.deepcopy(model)
    made = {}
    for path, module, weight in list(quantized_sites(plain)):
        twin = model.get_submodule(path).weight
        values = weight.dequantize().contiguous()
        module.weight = made.setdefault(id(twin), torch.nn.Parameter(values, requires_grad=False))
    assert not any(isinstance(p, NF4Tensor) for p in plain.parameters())
    return plain


def build(key, dtype=torch.float32, *, trained=True, config=EVERYTHING, **options):
    model = quantized(ALL[key].model, dtype, config)
    dw.adapt(model, ALL[key].config, **options)
    return tiny.randomise(model) if trained else model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("key", DENSE)
def test_logits_and_gradients_are_those_of_the_dequantised_base(key, dtype):
    name = ALL[key].model
    base = quantized(name, dtype)
    assert sum(1 for _ in quantized_sites(base)) > 4
    plain = dequantized(base)
    assert torch.equal(tiny.logits(base, name), tiny.logits(plain, name))
    model = build(key, dtype)
    exact = plain.double()
    got, out = gradients(model, key), dense_call(exact, model, {"default": 1.0}, **tiny.inputs(name))
    assert tiny.relative(tiny.logits(model, name), out.logits.detach()) < TOLERANCE[dtype]
    if dtype == torch.float32:
        parameters = dw.adapter_parameters(model, "default")
        expected = torch.autograd.grad(loss_of(out.logits), list(parameters.values()))
        assert_close(got, dict(zip(parameters, expected, strict=True)), 1e-4)
    assert all(torch.isfinite(g).all() and g.any() for g in got.values())
    assert all(p.grad is None for n, p in model.named_parameters() if "adapted" not in n.split("."))


@pytest.mark.parametrize("key", [key for key in ALL if METHOD[key].identity_at_start and key in ADDED])
def test_starts_as_the_base_and_unloads_without_a_trace(key):
    name = ALL[key].model
    model = quantized(name)
    expected, kinds = tiny.logits(model, name), {k: type(p) for k, p in model.named_parameters()}
    bytes_before = {k: p.packed.nbytes for k, p in model.named_parameters() if isinstance(p, NF4Tensor)}
    dw.adapt(model, ALL[key].config)
    assert torch.equal(tiny.logits(model, name), expected)
    summary = dw.summary(model)
    assert summary.base_parameters == sum(p.numel() for p in tiny.tiny(name).parameters())
    assert summary.base_bytes < 4 * summary.base_parameters
    dw.unload(model)
    assert {k: type(p) for k, p in model.named_parameters()} == kinds
    assert {k: p.packed.nbytes for k, p in model.named_parameters() if isinstance(p, NF4Tensor)} == bytes_before
    assert torch.equal(tiny.logits(model, name), expected)


@pytest.mark.parametrize("key", ADDED)
def test_a_step_moves_the_adapter_and_no_code(key):
    model = build(key, trained=False).train()
    tiny.randomise(model, std=0.02)
    codes = {path: weight.packed.codes.clone() for path, _, weight in quantized_sites(model)}
    own = {k: p.clone() for k, p in dw.adapter_parameters(model, "default").items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loss(model, key).backward()
    optimizer.step()
    assert all(not torch.equal(p, own[k]) for k, p in dw.adapter_parameters(model, "default").items())
    assert all(torch.equal(weight.packed.codes, codes[path]) for path, _, weight in quantized_sites(model))


@pytest.mark.parametrize("key", ADDED)
def test_saved_adapters_copies_and_states_keep_every_bit(key, tmp_path):
    name = ALL[key].model
    model = build(key)
    expected = tiny.logits(model, name)
    dw.save_adapter(model, tmp_path / "a")
    loaded = dw.load_adapter(quantized(name), tmp_path / "a")
    assert torch.equal(tiny.logits(loaded, name), expected)
    tiny.assert_same(adapter_state(loaded, "a"), adapter_state(model, "default"))
    twin = copy.deepcopy(model)
    other = build(key, trained=False, seed=8)
    for path, _, weight in quantized_sites(other):
        weight.packed.codes.zero_()
        assert weight.packed.codes.data_ptr() != model.get_submodule(path).weight.packed.codes.data_ptr()
    assert not other.load_state_dict(model.state_dict()).missing_keys
    for copied in (twin, other):
        assert torch.equal(tiny.logits(copied, name), expected)


@pytest.mark.parametrize("key", [key for key in ALL if METHOD[key].trains_base])
def test_a_method_that_trains_the_base_is_refused(key):
    with pytest.raises(InputError, match="held in 4 bits"):
        dw.adapt(quantized(ALL[key].model), ALL[key].config)


def test_every_method_is_tried():
    tried = {key.split("-")[0] for key in ADDED}
    assert tried == {name for name in CASES if not METHODS[name].trains_base}
