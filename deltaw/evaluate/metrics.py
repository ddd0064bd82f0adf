"""Classification, entity and exact-match metrics. All plain Python numbers, fit for JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import torch

from deltaw.core.errors import InputError, RunError, unknown_name

Metrics = dict[str, Any]


def classification_metrics(scores: Any, truth: Sequence[int | str], labels: Sequence[str]) -> Metrics:
    """Accuracy, macro F1, macro AUROC and the confusion matrix of scored labels; the best score is the prediction.

    Args:
        scores: (n, n_labels) tensor or array of log-likelihoods or logits; a tie goes to the earlier label.
        truth: n labels, as indices into `labels` or as names.
        labels: the names, in the order of the scores' columns.

    Returns:
        What `prediction_metrics` returns, and `macro_auroc`: each label against the rest by its probability (the
        softmax of the scores), averaged over the labels for which `truth` has positives and negatives; absent where
        none has.

    Raises:
        InputError: shapes that do not fit, a label outside the set.
        RunError: a score that is not finite.
    """
    table = torch.as_tensor(scores).detach().to("cpu", torch.float64)
    if table.ndim != 2 or table.shape != (len(truth), len(labels)):
        raise InputError(
            f"scores have shape {tuple(table.shape)}: expected ({len(truth)}, {len(labels)}), a row for each true "
            "label and a column for each label"
        )
    if not bool(torch.isfinite(table).all()):
        bad = int((~torch.isfinite(table)).any(dim=1).nonzero()[0])
        raise RunError(f"the scores of row {bad} are not finite: the model's weights hold NaN or overflow")
    indices = label_indices(truth, labels)
    result = prediction_metrics(_argmax(table), indices, labels)
    from sklearn.metrics import roc_auc_score

    probabilities = table.softmax(-1).numpy()
    areas = [
        float(roc_auc_score([int(index == column) for index in indices], probabilities[:, column]))
        for column in range(len(labels))
        if 0 < indices.count(column) < len(indices)
    ]
    if areas:
        result["macro_auroc"] = sum(areas) / len(areas)
    return result


def prediction_metrics(predicted: Sequence[int | str], truth: Sequence[int | str], labels: Sequence[str]) -> Metrics:
    """Accuracy, macro F1 and the confusion matrix of predicted labels, as indices or names.

    Returns:
        `accuracy`; `macro_f1`, the mean F1 over the labels that occur in `truth` (0 for one that is never predicted);
        `confusion`, rows true and columns predicted in the order of `labels`; `n`; and `absent_labels`, the names that
        do not occur in `truth`, of which nothing can be said: they are left out of every mean.

    Raises:
        InputError: no rows, different lengths, a label outside the set.
    """
    if len(predicted) != len(truth) or not truth:
        raise InputError(
            f"got {len(predicted)} predictions for {len(truth)} true labels: give as many of each, at least 1"
        )
    from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

    true, guess = label_indices(truth, labels), label_indices(predicted, labels)
    present = sorted(set(true))
    return {
        "accuracy": float(accuracy_score(true, guess)),
        "macro_f1": float(f1_score(true, guess, labels=present, average="macro", zero_division=0)),
        "confusion": confusion_matrix(true, guess, labels=range(len(labels))).tolist(),
        "n": len(true),
        "absent_labels": [name for index, name in enumerate(labels) if index not in present],
    }


def label_indices(values: Sequence[int | str], labels: Sequence[str]) -> list[int]:
    """Names or indices as indices into `labels`; one outside the set is an error."""
    if len(set(labels)) != len(labels) or not labels:
        raise InputError(f"labels are {list(labels)}: give at least one, each once")
    known = {name: index for index, name in enumerate(labels)}
    indices = []
    for value in values:
        if isinstance(value, str):
            if value not in known:
                raise unknown_name("label", value, known)
            indices.append(known[value])
        elif 0 <= int(value) < len(labels):
            indices.append(int(value))
        else:
            raise InputError(f"label index {value}: expected 0 to {len(labels) - 1} for {', '.join(labels)}")
    return indices


def entity_metrics(
    true_tags: Sequence[Sequence[str]],
    predicted_tags: Sequence[Sequence[str]],
    *,
    stray_inside: Literal["begin", "ignore"] = "begin",
) -> Metrics:
    """Strict span-level precision, recall and F1 of BIO tags: an entity counts when its type and both ends are right.

    A stray `I-X`, one that follows neither `B-X` nor `I-X`, begins an entity by default, as in the CoNLL-2000 script
    and seqeval's default mode, in which published figures are given; with `stray_inside="ignore"` it belongs to none
    (IOB2 taken strictly, seqeval's `mode="strict"`).

    Args:
        true_tags: one list a sentence, of `O`, `B-type`, `I-type`.
        predicted_tags: the same lengths.
        stray_inside: what a stray `I-` does.

    Returns:
        `precision`, `recall`, `f1` over all entities (micro), `n` (true entities), `predicted`, `correct`, and
        `per_type`: the same six for each type. A ratio over nothing is 0, which the counts beside it show.

    Raises:
        InputError: lengths that differ, a tag that is not BIO.
    """
    if len(true_tags) != len(predicted_tags) or not true_tags:
        raise InputError(
            f"got {len(predicted_tags)} predicted sentences for {len(true_tags)}: give as many, at least 1"
        )
    true, predicted, correct = Counter[str](), Counter[str](), Counter[str]()
    for number, (gold, guess) in enumerate(zip(true_tags, predicted_tags, strict=True)):
        if len(gold) != len(guess):
            raise InputError(f"sentence {number} has {len(gold)} true tags and {len(guess)} predicted: give as many")
        gold_spans, guess_spans = (
            entity_spans(gold, stray_inside=stray_inside),
            entity_spans(guess, stray_inside=stray_inside),
        )
        true.update(kind for kind, _, _ in gold_spans)
        predicted.update(kind for kind, _, _ in guess_spans)
        correct.update(kind for kind, _, _ in gold_spans & guess_spans)
    return {
        **_ratios(true.total(), predicted.total(), correct.total()),
        "per_type": {kind: _ratios(true[kind], predicted[kind], correct[kind]) for kind in sorted(true | predicted)},
    }


def entity_spans(
    tags: Sequence[str], *, stray_inside: Literal["begin", "ignore"] = "begin"
) -> set[tuple[str, int, int]]:
    """The entities of one sentence's BIO tags as (type, first token, one past the last)."""
    spans = set()
    kind, start = "", 0
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")
        if (prefix not in ("B", "I") or not name) and tag != "O":
            raise InputError(f"tag {tag!r} at token {place}: expected O, B-type or I-type")
        if prefix == "I" and name == kind:
            continue
        if kind:
            spans.add((kind, start, place))
        begins = prefix == "B" or (prefix == "I" and stray_inside == "begin")
        kind, start = (name, place) if begins else ("", 0)
    return spans


def labelled_tags(
    predicted: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], names: Sequence[str]
) -> tuple[list[list[str]], list[list[str]]]:
    """True and predicted tag names at the positions that carry a label (not -100), one list a sentence.

    Args:
        predicted: tag indices for every token, as `predict_token_classes` gives them.
        labels: encoded labels of the same lengths, -100 on special tokens and later pieces of a word.
        names: the tags, by index.
    """
    true_tags, predicted_tags = [], []
    for number, (guess, gold) in enumerate(zip(predicted, labels, strict=True)):
        if len(guess) != len(gold):
            raise InputError(f"row {number} has {len(guess)} predictions and {len(gold)} labels: give as many of each")
        kept = [place for place, index in enumerate(gold) if index != -100]
        true_tags.append([names[gold[place]] for place in kept])
        predicted_tags.append([names[guess[place]] for place in kept])
    return true_tags, predicted_tags


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> Metrics:
    """The share of answers that are the reference.

    Returns:
        `exact_match` after normalisation of both sides (Unicode case folded, runs of white space one space, none at the
        ends), `exact_match_raw` character by character, and `n`.
    """
    if len(predictions) != len(references) or not references:
        raise InputError(f"got {len(predictions)} answers for {len(references)} references: give as many, at least 1")
    pairs = list(zip(predictions, references, strict=True))
    return {
        "exact_match": sum(normalize_answer(a) == normalize_answer(b) for a, b in pairs) / len(pairs),
        "exact_match_raw": sum(a == b for a, b in pairs) / len(pairs),
        "n": len(pairs),
    }


def normalize_answer(text: str) -> str:
    """Case folded, runs of white space made one space, none at the ends."""
    return " ".join(text.casefold().split())


def _ratios(true: int, predicted: int, correct: int) -> Metrics:
    return {
        "precision": correct / predicted if predicted else 0.0,
        "recall": correct / true if true else 0.0,
        "f1": 2 * correct / (true + predicted) if true + predicted else 0.0,
        "n": true,
        "predicted": predicted,
        "correct": correct,
    }


def _argmax(table: torch.Tensor) -> list[int]:
    """The first best column of each row; torch's own argmax leaves the choice among equals open."""
    best = table == table.max(dim=1, keepdim=True).values
    columns = torch.arange(table.shape[1]).expand_as(table)
    return [int(i) for i in columns.masked_fill(~best, table.shape[1]).min(dim=1).values]
