"""Where LoRA's factors start, against float64 references; what LoRA-FA keeps and what LoRA+ changes."""

import copy

import pytest
import tiny
import torch
from torch import nn

import deltaw as dw
from deltaw.checkpoint.adapters import adapter_state, load_state
from deltaw.core.errors import InputError
from deltaw.core.generators import generator
from deltaw.methods import METHODS
from deltaw.methods.host import parts_of
from deltaw.methods.initial import share_ranks
from deltaw.models.sites import SiteWeight, kind_of
from deltaw.quant import NF4, quantize_model

OVER_BASE = ["pissa", "pissa_niter_4", "olora"]
EVERY_KIND = {"llama": ["q_proj", "mlp", "embed_tokens"], "gpt2": ["c_attn", "c_fc", "wte"]}
EVERYTHING = NF4(embeddings=True, head=True)


def matrix(module, dtype=torch.float64):
    return SiteWeight(module, kind_of(module)).dequantize(dtype=dtype)


def scattered(batch=6, length=9):
    """A batch whose rows end at different places, what is beyond being filled with one token."""
    ids = torch.randint(3, tiny.VOCAB, (batch, length), generator=generator(0, "eva"))
    mask = (torch.arange(length) < torch.tensor([9, 4, 7, 5, 8, 6])[:batch, None]).long()
    return {"input_ids": ids * mask + 2 * (1 - mask), "attention_mask": mask}


def best(W, r):
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return (U[:, :r] * S[:r]) @ Vh[:r]


def projector(rows):
    """Onto what orthonormal rows span: it knows no signs and no order."""
    return rows.t() @ rows


@pytest.mark.parametrize("four_bits", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", EVERY_KIND)
@pytest.mark.parametrize("init", OVER_BASE)
def test_factors_of_the_base_are_the_papers(init, name, dtype, four_bits):
    model = tiny.tiny(name, dtype)
    if four_bits:
        quantize_model(model, EVERYTHING)
    before, base = tiny.logits(model, name), {k: v.clone() for k, v in model.named_parameters()}
    dw.adapt(model, dw.LoRA(r=4, alpha=6, init=init, target_modules=EVERY_KIND[name]))
    assert torch.equal(tiny.logits(model, name), before)
    for path, module, part in parts_of(model, "default"):
        W, A, B = matrix(module), part.start_A.double(), part.start_B.double()
        if init == "olora":
            Q, R = torch.linalg.qr(W)
            sign = torch.sign(Q[:, :4] * B).sum(0).sign()
            expected = [R[:4] * sign[:, None], Q[:, :4] * sign]
        else:
            U, S, Vh = torch.linalg.svd(W, full_matrices=False)
            sign = torch.sign(U[:, :4] * B).sum(0).sign()
            root = (S[:4] / 1.5).sqrt()
            expected = [root[:, None] * Vh[:4] * sign[:, None], U[:, :4] * root * sign]
        # Four rounds leave a part of the neighbouring directions in each: the singular values of random matrices are
        # close to each other.
        if "niter" in init:
            lost, least = (W - 1.5 * B @ A).norm(), (W - best(W, 4)).norm()
            assert least * (1 - 1e-6) <= lost < 1.05 * least, (path, lost / least)
        else:
            torch.testing.assert_close([A, B], expected, rtol=2e-4, atol=2e-5)
        assert not part.lora_A.any() and not part.lora_B.any()
        assert part.described() == {"r": 4, "scale": 1.5, "init": init}
    unchanged = {k: v for k, v in model.named_parameters() if "adapted" not in k.split(".")}
    assert all(torch.equal(torch.as_tensor(v), base[k]) for k, v in unchanged.items())


def test_iterated_directions_depend_on_the_seed_and_the_site_alone():
    def started(**options):
        model = dw.adapt(tiny.tiny("llama"), dw.LoRA(r=4, init="pissa_niter_1"), **options)
        return {path: part.start_A for path, _, part in parts_of(model, "default")}

    state = torch.get_rng_state()
    first = started(seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    tiny.assert_same(first, started(seed=1))
    assert all(not torch.equal(A, first[path]) for path, A in started(seed=2).items())


@pytest.mark.parametrize("name", EVERY_KIND)
@pytest.mark.parametrize("init", OVER_BASE)
def test_gradients_are_those_of_factors_in_the_residual_of_the_base(init, name):
    """W - s B0 A0 + s B A with A and B trained, as the papers have it, gives the same output and the same gradients."""
    model = tiny.tiny(name, torch.float64)
    config = dw.LoRA(r=3, init=init, target_modules=EVERY_KIND[name], rslora=True)
    dw.adapt(model, config, dtype=torch.float64)
    tiny.randomise(model)
    plain = tiny.tiny(name, torch.float64)
    changed, leaves = {}, {}
    for path, module, part in parts_of(model, "default"):
        A = (part.start_A + part.lora_A).detach().requires_grad_(True)
        B = (part.start_B + part.lora_B).detach().requires_grad_(True)
        update = part.scale * (B @ A) + (matrix(module) - part.scale * part.start_B @ part.start_A)
        changed[f"{path}.weight"] = update if kind_of(module) == "linear" else update.t()
        leaves |= {f"{path}/lora_A": (A, part.lora_A), f"{path}/lora_B": (B, part.lora_B)}
    given = tiny.inputs(name)
    expected = torch.func.functional_call(plain, changed, args=(), kwargs=given, tie_weights=False).logits
    got = model(**given).logits
    assert tiny.relative(got, expected) < 1e-6
    torch.tanh(expected).sum().backward()
    torch.tanh(got).sum().backward()
    for key, (theirs, ours) in leaves.items():
        assert tiny.relative(ours.grad, theirs.grad) < 1e-6, key


@pytest.mark.parametrize("init", OVER_BASE)
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_comes_back_to_the_last_bit_and_from_another_start_to_a_rounding(init, adapter_dtype, tmp_path):
    config = dw.LoRA(r=3, init=init, target_modules=EVERY_KIND["llama"])

    def started(seed):
        return dw.adapt(tiny.tiny("llama"), config, dtype=adapter_dtype, seed=seed)

    model = tiny.randomise(started(1))
    dw.save_adapter(model, tmp_path / "a")
    same, other = started(1), started(2)
    for _, _, part in parts_of(other, "default"):
        # As another device's decomposition might be.
        part.start_A.neg_()
        part.start_B.neg_()
    for loaded in (same, other):
        load_state(loaded, "default", tmp_path / "a")
    tiny.assert_same(dict(same.state_dict()), dict(model.state_dict()))
    own = dict(model.state_dict())
    for key, value in other.state_dict().items():
        if key.endswith("start_B"):
            rounding = torch.finfo(adapter_dtype).eps * (own[key].abs() + 1)
            assert ((value - own[key]).abs() <= rounding).all()
        else:
            assert torch.equal(value, own[key]), key
    assert (
        tiny.relative(tiny.logits(other, "llama"), tiny.logits(model, "llama")) < 100 * torch.finfo(adapter_dtype).eps
    )


def test_updates_do_not_drown_in_the_start_in_16_bits():
    """A small change of the factors comes out as exactly as a plain LoRA's, though W's principal part is large."""
    model = dw.adapt(tiny.tiny("llama", torch.bfloat16), dw.LoRA(r=4, init="pissa", target_modules=["up_proj"]))
    tiny.randomise(model, std=1e-4)
    for _, _, part in parts_of(model, "default"):
        x = torch.randn(32, 16, generator=generator(0, "x")).bfloat16()
        A0, B0, a, b = (t.double() for t in (part.start_A, part.start_B, part.lora_A, part.lora_B))
        exact = part.scale * x.double() @ ((B0 + b) @ (A0 + a) - B0 @ A0).t()
        got = part.update(x, torch.zeros(32, 24, dtype=torch.bfloat16))
        assert tiny.relative(got, exact) < 1e-2
        naive = part.scale * (x @ (A0 + a).t().bfloat16() @ (B0 + b).t().bfloat16()
                              - x @ A0.t().bfloat16() @ B0.t().bfloat16())  # fmt: skip
        assert tiny.relative(naive, exact) > 1


@pytest.mark.parametrize("name", EVERY_KIND)
@pytest.mark.parametrize("rslora", [False, True])
def test_loftq_starts_at_the_best_approximation_of_what_4_bits_lost(name, rslora):
    plain = tiny.tiny(name)
    model = quantize_model(tiny.tiny(name), EVERYTHING)
    original = lambda path: matrix(plain.get_submodule(path), torch.float32)  # noqa: E731
    config = dw.LoRA(r=6, alpha=5, init="loftq", target_modules=EVERY_KIND[name], rslora=rslora)
    dw.adapt(model, config, original=original)
    for path, module, part in parts_of(model, "default"):
        lost = matrix(plain.get_submodule(path)) - matrix(module)
        got = part.scale * part.lora_B.double() @ part.lora_A.double()
        assert tiny.relative(got, best(lost, 6)) < 1e-4, path
        # The paper's balance: both factors carry the root of the singular values.
        torch.testing.assert_close(part.lora_A @ part.lora_A.t(), part.lora_B.t() @ part.lora_B, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(part.delta().double(), got)


@pytest.mark.parametrize("name", EVERY_KIND)
def test_loftq_brings_a_4_bit_model_nearer_to_what_it_was(name):
    plain, model = tiny.tiny(name), quantize_model(tiny.tiny(name), NF4())
    expected, before = tiny.logits(plain, name), tiny.logits(model, name)
    far = tiny.relative(before, expected)
    for r, left in ((4, 0.9), (8, 0.7)):
        start = {"original": lambda path: matrix(plain.get_submodule(path), torch.float32)}
        dw.adapt(model, dw.LoRA(r=r, init="loftq"), name=f"r{r}", **start)
        assert tiny.relative(tiny.logits(model, name), expected) < left * far
    dw.unload(model)
    assert torch.equal(tiny.logits(model, name), before)


def test_loftq_leaves_what_is_not_in_4_bits_to_chance_and_says_what_it_needs():
    model, plain = quantize_model(tiny.tiny("llama"), NF4()), tiny.tiny("llama")
    config = dw.LoRA(r=4, init="loftq", target_modules=["q_proj", "lm_head"])
    weights = {"original": lambda path: plain.get_submodule(path).weight}
    with pytest.raises(InputError, match=r"needs the weights from before they were quantised: give dw.adapt"):
        dw.adapt(model, config)
    with pytest.raises(InputError, match="the base is not in 4 bits: quantize it to nf4"):
        dw.adapt(plain, config, **weights)
    with pytest.raises(InputError, match=r"original\('model.layers.0.self_attn.q_proj'\) gave \(3, 2\): expected W"):
        dw.adapt(model, config, original=lambda path: torch.zeros(3, 2))
    dw.adapt(model, config, **weights)
    for path, _, part in parts_of(model, "default"):
        assert bool(part.lora_B.any()) == ("q_proj" in path)
        assert part.described().get("init") == ("loftq" if "q_proj" in path else None)


def inputs_of(model, batches):
    """Everything that each linear reads at positions that count, in float64."""
    seen = {}

    def hook(path):
        return lambda module, args: seen.setdefault(path, []).append(args[0][now.bool()].double())

    handles = [m.register_forward_pre_hook(hook(p)) for p, m in model.named_modules() if isinstance(m, nn.Linear)]
    for batch in batches:
        now = batch["attention_mask"]
        with torch.no_grad():
            model(**batch)
    for handle in handles:
        handle.remove()
    return {path: torch.cat(rows) for path, rows in seen.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("four_bits", [False, True])
def test_eva_takes_the_directions_of_most_variance(dtype, four_bits):
    model = tiny.tiny("llama", dtype)
    if four_bits:
        quantize_model(model, NF4())
    whole = scattered()
    batches = [{k: v[i : i + 2] for k, v in whole.items()} for i in (0, 2, 4)]
    read = inputs_of(copy.deepcopy(model), [whole])
    dw.adapt(model, dw.LoRA(r=4, init="eva", eva_rho=1), dtype=dtype, batches=batches)
    tolerance = 1e-3 if dtype == torch.float32 else 1e-7
    for path, _, part in parts_of(model, "default"):
        x = read[path]
        Vh = torch.linalg.svd(x - x.mean(0), full_matrices=False)[2]
        assert tuple(part.lora_A.shape) == (4, len(Vh[0])) and not part.lora_B.any()
        torch.testing.assert_close(part.lora_A @ part.lora_A.t(), torch.eye(4, dtype=dtype), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            projector(part.lora_A.double()), projector(Vh[:4]), rtol=tolerance, atol=tolerance, msg=path
        )
        assert part.lora_A.gather(1, part.lora_A.abs().argmax(1, keepdim=True)).gt(0).all()


def shares_of(read, most):
    found = {}
    for path, x in read.items():
        S = torch.linalg.svdvals(x - x.mean(0)).square()
        found[path] = (S / S.sum())[:most].tolist()
    return found


@pytest.mark.parametrize("rho", [1.0, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("rslora", [False, True])
def test_eva_shares_ranks_by_explained_variance(rho, rslora):
    model = tiny.tiny("llama", torch.float64)
    read = {k: v for k, v in inputs_of(copy.deepcopy(model), [scattered()]).items() if k != "lm_head"}
    config = dw.LoRA(r=4, alpha=6, init="eva", eva_rho=rho, rslora=rslora)
    dw.adapt(model, config, batches=[scattered()])
    ranks = {path: len(part.lora_A) for path, _, part in parts_of(model, "default")}
    assert sum(ranks.values()) == 4 * 14
    expected = sorted((s for own in shares_of(read, round(4 * rho)).values() for s in own), reverse=True)
    taken = sorted((s for path, r in ranks.items() for s in shares_of(read, r)[path]), reverse=True)
    assert taken == pytest.approx(expected[: 4 * 14])
    assert (len(set(ranks.values())) == 1) == (rho == 1)
    for path, _, part in parts_of(model, "default"):
        r = ranks[path]
        alpha = 6 * r / 4
        assert part.scale == pytest.approx(alpha / r**0.5 if rslora else alpha / r)
        assert part.described() == {"r": r, "scale": part.scale, "init": "eva"}


def test_ranks_are_shared_by_size_and_ties_go_to_the_first():
    shares = {"a": [0.5, 0.3, 0.1], "b": [0.5, 0.3, 0.1], "c": [0.9, 0.05, 0.01], "d": [0.04, 0.03]}
    assert share_ranks(shares, 5) == {"a": 2, "b": 2, "c": 1, "d": 0}
    assert share_ranks(shares, 4) == {"a": 2, "b": 1, "c": 1, "d": 0}


def test_eva_leaves_a_site_without_share_alone(tmp_path):
    """Nothing varies in what the second layer's down projection reads, once its gate is closed."""
    model = tiny.tiny("llama-bias")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.zero_()
        model.model.layers[1].mlp.up_proj.bias.zero_()
    config = dw.LoRA(r=2, init="eva", bias="lora_only", target_modules=["o_proj", "down_proj"])
    dw.adapt(model, config, batches=[scattered()])
    paths = {path for path, _, _ in parts_of(model, "default")}
    assert paths == {f"model.layers.{p}" for p in ("0.self_attn.o_proj", "0.mlp.down_proj", "1.self_attn.o_proj")}
    assert sum(len(p.lora_A) for _, _, p in parts_of(model, "default") if hasattr(p, "lora_A")) == 2 * 4
    tiny.randomise(model)
    dw.save_adapter(model, tmp_path / "a")
    plain = tiny.tiny("llama-bias")
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "adapted" not in k})
    loaded = dw.load_adapter(plain, tmp_path / "a")
    assert torch.equal(tiny.logits(loaded, "llama"), tiny.logits(model, "llama"))


def test_eva_looks_at_the_bare_base_and_leaves_the_model_as_it_was():
    config = dw.LoRA(r=3, init="eva", target_modules=["down_proj", "q_proj"])
    expected = adapter_state(dw.adapt(tiny.tiny("llama"), config, batches=[scattered()]), "default")
    model = tiny.randomise(dw.adapt(tiny.tiny("llama"), dw.LoRA(r=2), name="first"), "first")
    model.train()
    model.model.layers[0].eval()
    modes, hooks = [m.training for m in model.modules()], [len(m._forward_pre_hooks) for m in model.modules()]
    own = [id(m) for m in model.modules()]
    dw.adapt(model, config, batches=[scattered()], name="second")
    kept = {id(m): (m.training, len(m._forward_pre_hooks)) for m in model.modules()}
    assert [kept[i] for i in own] == list(zip(modes, hooks, strict=True))
    tiny.assert_same(adapter_state(model, "second"), expected)
    dw.set_adapter(model, "first")
    first = tiny.randomise(dw.adapt(tiny.tiny("llama"), dw.LoRA(r=2), name="first"), "first")
    assert torch.equal(tiny.logits(model.eval(), "llama"), tiny.logits(first, "llama"))


def test_covariances_are_gathered_in_as_many_passes_as_memory_asks_for(monkeypatch):
    config = dw.LoRA(r=3, init="eva")
    expected = adapter_state(dw.adapt(tiny.tiny("llama"), config, batches=[scattered()]), "default")
    monkeypatch.setattr("deltaw.methods.initial._BUDGET_BYTES", 4 * 16**2 * 2)
    model, calls = tiny.tiny("llama"), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    dw.adapt(model, config, batches=[scattered()])
    tiny.assert_same(adapter_state(model, "default"), expected)
    # Eight inputs that differ, six of 16 and two of 24 features, which take a pass of their own; one to see who shares.
    assert len(calls) == 1 + 6


def test_means_that_are_large_cost_eva_no_digits():
    random = torch.randn(400, 12, generator=generator(0, "far")) * torch.linspace(1, 3, 12)
    far = random + 3e3
    model = nn.Sequential(nn.Linear(12, 12))
    dw.adapt(
        model, dw.LoRA(r=4, init="eva", target_modules=["0"]), batches=[{"input": far[:100]}, {"input": far[100:]}]
    )
    x = far.double()
    Vh = torch.linalg.svd(x - x.mean(0), full_matrices=False)[2]
    (part,) = (part for _, _, part in parts_of(model, "default"))
    torch.testing.assert_close(projector(part.lora_A.double()), projector(Vh[:4]), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "options", "start", "says"),
    [
        ("llama", dict(init="pissa", r=20), {}, "init pissa: r is 20 at .*q_proj, whose matrix has rank 16: choose"),
        ("llama", dict(init="olora", rank_pattern={"k_proj": 9}), {}, "init olora: r is 9 at .*k_proj, whose matrix"),
        ("llama", dict(init="eva"), {}, r"init eva starts from what the sites read: give dw.adapt\(..., batches="),
        ("llama", dict(init="eva"), {"batches": []}, "init eva starts from what the sites read"),
        ("llama", dict(init="eva", target_modules=["embed_tokens"]), {"batches": [scattered()]}, "is an embedding"),
        ("llama", dict(init="eva", r=17), {"batches": [scattered()]}, "r is 17 at .*q_proj, which has 16 inputs"),
        ("llama", dict(init="eva"), {"batches": [scattered(1, 8)]}, "read 8 tokens, too few for 8 directions: give"),
    ],
)
def test_what_a_start_refuses(name, options, start, says):
    model = tiny.tiny(name)
    with pytest.raises(InputError, match=says) as caught:
        dw.adapt(model, dw.LoRA(**{"r": 4} | options), **start)
    assert "\n" not in str(caught.value) and "_deltaw" not in model.__dict__
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_eva_refuses_a_site_that_takes_no_part():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    config = dw.LoRA(r=2, init="eva", target_modules=["used", "idle"])
    with pytest.raises(InputError, match="the batches do not pass through idle; leave it out of target_modules"):
        dw.adapt(Model(), config, batches=[{"x": torch.randn(20, 4)}])


def test_encoder_decoders_count_what_each_side_reads():
    model, given = tiny.tiny("t5"), tiny.inputs("t5", batch=6, length=9)
    given["attention_mask"] = scattered()["attention_mask"]
    read = {}
    names = {
        "encoder.block.0.layer.0.SelfAttention.q": given["attention_mask"],
        "decoder.block.0.layer.0.SelfAttention.q": None,
    }
    handles = [
        model.get_submodule(p).register_forward_pre_hook(lambda m, args, p=p: read.update({p: args[0].double()}))
        for p in names
    ]
    with torch.no_grad():
        model(**given)
    for handle in handles:
        handle.remove()
    dw.adapt(model, dw.LoRA(r=4, init="eva", eva_rho=1, target_modules=list(names)), batches=[given])
    for path, _, part in parts_of(model, "default"):
        x = read[path].reshape(-1, 16) if names[path] is None else read[path][names[path].bool()]
        Vh = torch.linalg.svd(x - x.mean(0), full_matrices=False)[2]
        torch.testing.assert_close(projector(part.lora_A.double()), projector(Vh[:4]), rtol=1e-3, atol=1e-3)


# LoRA-FA.


@pytest.mark.parametrize("init", ["default", "gaussian", *OVER_BASE])
@pytest.mark.parametrize("name", EVERY_KIND)
def test_frozen_factors_stay_and_travel_along(init, name, tmp_path):
    config = dw.LoRA(r=4, init=init, freeze_a=True, target_modules=EVERY_KIND[name])
    model = tiny.tiny(name)
    before = tiny.logits(model, name)
    dw.adapt(model, config)
    assert torch.equal(tiny.logits(model, name), before)
    whole = tiny.tiny(name)
    dw.adapt(whole, dw.LoRA(r=4, init=init, target_modules=EVERY_KIND[name]))
    twins = {path: part for path, _, part in parts_of(whole, "default")}
    frozen = {}
    for path, module, part in parts_of(model, "default"):
        kept, trained = ("lora_B", "lora_A") if kind_of(module) == "embedding" else ("lora_A", "lora_B")
        assert [key for key, _ in part.named_parameters()] == [trained] and getattr(part, kept).any()
        from_base = init in OVER_BASE
        assert torch.equal(
            getattr(part, kept), getattr(twins[path], kept.replace("lora", "start") if from_base else kept)
        )
        assert part.start_A is None and len(part.tensors()[next(iter(part.tensors()))]) == 4
        frozen[path] = (kept, getattr(part, kept).clone())
    model.train()
    tiny.randomise(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    model(**tiny.inputs(name)).logits.square().sum().backward()
    optimizer.step()
    for path, _, part in parts_of(model, "default"):
        kept, values = frozen[path]
        assert torch.equal(getattr(part, kept), values)
    summary = dw.summary(model)
    assert summary.trainable_parameters == sum(
        METHODS["lora"].param_count(config, site.kind, site.shape) for site in summary.sites
    )
    dw.save_adapter(model.eval(), tmp_path / "a")
    loaded = dw.load_adapter(tiny.tiny(name), tmp_path / "a", trainable=True)
    assert torch.equal(tiny.logits(loaded, name), tiny.logits(model, name))
    again = dw.adapt(tiny.tiny(name), config, seed=7)
    load_state(again, "default", tmp_path / "a")
    tiny.assert_same(adapter_state(again, "default"), adapter_state(model, "default"))
    model.to(torch.float64)
    assert {b.dtype for _, _, p in parts_of(model, "default") for b in p.buffers()} == {torch.float64}


@pytest.mark.parametrize("init", ["loftq", "eva"])
def test_frozen_factors_start_where_they_are_told_to(init):
    plain, model = tiny.tiny("llama"), quantize_model(tiny.tiny("llama"), NF4())
    start = {"original": lambda p: plain.get_submodule(p).weight} if init == "loftq" else {"batches": [scattered()]}
    both = dw.adapt(copy.deepcopy(model), dw.LoRA(r=4, init=init), **start)
    dw.adapt(model, dw.LoRA(r=4, init=init, freeze_a=True), **start)
    tiny.assert_same(adapter_state(model, "default"), adapter_state(both, "default"))
    assert all(key.endswith("lora_B") for key in dw.adapter_parameters(model, "default"))


@pytest.mark.parametrize("four_bits", [False, True])
def test_a_frozen_a_needs_no_input_in_the_backward_pass(four_bits):
    def kept(freeze_a):
        model = tiny.tiny("llama")
        if four_bits:
            quantize_model(model, NF4())
        dw.adapt(model, dw.LoRA(r=4, freeze_a=freeze_a, target_modules=["down_proj"]))
        x, found = torch.randn(5, 24, requires_grad=True), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t.data_ptr()) or t, lambda t: t):
            out = model.model.layers[0].mlp.down_proj(x)
        out.sum().backward()
        return x.data_ptr() in found, x.grad

    (frozen, first), (trained, second) = kept(True), kept(False)
    assert not frozen and trained and torch.equal(first, second)


# LoRA+.


def test_b_learns_faster_on_linears_alone():
    config = dw.LoRA(r=2, lora_bias=True, loraplus_lr_ratio=16, target_modules=["q_proj", "up_proj"])
    for _, _, part in parts_of(dw.adapt(tiny.tiny("llama-bias"), config), "default"):
        assert part.rate_ratios() == {"lora_B": 16, "lora_bias": 16}
    config = dw.LoRA(r=2, loraplus_lr_ratio=16, target_modules=["embed_tokens", "q_proj"])
    for path, _, part in parts_of(dw.adapt(tiny.tiny("llama"), config), "default"):
        assert part.rate_ratios() == ({} if "embed" in path else {"lora_B": 16})
    assert all(ratio == 1 for _, _, p in parts_of(dw.adapt(tiny.tiny("llama"), dw.LoRA()), "default")
               for ratio in p.rate_ratios().values())  # fmt: skip
