from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from deltaw.core.errors import InputError, RunError
from deltaw.core.generators import generator
from deltaw.evaluate import label_log_likelihood, perplexity
from deltaw.evaluate import likelihood as module
from deltaw.methods import LoRA, adapt, adapter_parameters

CAUSAL = [
    "llama",
    "llama-eager",
    "gpt2",
    "gemma2",
    "gemma3",
    "mistral",
    "qwen3",
    "gpt-neox",
    "phi",
    "falcon-alibi",
    "opt",
    "bloom",
    "roberta",
    "mamba",
]
PLAIN = {"bloom", "roberta", "mamba"}
PAD = 0


def one_by_one(model, prompts, labels):
    """Every prompt with every label alone: no batch, no padding, no cache."""
    scores = torch.empty(len(prompts), len(labels))
    with torch.no_grad():
        for i, prompt in enumerate(prompts):
            for j, label in enumerate(labels):
                if model.config.is_encoder_decoder:
                    start = [model.config.decoder_start_token_id]
                    decoder_ids = torch.tensor([start + label[:-1]])
                    logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder_ids).logits[0]
                else:
                    logits = model(input_ids=torch.tensor([prompt + label])).logits[0, len(prompt) - 1 : -1]
                scores[i, j] = logits.float().log_softmax(-1)[range(len(label)), label].sum()
    return scores


@pytest.fixture
def labels():
    return [[5], [6, 7], [6, 9, 10, 11], [8, 12, 4]]


@pytest.mark.parametrize("name", CAUSAL)
def test_scores_equal_running_each_pair_alone(causal, rows, labels, name):
    model = causal(name)
    assert module._continues(model) == (name not in PLAIN)
    # A prefix longer and shorter than the differences in length, and none at all; windows of 4 tokens are passed.
    for lengths, prefix in (([3, 1, 9, 2, 6, 1, 4], 6), ([14, 1, 2, 9], 3), ([5, 2, 8], 0), ([4], 0)):
        prompts = rows(lengths, prefix=prefix)
        got = label_log_likelihood(model, prompts, labels, batch_size=3, pad_token_id=PAD, normalize=False)
        torch.testing.assert_close(got, one_by_one(model, prompts, labels), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_decoders_score_labels_on_the_decoder(seq2seq, rows, labels, name):
    model, prompts = seq2seq(name), rows([3, 1, 9, 2, 6], prefix=4)
    got = label_log_likelihood(model, prompts, labels, batch_size=2, pad_token_id=PAD, normalize=False)
    torch.testing.assert_close(got, one_by_one(model, prompts, labels), rtol=2e-5, atol=2e-5)


def test_normalised_scores_are_per_token(causal, rows, labels):
    model, prompts = causal("llama"), rows([3, 5], prefix=2)
    got = label_log_likelihood(model, prompts, labels, pad_token_id=PAD)
    lengths = torch.tensor([1.0, 2.0, 4.0, 3.0])
    torch.testing.assert_close(got, one_by_one(model, prompts, labels) / lengths, rtol=2e-5, atol=2e-5)


def test_equal_prompts_and_prompts_inside_others(causal, labels):
    model, prompts = causal("llama"), [[7, 8, 9], [7, 8, 9], [7, 8], [7, 8, 9, 10, 11, 12, 13]]
    got = label_log_likelihood(model, prompts, labels, pad_token_id=PAD, normalize=False)
    torch.testing.assert_close(got, one_by_one(model, prompts, labels), rtol=2e-5, atol=2e-5)


def test_padding_and_batches_change_nothing(causal, rows, labels):
    model, prompts = causal("gemma3"), rows([3, 1, 9, 2, 6, 1, 4], prefix=5)
    one = label_log_likelihood(model, prompts, labels, batch_size=1, pad_token_id=PAD)
    torch.testing.assert_close(
        label_log_likelihood(model, prompts, labels, batch_size=7, pad_token_id=33), one, rtol=2e-5, atol=2e-5
    )
    again = label_log_likelihood(model, prompts, labels, batch_size=1, pad_token_id=PAD)
    assert torch.equal(one, again)


def test_each_prompt_runs_once_and_the_prefix_once_for_all(causal, rows):
    model, seen, headed = causal("llama"), [], []
    model.model.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    model.lm_head.register_forward_hook(lambda _m, args, _o: headed.append(args[0].shape[:-1].numel()))
    prompts = rows([4, 4, 4, 2], prefix=10)
    label_log_likelihood(model, prompts, [[5], [6], [7, 8, 9]], batch_size=2, pad_token_id=PAD)
    assert seen == [(1, 10), (2, 4), (2, 2), (2, 4), (2, 2)]
    assert headed == [1, 2, 4, 2, 4]


def test_an_adapted_model_is_scored_with_its_adapter(causal, rows, labels):
    model, prompts = causal("llama"), rows([3, 1, 9], prefix=5)
    base = label_log_likelihood(model, prompts, labels, pad_token_id=PAD, normalize=False)
    adapt(model, LoRA(r=2, target_modules=["q_proj", "v_proj", "down_proj", "embed_tokens", "lm_head"]), name="one")
    drawn = generator(1, "adapter")
    with torch.no_grad():
        for parameter in adapter_parameters(model, "one").values():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=drawn))
    expected = one_by_one(model.eval(), prompts, labels)
    got = label_log_likelihood(model, prompts, labels, pad_token_id=PAD, normalize=False)
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)
    assert (got - base).abs().min() > 1e-3
    examples = examples_of(prompts, [2, 0, 3])
    assert perplexity(model, examples, pad_token_id=PAD)["loss"] == pytest.approx(
        loss_one_by_one(model, examples, shift=True)[0], rel=1e-5
    )


def test_modes_are_restored_and_dropout_is_off(causal, rows, labels):
    model, prompts = causal("gpt2"), rows([3, 5])
    model.train()
    model.transformer.h[0].eval()
    before = [part.training for part in model.modules()]
    calls = []
    got = label_log_likelihood(
        model, prompts, labels, batch_size=1, pad_token_id=PAD, normalize=False, progress=lambda *n: calls.append(n)
    )
    assert [part.training for part in model.modules()] == before
    assert calls == [(1, 2), (2, 2)]
    assert not got.requires_grad
    torch.testing.assert_close(got, one_by_one(model.eval(), prompts, labels), rtol=2e-5, atol=2e-5)


def test_bfloat16_scores_are_float32(causal, rows, labels):
    model, prompts = causal("qwen3").bfloat16(), rows([3, 5, 9], prefix=4)
    got = label_log_likelihood(model, prompts, labels, pad_token_id=PAD, normalize=False)
    assert got.dtype == torch.float32
    # bfloat16 keeps 8 bits: two orders of summing differ by about 2**-8 of logits of size 10.
    torch.testing.assert_close(got, one_by_one(model, prompts, labels), rtol=0.03, atol=0.3)


@pytest.mark.parametrize(
    ("prompts", "labels", "message"),
    [
        ([], [[1]], "0 prompts"),
        ([[1]], [], "0 labels"),
        ([[1], []], [[1]], "prompt 1 is empty"),
        ([[1]], [[1], []], "label 1 is empty"),
        ([[1] * 63], [[1, 2, 3]], "the model takes 64"),
    ],
)
def test_wrong_input_is_refused(causal, prompts, labels, message):
    with pytest.raises(InputError, match=message):
        label_log_likelihood(causal("llama"), prompts, labels, pad_token_id=PAD)


def test_broken_weights_are_an_error(causal):
    model = causal("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = math.nan
    with pytest.raises(RunError, match="prompt 0"):
        label_log_likelihood(model, [[7, 8]], [[6]], pad_token_id=PAD)


def loss_one_by_one(model, examples, shift):
    total, count = 0.0, 0
    with torch.no_grad():
        for example in examples:
            logits = model(input_ids=torch.tensor([example["input_ids"]])).logits[0]
            labels = torch.tensor(example["labels"])
            if shift:
                logits, labels = logits[:-1], labels[1:]
            total += functional.cross_entropy(logits.double(), labels, ignore_index=-100, reduction="sum").item()
            count += int((labels != -100).sum())
    return total / count, count


def examples_of(token_rows, masked):
    examples = [{"input_ids": row, "labels": list(row)} for row in token_rows]
    for example, count in zip(examples, masked, strict=True):
        example["labels"][:count] = [-100] * count
    return examples


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gemma3", "falcon-alibi", "bloom", "mamba"])
def test_perplexity_weighs_every_token_the_same(causal, rows, name):
    model, examples = causal(name), examples_of(rows([3, 12, 7, 1, 9]), [0, 8, 7, 0, 2])
    loss, count = loss_one_by_one(model, examples, shift=True)
    got = perplexity(model, examples, batch_size=2, pad_token_id=PAD)
    assert got["tokens"] == count == 2 + 4 + 0 + 0 + 7
    assert got["loss"] == pytest.approx(loss, rel=1e-5)
    assert got["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)


def test_perplexity_of_a_masked_language_model(headed, rows):
    model, examples = headed("bert", "ForMaskedLM"), examples_of(rows([3, 12, 7]), [1, 8, 5])
    loss, count = loss_one_by_one(model, examples, shift=False)
    got = perplexity(model, examples, batch_size=3, pad_token_id=PAD)
    assert got == {
        "loss": pytest.approx(loss, rel=1e-5),
        "perplexity": pytest.approx(math.exp(loss), rel=1e-4),
        "tokens": count,
    }


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_perplexity_of_an_encoder_decoder(seq2seq, rows, name):
    model = seq2seq(name)
    answers = [[5, 6, 2], [7, 8, 9, 10, 2], [4, 2]]
    examples = [{"input_ids": r, "labels": a} for r, a in zip(rows([3, 12, 7]), answers, strict=True)]
    with torch.no_grad():
        losses = [
            model(input_ids=torch.tensor([e["input_ids"]]), labels=torch.tensor([e["labels"]])).loss.item()
            for e in examples
        ]
    expected = sum(loss * len(a) for loss, a in zip(losses, answers, strict=True)) / 10
    got = perplexity(model, examples, batch_size=3, pad_token_id=PAD)
    assert got["tokens"] == 10
    assert got["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_packed_documents_do_not_see_each_other(causal, rows, name):
    model, documents = causal(name), rows([5, 3, 6, 4])
    apart = [{"input_ids": d, "labels": list(d)} for d in documents]
    packed = [
        {
            "input_ids": a + b,
            "labels": [*a, -100, *b[1:]],
            "position_ids": [*range(len(a)), *range(len(b))],
        }
        for a, b in (documents[:2], documents[2:])
    ]
    expected = perplexity(model, apart, pad_token_id=PAD)
    got = perplexity(model, packed, pad_token_id=PAD)
    assert got["tokens"] == expected["tokens"]
    assert got["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_only_positions_with_loss_reach_the_head_in_bounded_parts(causal, rows, monkeypatch):
    model, headed = causal("llama"), []
    model.lm_head.register_forward_hook(lambda _m, args, _o: headed.append(args[0].shape[:-1].numel()))
    examples = examples_of(rows([9, 8, 7, 6]), [6, 6, 0, 6])
    expected = perplexity(model, examples, batch_size=4, pad_token_id=PAD)
    assert headed == [3 + 2 + 6]
    monkeypatch.setattr(module, "MAX_LOGITS", 48 * 5)
    got = perplexity(model, examples, batch_size=4, pad_token_id=PAD)
    assert headed[1:] == [5, 6]
    assert got == {key: pytest.approx(value, rel=1e-6) for key, value in expected.items()}


def test_perplexity_refuses_what_has_no_loss(causal):
    model = causal("llama")
    with pytest.raises(InputError, match="no token carries loss"):
        perplexity(model, [{"input_ids": [5, 6], "labels": [5, -100]}], pad_token_id=PAD)
    with pytest.raises(InputError, match="2 input_ids and 1 labels"):
        perplexity(model, [{"input_ids": [5, 6], "labels": [5]}], pad_token_id=PAD)
    with pytest.raises(InputError, match="no 'labels'"):
        perplexity(model, [{"input_ids": [5, 6]}], pad_token_id=PAD)
    with pytest.raises(InputError, match="no examples"):
        perplexity(model, [], pad_token_id=PAD)
    with pytest.raises(InputError, match="batch_size is 0"):
        perplexity(model, [{"input_ids": [5, 6], "labels": [5, 6]}], batch_size=0, pad_token_id=PAD)
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    with pytest.raises(RunError, match="NaN"):
        perplexity(model, [{"input_ids": [5, 6], "labels": [5, 6]}], pad_token_id=PAD)
