"""Examples to a batch of tensors, with the positions that carry loss for masked language modelling."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltaw.core.errors import InputError
from deltaw.core.generators import generator
from deltaw.data.encode import IGNORED, TASKS, Example


class Collator:
    """Pads examples on the right to one batch; every tensor is int64 and (batch, tokens).

    A padded batch has `input_ids`, `attention_mask`, `labels`. A packed one has `position_ids` instead of the mask, and
    `use_cache=False` (see `deltaw.data.packing`); its padding tokens stand at position 0, each a document of its own.
    `labels` of sequence-classification are (batch,).

    Masked language modelling (Devlin et al. 2019, section 3.1): 15 % of the tokens that are not special carry loss, at
    least one; of those 80 % become the mask token, 10 % a random one that is not special, 10 % stay. The choice is a
    function of `seed`, `epoch` and the example's tokens alone, so that neither the batch, the number of processes nor
    a resumed run changes it. Call `set_epoch` to draw anew each epoch; an evaluation keeps epoch 0.

    Args:
        task: a key of `TASKS`.
        pad_token_id: fills `input_ids`.
        packed: the examples come from `pack`.
        pad_to_multiple_of: rounds the length up, for tensor cores.
        mask_token_id: masked-lm only.
        vocab_size: masked-lm only; random tokens are drawn below it.
        special_ids: masked-lm only; never masked, never drawn.
        mask_share: masked-lm only.
        seed: masked-lm only; the run's seed.

    Raises:
        InputError: a tokenizer without a padding or mask token, or packing for a task that is not generative.
    """

    def __init__(
        self,
        task: str,
        pad_token_id: int | None,
        *,
        packed: bool = False,
        pad_to_multiple_of: int | None = None,
        mask_token_id: int | None = None,
        vocab_size: int | None = None,
        special_ids: Iterable[int] = (),
        mask_share: float = 0.15,
        seed: int = 0,
    ) -> None:
        if task not in TASKS:
            raise InputError(f"unknown task {task!r}: known: {', '.join(TASKS)}")
        if pad_token_id is None:
            raise InputError(
                "the tokenizer has no padding token: set tokenizer.pad_token (the end-of-text token will do)"
            )
        if packed and task not in ("causal-lm", "instruct"):
            raise InputError(f"the task {task} cannot be packed: only causal-lm and instruct can")
        self.task = task
        self.pad_token_id = pad_token_id
        self.packed = packed
        self.multiple = pad_to_multiple_of or 1
        self.seed = seed
        self.epoch = 0
        if task == "masked-lm":
            if mask_token_id is None or vocab_size is None:
                raise InputError("masked-lm needs mask_token_id and vocab_size: choose a tokenizer with a mask token")
            if not 0 < mask_share < 1:
                raise InputError(f"mask_share is {mask_share}: expected a share between 0 and 1")
            self.mask_token_id = mask_token_id
            self.mask_share = mask_share
            special = torch.zeros(vocab_size, dtype=torch.bool)
            special[[i for i in {*special_ids, mask_token_id, pad_token_id} if i < vocab_size]] = True
            self.special = special
            self.ordinary = (~special).nonzero().squeeze(1)

    def set_epoch(self, epoch: int) -> None:
        """Which epoch's masks are drawn."""
        self.epoch = epoch

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """The batch."""
        if self.task == "masked-lm":
            examples = [self._masked(example["input_ids"]) for example in examples]
        longest = max(len(example["input_ids"]) for example in examples)
        length = -(-longest // self.multiple) * self.multiple
        batch: dict[str, Any] = {"input_ids": _padded(examples, "input_ids", length, self.pad_token_id)}
        if self.packed:
            batch["position_ids"] = _padded(examples, "position_ids", length, 0)
            batch["use_cache"] = False
        else:
            sizes = torch.tensor([len(example["input_ids"]) for example in examples])
            batch["attention_mask"] = (torch.arange(length) < sizes[:, None]).long()
        if self.task == "sequence-classification":
            batch["labels"] = torch.tensor([example["labels"][0] for example in examples])
        else:
            batch["labels"] = _padded(examples, "labels", length, IGNORED)
        return batch

    def _masked(self, input_ids: list[int]) -> Example:
        ids = torch.tensor(input_ids)
        digest = hashlib.sha256(ids.numpy().tobytes()).hexdigest()
        draw = generator(self.seed, "masked-lm", self.epoch, digest)
        chosen = torch.rand(len(ids), generator=draw)
        action = torch.rand(len(ids), generator=draw)
        random = self.ordinary[torch.randint(len(self.ordinary), (len(ids),), generator=draw)]
        chosen[self.special[ids]] = 2.0
        masked = chosen < self.mask_share
        if not masked.any() and chosen.min() < 1:
            # A batch without any position would have no loss at all.
            masked[chosen.argmin()] = True
        labels = torch.where(masked, ids, torch.tensor(IGNORED))
        ids = torch.where(masked & (action < 0.8), torch.tensor(self.mask_token_id), ids)
        ids = torch.where(masked & (action >= 0.9), random, ids)
        return {"input_ids": ids.tolist(), "labels": labels.tolist()}


def _padded(examples: Sequence[Example], key: str, length: int, value: int) -> Tensor:
    rows = [example[key] + [value] * (length - len(example[key])) for example in examples]
    # In a seventh of the time that torch takes for nested lists.
    return torch.from_numpy(np.array(rows, dtype=np.int64))
