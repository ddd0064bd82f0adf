"""What every evaluation shares: the model's mode, batches by length, padding, and logits for chosen positions only."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltaw.core.errors import InputError
from deltaw.methods.host import steady

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode without gradients, its adapters held steady; all is restored afterwards.

    `no_grad`, not `inference_mode`: buffers that a forward pass replaces (rotary frequencies) must stay trainable-with.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), steady(model):
            yield
    finally:
        for module, training in modes:
            if module.training != training:
                module.train(training)


def length_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of `batch_size`, longest first (so memory runs out at once or never), ties in input order."""
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}: give a number of rows of at least 1")
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def padded(
    rows: Sequence[Sequence[int]], value: int, device: torch.device | str, *, left: bool = False
) -> tuple[Tensor, Tensor]:
    """The rows as one (batch, longest) int64 tensor filled up with `value`, and its attention mask."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), value, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, place] = torch.tensor(row, dtype=torch.long)
        mask[i, place] = 1
    return ids.to(device), mask.to(device)


def checked_examples(
    model: PreTrainedModel, examples: Sequence[Mapping[str, Any]], columns: Sequence[str]
) -> list[list[int]]:
    """The examples' `input_ids`, after checking that each has every column, is not empty and fits the model."""
    if not examples:
        raise InputError("no examples to evaluate: give at least one")
    for i, example in enumerate(examples):
        for column in columns:
            if column not in example:
                raise InputError(f"example {i} has no {column!r}: it has {', '.join(sorted(example)) or 'nothing'}")
    rows = [list(example["input_ids"]) for example in examples]
    check_fits(model, rows, "example")
    return rows


def check_fits(model: PreTrainedModel, rows: Sequence[Sequence[int]], what: str, *, extra: int = 0) -> None:
    """Refuses empty rows, and rows that with `extra` more tokens exceed the model's positions."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for i, row in enumerate(rows):
        if not len(row):
            raise InputError(f"{what} {i} is empty: at least one token is needed (the tokenizer's BOS, say)")
        if isinstance(limit, int) and limit > 0 and len(row) + extra > limit:
            more = f" and {extra} more for the answer" if extra else ""
            raise InputError(
                f"{what} {i} has {len(row)} tokens{more}, the model takes {limit}: truncate it when encoding"
            )


def accepts(model: nn.Module, *names: str) -> bool:
    """Whether the forward of the model's class takes every one of these arguments by name."""
    return set(names) <= inspect.signature(type(model).forward).parameters.keys()


def without_cache(model: nn.Module) -> dict[str, Any]:
    """The argument that keeps a model from filling a cache nobody reads, where it takes one."""
    return {"use_cache": False} if accepts(model, "use_cache") else {}


def logits_where(model: PreTrainedModel, where: Tensor, **inputs: Any) -> Tensor:
    """The model's logits at the positions where `where` is True, row by row: (positions, vocabulary), float32.

    The choice is made on the input of the output embedding, so that the logits of other positions never exist,
    whatever the architecture does after it (soft caps, scales); `logits_to_keep` cannot choose by row in most models.

    Args:
        model: a transformers model with a language-modelling head.
        where: (batch, seq) bool, `seq` being the length that the head sees (the decoder's, for an encoder-decoder).
        inputs: what the model's forward takes.
    """
    taken = False

    def choose(_head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        nonlocal taken
        if not args or args[0].shape[:-1] != where.shape:
            return None
        taken = True
        return (args[0][where.to(args[0].device)].unsqueeze(0), *args[1:])

    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(choose) if head is not None else None
    try:
        logits = model(**inputs).logits
    finally:
        if handle is not None:
            handle.remove()
    chosen: Tensor = logits[0] if taken else logits[where.to(logits.device)]
    return chosen.float()
