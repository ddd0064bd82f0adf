"""Packing: what it keeps, how tightly, and that on real architectures no document sees another."""

from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from deltaw.core.errors import InputError
from deltaw.core.generators import generator
from deltaw.data import Collator, check_packing, pack

VOCAB = 64
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def tiny(name, attention):
    if name == "gpt2":
        config = GPT2Config(
            vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, attn_implementation=attention,
            attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        model = GPT2LMHeadModel(config)
    elif name == "gemma":
        kinds = ["sliding_attention", "full_attention"]
        model = Gemma3ForCausalLM(
            Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=4, layer_types=kinds, attn_implementation=attention)
        )
    else:
        model = LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation=attention))
    return drawn(model)


def drawn(model):
    """Weights large enough that a leak would show in every logit."""
    draw = generator(0, "weights")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
    return model


def example(index, length):
    ids = torch.randint(1, VOCAB, (length,), generator=generator(0, "ids", index)).tolist()
    return {"input_ids": ids, "labels": [-100] * (length // 2) + ids[length // 2 :]}


def documents(packed):
    """The documents of a packed example, cut where positions restart."""
    starts = [i for i, position in enumerate(packed["position_ids"]) if position == 0] + [len(packed["input_ids"])]
    return [{key: packed[key][a:b] for key in ("input_ids", "labels", "position_ids")} for a, b in pairwise(starts)]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 20), max_size=40), st.integers(20, 40))
def test_invariants(lengths, max_length):
    examples = [example(i, n) for i, n in enumerate(lengths)]
    packed = pack(examples, max_length)
    assert packed == pack(examples, max_length)
    sizes = [len(p["input_ids"]) for p in packed]
    assert all(size <= max_length for size in sizes)
    # No two sequences would fit into one: what best fit guarantees, and never more than twice the optimum.
    assert all(a + b > max_length for a, b in combinations(sizes, 2))
    got = [document for p in packed for document in documents(p)]
    for document in got:
        assert document["position_ids"] == list(range(len(document["input_ids"])))
    expected = [(e["input_ids"], [-100, *e["labels"][1:]]) for e in examples]
    assert sorted((d["input_ids"], d["labels"]) for d in got) == sorted(expected)


def test_best_fit():
    packed = pack([example(i, n) for i, n in enumerate([3, 5, 7, 5])], 10)
    assert [[len(d["input_ids"]) for d in documents(p)] for p in packed] == [[3, 7], [5, 5]]


def test_refusals():
    with pytest.raises(InputError, match="example 2 has 11 tokens"):
        pack([example(0, 3), example(1, 11)], 10)
    with pytest.raises(InputError, match="no label for each token"):
        pack([{"input_ids": [1, 2], "labels": [0]}], 10)
    with pytest.raises(InputError, match="has 0 tokens"):
        pack([{"input_ids": [], "labels": []}], 10)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma"])
def test_documents_are_alone(name, attention, training):
    """Logits, loss and gradients of a packed, padded batch are those of its documents one by one."""
    model = tiny(name, attention).train(training)
    examples = [example(i, n) for i, n in enumerate([9, 6, 1, 7, 8, 2, 12])]
    packed = pack(examples, 17)
    batch = Collator("causal-lm", 0, packed=True, pad_to_multiple_of=20)(packed)
    assert batch["input_ids"].shape == (3, 20)
    assert "attention_mask" not in batch
    out = model(**batch)
    total, count = 0.0, 0
    for row, p in enumerate(packed):
        start = 0
        for document in documents(p):
            ids = torch.tensor([document["input_ids"]])
            alone = model(input_ids=ids, use_cache=False).logits[0]
            end = start + len(alone)
            torch.testing.assert_close(out.logits[row, start:end], alone, rtol=1e-4, atol=1e-4)
            targets = torch.tensor(document["labels"][1:], dtype=torch.int64)
            total = total + torch.nn.functional.cross_entropy(alone[:-1], targets, ignore_index=-100, reduction="sum")
            count += int((targets != -100).sum())
            start = end
    torch.testing.assert_close(out.loss, total / count, rtol=1e-5, atol=1e-5)
    weights = [p for p in model.parameters() if p.requires_grad]
    ours = torch.autograd.grad(out.loss, weights)
    theirs = torch.autograd.grad(total / count, weights)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_cache_would_let_documents_see_each_other(training):
    """Why a packed batch says use_cache=False: were this to change in transformers, it could go."""
    model = tiny("llama", "sdpa").train(training)
    batch = Collator("causal-lm", 0, packed=True)(pack([example(0, 5), example(1, 6)], 11))
    apart = model(**batch).logits
    mixed = model(**{**batch, "use_cache": True}).logits
    assert (apart - mixed).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma"])
def test_check_packing_accepts(name, attention, dtype):
    model = tiny(name, attention).to(dtype).train()
    check_packing(model)
    assert model.training


class Deaf(LlamaForCausalLM):
    """Ignores the positions, as an attention implementation without masks of its own would."""

    def forward(self, input_ids=None, position_ids=None, use_cache=None, **rest):
        return super().forward(input_ids=input_ids, use_cache=False, **rest)


class Without(LlamaForCausalLM):
    def forward(self, input_ids=None, use_cache=None):
        return super().forward(input_ids=input_ids, use_cache=use_cache)


def test_check_packing_refuses():
    with pytest.raises(InputError, match="Deaf lets packed documents see each other"):
        check_packing(drawn(Deaf(LlamaConfig(**SIZES))))
    with pytest.raises(InputError, match="Without takes no position_ids"):
        check_packing(Without(LlamaConfig(**SIZES)))
    mamba = drawn(MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, state_size=4)))
    with pytest.raises(InputError, match="MambaForCausalLM"):
        check_packing(mamba)
