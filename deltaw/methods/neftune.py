"""NEFTune: noise on the input embeddings while a model is trained.

Jain et al., "NEFTune: Noisy Embeddings Improve Instruction Finetuning", arXiv 2310.05914, algorithm 1:

    X' = X + (alpha / sqrt(L d)) eps        X (L, d) the embeddings of one example, eps uniform in [-1, 1]

L is the example's real length and padding gets no noise, as in the authors' code; transformers' own switch counts the
padding in. Of several examples packed into one row, each has its own L. Nothing is trained, and nothing is changed in
evaluation mode.

The noise is added to what the embedding module gives, whatever adapters make of it, so a model that reads its input
ids for more than their embeddings (positions counted from padding, tokens that end a sequence) reads the true ones. It
is drawn from the device's default generator, which checkpoints keep as they do for dropout.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.core.configs import accepts, spelling
from deltaw.core.errors import InputError
from deltaw.methods.contract import Method, Placed, Start
from deltaw.models.sites import base_modules


@accepts(neftune_alpha="alpha", neftune_noise_alpha="alpha")
@dataclass(frozen=True)
class NEFTune:
    """Noise on the input embeddings in training, beside any adapter or full fine-tuning.

    Attributes:
        alpha: scale of the noise, above 0; the paper tries 5, 10 and 15.
    """

    alpha: float = 5.0

    def __post_init__(self) -> None:
        wrong = (
            isinstance(self.alpha, bool) or not isinstance(self.alpha, (int, float)) or not 0 < self.alpha < math.inf
        )
        if wrong:
            raise InputError(f"{spelling(self, 'alpha')} is {self.alpha!r}: expected a number above 0")


class Reach(nn.Module):
    """Sits where a model takes its input, and finds out how long each example is."""

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha
        #: 1/sqrt(L) at each token of the input that is being embedded, 0 at padding: (batch, seq).
        self.waiting: Tensor | None = None

    def prepare(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Notes the lengths for the embedding; adds the noise here where embeddings are given in place of ids."""
        self.waiting = None
        if not module.training:
            return args, kwargs
        given = arguments_of(module, args, kwargs)
        embeddings = given.get("inputs_embeds")
        tokens = given.get("input_ids") if embeddings is None else embeddings
        if tokens is None:
            return args, kwargs
        self.waiting = root_lengths(tokens, given.get("attention_mask"), given.get("position_ids"))
        return (args, kwargs) if embeddings is None else ((), given | {"inputs_embeds": self.noisy(embeddings)})

    def conclude(self, out: Any) -> Any:
        """The module's output as it is."""
        return out

    def noisy(self, embeddings: Tensor) -> Tensor:
        """The embeddings (batch, seq, d) of the noted input with noise; any others as they are."""
        reach, self.waiting = self.waiting, None
        if reach is None or embeddings.shape[:-1] != reach.shape:
            return embeddings
        bound = reach.to(embeddings.device) * (self.alpha / math.sqrt(embeddings.shape[-1]))
        noise = torch.empty(embeddings.shape, device=embeddings.device).uniform_(-1.0, 1.0)
        return embeddings + (noise * bound.unsqueeze(-1)).to(embeddings.dtype)


class Noise(nn.Module):
    """Sits on the embedding module, and adds the noise to its output."""

    _reach: Any

    def __init__(self, reach: Reach) -> None:
        super().__init__()
        object.__setattr__(self, "_reach", reach)

    def prepare(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The module's input as it is."""
        return args, kwargs

    def conclude(self, out: Any) -> Any:
        """The embeddings (batch, seq, d) with the noise."""
        noisy: Tensor = self._reach.noisy(out)
        return noisy


def root_lengths(tokens: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
    """1/sqrt(L) at each token, L the number of tokens of its example; 0 at padding.

    Args:
        tokens: (batch, seq) or (batch, seq, d); only the shape counts.
        mask: (batch, seq), 0 at padding; masks of other shapes tell nothing of it.
        positions: (batch, seq) without a mask: an example begins wherever they do not go on by one.

    Returns:
        (batch, seq), float32.
    """
    shape = tokens.shape[:2]
    if mask is not None and mask.shape == shape:
        real = (mask != 0).float()
        return real / real.sum(1, keepdim=True).clamp(min=1).sqrt()
    ones = torch.ones(shape, device=tokens.device)
    if mask is not None or positions is None or positions.dim() != 2:
        return ones / math.sqrt(shape[1])
    begins = F.pad(positions.diff(dim=1) != 1, (1, 0)).long().expand(shape)
    example = begins.cumsum(1)
    return torch.zeros_like(ones).scatter_add(1, example, ones).gather(1, example).rsqrt()


def arguments_of(module: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    """What a call of the module's forward gives, by name."""
    signature = inspect.signature(type(module).forward)
    given = dict(signature.bind(module, *args, **kwargs).arguments)
    del given[next(iter(signature.parameters))]
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= given.pop(parameter.name, {})
    return given


def entry_of(model: nn.Module) -> nn.Module:
    """The module of a transformers model that takes its input: the encoder where there is one, else the bare model.

    Raises:
        InputError: not a transformers model with an input embedding.
    """
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        # OPT's language model calls the decoder inside its base model, and never the base model.
        inner: Any = model.get_encoder() if getattr(model.config, "is_encoder_decoder", False) else model.get_decoder()
        entry: Any = inner if isinstance(inner, PreTrainedModel) else model.base_model
        try:
            embedding: Any = entry.get_input_embeddings()
        except NotImplementedError:
            embedding = None
        if isinstance(embedding, nn.Module):
            found: nn.Module = entry
            return found
    raise InputError(f"{type(model).__name__} is no transformers model with an embedding of its input tokens")


def path_of(model: nn.Module, module: nn.Module) -> str:
    """The module's path in the model."""
    return next(path for path, found in base_modules(model) if found is module)


def _attach(model: nn.Module, config: NEFTune, start: Start) -> list[Placed]:
    entry: Any = entry_of(model)
    reach = Reach(float(config.alpha))
    embedding = path_of(model, entry.get_input_embeddings())
    return [Placed(path_of(model, entry), reach), Placed(embedding, Noise(reach))]


def _param_count(config: Any, kind: str, shape: tuple[int, int]) -> int:
    return 0


NEFTUNE = Method(
    name="neftune",
    config=NEFTune,
    scope="model",
    attach=_attach,
    param_count=_param_count,
    trains_nothing=True,
    mergeable=False,
)
