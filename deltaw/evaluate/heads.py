"""Predictions of models with a classification head: one class a sequence, or one a token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deltaw.core.errors import InputError
from deltaw.evaluate.running import accepts, checked_examples, evaluating, length_batches, padded, without_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def predict_sequence_classes(
    model: PreTrainedModel, examples: Sequence[Mapping[str, Any]], *, batch_size: int = 16, pad_token_id: int
) -> Tensor:
    """The class logits of each example.

    Args:
        model: a transformers model for sequence classification: an encoder, a decoder, or T5.
        examples: each with `input_ids`, and `token_type_ids` where the model takes them.
        batch_size: examples a forward pass.
        pad_token_id: fills the padding; for a decoder it must be the configuration's, by which the model finds a row's
            last token.

    Returns:
        (n, n_labels) float32 on the CPU, in the order of the input.

    Raises:
        InputError: no examples, an empty one or one longer than the model's positions, a wrong padding token, rows with
            different numbers of end tokens where the model reads its class from the end token (T5, BART).
    """
    rows = checked_examples(model, examples, ("input_ids",))
    config = model.config.get_text_config()
    if hasattr(model, "score") and config.pad_token_id != pad_token_id:
        raise InputError(
            f"pad_token_id is {pad_token_id} and the model's configuration has {config.pad_token_id}: set "
            "model.config.pad_token_id to the tokenizer's padding token, by which the last token of a row is found"
        )
    if model.config.is_encoder_decoder:
        ends = [row.count(config.eos_token_id) for row in rows]
        for i, count in enumerate(ends):
            if count != ends[0] or not count:
                raise InputError(
                    f"example {i} has {count} end tokens (id {config.eos_token_id}), example 0 has {ends[0]}: "
                    "this model reads the class from the end token, so end every row with one"
                )
    scores: Tensor | None = None
    for chosen, logits in _head_logits(model, examples, rows, batch_size, pad_token_id):
        if scores is None:
            scores = torch.empty(len(rows), logits.shape[-1])
        scores[chosen] = logits.float().cpu()
    assert scores is not None
    return scores


def predict_token_classes(
    model: PreTrainedModel, examples: Sequence[Mapping[str, Any]], *, batch_size: int = 16, pad_token_id: int
) -> list[list[int]]:
    """The best class of each token, one list an example, as long as its `input_ids`.

    Arguments and errors are those of `predict_sequence_classes`, for models for token classification;
    `deltaw.evaluate.labelled_tags` turns the result into tags.
    """
    rows = checked_examples(model, examples, ("input_ids",))
    classes: list[list[int]] = [[] for _ in rows]
    for chosen, logits in _head_logits(model, examples, rows, batch_size, pad_token_id):
        for i, best in zip(chosen, logits.argmax(-1).tolist(), strict=True):
            classes[i] = best[: len(rows[i])]
    return classes


def _head_logits(
    model: PreTrainedModel,
    examples: Sequence[Mapping[str, Any]],
    rows: Sequence[Sequence[int]],
    batch_size: int,
    pad_token_id: int,
) -> Iterator[tuple[list[int], Tensor]]:
    """Batches of indices with the model's logits for them, padded on the right."""
    segments = accepts(model, "token_type_ids") and all("token_type_ids" in example for example in examples)
    with evaluating(model):
        for chosen in length_batches([len(row) for row in rows], batch_size):
            ids, mask = padded([rows[i] for i in chosen], pad_token_id, model.device)
            inputs = {"input_ids": ids, "attention_mask": mask, **without_cache(model)}
            if segments:
                inputs["token_type_ids"] = padded([examples[i]["token_type_ids"] for i in chosen], 0, model.device)[0]
            yield chosen, model(**inputs).logits
