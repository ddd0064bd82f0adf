"""Merging with 4-bit bases: what was trained against is what is merged, into plain NF4 or out of it."""

import pytest
import tiny
import torch
from torch import nn

import deltaw as dw
from deltaw.checkpoint import merging
from deltaw.checkpoint.calibration import Moments
from deltaw.core.errors import InputError
from deltaw.core.generators import generator
from deltaw.core.protocols import stored_bytes
from deltaw.methods.host import parts_of
from deltaw.quant import NF4, NF4Tensor, NF4Weight, quantize_model, quantized_sites

EVERYTHING = NF4(embeddings=True, head=True)
NAMES = ["llama", "llama-tied", "gpt2", "bert-mlm", "t5"]
TARGETS = {"llama": ["all-linear", "embed_tokens"], "gpt2": ["all-linear", "wpe"]}


def adapted(name, config=EVERYTHING, dtype=torch.float32, adapter="default", std=0.2, **options):
    model = tiny.tiny(name, dtype)
    if config is not None:
        quantize_model(model, config)
    return more(model, adapter, std, **{"target_modules": TARGETS.get(name, "all-linear")} | options)


def more(model, adapter="default", std=0.2, **options):
    dw.adapt(model, dw.LoRA(**{"r": 3, "alpha": 3.0} | options), name=adapter)
    return tiny.randomise(model, adapter, std)


def values(parameter):
    """In float64 and the stored layout."""
    parameter = parameter.detach()
    return (parameter.dequantize() if isinstance(parameter, NF4Tensor) else parameter).double()


def exact(model, weights):
    """The values that were computed with + sum of weight scale B A, in float64 and the stored layout, by path."""
    result = {}
    for name, weight in weights.items():
        for path, module, part in parts_of(model, name):
            W = result.get(path, values(module.weight))
            delta = part.scale * (part.lora_B.detach().double() @ part.lora_A.detach().double())
            result[path] = W + weight * (delta if part.kind == "linear" else delta.t())
    return result


def parameters(model):
    return {key: p for key, p in model.named_parameters(remove_duplicate=False) if "adapted" not in key.split(".")}


def batches(name="llama", count=3):
    """Keyword arguments of forward passes, with padding."""
    made = []
    for number in range(count):
        given = tiny.inputs(name, batch=2, length=7)
        given["input_ids"] = (given["input_ids"] * (number + 3)) % (tiny.VOCAB - 3) + 3
        given["attention_mask"] = given["attention_mask"].clone()
        given["attention_mask"][0, 5 - number :] = 0
        made.append(given)
    return made


# Out of 4 bits.


@pytest.mark.parametrize("into", ["bf16", "float16", "float32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_dense_weights_are_the_trained_ones_rounded_once(name, dtype, into):
    model = adapted(name, dtype=dtype)
    expected, base = exact(model, {"default": 1.0}), {key: values(p) for key, p in parameters(model).items()}
    assert len(expected) >= 8
    dw.merge(model, into=into)
    wanted = merging.DENSE[into]
    assert not any(True for _ in quantized_sites(model))
    for key, parameter in parameters(model).items():
        assert parameter.dtype == wanted and not parameter.requires_grad and parameter.is_contiguous(), key
        path = key.removesuffix(".weight")
        if path in expected:
            value = expected[path]
            # A rounding to nearest, and those of the sum in float32.
            bound = ulp(value, wanted) / 2 + 4 * 2**-24 * value.abs().max()
            assert bool(((parameter.double() - value).abs() <= bound).all()), key
        elif not (name == "llama-tied" and "embed" in key):
            assert torch.equal(parameter, base[key].to(wanted)), key


def ulp(value, dtype):
    near = value.to(dtype).abs()
    return torch.nextafter(near, torch.full_like(near, float("inf"))).double() - near.double()


def test_a_sum_that_is_taken_in_pieces_is_the_same(monkeypatch):
    whole = dw.merge(adapted("llama"), into="float32").state_dict()
    monkeypatch.setattr(merging, "_ELEMENTS", 100)
    for key, value in dw.merge(adapted("llama"), into="float32").state_dict().items():
        torch.testing.assert_close(value, whole[key], rtol=1e-6, atol=1e-6)


def assert_same_packed(model, other):
    found, wanted = parameters(model), parameters(other)
    assert found.keys() == wanted.keys()
    for key, parameter in wanted.items():
        assert type(found[key]) is type(parameter), key
        if isinstance(parameter, NF4Tensor):
            tiny.assert_same(found[key].packed.tensors(), parameter.packed.tensors())
        else:
            assert torch.equal(found[key], parameter), key


# Into 4 bits.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [EVERYTHING, NF4(double_quant=False, block_size=128)], ids=["all", "plain"])
@pytest.mark.parametrize("into", [None, "nf4"])
@pytest.mark.parametrize("name", NAMES)
def test_requantised_weights_are_the_nearest_codes_of_the_sum(name, config, into, dtype):
    model = adapted(name, config, dtype)
    # As the model's own arithmetic sums them up; float64 could fall to the other side of a tie.
    sums = {}
    for path, module, part in parts_of(model, "default"):
        W = module.adapted.weight.dequantize().float()
        sums[path] = torch.addmm(W, part.lora_B.detach(), part.lora_A.detach(), alpha=part.scale)
    before = {path: weight for path, _, weight in quantized_sites(model)}
    dense_before = {k: p for k, p in parameters(model).items() if not isinstance(p, NF4Tensor)}
    dw.merge(model, into=into, mode="requantize")
    after = {path: weight for path, _, weight in quantized_sites(model)}
    assert after.keys() == before.keys()
    for path, weight in after.items():
        old = before[path]
        assert (weight.shape, weight.dtype, weight.transposed) == (old.shape, old.dtype, old.transposed)
        assert weight.packed.nbytes == old.packed.nbytes and not weight.requires_grad
        assert (weight.packed.block_size, weight.packed.double_quant) == (config.block_size, config.double_quant)
        if path not in sums:
            assert weight is old
            continue
        embedding = isinstance(model.get_submodule(path), nn.Embedding)
        total = sums[path].t() if embedding else sums[path]
        nearest = NF4Weight.quantize(total, double_quant=config.double_quant, block_size=config.block_size, dtype=dtype)
        tiny.assert_same(weight.packed.tensors(), nearest.tensors())
    # Nothing beside them has grown.
    for key, parameter in parameters(model).items():
        if key in dense_before and key.removesuffix(".weight") not in sums:
            assert parameter is dense_before[key]
        assert "adapted" not in key


@pytest.mark.parametrize("mode", ["retain", "requantize"])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_16_bits_stays_beside_the_codes(name, mode):
    model = adapted(name, NF4(), torch.bfloat16, target_modules="all-linear")
    keys, total = list(parameters(model)), sum(stored_bytes(p) for p in parameters(model).values())
    kinds = {key: type(p) for key, p in parameters(model).items()}
    dw.merge(model, into="nf4", mode=mode, calibration=batches(name) if name != "t5" else None)
    assert list(parameters(model)) == keys == list(dict(model.named_parameters(remove_duplicate=False)))
    assert {key: type(p) for key, p in parameters(model).items()} == kinds
    assert sum(stored_bytes(p) for p in parameters(model).values()) == total
    assert tiny.logits(model, name).isfinite().all()


@pytest.mark.parametrize("mode", ["retain", "requantize"])
@pytest.mark.parametrize("config", [None, EVERYTHING, NF4(double_quant=False, skip_modules=["v_proj"])], ids=repr)
def test_a_16_bit_base_goes_into_4_bits_whole(config, mode):
    model = adapted("llama", None, target_modules=["q_proj", "v_proj"])
    expected, plain = exact(model, {"default": 1.0}), tiny.tiny("llama")
    dw.merge(model, into="nf4", mode=mode, quantize=config)
    chosen = {path for path, _, _ in quantized_sites(quantize_model(plain, config))}
    assert {path for path, _, _ in quantized_sites(model)} == chosen
    for path, _, weight in quantized_sites(model):
        assert weight.packed.double_quant == (config or NF4()).double_quant
        if path not in expected:
            tiny.assert_same(weight.packed.tensors(), plain.get_submodule(path).weight.packed.tensors())
        else:
            assert tiny.relative(weight.dequantize(), expected[path]) < 0.2
    for path in expected.keys() - chosen:
        torch.testing.assert_close(model.get_submodule(path).weight, expected[path].float())


def test_several_adapters_are_merged_as_they_are_active():
    def two():
        model = more(adapted("llama", dtype=torch.bfloat16), "second", r=2)
        dw.set_adapter(model, {"default": 0.5, "second": -1.5})
        return model

    expected = exact(two(), {"default": 0.5, "second": -1.5})
    dense = dw.merge(two(), into="float32")
    for path, value in expected.items():
        assert tiny.relative(dense.get_submodule(path).weight, value) < 1e-6
    # A retaining merge is told of both: what it keeps is their sum.
    report = dw.MergeReport()
    merged = dw.merge(two(), report=report, calibration=batches())
    assert report.layers.keys() == {path for path, _, _ in quantized_sites(merged)} - {"model.embed_tokens", "lm_head"}
    for path, error in report.layers.items():
        assert error.kept == pytest.approx(1, abs=0.1) and error.relative < 0.15, path


@pytest.mark.parametrize("into", [None, "nf4", "bf16", "float32"])
@pytest.mark.parametrize("name", NAMES)
def test_unmerging_puts_the_very_objects_back(name, into):
    model = adapted(name)
    before, logits = dict(model.named_parameters(remove_duplicate=False)), tiny.logits(model, name)
    wanting = {key for key, p in before.items() if p.requires_grad}
    dw.merge(model, into=into, mode="requantize")
    assert not torch.equal(tiny.logits(model, name), logits) or into == "float32"
    dw.unmerge(model)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert after.keys() == before.keys() and all(after[key] is before[key] for key in before)
    assert {key for key, p in after.items() if p.requires_grad} == wanting
    assert torch.equal(tiny.logits(model, name), logits)


def test_ties_of_4_bit_weights():
    tied = quantize_model(tiny.tiny("llama-tied"), EVERYTHING)
    more(tied, target_modules="attention")
    dw.merge(tied, into="bf16")
    assert tied.lm_head.weight is tied.model.embed_tokens.weight and tied.config.tie_word_embeddings
    # An adapter on the head alone parts the two, both into 4 bits and out of them.
    for into, kind in ((None, NF4Tensor), ("float32", nn.Parameter)):
        model = more(quantize_model(tiny.tiny("llama-tied"), EVERYTHING), target_modules=["lm_head"])
        wanted, embedding = exact(model, {"default": 1.0})["lm_head"], model.model.embed_tokens.weight.dequantize()
        dw.merge(model, into=into, mode="requantize")
        assert model.lm_head.weight is not model.model.embed_tokens.weight
        assert not model.config.tie_word_embeddings
        assert type(model.lm_head.weight) is kind and type(model.model.embed_tokens.weight) is kind
        assert torch.equal(values(model.model.embed_tokens.weight), embedding.double())
        assert tiny.relative(values(model.lm_head.weight), wanted) < (1e-6 if into else 0.15)
        dw.unmerge(model)
        assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.tie_word_embeddings


def test_trained_tokens_of_a_tied_4_bit_embedding_stay_tied():
    model = quantize_model(tiny.tiny("llama-tied"), EVERYTHING)
    more(model, target_modules="attention", trainable_tokens=[36, 10])
    expected = tiny.logits(model, "llama-tied")
    rows = model.model.embed_tokens.weight.dequantize()
    dw.merge(model, into="float32")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tiny.relative(tiny.logits(model, "llama-tied"), expected) < 1e-5
    same = torch.ones(len(rows), dtype=torch.bool)
    same[[36, 10]] = False
    merged = model.model.embed_tokens.weight
    assert torch.equal(merged[same], rows[same]) and not torch.equal(merged[~same], rows[~same])


def test_biases_are_merged_too():
    model = quantize_model(tiny.tiny("llama-bias"))
    more(model, target_modules="all-linear", bias="lora_only")
    expected = tiny.logits(model, "llama-bias")
    dw.merge(model, into="float32")
    assert tiny.relative(tiny.logits(model, "llama-bias"), expected) < 1e-5


def test_a_merged_4_bit_model_is_saved_and_read_again(tmp_path):
    model = dw.merge(adapted("llama", NF4(), target_modules="all-linear"), keep_original=False)
    dw.save_model(model, tmp_path)
    again = dw.load_model(tmp_path, dtype="float32", device="cpu")
    assert_same_packed(again, model)
    assert torch.equal(tiny.logits(again, "llama"), tiny.logits(model, "llama"))


# What is kept.


def wide():
    """A model whose layers have whole blocks, with an adapter that changes little, and rows for it."""
    import transformers

    options = tiny._LLAMA | {"hidden_size": 128, "intermediate_size": 192, "head_dim": 64}
    with torch.random.fork_rng(devices=[]):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options)).eval()
    tiny.draw(model, 0, "wide", std=0.1)
    quantize_model(model)
    dw.adapt(model, dw.LoRA(r=2, target_modules="all-linear"))
    for key, parameter in dw.adapter_parameters(model, "default").items():
        noise = torch.randn(parameter.shape, generator=generator(0, key))
        parameter.data = noise * (0.1 if "lora_A" in key else 0.01)
    ids = torch.randint(3, tiny.VOCAB, (16, 32), generator=generator(0, "rows"))
    rows = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(4)]
    return model, rows


@pytest.mark.parametrize("calibrated", [True, False])
def test_retaining_keeps_an_update_that_requantising_loses(calibrated):
    reports, moments = {}, {}
    for mode in merging.MODES:
        model, rows = wide()
        paths = [path for path, _, _ in parts_of(model, "default")]
        found = Moments(model, paths, rows)
        moments = {path: found[path] for path in paths}
        targets = exact(model, {"default": 1.0})
        bases = {path: values(model.get_submodule(path).weight) for path in paths}
        reports[mode] = dw.MergeReport()
        dw.merge(model, mode=mode, report=reports[mode], calibration=rows if calibrated else None)
        assert reports[mode].mode == mode and reports[mode].layers.keys() == set(paths) == targets.keys()
        assert reports[mode].calibration_tokens == (16 * 32 if calibrated else 0)
        for path, error in reports[mode].layers.items():
            # What the report says is what float64 says of the weights that are there now.
            H = moments[path].double() if calibrated else torch.eye(targets[path].shape[1]).double()
            W, T = values(model.get_submodule(path).weight), targets[path]
            E, D = W - T, T - bases[path]
            lost, whole, size = (float(((M @ H) * M).sum()) for M in (E, T, D))
            assert error.relative == pytest.approx((lost / whole) ** 0.5, rel=1e-3)
            assert error.update == pytest.approx((lost / size) ** 0.5, rel=1e-3)
            assert error.kept == pytest.approx(float((((E + D) @ H) * D).sum()) / size, abs=1e-3)
    lost = [error.kept for error in reports["requantize"].layers.values()]
    kept = [error.kept for error in reports["retain"].layers.values()]
    assert max(lost) < 0.4 and min(kept) > 0.8 and max(kept) < 1.1
    if calibrated:
        # The update's own directions count for more than all others, which may lose a little by it.
        errors = [(reports["retain"].layers[p].relative, reports["requantize"].layers[p].relative) for p in targets]
        assert all(mine < 1.1 * plain for mine, plain in errors)
        assert sum(mine for mine, _ in errors) < sum(plain for _, plain in errors)


def test_the_models_output_keeps_the_update_too():
    model, rows = wide()

    def outputs():
        with torch.no_grad():
            return torch.cat([model(**row).logits for row in rows]).double()

    own = outputs()
    dw.set_adapter(model, None)
    base = outputs()
    dw.set_adapter(model, "default")
    kept = {}
    for mode in merging.MODES:
        dw.merge(model, mode=mode, calibration=rows)
        kept[mode] = float(((outputs() - base) * (own - base)).sum() / (own - base).square().sum())
        dw.unmerge(model)
    assert abs(kept["retain"] - 1) < 0.3 < 0.6 < abs(kept["requantize"] - 1), kept


# Calibration.


def by_hand(model, rows, path, masked=True):
    """X^T X / tokens in float64, gathered by a hook, padding left out."""
    seen = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda m, a: seen.append(a[0].detach()))
    with torch.no_grad():
        for row in rows:
            model(**row)
    hook.remove()
    chosen = [
        x[row["attention_mask"].bool()] if masked else x.flatten(0, -2) for x, row in zip(seen, rows, strict=True)
    ]
    X = torch.cat(chosen).double()
    return X.t() @ X / len(X), len(X)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert-mlm"])
def test_moments_are_those_of_the_tokens(name):
    model, rows = adapted(name, target_modules="all-linear"), batches(name)
    paths = [path for path, _, part in parts_of(model, "default")]
    expected = {path: by_hand(model, rows, path) for path in paths}
    for budget in (4 << 30, 1, 4 * 16**2 * 3):
        found = Moments(model.train(), paths, rows, budget_bytes=budget)
        for path, (H, tokens) in expected.items():
            assert tokens == sum(int(row["attention_mask"].sum()) for row in rows)
            got = found[path]
            torch.testing.assert_close(got.double(), H, rtol=1e-4, atol=1e-5)
        assert found.tokens == tokens
    unmasked, _ = by_hand(model.eval(), rows, paths[0], masked=False)
    assert tiny.relative(unmasked, expected[paths[0]][0]) > 1e-2


def test_gathering_in_groups_changes_nothing_and_leaves_the_model_as_it_was():
    model, rows = adapted("llama", target_modules="all-linear").train(), batches()
    paths = [path for path, _, _ in parts_of(model, "default")]
    passes = []
    model.register_forward_pre_hook(lambda m, a: passes.append(m.training))
    all_at_once, one_by_one = (Moments(model, paths, rows, budget_bytes=budget) for budget in (4 << 30, 1))
    for path in paths:
        assert torch.equal(all_at_once[path], one_by_one[path])
    assert passes == [False] * len(rows) * (1 + len(paths)) and model.training
    assert not any(module._forward_pre_hooks for module in model.modules() if module is not model)


def test_masks_that_do_not_fit_the_layers_leave_nothing_out():
    """A decoder reads its own tokens, and through cross-attention the encoder's."""
    model = adapted("t5", NF4(), target_modules="all-linear")
    rows = [given | {"decoder_input_ids": given["input_ids"][:, :4]} for given in batches("t5")]
    path = "decoder.block.0.layer.0.SelfAttention.q"
    found = Moments(model, [path, "encoder.block.0.layer.0.SelfAttention.q"], rows)
    torch.testing.assert_close(found[path].double(), by_hand(model, rows, path, masked=False)[0], rtol=1e-4, atol=1e-5)
    assert found.tokens == 3 * 2 * 4
    path = "encoder.block.0.layer.0.SelfAttention.q"
    torch.testing.assert_close(found[path].double(), by_hand(model, rows, path)[0], rtol=1e-4, atol=1e-5)


def test_labels_of_calibration_rows_are_not_read():
    reports = []
    for extra in ({}, {"labels": torch.full((2, 7), -100)}):
        reports.append(dw.MergeReport())
        dw.merge(adapted("llama"), calibration=[row | extra for row in batches()], report=reports[-1])
    assert reports[0].layers == reports[1].layers


# Hostile.


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"into": "int8"}, "unknown form to merge into 'int8'"),
        ({"into": "bf61"}, "bf16"),
        ({"mode": "retian"}, "retain"),
        ({"calibration": []}, "no rows to calibrate with"),
        ({"quantize": NF4(skip_modules=["nothing"]), "into": "nf4"}, "skip_modules 'nothing' matches no module"),
    ],
    ids=str,
)
def test_a_merge_that_cannot_be_changes_nothing(options, said):
    model = adapted("llama")
    before, logits = dict(model.named_parameters()), tiny.logits(model, "llama")
    with pytest.raises(InputError, match=said) as caught:
        dw.merge(model, **options)
    assert "\n" not in str(caught.value)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and all(after[key] is before[key] for key in before)
    assert torch.equal(tiny.logits(model, "llama"), logits)


def test_rows_that_pass_a_layer_by_are_an_error():
    model = adapted("t5", NF4(), target_modules="all-linear")
    rows = [{"input_ids": given["input_ids"]} for given in batches("t5")]
    encoder = model.encoder
    found = Moments(model, ["decoder.block.0.layer.0.SelfAttention.q"], rows)
    model.forward, own = encoder.forward, model.forward
    try:
        with pytest.raises(InputError, match="the rows do not pass through it"):
            found["decoder.block.0.layer.0.SelfAttention.q"]
    finally:
        model.forward = own


def test_a_model_without_an_active_adapter_is_not_merged():
    model = adapted("llama")
    dw.set_adapter(model, None)
    with pytest.raises(InputError, match="no adapter is active"):
        dw.merge(model, into="nf4")
    dw.set_adapter(model, "default")
    dw.merge(model)
    with pytest.raises(InputError, match="merged already"):
        dw.merge(model, into="bf16")
