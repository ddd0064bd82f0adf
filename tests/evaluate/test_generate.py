from __future__ import annotations

import pytest
import torch

from deltaw.core.errors import InputError
from deltaw.evaluate import generate_answers

END = 2


def greedy(model, prompt, count, end=END):
    """The whole sequence again for each token: no batch, no padding, no cache."""
    encoder_decoder = model.config.is_encoder_decoder
    tokens = [model.config.decoder_start_token_id] if encoder_decoder else list(prompt)
    made = []
    with torch.no_grad():
        while len(made) < count:
            ids = torch.tensor([tokens + made])
            inputs = (
                {"input_ids": torch.tensor([prompt]), "decoder_input_ids": ids}
                if encoder_decoder
                else {"input_ids": ids}
            )
            made.append(int(model(**inputs).logits[0, -1].argmax()))
            if made[-1] == end:
                return made[:-1]
    return made


def text(tokens):
    return " ".join(f"w{token}" for token in tokens if token > 3)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "t5", "bart"])
def test_answers_equal_the_plain_greedy_loop(causal, seq2seq, tokenizer, rows, name):
    model = seq2seq(name) if name in ("t5", "bart") else causal(name)
    prompts = rows([3, 9, 1, 6, 2])
    expected = [text(greedy(model, prompt, 8)) for prompt in prompts]
    assert len(set(expected)) > 2
    assert generate_answers(model, tokenizer, prompts, max_new_tokens=8, batch_size=2) == expected
    words = [text(prompt) for prompt in prompts]
    assert generate_answers(model, tokenizer, words, max_new_tokens=8, batch_size=5) == expected


def test_answers_end_before_the_end_token(causal, tokenizer, rows):
    model, prompts = causal("llama"), rows([3, 9, 1, 6, 2])
    free = [greedy(model, prompt, 10, end=-1) for prompt in prompts]
    end = free[0][4]
    model.generation_config.eos_token_id = [end, END]
    expected = [row[: row.index(end)] if end in row else row for row in free]
    expected = [text(row[: row.index(END)] if END in row else row) for row in expected]
    assert len(expected[0].split()) < 10
    assert generate_answers(model, tokenizer, prompts, max_new_tokens=10) == expected


def test_answers_end_before_a_stop_string(causal, tokenizer, rows):
    model, prompts = causal("llama"), rows([3, 9, 1, 6, 2])
    free = generate_answers(model, tokenizer, prompts, max_new_tokens=10)
    stop = free[1].split()[3]
    expected = [answer.split(stop)[0] for answer in free]
    assert expected != free
    assert generate_answers(model, tokenizer, prompts, max_new_tokens=10, stop=stop) == expected
    assert generate_answers(model, tokenizer, prompts, max_new_tokens=10, stop=["nowhere", stop]) == expected


def test_the_models_own_settings_are_set_aside_and_kept(causal, tokenizer, rows):
    model, prompts = causal("llama"), rows([3, 9])
    expected = generate_answers(model, tokenizer, prompts, max_new_tokens=8)
    own = model.generation_config
    own.do_sample, own.temperature, own.repetition_penalty, own.min_new_tokens = True, 5.0, 9.0, 30
    model.train()
    assert generate_answers(model, tokenizer, prompts, max_new_tokens=8) == expected
    assert model.generation_config is own
    assert own.repetition_penalty == 9.0
    assert model.training


def test_wrong_input_is_refused(causal, tokenizer):
    model = causal("llama")
    with pytest.raises(InputError, match="prompt 1 is empty"):
        generate_answers(model, tokenizer, [[5], []], max_new_tokens=4)
    with pytest.raises(InputError, match="60 tokens and 8 more"):
        generate_answers(model, tokenizer, [[5] * 60], max_new_tokens=8)
    with pytest.raises(InputError, match="max_new_tokens is 0"):
        generate_answers(model, tokenizer, [[5]], max_new_tokens=0)
    with pytest.raises(InputError, match="no empty stop"):
        generate_answers(model, tokenizer, [[5]], max_new_tokens=4, stop="")
