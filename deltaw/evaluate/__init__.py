"""Metrics, the passes that produce what they measure, and the baselines they are shown beside.

Takes plain inputs: token ids, strings, lists. Heavy libraries load when a function needs them.
"""

from deltaw.evaluate.baselines import majority, tag_dictionary, tfidf_logreg
from deltaw.evaluate.generate import generate_answers
from deltaw.evaluate.heads import predict_sequence_classes, predict_token_classes
from deltaw.evaluate.likelihood import label_log_likelihood, perplexity
from deltaw.evaluate.metrics import (
    classification_metrics,
    entity_metrics,
    entity_spans,
    exact_match,
    label_indices,
    labelled_tags,
    normalize_answer,
    prediction_metrics,
)

__all__ = [
    "classification_metrics",
    "entity_metrics",
    "entity_spans",
    "exact_match",
    "generate_answers",
    "label_indices",
    "label_log_likelihood",
    "labelled_tags",
    "majority",
    "normalize_answer",
    "perplexity",
    "predict_sequence_classes",
    "predict_token_classes",
    "prediction_metrics",
    "tag_dictionary",
    "tfidf_logreg",
]
