"""The loss head against transformers' own forward: loss and every gradient, for tiny models of many families."""

import copy
import inspect
import warnings

import pytest
import torch
from torch import nn

from deltaw.core.errors import InputError
from deltaw.core.generators import generator
from deltaw.fuse import install_loss_head, uninstall_loss_head

VOCAB = 61
SMALL = dict(
    vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
FAMILIES = {
    "llama": ("Llama", SMALL),
    "llama-tied": ("Llama", SMALL | {"tie_word_embeddings": True}),
    "mistral": ("Mistral", SMALL),
    "qwen2": ("Qwen2", SMALL | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", SMALL),
    "gemma": ("Gemma", SMALL),
    "gemma2": ("Gemma2", SMALL | {"final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3Text", SMALL | {"final_logit_softcapping": 3.0}),
    "phi": ("Phi", SMALL | {"num_key_value_heads": 2}),
    "phi3": ("Phi3", SMALL),
    "cohere": ("Cohere", SMALL | {"logit_scale": 0.25}),
    "granite": ("Granite", SMALL | {"logits_scaling": 3.0}),
    "smollm3": ("SmolLM3", SMALL),
    "mixtral": ("Mixtral", SMALL | {"num_local_experts": 2}),
    "gpt2": ("GPT2", dict(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=64, eos_token_id=2)),
    "gpt-neox": ("GPTNeoX", SMALL),
    "falcon": ("Falcon", {k: v for k, v in SMALL.items() if k != "head_dim"}),
    "opt": ("OPT", SMALL | {"ffn_dim": 24, "word_embed_proj_dim": 16}),
}  # fmt: skip
# Loss and gradients are sums of a few hundred rounded products; atol is relative to a tensor's largest entry.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}


def build(family, *, dtype=torch.float32, seed=0, **changes):
    """A model whose logits are large enough (standard deviation above 1) for caps and scales to matter."""
    import transformers

    prefix, options = FAMILIES[family]
    config = getattr(transformers, f"{prefix}Config")(**options | changes)
    for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop", "dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    with torch.random.fork_rng(devices=[]):
        model = transformers.AutoModelForCausalLM.from_config(config)
    draw = generator(seed, family)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            parameter.copy_(0.4 * noise if parameter.dim() > 1 else parameter + 0.1 * noise)
    return model.to(dtype).train()


def batch(rows=3, length=11, *, masked=0.6, seed=0):
    draw = generator(seed, "batch")
    ids = torch.randint(3, VOCAB, (rows, length), generator=draw)
    attention = torch.ones_like(ids)
    attention[0, -3:] = 0
    drop = torch.rand(ids.shape, generator=draw) < masked
    return {"input_ids": ids, "attention_mask": attention, "labels": ids.masked_fill(drop | (attention == 0), -100)}


def gradients(model, given):
    model.zero_grad(set_to_none=True)
    outputs = model(**given)
    outputs.loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    return outputs, found


def assert_same_step(model, given, own_model=None):
    """`model`'s fast step against its own forward's."""
    dtype = next(model.parameters()).dtype
    own_model = copy.deepcopy(model) if own_model is None else own_model
    uninstall_loss_head(own_model)
    want, theirs = gradients(own_model, given)
    got, mine = gradients(model, given)
    assert got.logits is None and want.logits is not None and type(got) is type(want)
    tolerance = TOLERANCE[dtype]
    assert got.loss.dtype == want.loss.dtype
    torch.testing.assert_close(got.loss, want.loss, rtol=tolerance, atol=0.0)
    assert mine.keys() == theirs.keys() and any(g is not None for g in mine.values())
    largest = max(float(grad.abs().max()) for grad in theirs.values() if grad is not None)
    for name, grad in theirs.items():
        if grad is None:
            assert mine[name] is None, name
            continue
        assert mine[name].dtype == grad.dtype
        # Without rotations, softmax does not see the keys' bias: all its gradient is rounding.
        scale = largest if name.endswith("k_proj.bias") else float(grad.abs().max())
        torch.testing.assert_close(mine[name], grad, rtol=0.0, atol=tolerance * scale, msg=name)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_is_the_models_own(family, dtype):
    model = build(family, dtype=dtype)
    assert install_loss_head(model) is None
    assert_same_step(model, batch())
    assert_same_step(model, batch(masked=0.0, seed=1) | {"num_items_in_batch": torch.tensor(41)})
    assert uninstall_loss_head(model)
    assert "forward" not in model.__dict__ and not [k for k in model.__dict__ if "deltaw" in k]
    assert not uninstall_loss_head(model)


@pytest.mark.parametrize("seed", range(6))
def test_random_masks_and_rows_without_loss(seed):
    model = build("llama")
    assert install_loss_head(model) is None
    given = batch(4, 9, masked=0.1 + 0.15 * seed, seed=seed)
    given["labels"][seed % 4] = -100
    assert (given["labels"][:, 1:] != -100).any()
    assert_same_step(model, given)


def test_the_trainers_arguments():
    model = build("llama")
    assert install_loss_head(model) is None
    given = batch()
    shifted = torch.roll(given["labels"], 2, 1)
    assert_same_step(model, given | {"shift_labels": shifted})
    assert_same_step(model, given | {"shift_labels": shifted, "num_items_in_batch": 5})
    assert_same_step(model, given | {"labels": given["labels"].to(torch.int32)}, own_model=_casting(model))
    assert inspect.signature(model.forward) == inspect.signature(type(model).forward.__get__(model))


def _casting(model):
    """A copy whose own forward takes int32 labels, which `F.cross_entropy` does not."""
    own = copy.deepcopy(model)
    uninstall_loss_head(own)
    own.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {"labels": kwargs["labels"].long()}), with_kwargs=True
    )
    return own


def test_other_inputs_reach_the_base():
    model = build("llama")
    assert install_loss_head(model) is None
    given = batch(1, 12)
    # Two packed documents: positions start again.
    packed = {k: given[k] for k in ("input_ids", "labels")} | {"position_ids": torch.arange(12)[None] % 7}
    assert_same_step(model, packed)
    assert_same_step(
        model, {"inputs_embeds": torch.randn(1, 12, 16, generator=generator(0)), "labels": given["labels"]}
    )
    positional = model(given["input_ids"], given["attention_mask"], labels=given["labels"])
    assert torch.equal(positional.loss, model(**given).loss)
    kept = model(**given, use_cache=True)
    assert kept.logits is None and kept.past_key_values.get_seq_length() == 12
    after = model(**given | {"attention_mask": torch.ones(1, 24)}, past_key_values=kept.past_key_values)
    assert after.logits is None and after.loss != kept.loss


def test_gradient_checkpointing():
    model = build("llama")
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    assert install_loss_head(model) is None
    assert_same_step(model, batch())


@pytest.mark.parametrize("items", [None, torch.tensor(0), 4])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_no_position_with_loss_gives_zero_and_zero_gradients(family, items):
    model = build(family)
    assert install_loss_head(model) is None
    given = batch()
    given["labels"][:, 1:] = -100
    outputs, found = gradients(model, given | ({} if items is None else {"num_items_in_batch": items}))
    assert outputs.loss.item() == 0.0
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in found.values())


@pytest.mark.parametrize(
    "change",
    [{"labels": None}, {"output_hidden_states": True}, {"logits_to_keep": torch.arange(11)}, {"return_dict": False}],
)
def test_other_requests_run_the_models_own_forward(change):
    model = build("llama")
    assert install_loss_head(model) is None
    given = batch() | change
    if change.get("return_dict", True):
        assert model(**given).logits.shape == (3, 11, VOCAB)
    else:
        assert model(**given)[1].shape == (3, 11, VOCAB)


def test_evaluation_and_generation_are_untouched_unless_asked():
    model, given = build("llama"), batch()
    own = model.eval()(**given)
    assert install_loss_head(model) is None
    again = model(**given)
    assert torch.equal(again.logits, own.logits) and torch.equal(again.loss, own.loss)
    want = type(model).generate(copy.deepcopy(model), given["input_ids"], max_new_tokens=3, do_sample=False)
    assert install_loss_head(model, evaluation=True) is None
    fast = model(**given)
    assert fast.logits is None
    torch.testing.assert_close(fast.loss, own.loss, rtol=1e-5, atol=0.0)
    assert torch.equal(model.generate(given["input_ids"], max_new_tokens=3, do_sample=False), want)


def test_only_positions_with_loss_reach_the_head():
    model, rows = build("llama"), []
    assert install_loss_head(model) is None
    given = batch()
    model.lm_head.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape))
    model(**given)
    assert rows == [(int((given["labels"][:, 1:] != -100).sum()), 16)]


class Doubled(nn.Module):
    """Stands for what the host puts on a head: a child `adapted` and a forward on the instance."""

    def __init__(self, head):
        super().__init__()
        self.B = nn.Parameter(torch.randn(head.weight.shape[0], 2, generator=generator(0, "B")))
        self.A = nn.Parameter(torch.randn(2, head.weight.shape[1], generator=generator(0, "A")))
        self.run = lambda x: nn.functional.linear(x, head.weight) + (x @ self.A.t()) @ self.B.t()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_an_adapted_head_is_called_as_it_is(family, when):
    model = build(family)
    if when == "after":
        assert install_loss_head(model) is None
    head = model.lm_head
    head.adapted = Doubled(head)
    head.forward = head.adapted.run
    if when == "before":
        assert install_loss_head(model) is None
    given = batch()
    got, mine = gradients(model, given)
    uninstall_loss_head(model)
    want, theirs = gradients(model, given)
    assert got.logits is None
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=0.0)
    for name, grad in theirs.items():
        torch.testing.assert_close(mine[name], grad, rtol=0.0, atol=1e-5 * float(grad.abs().max()), msg=name)


def test_a_frozen_base_with_one_trained_part():
    model = build("qwen3").requires_grad_(False)
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    assert install_loss_head(model) is None
    assert_same_step(model, batch())


def test_two_models_and_copies_do_not_disturb_each_other():
    first, second, given = build("llama"), build("llama", seed=1), batch()
    own = second(**given)
    assert install_loss_head(first) is None
    untouched = second(**given)
    assert torch.equal(untouched.logits, own.logits) and "forward" not in type(first).__dict__.get("__dict__", {})
    assert install_loss_head(second) is None
    twin = copy.deepcopy(second)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.zero_()
    torch.testing.assert_close(twin(**given).loss, own.loss, rtol=1e-5, atol=0.0)
    assert uninstall_loss_head(second) and twin(**given).logits is None and first(**given).logits is None


def test_installing_disturbs_nothing():
    model = build("gemma3")
    model.model.layers[0].eval()
    model.register_buffer("counter", torch.zeros(3))
    model.model.register_forward_hook(lambda *_: [model.counter.add_(1)] and None)
    modes = [m.training for m in model.modules()]
    tensors = {k: v.clone() for k, v in [*model.named_parameters(), *model.named_buffers()]}
    before = torch.get_rng_state()
    assert install_loss_head(model) is None
    assert install_loss_head(model) is None
    assert torch.equal(torch.get_rng_state(), before)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, tensors[k]) for k, v in [*model.named_parameters(), *model.named_buffers()])
    assert all(p.grad is None for p in model.parameters())
    assert len(model.model._forward_hooks) == 1


def encoder(name, **options):
    import transformers

    config = dict(vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    with torch.random.fork_rng(devices=[]):
        return getattr(transformers, name)(
            getattr(transformers, name.partition("For")[0] + "Config")(**config | options)
        )


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: encoder("T5ForConditionalGeneration", d_kv=8, d_ff=24), "encoder-decoder"),
        (lambda: encoder("BertForMaskedLM"), "loss is not"),
        (lambda: encoder("LlamaForSequenceClassification"), "loss is not"),
        (lambda: nn.Linear(2, 2), "not a transformers model"),
        (lambda: build("mixtral", output_router_logits=True), "output_router_logits"),
        (lambda: _with(build("llama"), forward=lambda **_: None), "replaced already"),
        (lambda: build("llama").to("meta"), "meta"),
        (lambda: _with_class(build("llama"), _Scaled), "its own loss differs"),
        (lambda: _with_class(build("llama"), _Odd), "a trial batch failed (RuntimeError: no)"),
    ],
    ids=["t5", "bert", "classifier", "linear", "router-loss", "replaced", "meta", "scaled", "raises"],
)  # fmt: skip
def test_what_does_not_fit_is_left_alone_with_a_reason(make, reason):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make()
    attributes = set(model.__dict__)
    modes = [m.training for m in model.modules()]
    assert reason in install_loss_head(model)
    assert set(model.__dict__) == attributes and [m.training for m in model.modules()] == modes


def _with(model, **attributes):
    model.__dict__.update(attributes)
    return model


def _with_class(model, mixin):
    model.__class__ = type("Unknown", (mixin, type(model)), {})
    return model


class _Scaled:
    """A model that scales its hidden states by a quantity this package has never heard of."""

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask)
        logits = self.lm_head(1.02 * outputs.last_hidden_state)
        from transformers.modeling_outputs import CausalLMOutputWithPast

        loss = self.loss_function(logits, labels, VOCAB, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits)


class _Odd:
    def forward(self, input_ids=None, labels=None, **kwargs):
        raise RuntimeError("no\nnever")


@pytest.mark.parametrize(
    ("family", "changes"), [("gemma2", {"final_logit_softcapping": 30.0}), ("granite", {"logits_scaling": 1.01})]
)
def test_an_unknown_cap_or_scale_is_found_out_in_a_fresh_model(family, changes, monkeypatch):
    model = build(family, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.05)
    monkeypatch.setattr("deltaw.fuse.head._logit_shape", lambda config: (1.0, None))
    assert "its own loss differs" in install_loss_head(model)


def test_labels_of_another_shape_are_an_error():
    model, given = build("llama"), batch()
    assert install_loss_head(model) is None
    with pytest.raises(InputError, match=r"labels have shape \(3, 10\).*\(3, 11\)"):
        model(**given | {"labels": given["labels"][:, :-1]})


def test_uninstalling_under_another_replacement_is_an_error():
    model = build("llama")
    assert install_loss_head(model) is None
    inner = model.forward
    model.forward = lambda **kwargs: inner(**kwargs)
    with pytest.raises(InputError, match="undo that replacement first"):
        uninstall_loss_head(model)
    model.__dict__["forward"] = inner
    assert uninstall_loss_head(model)
