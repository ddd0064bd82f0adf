"""Which singular values of AdaLoRA stay: importance, a falling budget, and the cut at the end.

Zhang et al., arXiv 2303.10512, equations 8 to 12, step by step as PEFT's `RankAllocator` does it. After the update of
step t, with the gradients g that led to it, for every parameter w of the adapter:

    I = |w g|        S <- beta1 S + (1 - beta1) I        U <- beta2 U + (1 - beta2) |I - S|

The importance of triplet i is s(E_i) + mean over row i of s(Q) + mean over column i of s(P), s = S U. Of all triplets
of all sites the least important are masked, E_i = 0, so that b(t) are left (ties with the last masked go too):

    b(t) = b_T + (b_0 - b_T) (1 - (t - tinit) / (T - tinit - tfinal))^3        tinit < t <= T - tfinal

for b_0 the ranks' sum at first and b_T = target_r times the sites. A masked triplet goes on being trained and may come
back, until at t = T - tfinal the mask becomes final. At the end masked triplets are taken out of the factors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.core.errors import InputError, RunError
from deltaw.methods.adalora import AdaLoRA, AdaLoraPart


def scheduled(config: AdaLoRA, total: int) -> AdaLoRA:
    """The configuration with its schedule filled in for a training of `total` optimizer steps.

    Raises:
        InputError: the steps leave no room for ranks to fall.
    """
    steps = config.total_steps or total
    tinit = steps // 8 if config.tinit is None else config.tinit
    tfinal = min(steps // 2, max(steps - tinit - 2, 0)) if config.tfinal is None else config.tfinal
    if steps > total:
        raise InputError(f"total_steps is {steps} and the run has {total} steps: leave it out, or train longer")
    # Importance is measured from the first step on, and no more at the one of the last choice.
    if steps - tfinal < max(tinit + 1, 2):
        raise InputError(
            f"no rank could fall: of {steps} steps {tinit} come before the budget falls (tinit) and {tfinal} after it "
            "(tfinal); give smaller ones, or train longer (at least 2 steps)"
        )
    return dataclasses.replace(config, tinit=tinit, tfinal=tfinal, total_steps=steps)


class Budget:
    """AdaLoRA's controller.

    Args:
        parts: the adapter's parts by their site's path.
        config: with its schedule filled in.

    Raises:
        InputError: the parts have no more ranks than the target.
    """

    def __init__(self, parts: Mapping[str, AdaLoraPart], config: AdaLoRA) -> None:
        assert config.tinit is not None and config.tfinal is not None and config.total_steps is not None
        self.parts = dict(parts)
        self.config = config
        self.tinit, self.end = config.tinit, config.total_steps - config.tfinal
        self.first = sum(len(part.lora_E) for part in self.parts.values())
        self.last = config.target_r * len(self.parts)
        if self.last >= self.first:
            raise InputError(
                f"no rank could fall: the {len(self.parts)} sites have {self.first} in all, and target_r "
                f"{config.target_r} asks for {self.last}; choose a smaller one, or go on with the adapter as a plain "
                "LoRA (deltaw export --to lora)"
            )
        self.sensitivity = [torch.zeros_like(p, dtype=_wide(p)) for p in self._factors()]
        self.uncertainty = [torch.zeros_like(p, dtype=_wide(p)) for p in self._factors()]
        #: What was masked in the last choice, for every triplet, site after site.
        self.masked: Tensor | None = None

    def _factors(self) -> list[Tensor]:
        return [p.detach() for part in self.parts.values() for p in (part.lora_A, part.lora_B, part.lora_E)]

    def budget(self, step: int) -> int:
        """Triplets to keep at a step, tinit < step <= total_steps - tfinal."""
        left = 1 - (step - self.tinit) / (self.end - self.tinit)
        return int((self.first - self.last) * left**3 + self.last)

    def after_update(self, step: int) -> None:
        """Measures importance and masks, as the schedule has it, once optimizer step `step` (from 1) is done."""
        if step < self.end:
            self._measure()
            if step <= self.tinit or step % self.config.delta_t:
                return
        if step <= self.end:
            self._choose(self.budget(step))
        if step == self.end:
            self.sensitivity, self.uncertainty = [], []
        self._mask()

    @torch.no_grad()
    def _measure(self) -> None:
        factors = [p for part in self.parts.values() for p in (part.lora_A, part.lora_B, part.lora_E)]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in factors]
        beta1, beta2 = self.config.beta1, self.config.beta2
        seen = torch._foreach_abs(torch._foreach_mul(factors, grads))
        torch._foreach_mul_(self.sensitivity, beta1)
        torch._foreach_add_(self.sensitivity, torch._foreach_mul(seen, 1 - beta1))
        off = torch._foreach_abs(torch._foreach_sub(seen, self.sensitivity))
        torch._foreach_mul_(self.uncertainty, beta2)
        torch._foreach_add_(self.uncertainty, torch._foreach_mul(off, 1 - beta2))

    def _choose(self, budget: int) -> None:
        scores = torch._foreach_mul(self.sensitivity, self.uncertainty)
        triplets = [
            E.view(-1) + (A.mean(1) + B.mean(0))
            for A, B, E in zip(scores[::3], scores[1::3], scores[2::3], strict=True)
        ]
        importance = torch.cat(triplets)
        # Sorted, as the k-th value alone has no deterministic form on CUDA; it is never brought to the host.
        self.masked = importance <= importance.sort().values[self.first - budget - 1]

    @torch.no_grad()
    def _mask(self) -> None:
        assert self.masked is not None
        E = [part.lora_E for part in self.parts.values()]
        for values, masked in zip(E, self.masked.split([len(values) for values in E]), strict=True):
            values.masked_fill_(masked.view(-1, 1), 0.0)

    def state_dict(self) -> dict[str, Any]:
        """The averages while importance is measured, and the last mask."""
        return {"sensitivity": self.sensitivity, "uncertainty": self.uncertainty, "masked": self.masked}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the averages and the mask back, onto the factors' device."""
        for name in ("sensitivity", "uncertainty"):
            found = zip(state[name], self._factors(), strict=False)
            setattr(self, name, [values.to(p.device, copy=True) for values, p in found])
        masked = state["masked"]
        self.masked = None if masked is None else masked.to(self._factors()[0].device)

    def finish(self) -> None:
        """Takes the triplets whose singular value is zero in the weights that are kept out of the factors.

        Raises:
            RunError: no rank has fallen, or none is left.
        """
        kept = {path: (part.lora_E.detach() != 0).view(-1) for path, part in self.parts.items()}
        left = sum(int(keep.sum()) for keep in kept.values())
        where = f"ranks fall from step {self.tinit + 1} to step {self.end}"
        if left == self.first:
            raise RunError(
                f"no rank has fallen: all {left} singular values are in use in the weights that are kept ({where}): "
                "give a smaller tinit, delta_t 1, or more patience to early stopping"
            )
        if left == 0:
            raise RunError(f"every rank fell to 0 ({where}): raise the learning rate, or train longer")
        for path, keep in kept.items():
            self.parts[path].prune(keep)


def _wide(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


def control(model: nn.Module, name: str, total: int) -> Budget:
    """What follows a training of `total` optimizer steps; the adapter's configuration is told the schedule."""
    # The host knows all methods, this one too.
    from deltaw.methods.host import book_of, parts_of

    book = book_of(model)
    found = {path: part for path, _, part in parts_of(model, name) if isinstance(part, AdaLoraPart)}
    made = Budget(found, scheduled(book.configs[name], total))
    book.configs[name] = made.config
    return made
