"""Answers that a model writes: greedy, batched, the same every time."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from deltaw.core.errors import InputError
from deltaw.evaluate.running import check_fits, evaluating, length_batches, padded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    stop: str | Sequence[str] | None = None,
) -> list[str]:
    """Greedy continuations, without the prompt, cut before the end token and before the first stop string.

    The model's own generation settings (sampling, repetition penalties, length limits) are set aside; only its end
    tokens count, together with the tokenizer's.

    Args:
        model: a causal language model or an encoder-decoder.
        tokenizer: the model's; it decodes, and encodes prompts given as strings (with its special tokens).
        prompts: strings, or token ids that are taken as they are.
        max_new_tokens: tokens an answer at most.
        batch_size: prompts generated together.
        stop: a string or several at which an answer ends; not part of it.

    Returns:
        One string a prompt, in the order of the input, white space kept.

    Raises:
        InputError: an empty prompt, or one that leaves no room for `max_new_tokens`.
    """
    stops = [stop] if isinstance(stop, str) else list(stop or ())
    if max_new_tokens < 1 or not all(stops):
        raise InputError(f"max_new_tokens is {max_new_tokens}, stop {stops}: give at least 1, and no empty stop string")
    rows = [list(tokenizer(prompt)["input_ids"]) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    encoder_decoder = bool(model.config.is_encoder_decoder)
    check_fits(model, rows, "prompt", extra=0 if encoder_decoder else max_new_tokens)
    ends, pad = _end_tokens(model, tokenizer), _pad_token(tokenizer)
    settings = _greedy(model, max_new_tokens=max_new_tokens, ends=ends, pad=pad)
    answers = [""] * len(rows)
    original = model.generation_config
    with evaluating(model):
        try:
            # generate() fills what its settings leave open from the model's own.
            model.generation_config = copy.deepcopy(settings)
            for chosen in length_batches([len(row) for row in rows], batch_size):
                ids, mask = padded([rows[i] for i in chosen], pad, model.device, left=not encoder_decoder)
                begin = 1 if encoder_decoder else ids.shape[1]
                out = cast(Any, model).generate(
                    input_ids=ids,
                    attention_mask=mask,
                    generation_config=settings,
                    stopping_criteria=_stopping(tokenizer, stops, begin),
                )
                for i, tokens in zip(chosen, out[:, begin:].tolist(), strict=True):
                    answers[i] = _trimmed(tokens, tokenizer, ends, stops)
        finally:
            model.generation_config = original
    return answers


def _stopping(tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], begin: int) -> Any:
    """Ends a row whose text holds a stop string; transformers' own criterion fails on some vocabularies."""
    from transformers import StoppingCriteriaList

    def stopped(ids: Tensor, _scores: Any, **_more: Any) -> Tensor:
        texts = tokenizer.batch_decode(ids[:, begin:], skip_special_tokens=True)
        return torch.tensor([any(stop in text for stop in stops) for text in texts], device=ids.device)

    return StoppingCriteriaList([stopped] if stops else [])


def _trimmed(tokens: list[int], tokenizer: PreTrainedTokenizerBase, ends: set[int], stops: Sequence[str]) -> str:
    kept = tokens[: next((place for place, token in enumerate(tokens) if token in ends), len(tokens))]
    text = str(tokenizer.decode(kept, skip_special_tokens=True))
    return text[: min((place for place in map(text.find, stops) if place >= 0), default=len(text))]


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    ends: set[int] = set()
    for source in (getattr(model.generation_config, "eos_token_id", None), tokenizer.eos_token_id):
        if isinstance(source, int):
            ends.add(source)
        elif source is not None:
            ends.update(source)
    return ends


def _pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Any id does: padding is masked."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    return 0


def _greedy(model: PreTrainedModel, *, max_new_tokens: int, ends: set[int], pad: int) -> Any:
    from transformers import GenerationConfig

    own = model.generation_config
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad,
        bos_token_id=getattr(own, "bos_token_id", None),
        decoder_start_token_id=getattr(own, "decoder_start_token_id", None),
    )
