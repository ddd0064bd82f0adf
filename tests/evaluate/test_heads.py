from __future__ import annotations

import pytest
import torch

from deltaw.core.errors import InputError
from deltaw.evaluate import predict_sequence_classes, predict_token_classes

PAD, END = 0, 2


def alone(model, row, **more):
    with torch.no_grad():
        return model(input_ids=torch.tensor([row]), **{k: torch.tensor([v]) for k, v in more.items()}).logits[0]


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "bert", "t5"])
def test_sequence_classes_equal_each_row_alone(headed, rows, name):
    model = headed(name, "ForSequenceClassification", num_labels=5)
    model.train()
    token_rows = [[*row, END] for row in rows([3, 12, 7, 1, 9])]
    got = predict_sequence_classes(model, [{"input_ids": r} for r in token_rows], batch_size=2, pad_token_id=PAD)
    assert model.training
    model.eval()
    torch.testing.assert_close(got, torch.stack([alone(model, r) for r in token_rows]), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "bert", "t5"])
def test_token_classes_equal_each_row_alone(headed, rows, name):
    model, token_rows = headed(name, "ForTokenClassification", num_labels=5), rows([3, 12, 7, 1, 9])
    got = predict_token_classes(model, [{"input_ids": r} for r in token_rows], batch_size=2, pad_token_id=PAD)
    assert got == [alone(model, r).argmax(-1).tolist() for r in token_rows]
    assert len({c for row in got for c in row}) > 1


def test_segments_are_passed_on(headed, rows):
    model, token_rows = headed("bert", "ForSequenceClassification"), rows([6, 4])
    segments = [[0, 0, 0, 1, 1, 1], [0, 1, 1, 1]]
    examples = [{"input_ids": r, "token_type_ids": s} for r, s in zip(token_rows, segments, strict=True)]
    expected = torch.stack([alone(model, r, token_type_ids=s) for r, s in zip(token_rows, segments, strict=True)])
    got = predict_sequence_classes(model, examples, pad_token_id=PAD)
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)
    assert not torch.allclose(got, torch.stack([alone(model, r) for r in token_rows]))


def test_wrong_input_is_refused(headed):
    decoder, t5 = headed("llama", "ForSequenceClassification"), headed("t5", "ForSequenceClassification")
    with pytest.raises(InputError, match="pad_token_id is 3 and the model's configuration has 0"):
        predict_sequence_classes(decoder, [{"input_ids": [5]}], pad_token_id=3)
    with pytest.raises(InputError, match="no examples"):
        predict_sequence_classes(decoder, [], pad_token_id=PAD)
    with pytest.raises(InputError, match="example 1 has 65 tokens, the model takes 64"):
        predict_token_classes(decoder, [{"input_ids": [5]}, {"input_ids": [5] * 65}], pad_token_id=PAD)
    with pytest.raises(InputError, match="example 1 has 0 end tokens"):
        predict_sequence_classes(t5, [{"input_ids": [5, END]}, {"input_ids": [5, 6]}], pad_token_id=PAD)
