"""Fused decoder layers against the layers' own modules: losses, gradients of every trained tensor, what is kept."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import psutil
import pytest
import torch
import transformers
from torch import nn

import deltaw as dw
from deltaw.core.errors import RunError
from deltaw.fuse import block, decoder, flash, group, narrow, thin
from deltaw.fuse import plan as plan_module
from deltaw.fuse.decoder import install_blocks, needs_mask, uninstall_blocks
from deltaw.fuse.host_memory import HostMemory
from deltaw.fuse.keep import KEEPS, Room, bridges, choose, kept_bytes, planned, told
from deltaw.kernels.fp8 import whole
from deltaw.kernels.memory import ROW_BYTES
from deltaw.quant import quantize_model
from deltaw.quant.weight import NF4Weight

SHAPE = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16},
}
#: transformers' norms and rotations compute in float32 whatever their input is.
CLOSE = 1e-5
METHODS = {
    "lora": lambda: dw.LoRA(r=4),
    "dora": lambda: dw.DoRA(r=4),
    "adalora": lambda: dw.AdaLoRA(target_r=3, init_r=4, total_steps=10),
    "pissa": lambda: dw.LoRA(r=4, init="pissa"),
    "frozen-a": lambda: dw.LoRA(r=4, freeze_a=True),
    "some": lambda: dw.LoRA(r=3, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 5}),
}


def model_of(family="llama", method="lora", dtype=torch.float64, four_bits=False, **changes):
    config = transformers.AutoConfig.for_model(family, **{**SHAPE, **FAMILIES[family], **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(
                0.2 * torch.randn(parameter.shape, generator=draw, dtype=dtype) + (1.0 if "norm" in name else 0.0)
            )
    if four_bits:
        quantize_model(model, dw.NF4())
    dw.adapt(model, METHODS[method](), dtype=dtype if dtype == torch.float64 else None)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype))
    return model.train()


def batch_of(rows=3, length=11, padded=True):
    ids = torch.randint(0, 99, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 7:] = 0
    return {"input_ids": ids, "attention_mask": mask, "use_cache": False}


def gradients(model, batch):
    """The last hidden states and the gradients of a weighted sum of them, in the model's own dtype throughout."""
    model.zero_grad()
    hidden = model.model(**batch).last_hidden_state
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2)).to(hidden)
    (hidden * weights * batch["attention_mask"][..., None]).sum().backward()
    return hidden.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_like(found, wanted, tolerance):
    (hidden, grads), (true_hidden, true_grads) = found, wanted
    assert grads.keys() == true_grads.keys() and grads
    assert (hidden - true_hidden).norm() <= tolerance * true_hidden.norm()
    for name, true in true_grads.items():
        assert grads[name].dtype == true.dtype
        assert (grads[name] - true).norm() <= tolerance * true.norm(), name


def fused_calls(monkeypatch):
    """Counts the layers that ran fused."""
    count = []
    run = decoder.run_block
    monkeypatch.setattr(decoder, "run_block", lambda x, call: count.append(call.keep) or run(x, call))
    return count


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_and_method_is_as_its_own_modules_compute_it(family, method, monkeypatch):
    model, batch = model_of(family, method), batch_of()
    wanted = gradients(model, batch)
    calls = fused_calls(monkeypatch)
    for keep in KEEPS:
        assert install_blocks(model, keep=keep) == (3, 3, None)
        calls.clear()
        assert_like(gradients(model, batch), wanted, CLOSE)
        assert calls == [keep] * 3
        assert uninstall_blocks(model) == 3
    assert not any("forward" in layer.__dict__ for layer in model.model.layers)
    assert_like(gradients(model, batch), wanted, 1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_joined_for_the_time_being(family, method):
    model, batch = model_of(family, method), batch_of()
    wanted = gradients(model, batch)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for keep in KEEPS:
        assert install_blocks(model, keep=keep, joins=True)[0] == 3
        store = model.model.layers[0].__dict__["_deltaw_fused"].fusion.store
        assert len(store.joined) == 12
        assert all(whole.stride(0) * whole.element_size() % ROW_BYTES == 0 for whole in store.joined.values())
        assert_like(gradients(model, batch), wanted, CLOSE)
        # Factors that have changed are seen, also where only one of two did.
        with torch.no_grad():
            changed = [p for p in model.parameters() if p.requires_grad]
            for p in changed:
                p.add_(0.1)
        seen = gradients(model, batch)
        uninstall_blocks(model)
        assert_like(seen, gradients(model, batch), 10 * CLOSE)
        with torch.no_grad():
            for p in changed:
                p.sub_(0.1)
    for name, p in model.named_parameters():
        assert p.is_contiguous() and p.untyped_storage().nbytes() == p.nbytes, name
        assert torch.allclose(p, before[name], atol=1e-12), name


@pytest.mark.parametrize("four_bits", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("target", ["q_proj", "v_proj", "gate_proj", "up_proj"])
def test_one_of_a_group_adapted_at_a_whole_rank(target, four_bits):
    model, batch = model_of("llama", "lora", torch.float32, four_bits=four_bits), batch_of()
    dw.delete_adapter(model, "default")
    dw.adapt(model, dw.LoRA(r=16, target_modules=[target]))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    wanted = gradients(model, batch)
    # New memory is NaN.
    torch.use_deterministic_algorithms(True)
    try:
        assert install_blocks(model, keep="input", joins=True)[0] == 3
        assert_like(gradients(model, batch), wanted, 2 * CLOSE)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("keep", ["all", "input"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_rotation_that_scales(method, keep):
    scaled = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 32}
    model, batch = model_of("llama", method, rope_parameters=scaled), batch_of()
    wanted = gradients(model, batch)
    assert install_blocks(model, keep=keep)[0] == 3
    assert_like(gradients(model, batch), wanted, CLOSE)


def test_a_pass_that_is_not_taken_back_leaves_nothing_in_host_memory():
    model, batch = model_of("llama", "lora"), batch_of(padded=False)
    for keep, least in (("host", 3), ("host-products", 3), ("host-attention", 6)):
        install_blocks(model, keep=keep)
        host = model.model.layers[0].__dict__["_deltaw_fused"].fusion.host
        hidden = model.model(**batch).last_hidden_state
        assert len(host._held) >= least
        del hidden
        assert not host._held
        model.model(**batch).last_hidden_state.sum().backward()
        assert not host._held
        uninstall_blocks(model)


def test_another_attention_where_it_was_asked_for_and_can_be_had(monkeypatch):
    calls = []

    def attend(q, k, v, scaling):
        calls.append(q.shape)
        made = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        return made.transpose(1, 2)

    monkeypatch.setattr(flash, "attend", attend)
    takes = flash.takes
    assert not takes(torch.randn(1, 2, 3, 4), SimpleNamespace(is_causal=True), None), "it is not for the CPU"
    like = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, shape=(1, 2, 3, 4))
    monkeypatch.setattr(flash, "takes", lambda q, attn, mask: takes(like, attn, mask))
    for family, padded, taken in (("llama", False, 3), ("llama", True, 0), ("mistral", False, 0)):
        model, batch = model_of(family, "lora"), batch_of(padded=padded)
        wanted = gradients(model, batch)
        install_blocks(model, keep="host-attention", by_flash=True)
        calls.clear()
        assert_like(gradients(model, batch), wanted, CLOSE)
        assert calls == [(3, 4, 11, 8)] * taken


@pytest.mark.gpu
@pytest.mark.skipif(flash.objection(torch.device("cuda")) is not None, reason="no FlashAttention 4")
@pytest.mark.parametrize("keep", ["all", "host-attention"])
def test_flash_attention_is_sdpa(keep):
    model = model_of("llama", "lora", torch.bfloat16, head_dim=64, max_position_embeddings=512).cuda()
    ids = torch.randint(0, 99, (2, 300), generator=torch.Generator().manual_seed(1)).cuda()
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    found = []
    for by_flash in (False, True):
        install_blocks(model, keep=keep, by_flash=by_flash)
        hidden, grads = gradients(model, batch)
        found.append((hidden.float(), {name: grad.float() for name, grad in grads.items()}))
        uninstall_blocks(model)
    assert_like(*found, 2e-2)


@pytest.mark.gpu
def test_what_is_on_the_host_is_not_on_the_card():
    model = model_of("llama", "lora", torch.bfloat16, num_hidden_layers=8, max_position_embeddings=2048).cuda()
    ids = torch.randint(0, 99, (2, 2000), generator=torch.Generator().manual_seed(1)).cuda()
    held = {}
    for keep in ("host", "host-attention", "attention", "host-products", "all"):
        install_blocks(model, keep=keep)
        for _ in range(2):
            before = torch.cuda.memory_allocated()
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
            torch.cuda.synchronize()
            held[keep] = torch.cuda.memory_allocated() - before
            hidden.sum().backward()
            model.zero_grad()
            del hidden
        uninstall_blocks(model)
    output = 8 * ids.numel() * 32 * 2
    assert held["host-attention"] < held["host"] + 0.1 * output
    assert held["attention"] > held["host"] + 4 * output
    # The last one's are still here.
    products = (held["all"] - held["attention"]) / 8
    assert products > 0 and held["host-products"] - held["attention"] < 1.1 * products


def test_joined_weights_with_an_adapter_that_comes_and_goes():
    model, batch = model_of("llama", "lora"), batch_of()
    dw.adapt(model, dw.LoRA(r=6, target_modules=["q_proj", "up_proj"]), name="other", dtype=torch.float64)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "other" in name:
                p.normal_(std=0.1, generator=torch.Generator().manual_seed(3))
    dw.set_adapter(model, "default")
    install_blocks(model, keep="all", joins=True)
    # Two passes forward with other factors in between, then both back.
    first = model.model(**batch).last_hidden_state
    dw.set_adapter(model, "other")
    second = model.model(**batch).last_hidden_state
    found = []
    for hidden in (first, second):
        model.zero_grad()
        hidden.square().sum().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    uninstall_blocks(model)
    for active, grads in zip(("default", "other"), found, strict=True):
        dw.set_adapter(model, active)
        model.zero_grad()
        model.model(**batch).last_hidden_state.square().sum().backward()
        for name, grad in grads.items():
            true = dict(model.named_parameters())[name].grad
            assert (grad - true).norm() <= CLOSE * true.norm(), (active, name)


@pytest.mark.parametrize("bias", ["attention_bias", "mlp_bias"])
@pytest.mark.parametrize("method", ["lora", "dora", "some"])
def test_frozen_biases(method, bias):
    model, batch = model_of("llama", method, **{bias: True}), batch_of()
    wanted = gradients(model, batch)
    for keep in ("all", "input"):
        install_blocks(model, keep=keep, joins=keep == "all")
        assert_like(gradients(model, batch), wanted, CLOSE)
        uninstall_blocks(model)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_weights_in_four_bits_stay_packed(method):
    model, batch = model_of("llama", method, torch.float32, four_bits=True), batch_of()
    wanted = gradients(model, batch)
    assert install_blocks(model, keep="input")[0] == 3
    assert_like(gradients(model, batch), wanted, CLOSE)
    assert all(dw.core.protocols.packed_of(layer.mlp.up_proj.weight) is not None for layer in model.model.layers)


def test_bfloat16_is_as_near_to_float64_as_the_modules_are():
    exact, batch = model_of("qwen3", "lora"), batch_of()
    truth = gradients(exact, batch)[1]
    model = model_of("qwen3", "lora", torch.bfloat16)
    model.load_state_dict(exact.state_dict())
    errors = []
    for fuse in (False, True):
        if fuse:
            install_blocks(model, keep="all")
        found = gradients(model, batch)[1]
        errors.append(sum(float((found[n].double() - truth[n]).norm() ** 2) for n in truth) ** 0.5)
    assert errors[1] <= 1.1 * errors[0]


def test_loss_and_trainer_s_own_shape_of_a_step():
    model = model_of("llama", "lora", torch.float32)
    batch = batch_of() | {"labels": batch_of()["input_ids"]}

    def steps():
        other = copy.deepcopy(model)
        if fused:
            install_blocks(other, keep="attention")
        optimizer = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(20):
            loss = other(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    fused = False
    plain = steps()
    fused = True
    assert steps() == pytest.approx(plain, rel=2e-3) and plain[-1] < 0.9 * plain[0]


def test_two_adapters_at_once_and_none():
    model, batch = model_of(), batch_of()
    dw.adapt(model, dw.LoRA(r=2), name="other", dtype=torch.float64, seed=5)
    dw.set_adapter(model, {"default": 0.5, "other": 2.0})
    wanted = gradients(model, batch)
    install_blocks(model, keep="all")
    assert_like(gradients(model, batch), wanted, CLOSE)
    dw.set_adapter(model, None)
    plain = model.model(**batch).last_hidden_state
    own = model.eval().model(**batch).last_hidden_state
    assert (plain - own).norm() <= CLOSE * own.norm()


def test_the_first_layer_s_input_gradient_and_one_that_only_the_input_wants():
    model, batch = model_of(), batch_of(padded=False)
    dw.set_adapter(model, None)
    results = []
    for fuse in (False, True):
        if fuse:
            install_blocks(model, keep="input")
        embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        out = model.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=out.dtype)
        results.append(torch.autograd.grad((out * weights).sum(), embedded)[0])
    assert (results[1] - results[0]).norm() <= CLOSE * results[0].norm()


@pytest.mark.parametrize(
    "change",
    ["dropout", "cache", "hook", "evaluation", "autocast", "bias", "norm", "by example", "prefix", "beside"],
)
def test_what_does_not_fit_runs_the_layer_s_own_forward(change, monkeypatch):
    model, batch = model_of("qwen2" if change == "bias" else "llama", "lora", torch.float32), batch_of()
    if change in ("dropout", "bias", "prefix", "norm"):
        dw.delete_adapter(model, "default")
        config = {
            "dropout": dw.LoRA(r=2, dropout=0.5),
            "bias": dw.LoRA(r=2, bias="all"),
            "norm": dw.LoRA(r=2, modules_to_save=["input_layernorm"]),
            "prefix": dw.PrefixTuning(num_virtual_tokens=2),
        }[change]
        dw.adapt(model, config)
        model.train()
    calls = fused_calls(monkeypatch)
    state = torch.random.get_rng_state()
    wanted = model(**batch).logits
    install_blocks(model)
    calls.clear()
    if change == "hook":
        model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    elif change == "evaluation":
        model.eval()
    elif change == "beside":
        dw.adapt(model, dw.NEFTune(5.0), name="noise")
    torch.random.set_rng_state(state)
    if change == "cache":
        model(**{**batch, "use_cache": True})
    elif change == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            model(**batch)
    elif change == "by example":
        from deltaw.core.contexts import ForwardContext, in_context

        class Sink:
            def feed(self, parameter, gradients):
                raise AssertionError

        with in_context(ForwardContext(3, 11, Sink())):
            model(**batch)
    else:
        found = model(**batch).logits
        # A hook is on one layer, and noise on the embedding: the others still run fused.
        assert change == "beside" or (found - wanted).norm() <= (CLOSE if change == "hook" else 0.0) * wanted.norm()
    assert len(calls) == {"hook": 2, "beside": 3}.get(change, 0)


def test_a_layer_of_another_kind_is_left_alone_with_a_reason(monkeypatch):
    config = transformers.AutoConfig.for_model("gemma2", **SHAPE, head_dim=16)
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert install_blocks(model) == (0, 3, "Gemma2DecoderLayer has post_feedforward_layernorm too")
    gpt = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model("gpt2", n_embd=32, n_head=4, n_layer=2, vocab_size=99)
    )
    assert install_blocks(gpt) == (0, 0, "it has no list of decoder layers")

    other = model_of("llama")
    own = type(other.model.layers[0]).forward
    monkeypatch.setattr(type(other.model.layers[0]), "forward", _louder(own))
    fused, layers, reason = install_blocks(other)
    assert (fused, layers, reason) == (0, 3, "LlamaDecoderLayer computes something else")


@pytest.mark.parametrize("std", [0.01, 0.02])
def test_layers_that_change_their_input_little_are_known_in_bfloat16_too(std, monkeypatch):
    config = transformers.AutoConfig.for_model("llama", **SHAPE, initializer_range=std)
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).requires_grad_(False)
    assert install_blocks(model) == (3, 3, None)
    other = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).requires_grad_(False)
    own = type(other.model.layers[0]).forward
    monkeypatch.setattr(type(other.model.layers[0]), "forward", _louder(own))
    assert install_blocks(other)[0] == 0


def _louder(own):
    def forward(self, hidden_states, **given):
        return own(self, hidden_states, **given) * 1.1

    return forward


def test_rows_padded_on_the_right_need_no_mask_where_all_layers_are_causal():
    model, batch = model_of("mistral"), batch_of()
    assert needs_mask(model)
    wanted = gradients(model, batch)
    install_blocks(model, keep="input")
    assert not needs_mask(model)
    given, real = {**batch, "attention_mask": None}, batch["attention_mask"].bool()
    hidden = model.model(**given).last_hidden_state
    assert (hidden[real] - wanted[0][real]).norm() <= CLOSE * wanted[0][real].norm()
    model.zero_grad()
    draws = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2)).to(hidden)
    (hidden * draws * real[..., None]).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name, true in wanted[1].items():
        assert (found[name] - true).norm() <= CLOSE * true.norm(), name
    dw.adapt(model, dw.NEFTune(5.0), name="noise")
    assert needs_mask(model), "noise goes by each row's length"


def test_two_models_do_not_disturb_each_other_and_a_copy_is_whole():
    one, two, batch = model_of(), model_of(), batch_of()
    wanted = gradients(two, batch)
    install_blocks(one, keep="input")
    assert not any("forward" in layer.__dict__ for layer in two.model.layers)
    assert_like(gradients(two, batch), wanted, 1e-12)
    twin = copy.deepcopy(one)
    for layer in twin.model.layers:
        assert layer.__dict__["forward"].__self__ is layer and layer.__dict__["_deltaw_fused"].module is layer
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.zero_()
    assert_like(gradients(twin, batch), wanted, CLOSE)


def test_a_second_backward_pass_is_refused():
    model, batch = model_of(), batch_of()
    install_blocks(model)
    loss = model.model(**batch).last_hidden_state.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RunError, match="ran twice"):
        loss.backward()


def saved_bytes(model, batch, layer):
    """What a layer's function holds between the passes, counted by storages that are not weights."""
    out = []
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    handle = layer.register_forward_hook(lambda module, args, kwargs, y: out.append(y), with_kwargs=True)
    model.model(**batch)
    handle.remove()
    state = out[0].grad_fn.state if hasattr(out[0].grad_fn, "state") else out[0].grad_fn.__dict__["state"]
    seen = {}

    def walk(thing):
        if isinstance(thing, torch.Tensor):
            seen[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        elif isinstance(thing, dict):
            for value in thing.values():
                walk(value)
        elif isinstance(thing, (list, tuple)):
            for value in thing:
                walk(value)

    walk({name: value for name, value in state.kept.items() if name != "graph"})
    walk(state.x0)
    return sum(size for pointer, size in seen.items() if pointer not in weights)


def test_a_norm_that_was_passed_on_is_taken_only_where_it_is_of_this_input(monkeypatch):
    model, batch = model_of("llama", "lora", torch.float32), batch_of()
    norms = []
    norm = block.rms_norm
    monkeypatch.setattr(block, "rms_norm", lambda *args, **kw: norms.append(1) or norm(*args, **kw))

    def counted(tolerance=CLOSE):
        uninstall_blocks(model)
        wanted = gradients(model, batch)
        install_blocks(model, keep="all", joins=True)
        norms.clear()
        assert_like(gradients(model, batch), wanted, tolerance)
        return len(norms)

    # Both norms of the first layer, and of the others the one behind attention.
    assert counted(10 * CLOSE) == 4
    layer = model.model.layers[1]
    for change in (lambda h: h * 1.5, lambda h: h.add_(0.1), lambda h: h):
        handle = layer.register_forward_pre_hook(
            lambda module, args, kw, change=change: ((change(args[0]), *args[1:]), kw), with_kwargs=True
        )
        assert counted(10 * CLOSE) == 4 + (change(torch.ones(1)) != 1)
        handle.remove()
    # A layer between that runs its own forward takes nothing, and leaves nothing.
    layer.mlp.register_forward_hook(lambda module, args, out: out)
    assert counted(10 * CLOSE) == 4
    assert not model.model.layers[0].__dict__["_deltaw_fused"].fusion.passed


@pytest.mark.parametrize("keep", KEEPS)
def test_norms_that_cannot_be_undone_are_made_again(keep):
    model, batch = model_of("llama", "dora"), batch_of()
    layers = model.model.layers
    with torch.no_grad():
        layers[0].input_layernorm.weight[3] = layers[1].post_attention_layernorm.weight[-1] = 0.0
        layers[2].input_layernorm.weight[0] = 1e-300
    wanted = gradients(model, batch)
    install_blocks(model, keep=keep, joins=True)
    norms = [norm.invertible for layer in layers for norm in layer.__dict__["_deltaw_fused"].norms]
    assert norms == [False, True, True, False, True, True]
    assert_like(gradients(model, batch), wanted, CLOSE)


@pytest.mark.parametrize("joins", [False, True])
@pytest.mark.parametrize("keep", ["all", "input"])
def test_a_dora_s_norms_take_no_decoding_of_their_own(keep, joins, monkeypatch):
    model, batch = model_of("llama", "dora", torch.float32, four_bits=True), batch_of()
    wanted = gradients(model, batch)
    install_blocks(model, keep=keep, joins=joins)
    counts = []
    decode = group.dequantize_all
    monkeypatch.setattr(group, "dequantize_all", lambda *args: counts.append(1) or decode(*args))
    monkeypatch.setattr(NF4Weight, "matmul", lambda *args: pytest.fail("a weight was decoded by itself"))
    assert_like(gradients(model, batch), wanted, CLOSE)
    # Forward, again where only the input was kept, and back, but not to the first layer's input.
    assert len(counts) == 3 * (8 if keep == "all" else 12) - 1


@pytest.mark.parametrize("four_bits", [False, True])
def test_factors_are_those_of_now_though_nothing_says_that_they_changed(four_bits):
    model, batch = model_of("llama", "lora", torch.float32, four_bits=four_bits), batch_of()
    plain = copy.deepcopy(model)
    install_blocks(model, keep="all", joins=True)
    trained, alone = ([p for p in one.parameters() if p.requires_grad] for one in (model, plain))
    # A fused step does not raise a tensor's version.
    optimizers = [torch.optim.AdamW(parameters, lr=0.03, fused=True) for parameters in (trained, alone)]
    for _ in range(4):
        (found, _), (wanted, _) = gradients(model, batch), gradients(plain, batch)
        assert (found - wanted).norm() <= 1e-4 * wanted.norm()
        for optimizer in optimizers:
            optimizer.step()
    # Half of a forward pass, a change that is counted, and layers in any order.
    layer, x = model.model.layers, torch.randn(2, 5, 32)
    rotation = model.model.rotary_emb(x, torch.arange(5)[None])
    for index in (0, 2, 1, 1, 0):
        with torch.no_grad():
            for ours, theirs in zip(trained, alone, strict=True):
                ours.mul_(1.1), theirs.mul_(1.1)
        found, wanted = (one[index](x, position_embeddings=rotation) for one in (layer, plain.model.layers))
        assert (found - wanted).norm() <= 1e-4 * wanted.norm()


def test_all_factors_are_written_at_once(monkeypatch):
    model, batch = model_of("llama", "lora", torch.float32), batch_of()
    install_blocks(model, keep="input", joins=True)
    gradients(model, batch)
    calls = []
    write = thin.Writer.write
    monkeypatch.setattr(thin.Writer, "write", lambda writer, base=None: calls.append(base) or write(writer, base))
    monkeypatch.setattr(thin, "write_factors", lambda factors: pytest.fail("written one by one"))
    for count in (1, 2, 3):
        gradients(model, batch)
        assert calls == [None] * count


@pytest.mark.parametrize("keep", KEEPS[:4])
@pytest.mark.parametrize(("family", "method"), [("llama", "lora"), ("llama", "dora"), ("qwen3", "lora")])
def test_what_is_kept_is_what_the_arithmetic_says(family, method, keep):
    model, batch = model_of(family, method), batch_of(padded=False)
    install_blocks(model, keep=keep)
    head_dim = FAMILIES[family].get("head_dim", 8)
    wanted = kept_bytes(
        keep, 33, width=32, inner=56, heads=4, kv_heads=2, head_dim=head_dim, itemsize=8,
        scaled=method == "dora", head_norms=family == "qwen3",
    )  # fmt: skip
    found = saved_bytes(model, batch, model.model.layers[1])
    # The reciprocal norms of heads are float64 here and few.
    assert wanted <= found <= wanted * 1.06


def test_the_plan_uses_the_room_and_no_more():
    cost = {"all": 100, "attention": 40, "input": 10, "host": 0}.__getitem__
    assert choose(4, 39, cost) == ["host"] * 4
    assert choose(4, 40, cost) == ["input"] * 4
    assert choose(4, 130, cost) == ["input", "input", "input", "all"]
    plan = choose(4, 260, cost)
    assert plan == ["input", "attention", "all", "all"] and sum(map(cost, plan)) <= 260
    assert choose(4, 400, cost) == ["all"] * 4
    # While wide tensors are made again there is less room, but what the last layers kept is gone.
    assert planned(4, 170, 260, cost) == (plan, 10) and planned(4, 50, 260, cost) == (plan, 0)
    assert planned(4, 49, 260, cost) == (["input"] * 4, 9)
    assert planned(4, 1, 999, cost) == (["all"] * 4, 599) and planned(4, 39, 49, cost) == (["host"] * 4, 39)
    # Products that wait elsewhere.
    cost = {"all": 100, "attention": 40, "host-products": 40, "input": 10, "host": 0}.__getitem__
    assert planned(4, 270, 280, cost, {1, 2}) == (["host-products" if i in (1, 2) else "all" for i in range(4)], 0)
    assert planned(4, 209, 209, cost, {1, 2}) == (["input", "host-products", "host-products", "all"], 19)
    # Weights in the place of what is not there: 6 a layer beside what the layers up to that one keep.
    assert bridges([10] * 4, 6, 40) == 3 and bridges([1] * 4, 6, 13) == 2 and bridges([1] * 4, 6, 6) == 0
    assert told(plan) == "2 layers keep all, 1 layers make the MLP again, 1 layers keep their input"
    assert told(["input"] * 2) == "all 2 layers keep their input"


def test_host_memory_gives_back_what_it_was_given():
    memory = HostMemory()
    tensors = [torch.randn(3, 5) for _ in range(3)]
    held = [memory.put(t) for t in tensors]
    copies = [t.clone() for t in tensors]
    for t in tensors:
        t.zero_()
    for one, copied in reversed(list(zip(held, copies, strict=True))):
        assert torch.equal(memory.take(one), copied)
    again = memory.put(copies[0])
    assert any(again.host is one.host for one in held), "buffers are used again"


@pytest.mark.gpu
@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_gpu(family, method, keep):
    model, batch = model_of(family, method, torch.float32), batch_of()
    hidden, grads = gradients(model, batch)
    # Moving a model moves the gradients that it holds.
    wanted = hidden, {name: grad.clone() for name, grad in grads.items()}
    model.cuda()
    on_device = {name: value.cuda() if torch.is_tensor(value) else value for name, value in batch.items()}
    assert install_blocks(model, keep=keep)[0] == 3
    hidden, grads = gradients(model, on_device)
    assert_like((hidden.cpu(), {name: grad.cpu() for name, grad in grads.items()}), wanted, 2e-4)


def test_norms_and_activations_are_known_by_trying_them():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(8), requires_grad=False), 1e-6

        def forward(self, x):
            return x / x.abs().mean(-1, keepdim=True)

    assert decoder._norm(Odd()) is None and decoder._norm(nn.LayerNorm(8)) is None
    assert decoder._activation(nn.SiLU()) == "silu" and decoder._activation(nn.GELU(approximate="tanh")) == "gelu_tanh"
    assert decoder._activation(nn.GELU()) == "gelu" and decoder._activation(nn.ReLU()) is None


@pytest.mark.parametrize("four_bits", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_products_in_eight_bits_are_near_and_held_weights_change_nothing(method, four_bits):
    model, batch = model_of("llama", method, torch.float32, four_bits=four_bits), batch_of()
    wanted = gradients(model, batch)
    found = {}
    for fp8 in ("backward", "most", "all"):
        assert install_blocks(model, keep="input", fp8=fp8)[0] == 3
        decoder.learn_directions(model, batch["input_ids"], batch["attention_mask"])
        found[fp8] = gradients(model, batch)
        fusion = model.model.layers[0].__dict__["_deltaw_fused"].fusion
        fusion.store.narrow = {}
        held = gradients(model, batch)
        groups = [(i, g) for i in range(3) for g in ("q k v", "o", "gate up", "down")]
        forward = {"backward": [], "most": ["o", "gate up"], "all": ["q k v", "o", "gate up", "down"]}[fp8]
        # Nothing goes back beyond the first layer's q, k and v.
        assert set(fusion.store.narrow) == {*groups} - ({(0, "q k v")} if fp8 != "all" else set())
        by_rows = {name for name, (made, _) in fusion.store.narrow.items() if made[0] is not None}
        assert by_rows == set(fusion.store.directions) == {name for name in groups if name[1] in forward}
        assert all(torch.equal(held[1][name], grad) for name, grad in found[fp8][1].items())
        # In another turn some layers' weights are rounded with other scales: the same ones whether they stay or not.
        for turn in (8, 21):
            decoder.set_turn(model, turn)
            again = gradients(model, batch)
            assert torch.equal(again[0], held[0]) == (fp8 == "backward")
            fusion.store.narrow, kept = None, fusion.store.narrow
            alone = gradients(model, batch)
            assert all(torch.equal(alone[1][name], grad) for name, grad in again[1].items())
            fusion.store.narrow = kept
        uninstall_blocks(model)
    # Three layers of random normals amplify what a product loses, 4 % of its size.
    far = {fp8: float((hidden - wanted[0]).norm() / wanted[0].norm()) for fp8, (hidden, _) in found.items()}
    assert far["backward"] < 1e-5 and 1e-3 < far["most"] < far["all"] < 0.3


@pytest.mark.parametrize("four_bits", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("method", ["lora", "dora", "some"])
def test_with_products_that_lose_nothing_the_eight_bit_way_is_exact(method, four_bits, monkeypatch):
    def both(parts, spread=None, room=(0, 0), lost=None):
        W = torch.cat([part.dequantize() if hasattr(part, "codes") else part for part in parts])
        wide = W.new_full((W.shape[1], len(W) + room[1]), torch.nan)
        return W, W.new_ones(len(W)), wide[:, : len(W)].copy_(W.t()), W.new_ones(W.shape[1])

    def rows(x, behind=None, factor=None):
        if behind is not None:
            columns = x.shape[1] + behind.shape[1]
            x = nn.functional.pad(torch.cat([x, behind], 1), (0, whole(columns) - columns))
        return x, x.new_ones(len(x))

    monkeypatch.setattr(group, "quantize_rows", rows)
    monkeypatch.setattr(group, "write_columns", lambda A, q, scale: q.copy_(A.t()))
    monkeypatch.setattr(narrow, "quantize_rows_and_columns", both)
    monkeypatch.setattr(narrow, "quantize_nf4", lambda parts, code, **options: both(parts, **options))
    monkeypatch.setattr(group, "matmul_fp8", lambda q, scale, W, w_scale, **options: q @ W.t())
    model, batch = model_of("qwen2", method, torch.float32, four_bits=four_bits), batch_of()
    wanted = gradients(model, batch)
    for keep in ("all", "input"):
        for fp8 in ("backward", "most", "all"):
            install_blocks(model, keep=keep, fp8=fp8)
            assert_like(gradients(model, batch), wanted, 2 * CLOSE)
            uninstall_blocks(model)


def test_plans_by_the_card_s_memory(monkeypatch):
    model = model_of("llama", "lora", torch.float32)
    said = []
    install_blocks(
        model, room=Room(budget_bytes=4_000_000, later_bytes=100_000, head_bytes=7), fp8="all", say=said.append
    )
    layer = model.model.layers[0].__dict__["_deltaw_fused"]
    monkeypatch.setattr(plan_module, "rates", lambda device, dtype: (1.0, 1e30))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1_000_000)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2_500_000, 9_000_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 1_500_000)
    seen = []
    for tokens in (10, 500, 750, 1000, 750, 40_000):
        x = SimpleNamespace(is_cuda=True, device="cuda", shape=(1, tokens, 32), numel=lambda n=tokens: n * 32)
        first = layer.fusion.of(layer, x)
        plan = layer.fusion.plans[tokens]
        assert first in (plan[0], plan[0] + "-attention")
        kept = sum(layer.bytes_of(keep, tokens) for keep in plan)
        for again in (True, False):
            held = kept if not again else sum(layer.bytes_of(keep, tokens) for keep in plan if keep == "input")
            left = 4_000_000 * 0.99 - 1_100_000 - layer.working_bytes(tokens, again=again)
            assert plan == ["host"] * 3 or held <= left
        seen.append(plan)
    assert seen[0] == ["all"] * 3 and seen[-1] == ["host"] * 3 and seen[2] == seen[4]
    assert any("input" in plan and "all" in plan for plan in seen)
    assert len(said) == 5 and said[0] == "batches of 10 tokens: all 3 layers keep all"

    # Long rows make attention dear; 8,000 x 5 tokens are as many as one row of 40,000.
    assert said[-1] == "batches of 40,000 tokens: all 3 layers keep it and what attention made on the host"
    short = SimpleNamespace(is_cuda=True, device="cuda", shape=(8000, 5, 32), numel=lambda: 40_000 * 32)
    long = SimpleNamespace(is_cuda=True, device="cuda", shape=(1, 40_000, 32), numel=lambda: 40_000 * 32)
    assert [layer.fusion.of(layer, x) for x in (short, long)] == ["host", "host-attention"]
    assert layer.fusion.of(layer, long, masked=True) == "host"
    layer.fusion.far.clear()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10_000_000))
    assert layer.fusion.of(layer, long) == "host", "the host has no 7.7 MB to spare for it"

    def plan(tokens):
        x = SimpleNamespace(is_cuda=True, device="cuda", shape=(1, tokens, 32), numel=lambda: 32 * tokens)
        return layer.fusion.of(layer, x)

    layer.fusion.room, layer.fusion.plans, layer.fusion.held_layers = Room(holds=True), {}, 3
    plan(10)
    assert layer.fusion.store.narrow == {}, "4 MB for the process, 1 MB in use: 8-bit weights may stay"
    plan(40_000)
    assert layer.fusion.held_layers == 0, "no layers, not fewer than none"
    plan(11)
    assert layer.fusion.store.narrow is None, "what a longer batch has no room for does not come back"


def test_products_wait_in_host_memory_rather_than_be_made_again(monkeypatch):
    model = model_of("llama", "lora", torch.float32, num_hidden_layers=8, four_bits=True)
    install_blocks(model)
    layer = model.model.layers[0].__dict__["_deltaw_fused"]
    tokens = 1000
    x = SimpleNamespace(is_cuda=True, device="cuda", shape=(1, tokens, 32), numel=lambda: tokens * 32)
    layer_flops = 2 * tokens * sum(rows * columns for rows, columns in layer.shapes.values())
    rate = {"bytes": layer.products_bytes(tokens) / 1.9, "flops": layer_flops}
    monkeypatch.setattr(plan_module, "rates", lambda device, dtype: (rate["bytes"], rate["flops"]))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    # A copy takes as long as 1.9 layers; the last layer's would not be worth it.
    assert layer.spots(tokens, "cuda") == range(0, 7, 2)
    products, each = layer.products_bytes(tokens), layer.bytes_of("all", tokens)
    assert each - layer.bytes_of("host-products", tokens) == products

    def planned_for(room_bytes, **free):
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free.get("host", 1 << 40)))
        working = layer.working_bytes(tokens, again=False)
        layer.fusion.room = Room(budget_bytes=int((room_bytes + working) / 0.99) + 1, holds=True)
        layer.fusion.plans, layer.fusion.held_layers, layer.fusion.bridged = {}, 9, 9
        layer.fusion.of(layer, x)
        plan = layer.fusion.plans[tokens]
        away = "host-products" in plan
        assert sum(layer.bytes_of(keep, tokens) for keep in plan) + away * products <= room_bytes
        return plan

    # All fit: what is left over is for weights; nothing goes away.
    assert planned_for(8 * each) == ["all"] * 8 and layer.fusion.held_layers == 0 and layer.fusion.bridged == 7
    assert planned_for(8 * each + 2 * layer.held_bytes) == ["all"] * 8
    assert layer.fusion.held_layers == 2 and layer.fusion.store.bridges == range(6)
    # As few go as have to, the last ones; one more than would do, as one is always on its way.
    assert planned_for(8 * each - products) == ["all"] * 4 + ["host-products", "all"] * 2
    assert planned_for(8 * each - 3 * products) == ["host-products", "all"] * 4
    assert planned_for(8 * each - 4 * products) == ["input", "all"] + ["host-products", "all"] * 3
    # Not without host memory, nor over a slow bus.
    assert "host-products" not in planned_for(8 * each - 3 * products, host=1000)
    rate["bytes"] = products / 100
    assert "host-products" not in planned_for(8 * each - 3 * products) and len(layer.spots(tokens, "cuda")) == 1


def test_decoded_weights_stay_where_there_is_room():
    model, batch = model_of("llama", "lora", torch.float32, four_bits=True), batch_of()
    wanted = gradients(model, batch)
    install_blocks(model, keep="all")
    fusion = model.model.layers[0].__dict__["_deltaw_fused"].fusion
    fusion.store.hold(2, 3, narrow=False)
    first = gradients(model, batch)
    assert {index for index, _ in fusion.store.decoded} == {1, 2} and len(fusion.store.decoded) == 8
    assert (
        fusion.store.held_bytes
        == sum(whole.untyped_storage().nbytes() for whole, _ in fusion.store.decoded.values())
        > 0
    )
    assert_like(first, wanted, CLOSE)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(2.0)
    changed = gradients(model, batch)
    # Another base under the same names is decoded again.
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight, layer.mlp.gate_proj.weight = (
                layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight
            )  # fmt: skip
    swapped = gradients(model, batch)
    uninstall_blocks(model)
    assert_like(swapped, gradients(model, batch), CLOSE)
    for layer in model.model.layers:
        layer.mlp.up_proj.weight, layer.mlp.gate_proj.weight = layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight
    assert_like(changed, gradients(model, batch), CLOSE)
    fusion.store.hold(1, 3, narrow=False)
    assert {index for index, _ in fusion.store.decoded} == {2}


@pytest.mark.parametrize("keep", ["all", "input"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_weights_decoded_for_a_backward_pass_stay_for_the_next_forward_pass(method, keep, monkeypatch):
    model, batch = model_of("llama", method, torch.float32, four_bits=True), batch_of()
    wanted = gradients(model, batch)
    decoded, decode = [], group.dequantize_all
    monkeypatch.setattr(group, "dequantize_all", lambda packed, out: decoded.append(len(packed)) or decode(packed, out))
    install_blocks(model, keep=keep)
    store = model.model.layers[0].__dict__["_deltaw_fused"].fusion.store
    counts = []
    for bridged in (0, 2, 2):
        store.hold(1, 3, narrow=False, bridged=bridged)
        decoded.clear()
        assert_like(gradients(model, batch), wanted, CLOSE)
        counts.append(len(decoded))
        assert {index for index, _ in store.bridged} == set(range(bridged))
    # The layer that is held was decoded the first time. Then four groups of two layers are there already, but for the
    # first one of all, which had no gradient to hand on.
    assert counts[0] - counts[1] == 4 and counts[1] - counts[2] == 7
    assert store.held_bytes == sum(
        t.untyped_storage().nbytes() for kept in (store.decoded, store.bridged) for t, _ in kept.values()
    )
    # After a forward pass they are gone, as they are for who evaluates.
    hidden = model.model(**batch).last_hidden_state
    assert not store.bridged
    hidden.sum().backward()
    model.zero_grad()
    assert len(store.bridged) == 7
    with torch.no_grad():
        model.model(**batch)
    assert not store.bridged
    # Other weights and other factors are seen.
    gradients(model, batch)
    with torch.no_grad():
        layer = model.model.layers[1]
        layer.mlp.up_proj.weight, layer.mlp.gate_proj.weight = layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    changed = gradients(model, batch)
    store.hold(1, 3, narrow=False)
    assert not store.bridged
    uninstall_blocks(model)
    assert_like(changed, gradients(model, batch), CLOSE)
