"""How likely a model finds given answers: label log-likelihoods, and perplexity.

Label scoring runs each prompt once and continues from its key-value cache for labels of several tokens. A prefix common
to all prompts is computed once for the whole set. Both must not change a score, and sliding windows measure distance in
columns, not in positions; so no padding may stand between a row's tokens. A batch is therefore padded on the left as a
whole: for prefix length P, longest row W and row length n, the row starts at column s = W - n, its first P columns come
from the prefix's cache moved right by s, and the s prefix tokens that fall out on the right are simply run again
(in columns that would have been padding). A full-length cache is kept on sliding layers too, so that it can be
cropped back between labels; the attention mask still applies the window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from deltaw.core.errors import InputError, RunError
from deltaw.evaluate.running import (
    accepts,
    check_fits,
    checked_examples,
    evaluating,
    length_batches,
    logits_where,
    padded,
    without_cache,
)

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

MAX_LOGITS = 1 << 27  # a batch's logits in perplexity: 0.5 GiB in float32, half as much again or more while in use

Rest = Callable[[Sequence[int]], Tensor]
"""From a label's tokens to the logits that predict all but the first: (batch, tokens - 1, vocabulary)."""


def label_log_likelihood(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    *,
    batch_size: int = 16,
    pad_token_id: int,
    normalize: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """The log-likelihood of each label's tokens after each prompt.

    Equal to running every prompt with every label alone, up to rounding. Models whose cache cannot be continued
    (recurrent states, shared layers, no position ids) take a plain pass per label of several tokens instead.

    Args:
        model: a causal language model, or an encoder-decoder (prompts go to the encoder, labels to the decoder).
        prompts: token ids, one list a prompt, special tokens included.
        labels: token ids, one list a label.
        batch_size: prompts a forward pass.
        pad_token_id: fills the padding; it is masked and changes nothing.
        normalize: divide by the label's number of tokens, so that long labels are not at a disadvantage.
        progress: called after each batch with (prompts done, prompts in all).

    Returns:
        (n_prompts, n_labels) float32 on the CPU, in nats (a token, if normalised), in the order of the input.

    Raises:
        InputError: no prompt or label, an empty one, or one longer than the model's positions.
        RunError: the model gave a log-likelihood that is not finite.
    """
    if not prompts or not labels:
        raise InputError(f"got {len(prompts)} prompts and {len(labels)} labels: give at least one of each")
    encoder_decoder = bool(model.config.is_encoder_decoder)
    longest = max(len(label) for label in labels)
    check_fits(model, labels, "label")
    check_fits(model, prompts, "prompt", extra=0 if encoder_decoder else longest - 1)
    scores = torch.empty(len(prompts), len(labels))
    with evaluating(model):
        cached = not encoder_decoder and _continues(model)
        prefix = _run_prefix(model, [list(prompt) for prompt in prompts]) if cached else None
        done = 0
        for rows in length_batches([len(prompt) for prompt in prompts], batch_size):
            batch = [prompts[i] for i in rows]
            if encoder_decoder:
                first, rest = _encoder_decoder(model, batch, pad_token_id)
            elif prefix is not None:
                first, rest = _cached(model, batch, prefix, pad_token_id)
            else:
                first, rest = _plain(model, batch, pad_token_id)
            scores[rows] = _score(first, rest, labels)
            done += len(rows)
            if progress is not None:
                progress(done, len(prompts))
    if not bool(torch.isfinite(scores).all()):
        bad = int((~torch.isfinite(scores)).any(dim=1).nonzero()[0])
        raise RunError(
            f"prompt {bad}: a label's log-likelihood is not finite; the model's weights hold NaN or overflow"
        )
    return scores / torch.tensor([len(label) for label in labels]) if normalize else scores


def _score(first: Tensor, rest: Rest, labels: Sequence[Sequence[int]]) -> Tensor:
    """Summed log-likelihoods (batch, n_labels) from the first token's logits (batch, vocabulary) and the rest's."""
    start = first.log_softmax(-1)
    columns = []
    for label in labels:
        column = start[:, label[0]]
        if len(label) > 1:
            following = rest(label).log_softmax(-1)
            target = torch.tensor(label[1:], device=following.device).expand(len(following), -1)
            column = column + following.gather(-1, target.unsqueeze(-1)).squeeze(-1).sum(-1)
        columns.append(column)
    return torch.stack(columns, dim=1).cpu()


def _last(like: Tensor, count: int = 1) -> Tensor:
    """True in the last `count` columns of a tensor shaped like `like` (batch, seq)."""
    where = torch.zeros_like(like, dtype=torch.bool)
    where[:, -count:] = True
    return where


def _continues(model: PreTrainedModel) -> bool:
    """Whether the cache is plain keys and values per layer, and positions can be given."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    if not accepts(model, "position_ids", "attention_mask", "past_key_values", "use_cache"):
        return False
    # RoBERTa's kind count positions from the padding index on; position ids from 0 would mean other positions.
    if any(
        name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None
        for name, module in model.named_modules()
    ):
        return False
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "attention_chunk_size", None) or not getattr(config, "is_causal", True):
        return False
    if getattr(config, "num_kv_shared_layers", None):
        return False
    try:
        layers = DynamicCache(config=model.config).layers
    except (KeyError, AttributeError):
        return False
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def _run_prefix(model: PreTrainedModel, prompts: Sequence[list[int]]) -> DynamicCache:
    """A batch-of-one cache of what all prompts start with; at least one token of every prompt is left to run."""
    from transformers import DynamicCache

    low, high = min(prompts), max(prompts)
    bound = min(len(prompt) for prompt in prompts) - 1 if len(prompts) > 1 else 0
    length = 0
    while length < bound and low[length] == high[length]:
        length += 1
    cache = DynamicCache()
    if length:
        ids = torch.tensor([list(low[:length])], device=model.device)
        logits_where(model, _last(ids), input_ids=ids, past_key_values=cache, use_cache=True)
    return cache


def _cached(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], prefix: DynamicCache, pad: int
) -> tuple[Tensor, Rest]:
    from transformers import DynamicCache

    ids, mask = padded(prompts, pad, model.device, left=True)
    batch, width = ids.shape
    past = prefix.get_seq_length()
    shift = width - mask.sum(1, keepdim=True)
    positions = (torch.arange(width, device=ids.device) - shift).clamp(min=0)
    cache = DynamicCache()
    for number, layer in enumerate(prefix.layers):
        keys, values = cast(Any, layer).keys, cast(Any, layer).values
        source = positions[:, :past].to(keys.device)
        cache.update(keys[0][:, source].transpose(0, 1), values[0][:, source].transpose(0, 1), number)
    first = logits_where(
        model,
        _last(ids[:, past:]),
        input_ids=ids[:, past:],
        attention_mask=mask,
        position_ids=positions[:, past:],
        past_key_values=cache,
        use_cache=True,
    )

    def rest(label: Sequence[int]) -> Tensor:
        tokens = torch.tensor(label[:-1], device=ids.device).expand(batch, -1)
        count = tokens.shape[1]
        assert cache.get_seq_length() == width, "the model did not keep the cache it was given"
        logits = logits_where(
            model,
            _last(tokens, count),
            input_ids=tokens,
            attention_mask=torch.cat([mask, torch.ones_like(tokens)], dim=1),
            position_ids=positions[:, -1:] + torch.arange(1, count + 1, device=ids.device),
            past_key_values=cache,
            use_cache=True,
        )
        cache.crop(-count)
        return logits.view(batch, count, -1)

    return first, rest


def _plain(model: PreTrainedModel, prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Rest]:
    """Whole sequences, padded on the right: exact for every causal model, as nothing sees what comes after it."""

    def logits(suffix: Sequence[int], count: int) -> Tensor:
        ids, mask = padded([[*prompt, *suffix] for prompt in prompts], pad, model.device)
        end = mask.sum(1, keepdim=True)
        column = torch.arange(ids.shape[1], device=ids.device)
        where = (column >= end - count) & (column < end)
        return logits_where(model, where, input_ids=ids, attention_mask=mask, **without_cache(model))

    def rest(label: Sequence[int]) -> Tensor:
        return logits(label[:-1], len(label) - 1).view(len(prompts), len(label) - 1, -1)

    return logits([], 1), rest


def _encoder_decoder(model: PreTrainedModel, prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Rest]:
    """The encoder runs once a prompt; the decoder runs from its start token for each label of several tokens."""
    ids, mask = padded(prompts, pad, model.device)
    encoded = model.get_encoder()(input_ids=ids, attention_mask=mask)
    start = model.config.decoder_start_token_id
    if start is None:
        raise InputError("the model's configuration has no decoder_start_token_id: set it to the decoder's first token")

    def logits(tokens: Sequence[int], count: int) -> Tensor:
        decoder_ids = torch.tensor([start, *tokens], device=ids.device).expand(len(prompts), -1)
        return logits_where(
            model,
            _last(decoder_ids, count),
            encoder_outputs=encoded,
            attention_mask=mask,
            decoder_input_ids=decoder_ids,
            **without_cache(model),
        )

    def rest(label: Sequence[int]) -> Tensor:
        return logits(label[:-1], len(label) - 1).view(len(prompts), len(label) - 1, -1)

    return logits([], 1), rest


def perplexity(
    model: PreTrainedModel,
    examples: Sequence[Mapping[str, Any]],
    *,
    batch_size: int = 16,
    pad_token_id: int,
    masked_lm: bool | None = None,
    shares: list[tuple[float, float]] | None = None,
) -> dict[str, float | int]:
    """The mean negative log-likelihood over every token that carries loss, each token weighing the same.

    Args:
        model: a causal language model (labels are predicted from the position before), an encoder-decoder (labels are
            the decoder's), or a masked language model (labels stand at their own position).
        examples: each with `input_ids` and `labels`, lists of ints; -100 marks positions without loss. Packed examples
            also bring `position_ids` that start again at 0 with each document.
        batch_size: examples a forward pass at most; fewer where their logits would not fit into `MAX_LOGITS`.
        pad_token_id: fills the padding.
        masked_lm: whether the model is a masked language model; None goes by its class's name, `...ForMaskedLM`.
        shares: takes each example's (nats, tokens with loss), in their order.

    Returns:
        `loss` (nats a token), `perplexity` (its exponential), `tokens` (how many carried loss).

    Raises:
        InputError: an example without its columns, with labels of another length, or no token with loss at all.
        RunError: the loss is not finite, or too large for its exponential.
    """
    rows = checked_examples(model, examples, ("input_ids", "labels"))
    labels = [list(example["labels"]) for example in examples]
    encoder_decoder = bool(model.config.is_encoder_decoder)
    if not encoder_decoder:
        for i, (row, label) in enumerate(zip(rows, labels, strict=True)):
            if len(row) != len(label):
                raise InputError(f"example {i} has {len(row)} input_ids and {len(label)} labels: give as many of each")
    if masked_lm is None:
        masked_lm = type(model).__name__.endswith("ForMaskedLM")
    counts = [sum(token != -100 for token in label) for label in labels]
    budget = MAX_LOGITS // int(model.config.get_text_config().vocab_size)
    total, tokens = 0.0, 0
    apart = [(0.0, 0.0)] * len(rows)
    with evaluating(model):
        for chosen in _within(length_batches([len(row) for row in rows], batch_size), counts, budget):
            ids, mask = padded([rows[i] for i in chosen], pad_token_id, model.device)
            target, _ = padded([labels[i] for i in chosen], -100, model.device)
            inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, **without_cache(model)}
            if encoder_decoder:
                inputs["decoder_input_ids"] = cast(Any, model).prepare_decoder_input_ids_from_labels(labels=target)
            elif not masked_lm:
                target = functional.pad(target[:, 1:], (0, 1), value=-100)
            if any("position_ids" in examples[i] for i in chosen):
                # With both given, transformers takes the mask and lets packed documents see each other.
                del inputs["attention_mask"]
                places = [examples[i].get("position_ids", range(len(rows[i]))) for i in chosen]
                inputs["position_ids"] = padded(places, 0, model.device)[0]
            where = target != -100
            count = int(where.sum())
            if count:
                logits = logits_where(model, where, **inputs)
                truth = target[where].to(logits.device)
                nats = functional.cross_entropy(logits, truth, reduction="none").double()
                total += float(nats.sum())
                tokens += count
                sizes = where.sum(1).tolist()
                for i, part in zip(chosen, nats.cpu().split(sizes), strict=True):
                    apart[i] = (float(part.sum()), float(len(part)))
    if shares is not None:
        shares += apart
    if not tokens:
        raise InputError("no token carries loss: every label is -100 (or has no token before it); check the encoding")
    loss = total / tokens
    if not loss < 700:
        raise RunError(f"the loss is {loss:g} nats a token: the model's weights hold NaN or have diverged")
    return {"loss": loss, "perplexity": math.exp(loss), "tokens": tokens}


def _within(batches: Sequence[Sequence[int]], counts: Sequence[int], budget: int) -> list[list[int]]:
    """The batches, split so that none has more than `budget` positions with loss (a single row may)."""
    parts: list[list[int]] = []
    for batch in batches:
        room = -1
        for row in batch:
            room -= counts[row]
            if room < 0:
                parts.append([])
                room = budget - counts[row]
            parts[-1].append(row)
    return parts
