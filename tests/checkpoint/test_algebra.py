"""Sums of adapters: PEFT's `add_weighted_adapter` as oracle, deltaw's own sum of active adapters, dense float64."""

import pytest
import tiny
import torch

import deltaw as dw
from deltaw.checkpoint import algebra
from deltaw.checkpoint.adapters import PREFIX
from deltaw.checkpoint.algebra import combined, cut, in_all, read_stored, write_stored
from deltaw.core.errors import InputError
from deltaw.core.generators import generator

# What PEFT says of its own about tied weights, Conv1D, embeddings that it saves and models without a name.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings=True.*"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to.*"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`.*"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in.*"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

SITES = {
    "llama": ["q_proj", "down_proj"],
    "gpt2": ["c_attn"],
    "llama-tied": ["q_proj", "embed_tokens"],
}
WEIGHTS = [0.7, -0.4, 1.3]


def made(tmp_path, model, *configs):
    """Folders of random adapters on a tiny model."""
    folders = []
    for place, config in enumerate(configs):
        adapted = dw.adapt(tiny.tiny(model), config, name=f"a{place}")
        tiny.randomise(adapted, f"a{place}", seed=place + 1)
        dw.save_adapter(adapted, tmp_path / f"a{place}")
        folders.append(tmp_path / f"a{place}")
    return folders


def three(tmp_path, model, r=3):
    alphas = (6, 2, 9)
    return made(tmp_path, model, *(dw.LoRA(r=r, alpha=a, target_modules=SITES[model]) for a in alphas))


def dense(stored):
    return {path: low.scale * low.B.double() @ low.A.double() for path, low in stored.sites.items()}


def exact(folders, weights):
    """The weighted sum of the updates, densely."""
    total = {}
    for folder, weight in zip(folders, weights, strict=True):
        for path, delta in dense(read_stored(folder)).items():
            total[path] = total.get(path, 0) + weight * delta
    return total


def peft_state(model, folders, weights, **options):
    """The factors that PEFT gives, by our paths: {path: (A, B)}."""
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(tiny.tiny(model), folders[0], adapter_name="a0")
    for place, folder in enumerate(folders[1:], 1):
        adapted.load_adapter(folder, adapter_name=f"a{place}")
    names = [f"a{place}" for place in range(len(folders))]
    adapted.add_weighted_adapter(names, list(weights), "new", **options)
    found = {}
    for path, module in adapted.named_modules():
        path = path.removeprefix(PREFIX)
        if "new" in getattr(module, "lora_A", ()):
            found[path] = (module.lora_A["new"].weight, module.lora_B["new"].weight)
        elif "new" in getattr(module, "lora_embedding_A", ()):
            found[path] = (module.lora_embedding_A["new"], module.lora_embedding_B["new"])
    return {path: (A.detach(), B.detach()) for path, (A, B) in found.items()}


def check_against_peft(folders, model, method, *, density=None, r=None, seed=0):
    ours, _ = combined([read_stored(f) for f in folders], WEIGHTS, method=method, density=density, r=r, seed=seed)
    options = {"density": density, "svd_rank": r}
    theirs = peft_state(model, folders, WEIGHTS, combination_type=method, **options)
    assert ours.sites.keys() == theirs.keys() and theirs
    for path, (A, B) in theirs.items():
        low = ours.sites[path]
        assert low.scale == 1.0
        if not method.endswith("svd"):
            # The same operations in float32, but for the order in which three summands are added.
            torch.testing.assert_close(low.A, A, rtol=2e-6, atol=1e-7)
            torch.testing.assert_close(low.B, B, rtol=2e-6, atol=1e-7)
        # PEFT's SVD is in float32.
        assert tiny.relative(low.B.double() @ low.A.double(), B.double() @ A.double()) < 1e-5


@pytest.mark.parametrize("model", SITES)
@pytest.mark.parametrize(
    "method", ["cat", "svd", "linear", "ties", "magnitude_prune", "ties_svd", "magnitude_prune_svd"]
)
def test_as_peft_has_it(model, method, tmp_path):
    density = 0.4 if "ties" in method or "prune" in method else None
    check_against_peft(three(tmp_path, model), model, method, density=density, r=5 if "svd" in method else None)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
def test_dare_as_peft_has_it_where_the_same_entries_are_dropped(method, tmp_path, monkeypatch):
    import peft.utils.merge_utils as theirs

    drawn, own = [], algebra.dropped

    def recorded(tensor, density, random):
        out = own(tensor, density, random)
        drawn.append((tensor, out != 0))
        return out

    def replayed(tensor, density, rescale):
        assert rescale
        (mask,) = [m for t, m in drawn if t.shape == tensor.shape and torch.allclose(t, tensor, atol=1e-6)]
        return tensor * mask / density

    monkeypatch.setattr(algebra, "dropped", recorded)
    monkeypatch.setattr(theirs, "random_pruning", replayed)
    folders = three(tmp_path, "llama")
    check_against_peft(folders, "llama", method, density=0.6, r=4 if "svd" in method else None, seed=3)
    assert len(drawn) == len(read_stored(folders[0]).sites) * 3 * (1 if "svd" in method else 2)


def test_dare_drops_at_random_without_changing_the_mean():
    tensor = torch.full((200, 300), 2.0)
    out = algebra.dropped(tensor, 0.3, generator(0))
    assert out.unique().tolist() == [0.0, pytest.approx(2.0 / 0.3)]
    # 60,000 draws: the share's deviation is 0.0019.
    assert float((out != 0).float().mean()) == pytest.approx(0.3, abs=0.01)
    assert torch.equal(out, algebra.dropped(tensor, 0.3, generator(0)))


def test_dares_draws_follow_the_seed_alone(tmp_path):
    stored = [read_stored(folder) for folder in three(tmp_path, "llama")]
    first, again, other = (combined(stored, WEIGHTS, method="dare_linear", density=0.5, seed=s)[0] for s in (1, 1, 2))
    tiny.assert_same(first.tensors(), again.tensors())
    assert not any(torch.equal(first.sites[path].A, other.sites[path].A) for path in first.sites)


def test_ties_by_hand():
    tensors = [torch.tensor([5.0, -1.0, 2.0, 0.5]), torch.tensor([-3.0, -4.0, 0.1, 0.2])]
    # Half of each stays: [5, 0, 2, 0] and [-3, -4, 0, 0]; signs +, -, +; only what agrees is averaged.
    got = algebra._merged(tensors, [1.0, 2.0], "ties", 0.5, lambda place: generator(0))
    assert got.tolist() == [5.0, -8.0, 2.0, 0.0]


@pytest.mark.parametrize("model", SITES)
def test_cat_computes_what_the_active_adapters_do_together(model, tmp_path):
    folders = three(tmp_path, model)
    sum_, fits = combined([read_stored(f) for f in folders], WEIGHTS)
    write_stored(sum_, tmp_path / "sum")
    together = tiny.tiny(model)
    for folder in folders:
        dw.load_adapter(together, folder)
    dw.set_adapter(together, dict(zip(["a0", "a1", "a2"], WEIGHTS, strict=True)))
    alone = dw.load_adapter(tiny.tiny(model), tmp_path / "sum")
    base = tiny.logits(tiny.tiny(model), model)
    got, expected = tiny.logits(alone, model), tiny.logits(together, model)
    assert tiny.relative(got - base, expected - base) < 1e-5
    # Written in float32.
    assert in_all(fits.values()) < 1e-7 and all(fit.r == 9 for fit in fits.values())


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_ranks_scales_and_sites_may_differ(method, tmp_path):
    folders = made(
        tmp_path,
        "llama",
        dw.LoRA(r=2, alpha=3, target_modules="attention", rank_pattern={"k_proj": 5}, rslora=True),
        dw.LoRA(
            r=4, target_modules=["q_proj", "up_proj"], alpha_pattern={"0.mlp.up_proj": 11.0}, layers_to_transform=[0]
        ),
    )
    sum_, fits = combined(
        [read_stored(f) for f in folders], [1.0, -0.5], method=method, r=None if method == "cat" else 16
    )
    write_stored(sum_, tmp_path / "sum")
    again, expected = read_stored(tmp_path / "sum"), exact(folders, [1.0, -0.5])
    assert len(expected) == 9 and again.sites.keys() == expected.keys()
    for path, delta in dense(again).items():
        torch.testing.assert_close(delta, expected[path], rtol=0, atol=1e-6)
    ranks = {path: fit.r for path, fit in fits.items()}
    q, k, up = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj", "model.layers.0.mlp.up_proj"
    assert (ranks[q], ranks[k], ranks[up]) == (6, 5, 4)
    for loaded in (dw.load_adapter(tiny.tiny("llama"), tmp_path / "sum"), peft_loaded(tmp_path / "sum", "llama")):
        base = tiny.logits(tiny.tiny("llama"), "llama")
        assert (tiny.logits(loaded, "llama") - base).abs().max() > 0.01
    torch.testing.assert_close(
        tiny.logits(loaded, "llama"), tiny.logits(dw.load_adapter(tiny.tiny("llama"), tmp_path / "sum"), "llama")
    )


def peft_loaded(folder, model):
    from peft import PeftModel

    return PeftModel.from_pretrained(tiny.tiny(model), folder)


@pytest.mark.parametrize("method", algebra.COMBINATIONS)
def test_the_error_is_that_of_what_was_written(method, tmp_path):
    folders = three(tmp_path, "llama", r=2)
    density = 0.5 if method not in ("cat", "svd", "linear") else None
    made_, fits = combined([read_stored(f) for f in folders], WEIGHTS, method=method, density=density)
    write_stored(made_, tmp_path / "out")
    written, expected = dense(read_stored(tmp_path / "out")), exact(folders, WEIGHTS)
    whole = torch.cat([(written[path] - expected[path]).flatten() for path in expected])
    norm = torch.cat([delta.flatten() for delta in expected.values()]).norm()
    for path, fit in fits.items():
        assert fit.distance == pytest.approx(float((written[path] - expected[path]).norm()), rel=1e-5, abs=1e-9)
        assert fit.norm == pytest.approx(float(expected[path].norm()), rel=1e-9)
    assert in_all(fits.values()) == pytest.approx(float(whole.norm() / norm), rel=1e-5, abs=1e-9)


def test_an_adapter_less_itself_is_nothing(tmp_path):
    (folder,) = made(tmp_path, "llama", dw.LoRA(r=2))
    stored = read_stored(folder)
    for method in ("cat", "svd"):
        nothing, fits = combined([stored, stored], [1.0, -1.0], method=method)
        assert in_all(fits.values()) < 1e-7
        assert max(float(delta.abs().max()) for delta in dense(nothing).values()) < 1e-6


def test_one_adapter_is_scaled_and_keeps_its_choice_of_modules(tmp_path):
    (folder,) = made(tmp_path, "llama", dw.LoRA(r=2, target_modules=["q_proj"], dropout=0.1))
    twice, _ = combined([read_stored(folder)], [2.0])
    assert twice.fields["target_modules"] == ["q_proj"] and twice.fields["lora_dropout"] == 0.1
    assert (twice.config.r, twice.config.alpha) == (2, 2)
    for path, delta in dense(twice).items():
        torch.testing.assert_close(delta, 2 * dense(read_stored(folder))[path], rtol=0, atol=1e-6)


# What adapters bring along.


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("bert-mlm", {"bias": "all", "target_modules": "qv"}),
        ("gpt2", {"bias": "lora_only", "target_modules": "attention"}),
        ("llama-bias", {"lora_bias": True}),
        ("llama", {"trainable_tokens": [21, 5, 30]}),
    ],
)
def test_biases_and_tokens_are_summed(model, options, tmp_path):
    folders = made(tmp_path, model, *(dw.LoRA(r=r, alpha=5, **options) for r in (2, 3)))
    sum_, _ = combined([read_stored(f) for f in folders], [0.3, 0.7])
    write_stored(sum_, tmp_path / "sum")
    together = tiny.tiny(model)
    for folder in folders:
        dw.load_adapter(together, folder)
    dw.set_adapter(together, {"a0": 0.3, "a1": 0.7})
    got = tiny.logits(dw.load_adapter(tiny.tiny(model), tmp_path / "sum"), model)
    torch.testing.assert_close(got, tiny.logits(together, model), atol=2e-5, rtol=1e-5)


def test_whole_modules_are_averaged_where_weights_sum_to_one(tmp_path):
    first, second = made(tmp_path, "llama-seq", *(dw.LoRA(r=2, modules_to_save=["score"]),) * 2)
    (plain,) = made(tmp_path / "plain", "llama-seq", dw.LoRA(r=2))
    stored = [read_stored(path) for path in (first, second, plain)]
    key = f"{PREFIX}score.weight"
    sum_, _ = combined(stored, [0.25, 0.75, -2.0])
    expected = 0.25 * stored[0].others[key].double() + 0.75 * stored[1].others[key].double()
    torch.testing.assert_close(sum_.others[key], expected.float())
    assert sum_.fields["modules_to_save"] == ["score"] and sum_.fields["task_type"] == "SEQ_CLS"
    write_stored(sum_, tmp_path / "sum")
    dw.load_adapter(tiny.tiny("llama-seq"), tmp_path / "sum")
    with pytest.raises(InputError, match=r"train score\.weight whole.* their weights sum to 1, and they sum to 2"):
        combined(stored[:2], [1.0, 1.0])


def test_base_weights_that_peft_wrote_along_are_kept(tmp_path):
    from safetensors.torch import load_file, save_file

    folders = three(tmp_path, "llama-tied")
    own = tiny.tiny("llama-tied").model.embed_tokens.weight.detach()
    key = f"{PREFIX}model.embed_tokens.base_layer.weight"
    for folder in folders:
        file = folder / "adapter_model.safetensors"
        save_file(load_file(file) | {key: own.clone()}, file)
    stored = [read_stored(folder) for folder in folders]
    assert torch.equal(combined(stored, WEIGHTS)[0].others[key], own)
    stored[1].others[key].add_(1)
    with pytest.raises(InputError, match=r"embed_tokens\.base_layer\.weight differs in"):
        combined(stored, WEIGHTS)


# Refused.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "ties"}, "no density: ties needs the share"),
        ({"method": "dare_linear", "density": 0.0}, "density is 0.0: dare_linear needs"),
        ({"method": "magnitude_prune", "density": 1.5}, "density is 1.5"),
        ({"method": "svd", "density": 0.5}, "svd drops nothing: leave density out"),
        ({"method": "cat", "r": 3}, "cat has no r of its own"),
        ({"method": "svd", "r": 0}, "r is 0: expected a whole number"),
        ({"method": "tie", "density": 0.5}, "unknown way to combine 'tie': did you mean 'ties'"),
        ({"method": "linear"}, r"linear sums A and B apart and needs equal ranks, and .* has 2 and 3: take cat or svd"),
        ({"weights": [1.0, float("nan")]}, "expected finite numbers"),
        ({"weights": [1.0]}, "got 2 adapters and 1 weights"),
    ],
)
def test_refused_options(options, message, tmp_path):
    stored = [read_stored(f) for f in made(tmp_path, "llama", dw.LoRA(r=2), dw.LoRA(r=3))]
    with pytest.raises(InputError, match=message):
        combined(stored, options.pop("weights", [1.0, 1.0]), **options)


def test_refused_pairs(tmp_path):
    (plain,) = made(tmp_path / "1", "llama", dw.LoRA(r=2))
    cases = {
        "is a DoRA adapter, whose update is no sum": made(tmp_path / "2", "llama", dw.DoRA(r=2))[0],
        r"different bases: model.layers.0.self_attn.k_proj is \(8, 16\) in one and \(16, 16\)": made(
            tmp_path / "3", "phi", dw.LoRA(r=2)
        )[0],
        "bias is 'none' and 'lora_only' in the adapters": made(tmp_path / "4", "llama", dw.LoRA(r=2, bias="lora_only"))[
            0
        ],
    }
    for message, other in cases.items():
        with pytest.raises(InputError, match=message):
            combined([read_stored(plain), read_stored(other)], [1.0, 1.0])
    named = [read_stored(plain), read_stored(plain)]
    for stored, name in zip(named, ("m1", "m2"), strict=True):
        stored.fields["base_model_name_or_path"] = name
    with pytest.raises(InputError, match=r"name different bases \(m1, m2\): name the one to write with --model"):
        combined(named, [1.0, 1.0])
    assert combined(named, [1.0, 1.0], base_model="m2")[0].fields["base_model_name_or_path"] == "m2"
    with pytest.raises(InputError, match="is an adapter of adalora, not of LoRA or DoRA: convert it first"):
        read_stored(made(tmp_path / "5", "llama", dw.AdaLoRA(init_r=4, target_r=2))[0])
    with pytest.raises(InputError, match="is an adapter of prefix, not of LoRA or DoRA: it has no A and B"):
        read_stored(made(tmp_path / "6", "llama", dw.PrefixTuning())[0])


@pytest.mark.parametrize(
    ("wrong", "message"), [("missing", "has no B"), ("short", r"A \(1, 16\) and B"), ("nan", "no finite")]
)
def test_damaged_factors(wrong, message, tmp_path):
    from safetensors.torch import load_file, save_file

    (folder,) = made(tmp_path, "llama", dw.LoRA(r=2, target_modules=["q_proj"]))
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    A, B = (f"{PREFIX}model.layers.1.self_attn.q_proj.lora_{side}.weight" for side in "AB")
    if wrong == "missing":
        del tensors[B]
    elif wrong == "short":
        tensors[A] = tensors[A][:1].clone()
    else:
        tensors[A][0, 0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(InputError, match=message):
        read_stored(folder)


# Cutting.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cut_gives_the_nearest_of_each_rank_and_its_error_as_rounded(dtype, tmp_path):
    (folder,) = made(tmp_path, "llama", dw.LoRA(r=5, alpha=7, target_modules=["q_proj", "up_proj"]))
    lows = {
        path: type(low)(low.A.to(dtype), low.B.to(dtype), low.scale) for path, low in read_stored(folder).sites.items()
    }
    new, fits = cut(lows, r=2, rank_pattern={"1.mlp.up_proj": 4})
    for path, low in lows.items():
        wanted = 4 if path.endswith("1.mlp.up_proj") else 2
        X = low.scale * low.B.double() @ low.A.double()
        got = new[path].scale * new[path].B.double() @ new[path].A.double()
        assert new[path].A.dtype == dtype and new[path].A.shape[0] == wanted == fits[path].r
        assert new[path].scale == low.scale
        best = float(torch.linalg.svdvals(X)[wanted:].norm())
        rounding = torch.finfo(dtype).eps * float(X.norm()) * 2
        assert best <= fits[path].distance * (1 + 1e-9) and fits[path].distance <= best + rounding
        assert fits[path].distance == pytest.approx(float((got - X).norm()), rel=1e-6)
    assert cut(lows, r=9)[0] == lows
    by_energy, fits = cut(lows, energy=0.9)
    for path in lows:
        assert 1 <= fits[path].r <= 5 and by_energy[path].A.shape[0] == fits[path].r
        assert fits[path].relative_error <= (1 - 0.9) ** 0.5 + 0.01


def test_a_written_cut_says_its_ranks(tmp_path):
    (folder,) = made(tmp_path, "llama", dw.LoRA(r=4, alpha=6, rslora=True, rank_pattern={"q_proj": 2, "k_proj": 3}))
    stored = read_stored(folder)
    made_ = stored.with_sites(cut(stored.sites, rank_pattern={"down_proj": 1, "k_proj": 2})[0])
    write_stored(made_, tmp_path / "out")
    again = read_stored(tmp_path / "out")
    for path, low in again.sites.items():
        own = stored.sites[path]
        wanted = {"down_proj": 1, "k_proj": 2, "q_proj": 2}.get(path.rsplit(".")[-1], 4)
        assert low.A.shape[0] == wanted and low.scale == pytest.approx(own.scale, rel=1e-12)
    assert again.sites.keys() == stored.sites.keys() and len(again.sites) == 14
    base = tiny.logits(tiny.tiny("llama"), "llama")
    ours = tiny.logits(dw.load_adapter(tiny.tiny("llama"), tmp_path / "out"), "llama")
    torch.testing.assert_close(tiny.logits(peft_loaded(tmp_path / "out", "llama"), "llama"), ours, atol=1e-5, rtol=1e-5)
    assert (ours - base).abs().max() > 0.01
