"""Prefix tuning: trained keys and values before those of the text, in every layer.

Li & Liang, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", arXiv 2101.00190, equation 3, in the keys and
values of each attention layer l, n virtual tokens long, directly trained:

    attention_l(q, [P_k,l ; K], [P_v,l ; V])        P_k,l, P_v,l (heads, n, head_dim)

The text's positions begin at n. The paper's MLP over a smaller table (PEFT's `prefix_projection`) serves training only
and is not here; files that were trained with it are read, as they hold what it gave.

The prefix stands before the cache and not in it: a cache that a caller hands in or gets back holds the text alone,
however often it is continued, cropped or copied, under whichever adapter. On layers with a sliding window the prefix
falls out of it as any other token of its place would, as in PEFT.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.core.configs import accepts
from deltaw.core.errors import InputError
from deltaw.core.protocols import LowRank
from deltaw.kernels.per_example import spread
from deltaw.methods.companions import companions
from deltaw.methods.contract import Method, Placed, Start
from deltaw.methods.neftune import arguments_of, entry_of, path_of

#: Deviation of the values that a prefix starts from: nearly nothing beside the text's own keys and values, where PEFT's
#: normal numbers of deviation 1 drown what the model knows until training has found the way back.
_START = 0.02


@accepts()
@dataclass(frozen=True)
class PrefixTuning:
    """Trained keys and values before the text, for decoders and for encoders that attend to a cache (BERT's kind).

    Attributes:
        num_virtual_tokens: length of the prefix, at least 1.
        modules_to_save: modules trained whole and saved with the adapter (a new classifier).
    """

    num_virtual_tokens: int = 20
    modules_to_save: Sequence[str] | None = None

    def __post_init__(self) -> None:
        n = self.num_virtual_tokens
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise InputError(f"num_virtual_tokens is {n!r}: expected a whole number of at least 1")


class PrefixPart(nn.Module):
    """The keys and values of all layers, on the module that runs them.

    `prompt_embeddings` is (n, layers * 2 * heads * head_dim), as PEFT stores it: for each virtual token, layer by layer
    its keys and then its values.
    """

    replaces = False
    dropout = 0.0

    def __init__(self, n: int, shape: tuple[int, int, int], *, device: torch.device, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.layers, self.heads, self.head_dim = shape
        values = torch.zeros(n, self.layers * 2 * self.heads * self.head_dim, device=device)
        self.prompt_embeddings = nn.Parameter(values.to(dtype or torch.float32))

    def initialise(self, generator: torch.Generator) -> None:
        """Draws the starting values on the CPU, so that they do not depend on the device."""
        values = torch.randn(self.prompt_embeddings.shape, generator=generator) * _START
        with torch.no_grad():
            self.prompt_embeddings.copy_(values)

    def prepare(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The module's arguments with the prefix before the cache, in the mask and in the positions."""
        given = arguments_of(module, args, kwargs)
        tokens = given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        if tokens is None:
            return args, kwargs
        n = len(self.prompt_embeddings)
        mask, positions, cache = (given.get(name) for name in ("attention_mask", "position_ids", "past_key_values"))
        self._check(module, mask, positions, cache)
        config: Any = module.config
        if cache is None:
            wanted = given.get("use_cache")
            wanted = getattr(config, "use_cache", False) if wanted is None else wanted
            cache = _dynamic_cache()(config=config) if wanted else None
        elif not isinstance(cache, _dynamic_cache()):
            raise InputError(f"prefix tuning needs a DynamicCache, and was given a {type(cache).__name__}")
        past = 0 if cache is None else cache.get_seq_length()
        limit = getattr(config, "max_position_embeddings", None)
        if isinstance(limit, int) and n + past + tokens.shape[1] > limit:
            raise InputError(
                f"{past + tokens.shape[1]} tokens after a prefix of {n} are more than the {limit} positions of "
                f"{type(module).__name__}: shorten max_length to {limit - n}"
            )
        prefix = spread(self.prompt_embeddings, len(tokens))
        prefix = prefix.view(*prefix.shape[:-1], self.layers * 2, self.heads, self.head_dim)
        # (layers * 2, heads, n, head_dim), or (layers * 2, batch, heads, n, head_dim) by example.
        prefix = prefix.movedim(-3, 0).transpose(-2, -3)
        given["past_key_values"] = _prefixed_cache()(prefix, cache)
        if mask is not None:
            given["attention_mask"] = torch.cat([mask.new_ones(len(mask), n), mask], dim=1)
        if positions is not None:
            given["position_ids"] = positions + n
        return (), given

    def _check(self, module: nn.Module, mask: Any, positions: Any, cache: Any) -> None:
        if isinstance(cache, _prefixed_cache()):
            raise InputError("several prefixes are active at once: activate one of them")
        if module.training and any(getattr(inner, "gradient_checkpointing", False) for inner in module.modules()):
            raise InputError(
                "prefix tuning does not go with gradient_checkpointing, which drops the keys and values: leave it out"
            )
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise InputError("prefix tuning wants an attention mask (batch, tokens), and was given one of another kind")
        if positions is None:
            return
        apart = mask is None and positions.shape[-1] > 1 and bool((positions.diff() != 1).any())
        if positions.dim() != 2 or apart:
            raise InputError("prefix tuning does not go with packed rows, which would share one prefix: leave pack out")

    def conclude(self, out: Any) -> Any:
        """The module's output with the caller's cache in the place of ours."""
        kind = _prefixed_cache()
        if isinstance(out, tuple):
            given = [item.inner if isinstance(item, kind) else item for item in out if item is not None]
            return tuple(item for item in given if item is not None)
        cache = getattr(out, "past_key_values", None)
        if not isinstance(cache, kind):
            return out
        return type(out)(**{**out, "past_key_values": cache.inner})

    def low_rank(self) -> LowRank | None:
        """None: it changes no matrix."""
        return None

    def shift(self) -> Tensor | None:
        """None: it changes no bias."""
        return None

    def update(self, x: Tensor, base_out: Tensor) -> Tensor:
        """Nothing is added to the output."""
        return torch.zeros_like(base_out)

    def delta(self, rows: slice | None = None) -> Tensor | None:
        """None: it changes no matrix."""
        return None

    def replacements(self) -> dict[str, Tensor]:
        """None of the module's parameters is replaced."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """The prefix under PEFT's key, which has no module's path before it."""
        return {"prompt_embeddings": self.prompt_embeddings.detach()}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Takes the prefix back."""
        with torch.no_grad():
            self.prompt_embeddings.copy_(tensors["prompt_embeddings"])

    def described(self) -> dict[str, Any]:
        """Its length, and the layers that it reaches."""
        return {"virtual_tokens": len(self.prompt_embeddings), "layers": self.layers}


@functools.cache
def _dynamic_cache() -> Any:
    from transformers import DynamicCache

    return DynamicCache


@functools.cache
def _prefixed_cache() -> Any:
    """The class of caches whose keys and values come after a prefix; transformers is imported when it is needed."""

    class PrefixedCache(_dynamic_cache()):  # type: ignore[misc]
        """A cache seen with a prefix before it, for one forward pass.

        Args:
            prefix: (layers * 2, heads, n, head_dim): keys and values in turn; (layers * 2, batch, ...) where each row
                of the batch has one.
            inner: the caller's cache, which the text's keys and values go into; None keeps none.
        """

        def __init__(self, prefix: Tensor, inner: Any) -> None:
            super().__init__()
            self.prefix, self.inner = prefix, inner
            if inner is not None:
                self.layers = inner.layers

        def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            left_behind = self._inner_sizes(keys.shape[-2], layer_idx)[1] > 0
            new = keys, values
            if self.inner is not None:
                new = self.inner.update(keys, values, layer_idx, *args, **kwargs)
            if left_behind:
                return new
            own = self.prefix[2 * layer_idx : 2 * layer_idx + 2].to(keys.device, keys.dtype)
            return tuple(
                torch.cat([before.expand(len(after), *before.shape[-3:]), after], dim=-2)
                for before, after in zip(own, new, strict=True)
            )

        def get_seq_length(self, layer_idx: int = 0) -> int:
            past: int = 0 if self.inner is None else self.inner.get_seq_length(layer_idx)
            return past + self.prefix.shape[-2]

        def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
            length, offset = self._inner_sizes(query_length, layer_idx)
            n = self.prefix.shape[-2]
            # Once a sliding layer has dropped tokens of the text, the prefix before them is out of its window too.
            return (length, offset + n) if offset else (length + n, 0)

        def _inner_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
            if self.inner is None:
                return query_length, 0
            sizes: tuple[int, int] = self.inner.get_mask_sizes(query_length, layer_idx)
            return sizes

    return PrefixedCache


def _shape_of_cache(model: Any, entry: Any) -> tuple[int, int, int]:
    """Layers, heads and their dimension of the keys and values that a model keeps, found by running one token.

    Raises:
        InputError: an encoder-decoder, or layers that keep nothing, something else, or differ.
    """
    what = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise InputError(f"prefix tuning is not for encoder-decoders, and {what} is one: use another method")
    cache = _dynamic_cache()()
    token = torch.zeros(1, 1, dtype=torch.long, device=entry.get_input_embeddings().weight.device)
    try:
        with _unadapted(model, entry), torch.no_grad():
            entry(input_ids=token, attention_mask=torch.ones_like(token), past_key_values=cache, use_cache=True)
    except Exception as error:
        # Whatever a model makes of a plain cache, it is one that a prefix cannot be put into.
        line = str(error).strip().partition("\n")[0]
        raise InputError(f"{what} takes no cache of keys and values ({type(error).__name__}: {line})") from error
    kept = [(layer.keys, layer.values) for layer in cache.layers if getattr(layer, "keys", None) is not None]
    if not kept:
        raise InputError(f"{what} keeps no keys and values that a prefix could stand before: use another method")
    shapes = {tuple(tensor.shape) for pair in kept for tensor in pair}
    if len(shapes) > 1 or len(kept) < len(cache.layers):
        raise InputError(
            f"the layers of {what} keep keys and values of differing shapes: prefix tuning wants one shape"
        )
    _, heads, _, head_dim = next(iter(shapes))
    return len(kept), heads, head_dim


@contextlib.contextmanager
def _unadapted(model: nn.Module, entry: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, with no other prefix in force."""
    modes = [(module, module.training) for module in model.modules()]
    site: Any = entry._modules.get("adapted")
    active = {} if site is None else site.active
    try:
        for module, _ in modes:
            module.training = False
        if site is not None:
            site.active = {}
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        if site is not None:
            site.active = active


def _attach(model: nn.Module, config: PrefixTuning, start: Start) -> list[Placed]:
    entry: Any = entry_of(model)
    path = path_of(model, entry)
    device = entry.get_input_embeddings().weight.device
    part = PrefixPart(config.num_virtual_tokens, _shape_of_cache(model, entry), device=device, dtype=start.dtype)
    part.initialise(start.generator(path))
    beside = companions(
        model, [], bias="none", modules_to_save=config.modules_to_save, trainable_tokens=None, dtype=start.dtype
    )
    return [Placed(path, part), *beside]


def _param_count(config: PrefixTuning, kind: str, shape: tuple[int, int]) -> int:
    raise InputError("a prefix's parameters follow from the model's layers, not from one site's shape")


def _to_peft(config: PrefixTuning, model: nn.Module, parts: Mapping[str, Any]) -> dict[str, Any]:
    entry: Any = entry_of(model)
    found = [part for own in entry.adapted.parts.values() for part in own]
    part = next(part for part in found if isinstance(part, PrefixPart))
    return {
        "peft_type": "PREFIX_TUNING",
        "num_virtual_tokens": config.num_virtual_tokens,
        "num_layers": part.layers,
        "num_attention_heads": part.heads,
        "token_dim": part.heads * part.head_dim,
        "num_transformer_submodules": 1,
        "encoder_hidden_size": part.heads * part.head_dim,
        "prefix_projection": False,
    }


def _from_peft(fields: dict[str, Any]) -> PrefixTuning:
    """PEFT's `PrefixTuningConfig` fields; those that say how values were drawn or made change nothing that is stored.

    Raises:
        InputError: a prefix for both halves of an encoder-decoder, or a damaged file.
    """
    if fields.get("num_transformer_submodules") not in (None, 1):
        raise InputError("adapter_config.json is of an encoder-decoder, which prefix tuning does not know")
    if "num_virtual_tokens" not in fields:
        raise InputError("adapter_config.json names no num_virtual_tokens: expected the prefix's length")
    return PrefixTuning(fields["num_virtual_tokens"], modules_to_save=fields.get("modules_to_save") or None)


PREFIX = Method(
    name="prefix",
    config=PrefixTuning,
    scope="model",
    attach=_attach,
    param_count=_param_count,
    to_peft=_to_peft,
    from_peft=_from_peft,
    peft_type="PREFIX_TUNING",
    identity_at_start=False,
    learning_rate=1e-2,
    mergeable=False,
    not_with={
        "pack": "packed rows would share one prefix",
        "gradient_checkpointing": "it drops the keys and values",
    },
)
