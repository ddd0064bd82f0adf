"""The loss of a batch as a sum over its labels, whatever the model's own way of averaging is."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaw.data.encode import IGNORED
from deltaw.fuse.decoder import needs_mask


class SummedLoss:
    """Cross-entropy in nats summed over the labels of a batch.

    Most of transformers' classification and encoder-decoder models average over each batch, whatever they are told; for
    those the loss is made here, from their logits.

    Args:
        model: the transformers model itself, not what wraps it.
        task: a key of `TASKS`.
    """

    def __init__(self, model: Any, task: str) -> None:
        from transformers.loss.loss_utils import ForCausalLMLoss

        self.model, self.task = model, task
        #: Whether labels are predicted from the position before.
        self.shifted = task in ("causal-lm", "instruct") and not model.config.is_encoder_decoder
        takes_any = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values())
        self.by_model = self.shifted and takes_any and model.loss_function is ForCausalLMLoss
        #: Batches are padded on the right.
        self.masked = not self.shifted or needs_mask(model)

    def __call__(self, model: Any, inputs: dict[str, Any], *, over: Any = 1) -> Tensor:
        """The sum over the labels of `inputs`, divided by `over`; `model` may be what wraps the model."""
        given = dict(inputs)
        if not self.masked and model.training:
            given.pop("attention_mask", None)
        if self.by_model:
            loss: Tensor = model(**given, num_items_in_batch=over).loss
            return loss
        labels = given.pop("labels")
        if self.model.config.is_encoder_decoder and self.task in ("causal-lm", "instruct"):
            given["decoder_input_ids"] = self.model.prepare_decoder_input_ids_from_labels(labels=labels)
        logits = model(**given).logits
        if self.shifted:
            labels = F.pad(labels[..., 1:], (0, 1), value=IGNORED)
        logits, labels = logits.flatten(0, -2).float(), labels.flatten().to(logits.device)
        total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        mean: Tensor = total / over
        return mean

    def counts(self, labels: Tensor) -> Tensor:
        """How many labels of each row carry loss: (rows,)."""
        counted = labels[..., 1:] if self.shifted else labels
        return counted.ne(IGNORED).flatten(1).sum(1) if counted.dim() > 1 else counted.ne(IGNORED).long()


def loss_share(counts: Tensor) -> Tensor:
    """What turns a row's summed loss into the mean over its own labels; 0 for a row without any: (rows,)."""
    return torch.where(counts > 0, 1.0 / counts.clamp(min=1), torch.zeros_like(counts, dtype=torch.float32))
