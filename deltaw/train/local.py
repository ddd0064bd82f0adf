"""A few optimizer steps from given weights, without a run folder: what an organisation does in one federated round.

The steps are those of `deltaw train`: a loss summed over the step's labels and divided by their number, or under
`private` a noised sum of clipped gradients. No optimizer state outlives the call, so that a client may join late, be
asked again or start anew, and always gives the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deltaw.core.errors import RunError
from deltaw.data import Collator
from deltaw.methods import adapter_parameters
from deltaw.methods.host import parts_of, steady_parts
from deltaw.train.config import TrainConfig
from deltaw.train.groups import parameter_groups, rate_ratios
from deltaw.train.loop import prepared, warmup_steps
from deltaw.train.losses import SummedLoss
from deltaw.train.order import StepOrder
from deltaw.train.private import MicroBatch, PoissonBatches, PrivacyPlan, PrivateGradients

Example = dict[str, list[int]]


def scheduled_rate(config: TrainConfig, *, step: int, steps: int) -> float:
    """The learning rate of optimizer step number `step` (from 0) of `steps`, as the run's schedule has it."""
    assert config.learning_rate is not None
    warmup = warmup_steps(config, steps)
    if step < warmup:
        return config.learning_rate * step / max(1, warmup)
    share = (step - warmup) / max(1, steps - warmup)
    factor = {"cosine": 0.5 * (1 + math.cos(math.pi * share)), "linear": 1 - share, "constant": 1.0}[config.schedule]
    return config.learning_rate * max(factor, 0.0)


def train_steps(
    model: Any,
    adapter: str,
    examples: Sequence[Example],
    collator: Collator,
    config: TrainConfig,
    *,
    steps: int,
    first_step: int,
    all_steps: int,
    seed: int,
    private: PrivacyPlan | None = None,
    proximal_mu: float = 0.0,
) -> float | None:
    """Trains the parameters of `adapter` that want gradients, in place.

    Args:
        model: with the adapter active, on its device.
        adapter: its name.
        examples: encoded rows.
        collator: for them.
        config: batch sizes, rates, clipping.
        steps: optimizer steps.
        first_step: of all_steps, for the schedule.
        all_steps: over all rounds.
        seed: of the rows' order.
        private: how to be differentially private; None: not.
        proximal_mu: FedProx (Li et al., arXiv 1812.06127): mu (w - w_start) is added to the gradient.

    Returns:
        The mean loss of the steps, in nats a label; None where it is private.

    Raises:
        RunError: a loss or gradient that is not finite.
    """
    trained = {name: p for name, p in adapter_parameters(model, adapter).items() if p.requires_grad}
    start = {name: p.detach().clone() for name, p in trained.items()} if proximal_mu else {}
    optimizer = torch.optim.AdamW(
        parameter_groups(
            trained,
            rate_ratios(model, adapter),
            decayed={name for name, p in trained.items() if p.dim() > 1},
            learning_rate=1.0,
            weight_decay=config.weight_decay,
        ),
        fused=model.device.type == "cuda",
    )
    extras = [part.extra_loss for _, _, part in parts_of(model, adapter) if hasattr(part, "extra_loss")]
    total, counted = torch.zeros((), device=model.device), 0
    model.train()
    # The rate of each group over the run's, which is set step by step.
    ratios = [group["lr"] for group in optimizer.param_groups]
    with prepared(model, config, collator.task):
        loss = SummedLoss(model, collator.task)
        gradients = None if private is None else PrivateGradients(model, adapter, private, loss)
        for number, batches in enumerate(_batches(examples, config, steps, seed, private, gradients)):
            for group, ratio in zip(optimizer.param_groups, ratios, strict=True):
                group["lr"] = ratio * scheduled_rate(config, step=first_step + number, steps=all_steps)
            made = [(micro, _on(collator([examples[i] for i in micro.rows]), model.device)) for micro in batches]
            if gradients is not None:
                extra = (lambda: torch.stack([one() for one in extras]).sum()) if extras else None
                gradients(made, extra=extra)
            else:
                optimizer.zero_grad()
                total += _plain_gradients(model, loss, [inputs for _, inputs in made], extras)
                counted += 1
            for name, value in start.items():
                p = trained[name]
                p.grad = (p.detach() - value).mul_(proximal_mu).add_(0 if p.grad is None else p.grad)
            if gradients is None and config.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(list(trained.values()), config.max_grad_norm)
            optimizer.step()
            for part in steady_parts(model):
                part.steady(True)
    if not bool(torch.isfinite(total)) or not all(bool(torch.isfinite(p).all()) for p in trained.values()):
        raise RunError("the loss or the weights became NaN or infinite: lower the learning rate")
    return float(total) / counted if counted else None


def _plain_gradients(model: Any, loss: SummedLoss, batches: list[dict[str, Any]], extras: list[Any]) -> Tensor:
    """The gradient of the step's mean loss over all its labels; gives that mean."""
    count = torch.stack([loss.counts(inputs["labels"]).sum() for inputs in batches]).sum().clamp(min=1)
    total = torch.zeros((), device=model.device)
    for inputs in batches:
        mean = loss(model, inputs, over=count)
        total += mean.detach()
        mean.backward()
    if extras:
        torch.stack([one() for one in extras]).sum().backward()
    return total


def _batches(
    examples: Sequence[Example],
    config: TrainConfig,
    steps: int,
    seed: int,
    private: PrivacyPlan | None,
    gradients: PrivateGradients | None,
) -> Iterator[list[MicroBatch]]:
    lengths = [len(example["input_ids"]) for example in examples]
    if private is not None and gradients is not None:
        yield from PoissonBatches(
            private, lengths, steps=steps, micro_batch_size=config.micro_batch_size, noise=gradients.noise
        )
        return
    order = StepOrder(lengths, step_rows=config.batch_size, seed=seed)
    done = 0
    while done < steps:
        rows = list(order)
        for begin in range(0, len(rows), config.batch_size):
            if done == steps:
                return
            part = rows[begin : begin + config.batch_size]
            size = config.micro_batch_size
            micro = [part[i : i + size] for i in range(0, len(part), size)]
            yield [MicroBatch(rows=own, units=None, shares=[1.0] * len(own), stays_open=False) for own in micro]
            done += 1
        order.epoch += 1


def _on(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
