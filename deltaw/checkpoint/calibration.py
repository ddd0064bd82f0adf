"""What a model's layers read: second moments of their inputs over training rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.core.errors import InputError
from deltaw.quant.retain import SecondMoment

#: Bytes of moments that are gathered in one pass over the rows.
BUDGET_BYTES = 4 << 30


class Moments:
    """Second moments of the inputs of chosen modules, gathered a group of modules at a time.

    Args:
        model: as it computes while the rows run through it: in eval mode, adapters and all.
        paths: modules (..., in) to (..., out), in the order in which they will be asked for.
        batches: keyword arguments of forward passes, from training rows alone; gone through once a group.
        budget_bytes: of the moments of one group.
    """

    def __init__(
        self,
        model: nn.Module,
        paths: Sequence[str],
        batches: Sequence[Mapping[str, Any]],
        *,
        budget_bytes: int = BUDGET_BYTES,
    ) -> None:
        if not batches:
            raise InputError("no rows to calibrate with: give batches of training rows, or none at all")
        self.model, self.paths, self.batches, self.budget_bytes = model, list(paths), batches, budget_bytes
        self.gathered: dict[str, SecondMoment] = {}
        #: Tokens that the layers have been shown; the most that any has.
        self.tokens = 0

    def __getitem__(self, path: str) -> Tensor:
        """H (in, in) of one module.

        Raises:
            InputError: the module takes no part in the model's forward.
        """
        if path not in self.gathered:
            self._gather(self.paths.index(path))
        moment = self.gathered.pop(path)
        if not moment.tokens:
            raise InputError(f"cannot calibrate {path}: the rows do not pass through it; merge without calibration")
        self.tokens = max(self.tokens, moment.tokens)
        return moment.H

    def _gather(self, start: int) -> None:
        self.gathered, taken = {}, 0
        for path in self.paths[start:]:
            weight: Any = self.model.get_submodule(path).weight
            features = _inputs(self.model.get_submodule(path))
            taken += 4 * features**2
            if self.gathered and taken > self.budget_bytes:
                break
            self.gathered[path] = SecondMoment(features, device=weight.device)
        now: dict[str, Any] = {}
        hooks = [
            self.model.get_submodule(path).register_forward_pre_hook(_hook(moment, now, self._is_masked(path)))
            for path, moment in self.gathered.items()
        ]
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                for batch in self.batches:
                    now["mask"] = batch.get("attention_mask")
                    self.model(**batch)
        finally:
            self.model.train(was_training)
            for hook in hooks:
                hook.remove()

    def _is_masked(self, path: str) -> bool:
        """Whether the batches' mask is of the tokens that a module reads: an encoder's is not its decoder's."""
        return not _has_encoder(self.model) or "encoder" in path.split(".")


def _inputs(module: nn.Module) -> int:
    """Features that a linear or a Conv1D reads."""
    rows, columns = module.weight.shape  # type: ignore[misc, operator]
    return int(rows if type(module).__name__ == "Conv1D" else columns)


def _hook(moment: SecondMoment, now: Mapping[str, Any], masked: bool) -> Callable[..., None]:
    def take(module: nn.Module, args: tuple[Any, ...]) -> None:
        x, mask = args[0], now["mask"] if masked else None
        # Where tokens are laid out in another way (flattened, an encoder's states in a decoder), none is left out.
        moment.update(x, mask if mask is not None and mask.shape == x.shape[:-1] else None)

    return take


def _has_encoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def on_device(model: nn.Module, batches: Iterable[Mapping[str, Any]], device: torch.device) -> list[dict[str, Any]]:
    """Batches on a device, without labels but where a decoder's inputs are made from them."""
    dropped = () if _has_encoder(model) else ("labels",)
    return [
        {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in batch.items()
            if name not in dropped
        }
        for batch in batches
    ]
