"""Encoding for every task: against transformers' own tokenisation where it has one."""

import pytest
from transformers import PreTrainedTokenizer

from deltaw.core.errors import InputError
from deltaw.data import Counts, LabelRow, PromptRow, RowSet, TagRow, Template, TextRow, encode, prompt_ids

TEXT = "The Borrower shall repay the Loan to Union Bank"
TAGGED = TagRow(["Union", "Bank", "of", "France,", "shall"], ["B-org", "I-org", "I-org", "I-org", "O"])


def test_causal(byte_level, sentencepiece):
    for tokenizer in (byte_level, sentencepiece):
        got = encode([TextRow(TEXT), TextRow("Paris")], tokenizer, "causal-lm", max_length=100)
        for example, text in zip(got.examples, (TEXT, "Paris"), strict=True):
            ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
            assert example == {"input_ids": ids, "labels": ids}
        tokens = sum(len(e["input_ids"]) for e in got.examples)
        assert got.counts == Counts(rows=2, tokens=tokens, loss_tokens=tokens - 2)
        assert got.labels is None


def test_causal_truncation_leaves_the_end_token_out(byte_level):
    ids = byte_level(TEXT)["input_ids"]
    got = encode([TextRow(TEXT)], byte_level, "causal-lm", max_length=len(ids))
    assert (got.examples[0]["input_ids"], got.counts.truncated) == (ids, 1)
    got = encode([TextRow(TEXT)], byte_level, "causal-lm", max_length=len(ids) + 1)
    assert got.counts.truncated == 0


def test_instruct(sentencepiece):
    rows = [PromptRow("Label:", "positive"), PromptRow("Label: ", "negative")]
    got = encode(rows, sentencepiece, "instruct", max_length=50)
    for example, row in zip(got.examples, rows, strict=True):
        start = prompt_ids(row, sentencepiece)
        assert example["input_ids"][: len(start)] == start
        assert example["labels"] == [-100] * len(start) + example["input_ids"][len(start) :]
    assert got.counts.loss_tokens == sum(x != -100 for e in got.examples for x in e["labels"])


def test_instruct_cuts_the_prompt_from_the_left_and_keeps_its_first_token(sentencepiece):
    row = PromptRow(TEXT, "Paris, capital of France")
    whole = encode([row], sentencepiece, "instruct", max_length=100).examples[0]
    answer = sum(x != -100 for x in whole["labels"])
    got = encode([row], sentencepiece, "instruct", max_length=answer + 4)
    assert got.examples[0] == {
        "input_ids": whole["input_ids"][:1] + whole["input_ids"][-(answer + 3) :],
        "labels": [-100] * 4 + whole["labels"][-answer:],
    }
    assert (got.counts.truncated, got.counts.dropped) == (1, 0)
    fits = encode([row], sentencepiece, "instruct", max_length=answer + 1).examples[0]
    assert fits["input_ids"] == whole["input_ids"][:1] + whole["input_ids"][-answer:]
    got = encode([row, PromptRow("a", "b")], sentencepiece, "instruct", max_length=answer)
    assert (got.counts.dropped, got.counts.rows, list(got.kept)) == (1, 1, [1])
    with pytest.raises(InputError, match="no row is left after encoding"):
        encode([row], sentencepiece, "instruct", max_length=answer)


@pytest.mark.parametrize("name", ["wordpiece", "byte_level", "sentencepiece"])
def test_sequence_classification_is_transformers_own(name, request):
    tokenizer = request.getfixturevalue(name)
    rows = [LabelRow(TEXT, "b"), LabelRow("Paris", "a"), LabelRow(TEXT, "a")]
    got = encode(rows, tokenizer, "sequence-classification", max_length=8)
    assert got.labels == ["a", "b"]
    assert [e["labels"] for e in got.examples] == [[1], [0], [0]]
    expected = tokenizer([r.text for r in rows], truncation=True, max_length=8)["input_ids"]
    assert [e["input_ids"] for e in got.examples] == expected
    assert got.counts.truncated == 2
    assert encode(rows, tokenizer, "sequence-classification", max_length=8, labels=["b", "a"]).examples[0][
        "labels"
    ] == [0]


def test_prompts_with_closed_answers_are_classified(wordpiece):
    rows = [PromptRow("x ", " b")] * 2 + [PromptRow("y", "a")] * 2
    got = encode(rows, wordpiece, "sequence-classification", max_length=8)
    assert (got.labels, [e["labels"] for e in got.examples]) == (["a", "b"], [[1], [1], [0], [0]])
    with pytest.raises(InputError, match="no small closed set of labels"):
        encode([PromptRow("x", "b"), PromptRow("y", "a")], wordpiece, "sequence-classification", max_length=8)


def test_tags_stand_at_first_sub_tokens(wordpiece):
    rows = [TagRow(["Union", "France", "the", "capital"], ["B-org", "I-org", "O", "O"])]
    got = encode(rows, wordpiece, "token-classification", max_length=50)
    own = wordpiece(list(rows[0].tokens), is_split_into_words=True)
    ids = [got.labels.index(tag) for tag in rows[0].tags]
    words = own.word_ids()
    expected = [ids[word] if word is not None and words[i - 1] != word else -100 for i, word in enumerate(words)]
    assert got.examples == [{"input_ids": own["input_ids"], "labels": expected}]
    assert got.counts.loss_tokens == 4
    cut = encode(rows, wordpiece, "token-classification", max_length=6)
    assert cut.examples[0]["input_ids"] == [*own["input_ids"][:5], 3]
    assert cut.examples[0]["labels"] == [*expected[:5], -100]
    assert cut.counts.truncated == 1


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece"])
def test_tags_on_decoders(name, request):
    """A word may hold punctuation; the model reads the words as ordinary text."""
    tokenizer = request.getfixturevalue(name)
    got = encode([TAGGED], tokenizer, "token-classification", max_length=60)
    example = got.examples[0]
    assert example["input_ids"] == tokenizer(" ".join(TAGGED.tokens))["input_ids"]
    assert [got.labels[x] for x in example["labels"] if x != -100] == list(TAGGED.tags)
    starts = [
        tokenizer.decode([i]).strip() for i, x in zip(example["input_ids"], example["labels"], strict=True) if x != -100
    ]
    for start, word in zip(starts, TAGGED.tokens, strict=True):
        assert word.startswith(start)


def test_masked(wordpiece):
    got = encode([TextRow(TEXT)], wordpiece, "masked-lm", max_length=9)
    assert got.examples == [{"input_ids": wordpiece(TEXT, truncation=True, max_length=9)["input_ids"]}]
    assert (got.counts.truncated, got.counts.loss_tokens) == (1, 0)


def rowset(*rows):
    return RowSet(rows, "label", "d.jsonl", counts=Counts(rows=len(rows), bad=3, empty=4), lines=[7, 9])


def test_label_outside_the_set(wordpiece, byte_level):
    rows = rowset(LabelRow("x", "positive"), LabelRow("y", "postive"))
    for tokenizer, task in ((wordpiece, "sequence-classification"), (byte_level, "instruct")):
        with pytest.raises(InputError) as caught:
            encode(rows, tokenizer, task, max_length=20, labels=["negative", "positive"])
        assert str(caught.value).startswith(
            "d.jsonl:9: label 'postive' is not one of negative, positive; did you mean 'positive'"
        )
    with pytest.raises(InputError, match="label 'B-x' is not one of O; add it"):
        encode([TagRow(["a"], ["B-x"])], wordpiece, "token-classification", max_length=20, labels=["O"])


def test_counts_of_the_source_are_kept(byte_level):
    got = encode(rowset(LabelRow("x", "a"), LabelRow("y", "b")), byte_level, "instruct", max_length=50)
    assert (got.counts.rows, got.counts.bad, got.counts.empty) == (2, 3, 4)


def test_limits(byte_level, wordpiece):
    with pytest.raises(InputError, match="max_length 4096 is longer than the model's 2048 positions"):
        encode([TextRow("x")], byte_level, "causal-lm", max_length=4096, model_max_length=2048)
    with pytest.raises(InputError, match="expected at least 2"):
        encode([TextRow("x")], byte_level, "causal-lm", max_length=1)
    with pytest.raises(InputError, match="leaves no room"):
        encode([TextRow("x")], wordpiece, "masked-lm", max_length=2)


@pytest.mark.parametrize(
    "task,row,advice",
    [
        ("causal-lm", PromptRow("a", "b"), "choose the task instruct"),
        ("instruct", TextRow("a"), "choose another task"),
        ("token-classification", PromptRow("a", "b"), "derive_tags"),
        ("masked-lm", LabelRow("a", "b"), "layout='text'"),
        ("sequence-classification", TextRow("a"), "give a text and a label"),
    ],
)
def test_task_and_layout(byte_level, task, row, advice):
    with pytest.raises(InputError, match=advice):
        encode([row], byte_level, task, max_length=20)


def test_other_mistakes(byte_level):
    with pytest.raises(InputError, match="unknown task 'causal_lm': did you mean 'causal-lm'"):
        encode([TextRow("x")], byte_level, "causal_lm", max_length=20)
    with pytest.raises(InputError, match="no rows to encode"):
        encode([], byte_level, "causal-lm", max_length=20)
    with pytest.raises(InputError, match="each once"):
        encode([LabelRow("x", "a")], byte_level, "sequence-classification", max_length=20, labels=["a", "a"])
    with pytest.raises(InputError, match=r"rows: row 1: the tokenizer has no chat template"):
        encode([PromptRow("x", "a")], byte_level, "instruct", max_length=20, template=Template(style="chat"))


class Slow(PreTrainedTokenizer):
    """Characters as tokens."""

    @property
    def vocab_size(self):
        return 128

    def get_vocab(self):
        return {chr(i): i for i in range(128)}

    def _tokenize(self, text):
        return list(text)

    def _convert_token_to_id(self, token):
        return ord(token) % 128

    def _convert_id_to_token(self, index):
        return chr(index)


def test_slow_tokenizers():
    tokenizer = Slow(eos_token="~")
    assert encode([TextRow("abc")], tokenizer, "causal-lm", max_length=9).examples[0]["input_ids"] == [97, 98, 99, 126]
    with pytest.raises(InputError, match="needs a fast tokenizer, got Slow"):
        encode([TAGGED], tokenizer, "token-classification", max_length=9)
