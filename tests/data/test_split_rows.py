"""The split: deterministic, blind to order, stratified, without leakage."""

import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.core.errors import InputError
from deltaw.data import ChatRow, Counts, LabelRow, PromptRow, RowSet, TagRow, TextRow, label_set, split_rows


def rowset(rows, layout="label", **counts):
    return RowSet(rows, layout, "rows.jsonl", None, Counts(rows=len(rows), **counts), list(range(1, len(rows) + 1)))


def many(n=300):
    return [LabelRow(f"text {i}", "ab"[i % 3 == 0]) for i in range(n)]


def test_exact_number_and_stratified():
    train, held = split_rows(rowset(many(), bad=2), held_out=30, seed=0)
    assert (len(train), len(held)) == (270, 30)
    assert Counter(row.label for row in held) == {"a": 20, "b": 10}
    assert sorted([*train.lines, *held.lines]) == list(range(1, 301))
    assert list(train.lines) == sorted(train.lines)
    assert (train.counts, held.counts) == (Counts(rows=270, bad=2), Counts(rows=30))
    assert len(split_rows(rowset(many()), held_out=0.1, seed=0)[1]) == 30


def test_completions_that_form_a_closed_set_are_strata():
    rows = [PromptRow(f"p{i}", "yes " if i % 4 else " no") for i in range(80)]
    _, held = split_rows(rowset(rows, "prompt"), held_out=0.25, seed=3)
    assert Counter(row.completion.strip() for row in held) == {"yes": 15, "no": 5}


def test_membership_ignores_order_and_global_generators():
    rows = many()
    first = set(split_rows(rowset(rows), held_out=0.2, seed=1)[1])
    state = torch.get_rng_state()
    shuffled = random.Random(5).sample(rows, len(rows))
    assert set(split_rows(rowset(shuffled), held_out=0.2, seed=1)[1]) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert set(split_rows(rowset(rows), held_out=0.2, seed=2)[1]) != first


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.sampled_from("ab")), min_size=12, max_size=60),
    st.floats(0.1, 0.9),
    st.integers(0, 5),
)
def test_no_input_on_both_sides(pairs, share, seed):
    rows = [LabelRow(str(text), label) for text, label in pairs]
    try:
        train, held = split_rows(rowset(rows), held_out=share, seed=seed)
    except InputError as error:
        assert "duplicates" in str(error) or "both sides" in str(error)
        return
    assert not {row.text for row in train} & {row.text for row in held}
    assert Counter(train) + Counter(held) == Counter(rows)
    assert 0 < len(held) <= max(1, round(share * len(rows)))


@pytest.mark.parametrize("held_out", [0.0, 1.0, 1.5, -0.1, 0, 300, -1, True, "0.1"])
def test_impossible_splits(held_out):
    with pytest.raises(InputError):
        split_rows(rowset(many()), held_out=held_out, seed=0)


def test_only_duplicates():
    with pytest.raises(InputError, match="only 1 different inputs"):
        split_rows(rowset([TextRow("same")] * 10, "text"), held_out=0.1, seed=0)


def test_conversations_and_words_split_by_what_the_model_sees():
    chat = [
        ChatRow([{"role": "user", "content": str(i // 2)}, {"role": "assistant", "content": str(i)}]) for i in range(40)
    ]
    train, held = split_rows(rowset(chat, "chat"), held_out=10, seed=0)
    assert len(held) == 10
    assert not {r.messages[0]["content"] for r in train} & {r.messages[0]["content"] for r in held}
    tags = [TagRow([str(i)], ["O"]) for i in range(10)]
    assert len(split_rows(rowset(tags, "tags"), held_out=3, seed=0)[1]) == 3


def test_label_set():
    assert label_set([LabelRow("x", "b"), LabelRow("y", "a")]) == ["a", "b"]
    assert label_set([PromptRow("x", " b")] * 2 + [PromptRow("y", "a")] * 2) == ["a", "b"]
    assert label_set([PromptRow("x", str(i)) for i in range(10)]) is None
    assert label_set([PromptRow("x", str(i)) for i in range(30)] * 2) is None
    assert label_set([PromptRow("x", str(i)) for i in range(30)] * 2, max_labels=30) is not None
    assert label_set([TagRow(["x"], ["B-per"])]) == ["B-per", "I-per", "O"]
    assert label_set([TextRow("x")]) is None
    assert label_set([]) is None
