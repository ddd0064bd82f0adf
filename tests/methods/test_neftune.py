"""NEFTune: the noise against the paper's formula, where it is and where not, and beside whatever else is trained."""

import copy
import math

import pytest
import tiny
import torch

import deltaw as dw
from deltaw.core.errors import InputError
from deltaw.core.generators import generator
from deltaw.fuse.head import install_loss_head, uninstall_loss_head
from deltaw.methods.host import book_of, parts_of, sites_of
from deltaw.methods.neftune import root_lengths

ALPHA = 5.0


def padded(batch=3, length=9, *, left=False):
    """Token ids and a mask whose rows are of lengths 9, 7, 5."""
    ids = torch.randint(3, tiny.VOCAB, (batch, length), generator=generator(0, "padded"))
    mask = (torch.arange(length) < torch.tensor([9, 7, 5])[:, None]).long()
    mask = mask.flip(1) if left else mask
    return {"input_ids": ids * mask, "attention_mask": mask}


def noise_of(ids, mask, d, alpha=ALPHA):
    """The authors' formula, from the default generator as it is now: alpha / sqrt(L d) times uniform, masked."""
    uniform = torch.zeros(*ids.shape, d).uniform_(-1, 1)
    lengths = mask.sum(1)
    return uniform * mask[..., None] * (alpha / torch.sqrt(lengths * d))[:, None, None]


def embedding_output(model, embedding, given, *, seed=11):
    """What the embedding module of a model gives in one forward pass."""
    seen = []
    handle = embedding.register_forward_hook(lambda module, args, out: seen.append(out.detach().clone()))
    torch.default_generator.manual_seed(seed)
    out = model(**given)
    handle.remove()
    return seen, out


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert-mlm", "gemma3", "opt"])
def test_the_noise_is_the_papers(name, left):
    given = padded(left=left)
    model, plain = tiny.tiny(name).train(), tiny.tiny(name).train()
    dw.adapt(model, dw.NEFTune(ALPHA), name="noise")
    embedding = model.get_input_embeddings()
    seen, out = embedding_output(model, embedding, given)
    bare = plain.get_input_embeddings()(given["input_ids"]).detach()
    torch.default_generator.manual_seed(11)
    noise = noise_of(given["input_ids"], given["attention_mask"], bare.shape[-1])
    assert len(seen) == 1 and torch.equal(noise[given["attention_mask"] == 0], torch.zeros(6, bare.shape[-1]))
    torch.testing.assert_close(seen[0], bare + noise, rtol=0, atol=1e-6)
    # The model goes on from there as from any other embeddings.
    again = plain(inputs_embeds=seen[0], attention_mask=given["attention_mask"]).logits
    torch.testing.assert_close(out.logits, again, rtol=0, atol=1e-5)


def test_bounds_and_variance():
    given = {"input_ids": torch.full((64, 16), 5)}
    given["attention_mask"] = (torch.arange(16) < torch.tensor([16, 4] * 32)[:, None]).long()
    model = dw.adapt(tiny.tiny("llama").train(), dw.NEFTune(7.0))
    (got,), _ = embedding_output(model, model.get_input_embeddings(), given)
    noise = got - tiny.tiny("llama").get_input_embeddings()(given["input_ids"]).detach()
    for rows, length in ((noise[0::2], 16), (noise[1::2, :4], 4)):
        bound = 7.0 / math.sqrt(length * 16)
        assert 0.99 * bound < rows.abs().max() <= bound * (1 + 1e-5)
        # Of 2048 draws or more the mean is within 4 of its standard deviations, and so is the variance.
        count = rows.numel()
        assert abs(rows.mean()) < 4 * bound / math.sqrt(3 * count)
        assert abs(rows.var() / (bound**2 / 3) - 1) < 4 * math.sqrt(0.8 / count)
        assert rows.unique().numel() > 0.9 * count
    assert not noise[1::2, 4:].any()


def test_each_document_of_a_packed_row_has_its_own_length():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7, 8]])
    expected = torch.tensor([[3, 3, 3, 2, 2, 4, 4, 4, 4], [9] * 9]).double().rsqrt()
    got = root_lengths(torch.zeros(2, 9), None, positions)
    torch.testing.assert_close(got.double(), expected)
    torch.testing.assert_close(
        root_lengths(torch.zeros(2, 9), None, positions[1:]).double(), expected[1:].expand(2, -1)
    )
    ids = torch.randint(3, tiny.VOCAB, (2, 9), generator=generator(0, "packed"))
    model = dw.adapt(tiny.tiny("llama").train(), dw.NEFTune(ALPHA))
    given = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    (got,), _ = embedding_output(model, model.get_input_embeddings(), given)
    torch.default_generator.manual_seed(11)
    uniform = torch.zeros(2, 9, 16).uniform_(-1, 1)
    bare = tiny.tiny("llama").get_input_embeddings()(ids).detach()
    torch.testing.assert_close(got, bare + uniform * (ALPHA / 4 * expected.float())[..., None], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", tiny.MODELS)
def test_nothing_in_evaluation_and_noise_in_training(name):
    model, plain = tiny.tiny(name), tiny.tiny(name)
    dw.adapt(model, dw.NEFTune(ALPHA))
    state = torch.get_rng_state()
    assert torch.equal(tiny.logits(model, name), tiny.logits(plain, name))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(tiny.logits(model.train(), name), tiny.logits(plain.train(), name))
    assert dw.adapter_names(model) == [] and {p.requires_grad for p in model.parameters()} == {True}
    dw.delete_adapter(model, "default")
    assert not list(sites_of(model)) and "_deltaw" not in model.__dict__
    assert torch.equal(tiny.logits(model, name), tiny.logits(plain, name))


@pytest.mark.parametrize("name", ["t5", "bart-seq"])
def test_an_encoder_decoder_has_noise_on_the_encoders_input_alone(name):
    model = dw.adapt(tiny.tiny(name).train(), dw.NEFTune(ALPHA))
    plain, given = tiny.tiny(name).train(), tiny.inputs(name)
    for part in ("get_encoder", "get_decoder"):
        own, bare = (getattr(m, part)().get_input_embeddings() for m in (model, plain))
        seen, _ = embedding_output(model, own, given)
        ids = given["input_ids"] if part == "get_encoder" else None
        expected, _ = embedding_output(plain, bare, given)
        changed = [not torch.equal(a, b) for a, b in zip(seen, expected, strict=True)]
        assert changed == ([True] if ids is not None else [False]), part


def test_embeddings_given_in_place_of_ids_get_it_too():
    given = padded()
    model, plain = tiny.tiny("llama").train(), tiny.tiny("llama").train()
    dw.adapt(model, dw.NEFTune(ALPHA))
    embeddings = plain.get_input_embeddings()(given["input_ids"]).detach()
    torch.default_generator.manual_seed(3)
    got = model(inputs_embeds=embeddings, attention_mask=given["attention_mask"]).logits
    torch.default_generator.manual_seed(3)
    assert torch.equal(got, model(**given).logits)
    assert not torch.equal(got, plain(**given).logits)


ADAPTERS = {
    "lora-on-embedding": dw.LoRA(r=4, target_modules=["embed_tokens", "q_proj"]),
    "dora-on-embedding": dw.DoRA(r=4, target_modules=["embed_tokens", "v_proj"]),
    "tokens": dw.LoRA(r=4, trainable_tokens=[5, 6, 7]),
    "copy-of-the-embedding": dw.LoRA(r=4, modules_to_save=["embed_tokens"]),
    "bottleneck": dw.Bottleneck(bottleneck_dim=4),
    "prefix": dw.PrefixTuning(3),
    "full": dw.Full(),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_beside_any_adapter_it_is_the_adapters_embedding_and_noise(kind):
    given = padded()
    model, alone = (dw.adapt(tiny.tiny("llama"), ADAPTERS[kind]) for _ in range(2))
    for one in (model, alone):
        tiny.randomise(one, std=0.05)
    wants = {k: p.requires_grad for k, p in model.named_parameters()}
    before = tiny.logits(model, "llama")
    dw.adapt(model, dw.NEFTune(ALPHA), name="noise")
    assert {k: p.requires_grad for k, p in model.named_parameters()} == wants
    assert torch.equal(tiny.logits(model, "llama"), before) and dw.adapter_names(model) == ["default"]
    (bare,), _ = embedding_output(alone.train(), alone.get_input_embeddings(), given)
    (got,), out = embedding_output(model.train(), model.get_input_embeddings(), given)
    torch.default_generator.manual_seed(11)
    noise = noise_of(given["input_ids"], given["attention_mask"], 16)
    torch.testing.assert_close(got, bare + noise, rtol=0, atol=2e-6)
    out.logits.sum().backward()
    trained = dw.adapter_parameters(model, "default")
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
    dw.delete_adapter(model, "noise")
    assert torch.equal(tiny.logits(model.eval(), "llama"), before)


def test_on_an_embedding_in_four_bits():
    from deltaw.quant import NF4, quantize_model

    model = quantize_model(tiny.tiny("llama"), NF4(embeddings=True, head=True))
    bare = model.get_input_embeddings()(padded()["input_ids"]).detach()
    dw.adapt(model, [dw.LoRA(r=2), dw.NEFTune(ALPHA)], name="q")
    (got,), _ = embedding_output(model.train(), model.get_input_embeddings(), padded())
    torch.default_generator.manual_seed(11)
    noise = noise_of(padded()["input_ids"], padded()["attention_mask"], 16)
    torch.testing.assert_close(got, bare + noise, rtol=0, atol=1e-6)


def gradients_with(model, given, *, seed=5):
    torch.default_generator.manual_seed(seed)
    model.zero_grad(set_to_none=True)
    out = model(**given, labels=given["input_ids"].masked_fill(given["attention_mask"] == 0, -100))
    out.loss.backward()
    return out, {k: p.grad.clone() for k, p in dw.adapter_parameters(model, "default").items()}


def test_the_loss_head_and_recomputation_change_nothing():
    model = dw.adapt(tiny.tiny("llama", torch.float64), dw.LoRA(r=4), dtype=torch.float64)
    tiny.randomise(model)
    dw.adapt(model, dw.NEFTune(ALPHA), name="noise")
    given = padded()
    own, expected = gradients_with(model.train(), given)
    quiet, _ = gradients_with(model, given, seed=6)
    assert not torch.equal(own.loss, quiet.loss)
    assert install_loss_head(model) is None
    fast, got = gradients_with(model, given)
    assert fast.logits is None
    torch.testing.assert_close(fast.loss.float(), own.loss)
    assert got.keys() == expected.keys()
    for key in got:
        # transformers' own loss and its norms go through float32.
        assert tiny.relative(got[key], expected[key]) < 1e-5
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    again, got = gradients_with(model, given)
    torch.testing.assert_close(again.loss.float(), own.loss)
    for key in got:
        # transformers' own loss and its norms go through float32.
        assert tiny.relative(got[key], expected[key]) < 1e-5
    assert uninstall_loss_head(model)


# Beside the adapters, not among them.


def test_a_list_puts_it_beside_its_adapter():
    model = tiny.tiny("llama")
    base = tiny.logits(model, "llama")
    dw.adapt(model, [dw.DoRA(r=4), dw.NEFTune(ALPHA)], name="fin", seed=3)
    dw.adapt(model, dw.LoRA(r=2), name="other")
    assert dw.adapter_names(model) == ["fin", "other"] and book_of(model).beside == {"fin-neftune": "fin"}
    model.train()

    def noisy():
        return not torch.equal(tiny.logits(model, "llama"), tiny.logits(model, "llama"))

    for active, expected in [("fin", True), ("other", False), (None, False), (["fin", "other"], True)]:
        dw.set_adapter(model, active)
        assert noisy() == expected, active
    twin = copy.deepcopy(model)
    dw.delete_adapter(model, "fin")
    assert book_of(model).beside == {} and not noisy()
    dw.unload(model)
    assert torch.equal(tiny.logits(model.eval(), "llama"), base)
    model = twin
    assert noisy()
    plain = dw.adapt(tiny.tiny("llama"), dw.DoRA(r=4), name="fin", seed=3)
    for key, parameter in dw.adapter_parameters(plain, "fin").items():
        assert torch.equal(parameter, dw.adapter_parameters(model, "fin")[key])


def test_by_itself_it_stays_whatever_is_active():
    model = dw.adapt(tiny.tiny("llama"), dw.NEFTune(ALPHA), name="noise").train()
    dw.adapt(model, dw.LoRA(r=2), name="a")
    assert not any(p.requires_grad for k, p in model.named_parameters() if "adapted" not in k)
    for active in ("a", None):
        dw.set_adapter(model, active)
        assert not torch.equal(tiny.logits(model, "llama"), tiny.logits(model, "llama"))
    # The last adapter goes, and the noise is still there; the base is free again.
    dw.delete_adapter(model, "a")
    assert all(p.requires_grad for p in model.parameters())
    assert not torch.equal(tiny.logits(model, "llama"), tiny.logits(model, "llama"))
    dw.adapt(model, dw.LoRA(r=2), name="b")
    assert dw.summary(model).method == "lora"
    dw.unload(model)
    assert not list(sites_of(model)) and "_deltaw" not in model.__dict__
    tiny.assert_same(tiny.base_state(model), tiny.base_state(tiny.tiny("llama")))


@pytest.mark.parametrize("keep", [True, False])
def test_merging_and_saving_pass_over_it(tmp_path, keep):
    model = dw.adapt(tiny.tiny("llama"), [dw.LoRA(r=4), dw.NEFTune(ALPHA)])
    tiny.randomise(model)
    expected = tiny.logits(model, "llama")
    dw.save_adapter(model, tmp_path / "a")
    loaded = dw.load_adapter(tiny.tiny("llama"), tmp_path / "a")
    assert torch.equal(tiny.logits(loaded, "llama"), expected)
    assert [part.__class__.__name__ for _, _, part in parts_of(loaded, "a")] == ["LoraPart"] * 14
    dw.merge(model.train(), keep_original=keep)
    torch.testing.assert_close(tiny.logits(model, "llama"), expected, rtol=1e-4, atol=1e-4)
    assert not list(sites_of(model))
    if keep:
        dw.unmerge(model)
        assert not torch.equal(tiny.logits(model, "llama"), tiny.logits(model, "llama"))
        assert torch.equal(tiny.logits(model.eval(), "llama"), expected)
    else:
        assert "_deltaw" not in model.__dict__


def test_what_cannot_be_is_one_line():
    model = dw.adapt(tiny.tiny("llama"), [dw.LoRA(r=2), dw.NEFTune()], name="a")
    for wrong in (0, -1.0, "5", True, math.inf, math.nan):
        with pytest.raises(InputError, match=r"alpha is .*: expected a number above 0"):
            dw.NEFTune(wrong)
    for refused, says in [
        (lambda: dw.adapt(model, dw.NEFTune(), name="a"), "already has an adapter named 'a'"),
        (lambda: dw.adapt(model, dw.LoRA(), name="a-neftune"), "already has an adapter named 'a-neftune'"),
        (
            lambda: dw.adapt(model, [dw.NEFTune(), dw.LoRA()], name="b"),
            "given neftune, lora: expected one",
        ),
        (lambda: dw.adapt(model, [dw.LoRA(), dw.LoRA()], name="b"), "given lora, lora"),
        (lambda: dw.adapt(model, [], name="b"), "given an empty list"),
        (lambda: dw.set_adapter(model, "a-neftune"), "unknown adapter 'a-neftune'"),
        (lambda: dw.delete_adapter(model, "noise"), "unknown adapter 'noise'"),
        (lambda: dw.adapt(torch.nn.Linear(2, 2), dw.NEFTune()), "Linear is no transformers model with an embedding"),
    ]:
        with pytest.raises(InputError, match=says):
            refused()
    assert dw.adapter_names(model) == ["a"]
