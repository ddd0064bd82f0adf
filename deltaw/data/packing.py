"""Several documents in one sequence, none of which sees another.

Packed rows carry `position_ids` that start again at 0 for each document and no attention mask: transformers derives a
block-diagonal causal mask from the positions (masking_utils.find_packed_sequence_indices), for full and sliding
attention alike, which one explicit 4-D mask could not serve. It does so only without a key-value cache, and models make
one by default even in training; so a packed batch also carries `use_cache=False`.
"""

from __future__ import annotations

import inspect
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deltaw.core.errors import InputError
from deltaw.core.generators import generator

Example = dict[str, list[int]]


def pack(examples: Sequence[Example], max_length: int) -> list[Example]:
    """Packs examples into sequences of at most `max_length` tokens, best fit decreasing.

    The longest example goes first, each into the fullest sequence that still holds it. The same examples in the same
    order always give the same sequences; within one, documents keep their order.

    Args:
        examples: dicts of `input_ids` and `labels`, both (tokens,).
        max_length: tokens a sequence.

    Returns:
        Dicts of `input_ids`, `labels` (-100 at each document's first token) and `position_ids`, all (tokens,).

    Raises:
        InputError: an example longer than `max_length`, or one without token labels.
    """
    for index, example in enumerate(examples):
        length = len(example["input_ids"])
        if len(example.get("labels", ())) != length:
            raise InputError(f"example {index + 1} has no label for each token: only causal-lm and instruct are packed")
        if not 0 < length <= max_length:
            raise InputError(
                f"example {index + 1} has {length} tokens: packing to {max_length} takes 1 to {max_length}"
            )
    bins: list[list[int]] = []
    free: list[int] = []  # the distinct amounts of room left, sorted
    with_room: dict[int, list[int]] = defaultdict(list)
    for index in sorted(range(len(examples)), key=lambda i: (-len(examples[i]["input_ids"]), i)):
        length = len(examples[index]["input_ids"])
        at = bisect_left(free, length)
        if at == len(free):
            number, room = len(bins), max_length
            bins.append([])
        else:
            room = free[at]
            number = with_room[room].pop()
            if not with_room[room]:
                free.pop(at)
        bins[number].append(index)
        room -= length
        if room and not with_room[room]:
            insort(free, room)
        with_room[room].append(number)
    return [_joined([examples[i] for i in sorted(members)]) for members in sorted(bins, key=min)]


def _joined(documents: Sequence[Example]) -> Example:
    ids: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    for document in documents:
        ids += document["input_ids"]
        labels += [-100, *document["labels"][1:]]
        positions += range(len(document["input_ids"]))
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


@torch.no_grad()
def check_packing(model: nn.Module, *, length: int = 6, seed: int = 0) -> None:
    """Shows by a forward pass that this model keeps packed documents apart.

    Two batches of two documents a row differ in the first document only. Their second documents' logits must agree to
    1 % of what the same change does to them when nothing marks the boundary; the threshold thus needs no tolerance per
    dtype. Catches attention implementations that ignore the positions, recurrent layers, and models without them.

    Args:
        model: a causal language model of transformers; its training mode is put back.
        length: tokens a document.
        seed: of the random tokens.

    Raises:
        InputError: the model lets documents see each other, or takes no `position_ids`.
    """
    name = type(model).__name__
    advice = "train without packing, or load the model with attn_implementation='sdpa'"
    # A wrapper shows the arguments it passes on as **kwargs.
    accepted = inspect.signature(model.forward).parameters
    if "position_ids" not in accepted and not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        raise InputError(f"{name} takes no position_ids, so packed documents would see each other: {advice}")
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    device = embedding.weight.device
    draw = generator(seed, "check-packing")
    ids = torch.randint(embedding.weight.shape[0], (2, 2 * length), generator=draw)
    other = ids.clone()
    other[:, :length] = (ids[:, :length] + 1 + ids[:, length:]) % embedding.weight.shape[0]
    packed = torch.arange(length).repeat(2, 2)
    plain = torch.arange(2 * length).repeat(2, 1)

    def second(tokens: Tensor, positions: Tensor) -> Tensor:
        given = {"input_ids": tokens.to(device), "position_ids": positions.to(device)}
        logits: Tensor = model(**given, use_cache=False).logits
        return logits[:, length:].double()

    was_training = model.training
    model.eval()
    try:
        leak = (second(ids, plain) - second(other, plain)).norm()
        kept_apart = (second(ids, packed) - second(other, packed)).norm()
    finally:
        model.train(was_training)
    if not kept_apart <= 0.01 * leak:
        raise InputError(f"{name} lets packed documents see each other: {advice}")
