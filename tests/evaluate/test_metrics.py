from __future__ import annotations

import json

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltaw.core.errors import InputError, RunError
from deltaw.evaluate import (
    classification_metrics,
    entity_metrics,
    entity_spans,
    exact_match,
    label_indices,
    labelled_tags,
    prediction_metrics,
)

NAMES = ["negative", "neutral", "positive"]


def test_classification_by_hand():
    scores = torch.tensor([[3.0, 1, 0], [0, 2, 1], [0, 1, 2], [1, 3, 0], [0, 0, 5], [4, 1, 1]])
    truth = ["negative", "neutral", "neutral", "negative", "positive", "negative"]
    got = classification_metrics(scores, truth, NAMES)
    # Per label (true positives, false positives, false negatives): (2, 0, 1), (1, 1, 1), (1, 1, 0).
    assert got["accuracy"] == pytest.approx(4 / 6)
    assert got["macro_f1"] == pytest.approx((4 / 5 + 2 / 4 + 2 / 3) / 3)
    assert got["confusion"] == [[2, 1, 0], [0, 1, 1], [0, 0, 1]]
    assert got["n"] == 6
    assert got["absent_labels"] == []
    # Pairs in the right order by softmax probability: all of negative's and positive's; of neutral's, its 0.67 and 0.24
    # are each below the fourth row's 0.84 and above the other three rows.
    assert got["macro_auroc"] == pytest.approx((1.0 + 6 / 8 + 1.0) / 3)
    json.dumps(got, allow_nan=False)
    assert classification_metrics(scores.numpy(), [0, 1, 1, 0, 2, 0], NAMES) == got
    assert classification_metrics(scores.bfloat16(), truth, NAMES)["confusion"] == got["confusion"]


def test_auroc_does_not_depend_on_the_scale_of_a_row():
    scores = torch.randn(40, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    truth = [i % 3 for i in range(40)]
    moved = scores + torch.arange(40.0).unsqueeze(1)
    assert classification_metrics(scores, truth, NAMES)["macro_auroc"] == pytest.approx(
        classification_metrics(moved, truth, NAMES)["macro_auroc"], abs=1e-12
    )


def test_labels_absent_from_the_truth_are_named_and_left_out():
    scores = numpy.log([[0.7, 0.2, 0.1], [0.2, 0.7, 0.1], [0.1, 0.2, 0.7], [0.3, 0.6, 0.1]])
    got = classification_metrics(scores, ["negative", "neutral", "negative", "neutral"], NAMES)
    assert got["absent_labels"] == ["positive"]
    assert got["macro_f1"] == pytest.approx((2 / 3 + 1.0) / 2)
    assert got["macro_auroc"] == pytest.approx((2 / 4 + 4 / 4) / 2)
    assert got["confusion"] == [[1, 0, 1], [0, 2, 0], [0, 0, 0]]
    single = classification_metrics(scores, ["neutral"] * 4, NAMES)
    assert "macro_auroc" not in single
    assert single["absent_labels"] == ["negative", "positive"]


def test_ties_go_to_the_earlier_label():
    assert classification_metrics([[0.0, 0.0, 0.0], [-1.0, 2.0, 2.0]], [0, 1], NAMES)["accuracy"] == 1.0


def test_classification_refuses_wrong_input():
    with pytest.raises(InputError, match=r"expected \(2, 3\)"):
        classification_metrics(torch.zeros(2, 2), [0, 1], NAMES)
    with pytest.raises(InputError, match="did you mean 'positive'"):
        classification_metrics(torch.zeros(1, 3), ["positiv"], NAMES)
    with pytest.raises(InputError, match="expected 0 to 2"):
        label_indices([3], NAMES)
    with pytest.raises(InputError, match="each once"):
        label_indices([0], ["a", "a"])
    with pytest.raises(InputError, match="0 predictions"):
        prediction_metrics([], [], NAMES)
    with pytest.raises(RunError, match="row 1"):
        classification_metrics(torch.tensor([[0.0, 1, 2], [0, float("nan"), 1]]), [0, 1], NAMES)


# The example of seqeval's README and its documented figures.
README_TRUE = [["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
README_PREDICTED = [["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]


def test_entities_of_seqevals_readme():
    got = entity_metrics(README_TRUE, README_PREDICTED)
    assert (got["precision"], got["recall"], got["f1"]) == (0.5, 0.5, 0.5)
    assert got["per_type"] == {
        "MISC": {"precision": 0.0, "recall": 0.0, "f1": 0.0, "n": 1, "predicted": 1, "correct": 0},
        "PER": {"precision": 1.0, "recall": 1.0, "f1": 1.0, "n": 1, "predicted": 1, "correct": 1},
    }


def test_stray_inside_tags_in_both_conventions():
    # seqeval's README again: 1.0 in its default mode, 0.0 in its strict one.
    true, predicted = [["B-NP", "I-NP", "O"]], [["I-NP", "I-NP", "O"]]
    assert entity_metrics(true, predicted)["f1"] == 1.0
    assert entity_metrics(true, predicted, stray_inside="ignore")["f1"] == 0.0


@pytest.mark.parametrize(
    ("tags", "begun", "ignored"),
    [
        ("O O", set(), set()),
        ("B-A I-A B-A", {("A", 0, 2), ("A", 2, 3)}, {("A", 0, 2), ("A", 2, 3)}),
        ("B-A I-B I-B", {("A", 0, 1), ("B", 1, 3)}, {("A", 0, 1)}),
        ("O I-A I-A O I-A", {("A", 1, 3), ("A", 4, 5)}, set()),
        ("I-A B-A I-A", {("A", 0, 1), ("A", 1, 3)}, {("A", 1, 3)}),
        ("B-A-B I-A-B", {("A-B", 0, 2)}, {("A-B", 0, 2)}),
    ],
)
def test_spans(tags, begun, ignored):
    assert entity_spans(tags.split()) == begun
    assert entity_spans(tags.split(), stray_inside="ignore") == ignored


def test_entities_by_hand():
    true = ["B-PER I-PER O B-LOC O B-ORG I-ORG".split(), "B-LOC B-LOC O".split(), "O O".split()]
    predicted = ["B-PER O O B-LOC O B-LOC I-LOC".split(), "B-LOC I-LOC O".split(), "O B-ORG".split()]
    got = entity_metrics(true, predicted)
    # Right: only (LOC, 3, 4) of the first sentence.
    assert (got["correct"], got["predicted"], got["n"]) == (1, 5, 5)
    assert got["f1"] == pytest.approx(0.2)
    assert {kind: (m["correct"], m["predicted"], m["n"]) for kind, m in got["per_type"].items()} == {
        "LOC": (1, 3, 3),
        "ORG": (0, 1, 1),
        "PER": (0, 1, 1),
    }
    nothing = entity_metrics([["O"]], [["O"]])
    assert (nothing["f1"], nothing["n"], nothing["predicted"], nothing["per_type"]) == (0.0, 0, 0, {})


TAGS = st.lists(st.sampled_from(["O", "B-A", "I-A", "B-B", "I-B"]), max_size=12)


@given(TAGS)
def test_spans_rewrite_to_the_same_tags_where_none_is_stray(tags):
    for stray in ("begin", "ignore"):
        spans = entity_spans(tags, stray_inside=stray)
        written = ["O"] * len(tags)
        for kind, start, end in spans:
            written[start:end] = [f"B-{kind}"] + [f"I-{kind}"] * (end - start - 1)
        assert entity_spans(written, stray_inside="ignore") == spans
    assert sum(tag.startswith("B") for tag in tags) == len(spans)


def test_entities_refuse_wrong_input():
    with pytest.raises(InputError, match="tag 'S-PER' at token 1"):
        entity_metrics([["O", "O"]], [["O", "S-PER"]])
    with pytest.raises(InputError, match="tag 'B-'"):
        entity_spans(["B-"])
    with pytest.raises(InputError, match="sentence 0 has 1 true tags and 2"):
        entity_metrics([["O"]], [["O", "O"]])
    with pytest.raises(InputError, match="1 predicted sentences for 2"):
        entity_metrics([["O"], ["O"]], [["O"]])


def test_tags_are_taken_where_labels_are():
    names = ["O", "B-PER", "I-PER"]
    got = labelled_tags([[0, 1, 1, 2, 0], [1, 0]], [[-100, 1, -100, 2, -100], [-100, 0]], names)
    assert got == ([["B-PER", "I-PER"], ["O"]], [["B-PER", "I-PER"], ["O"]])
    with pytest.raises(InputError, match="row 0"):
        labelled_tags([[0]], [[0, 1]], names)


def test_exact_match():
    got = exact_match([" New\n York ", "STRASSE", "4.0", "right"], ["new york", "Straße", "4", "right"])
    assert got == {"exact_match": 0.75, "exact_match_raw": 0.25, "n": 4}
    with pytest.raises(InputError, match="1 answers for 2"):
        exact_match(["a"], ["a", "b"])
