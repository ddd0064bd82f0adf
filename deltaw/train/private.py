"""Steps of differentially private training: sampled units, gradients clipped by unit, noise on their sum.

Abadi et al., "Deep Learning with Differential Privacy", arXiv 1607.00133 (DP-SGD; Liu et al., "Differentially private
low-rank adaptation", arXiv 2312.17493, for LoRA's factors). One step, with q the sampling rate and N units:

    gradient = (sum_i G_i min(1, C / ||G_i||) + sigma C z) / (q N)

Units are sampled each by itself with probability q (Poisson sampling, which the accounting assumes; shuffled batches of
fixed size are another mechanism), so a step has a random number of rows and may have none: then it is all noise. The
divisor is the expected number of units, which depends on no draw. G_i is the gradient of the mean loss over unit i's
labels, row by row; a unit is one row, or all rows of one customer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.core.contexts import ForwardContext, in_context
from deltaw.core.errors import InputError, RunError
from deltaw.methods import adapter_parameters
from deltaw.methods.by_example import whole_modules_by_example
from deltaw.privacy.clipping import ExampleGradients
from deltaw.privacy.noise import SecureNoise
from deltaw.train.config import TrainConfig
from deltaw.train.losses import SummedLoss, loss_share

Example = Mapping[str, list[int]]


@dataclass(frozen=True)
class PrivacyPlan:
    """What a private training does.

    Attributes:
        noise_multiplier: sigma, the noise's standard deviation over `max_grad_norm`.
        max_grad_norm: C, what a unit's gradient is clipped to.
        sampling_rate: q, the probability with which each unit takes part in a step.
        steps: of the whole training.
        delta: of the statement.
        unit: whose presence is hidden, `example` or `customer`.
        units: the rows of each unit.
    """

    noise_multiplier: float
    max_grad_norm: float
    sampling_rate: float
    steps: int
    delta: float
    unit: str
    units: Sequence[Sequence[int]]

    @property
    def spec(self) -> Any:
        """What the accounting knows of it: a `PrivacySpec`."""
        from deltaw.privacy.accounting import PrivacySpec

        return PrivacySpec(
            unit=self.unit,
            sampling_rate=self.sampling_rate,
            noise_multiplier=self.noise_multiplier,
            steps=self.steps,
            delta=self.delta,
            sampling="poisson" if self.sampling_rate < 1 else "full",
        )

    @property
    def expected_units(self) -> float:
        """Units that a step has on average, q N."""
        return self.sampling_rate * len(self.units)


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward pass.

    Attributes:
        rows: their numbers.
        units: of each row, its unit's number in the micro-batch; None: every row is a unit.
        shares: of each row, one over the rows that its unit has.
        stays_open: the last unit has more rows in the next micro-batch.
    """

    rows: Sequence[int]
    units: Sequence[int] | None
    shares: Sequence[float]
    stays_open: bool


def rows_of_units(groups: Sequence[str] | None, count: int) -> list[list[int]]:
    """The rows of each unit: of each name in `groups`, in order of appearance, or every row by itself."""
    if groups is None:
        return [[row] for row in range(count)]
    found: dict[str, list[int]] = {}
    for row, name in enumerate(groups):
        found.setdefault(name, []).append(row)
    return list(found.values())


def plan_privacy(config: TrainConfig, units: Sequence[Sequence[int]], *, steps: int) -> PrivacyPlan:
    """What a run's privacy is, with the noise that its target asks for.

    Args:
        config: a run with `dp`.
        units: the rows of each unit.
        steps: of the whole training.

    Raises:
        InputError: more units a step than there are, a delta that protects nobody, a target out of reach.
        MissingExtraError: dp-accounting is not installed.
    """
    from deltaw.privacy.accounting import calibrate, check_delta

    if config.batch_size > len(units):
        raise InputError(
            f"batch_size is {config.batch_size}, the units that a step has on average, and there are {len(units)}: "
            "choose a smaller one"
        )
    rate = config.batch_size / len(units)
    delta = min(1e-5, 0.1 / len(units)) if config.delta is None else config.delta
    check_delta(delta, len(units))
    sigma = config.noise_multiplier
    if sigma is None:
        assert config.target_epsilon is not None
        target = config.target_epsilon
        sigma = calibrate(target_epsilon=target, delta=delta, sampling_rate=rate, steps=steps)
    unit = "example" if config.unit is None else "customer"
    return PrivacyPlan(sigma, config.max_grad_norm, rate, steps, delta, unit, units)


def privacy_record(plan: PrivacyPlan, config: TrainConfig) -> dict[str, Any]:
    """What `run.json` says of it."""
    from deltaw.privacy.accounting import epsilon, statement

    spec = plan.spec
    record: dict[str, Any] = {
        "level": "example",
        "unit": plan.unit,
        "adjacency": spec.adjacency,
        "sampling": spec.sampling,
        "sampling_rate": plan.sampling_rate,
        "noise_multiplier": plan.noise_multiplier,
        "max_grad_norm": plan.max_grad_norm,
        "steps": plan.steps,
        "delta": plan.delta,
    }
    if config.target_epsilon is not None:
        record["target_epsilon"] = config.target_epsilon
    if not plan.noise_multiplier:
        return record | {"statement": "no noise was added: nothing is hidden"}
    spent = epsilon(spec)
    return record | {
        "epsilon": spent.epsilon,
        "epsilon_rdp": spent.epsilon_rdp,
        "statement": statement(spent, spec),
    }


def micro_batches(units: Sequence[Sequence[int]], lengths: Sequence[int], *, micro_batch_size: int) -> list[MicroBatch]:
    """The chosen units' rows in micro-batches of at most `micro_batch_size`, each unit's rows one after another.

    Units of like length stand together, which saves padding; how rows are batched changes no result.
    """
    ordered = sorted(units, key=lambda rows: -max(lengths[row] for row in rows))
    flat = [(number, row) for number, rows in enumerate(ordered) for row in rows]
    single = all(len(rows) == 1 for rows in ordered)
    made = []
    for start in range(0, len(flat), micro_batch_size):
        part = flat[start : start + micro_batch_size]
        first = part[0][0]
        after = flat[start + micro_batch_size : start + micro_batch_size + 1]
        made.append(
            MicroBatch(
                rows=[row for _, row in part],
                units=None if single else [number - first for number, _ in part],
                shares=[1.0 / len(ordered[number]) for number, _ in part],
                stays_open=bool(after) and after[0][0] == part[-1][0],
            )
        )
    return made


class PoissonBatches:
    """An iterable of optimizer steps, each a list of micro-batches' rows, without end but for `steps`.

    Args:
        plan: what is sampled, and how often.
        lengths: tokens of each row.
        steps: how many there are.
        micro_batch_size: rows of a forward pass.
        noise: the source of the draws.
    """

    def __init__(
        self, plan: PrivacyPlan, lengths: Sequence[int], *, steps: int, micro_batch_size: int, noise: SecureNoise
    ) -> None:
        self.plan, self.lengths, self.steps, self.size, self.noise = plan, lengths, steps, micro_batch_size, noise

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        for _ in range(self.steps):
            drawn = self.noise.bernoulli(len(self.plan.units), self.plan.sampling_rate).nonzero().flatten().tolist()
            yield micro_batches([self.plan.units[i] for i in drawn], self.lengths, micro_batch_size=self.size)


class PrivateGradients:
    """Makes the noised gradient of one step, and guards that nothing else reaches the parameters.

    Args:
        model: the adapted transformers model.
        adapter: the one that is trained.
        plan: bounds and noise.
        loss: for the task.
        noise: the source of the noise.
    """

    def __init__(
        self, model: Any, adapter: str, plan: PrivacyPlan, loss: SummedLoss, *, noise: SecureNoise | None = None
    ) -> None:
        check_uncoupled(model)
        self.model, self.adapter, self.plan, self.loss = model, adapter, plan, loss
        self.noise = noise or SecureNoise()
        self._sink: ExampleGradients | None = None
        self.checked = False

    def __call__(
        self,
        batches: Sequence[tuple[MicroBatch, Mapping[str, Any]]],
        *,
        extra: Callable[[], Tensor] | None = None,
        autocast: bool = False,
    ) -> None:
        """Puts the step's gradient into `.grad` of everything that is trained.

        Args:
            batches: the micro-batches with their tensors on the model's device; none for an empty step.
            extra: a term of the loss that depends on no example; its gradient is added as it is.
            autocast: whether the forward passes run in bfloat16 autocast.

        Raises:
            RunError: a trained tensor gets no gradient by example, or one that was not clipped.
        """
        parameters = {n: p for n, p in adapter_parameters(self.model, self.adapter).items() if p.requires_grad}
        if (
            self._sink is None
            or set(self._sink.parameters) != set(parameters)
            or any(self._sink.parameters[name] is not p for name, p in parameters.items())
        ):
            # AdaLoRA cuts its factors: new parameters.
            self._sink = ExampleGradients(parameters, max_grad_norm=self.plan.max_grad_norm)
        for p in parameters.values():
            p.grad = None
        device = self.model.device
        with whole_modules_by_example(self.model, self.adapter):
            for micro, inputs in batches:
                self._one(self._sink, micro, inputs, device, autocast)
        self._check(parameters, any_rows=bool(batches))
        means = self._noised_means(self._sink.take())
        if extra is not None:
            extra().backward()
        for name, p in parameters.items():
            mean = means[name].to(p.dtype)
            p.grad = mean if p.grad is None else p.grad.add_(mean)

    def _noised_means(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The noised sums over the expected units; joined meanwhile, as many small tensors cost more to start."""
        kinds: dict[Any, list[str]] = {}
        for name, total in sums.items():
            kinds.setdefault((total.device, total.dtype), []).append(name)
        flat = [torch.cat([sums[name].flatten() for name in names]) for names in kinds.values()]
        released = self.noise.release(
            flat, noise_multiplier=self.plan.noise_multiplier, max_grad_norm=self.plan.max_grad_norm, write=True
        )
        means: dict[str, Tensor] = {}
        for names, joined in zip(kinds.values(), released, strict=True):
            parts = joined.div_(self.plan.expected_units).split([sums[name].numel() for name in names])
            means |= {name: part.view_as(sums[name]) for name, part in zip(names, parts, strict=True)}
        return means

    def _one(
        self,
        sink: ExampleGradients,
        micro: MicroBatch,
        inputs: Mapping[str, Any],
        device: torch.device,
        autocast: bool,
    ) -> None:
        ids = inputs["input_ids"]
        shares = loss_share(self.loss.counts(inputs["labels"])).to(device)
        shares *= torch.tensor(micro.shares, device=device)
        units = None if micro.units is None else torch.tensor(micro.units, device=device)
        sink.begin(shares, units=units, stays_open=micro.stays_open)
        with in_context(ForwardContext(rows=len(ids), positions=ids.shape[1], sink=sink)):
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                loss = self.loss(self.model, dict(inputs))
            loss.backward()
        sink.end()

    def _check(self, parameters: Mapping[str, nn.Parameter], *, any_rows: bool) -> None:
        """What autograd gave a parameter by itself is clipped by nobody; what nothing gave is trained in vain."""
        past = [name for name, p in parameters.items() if p.grad is not None]
        if past:
            raise RunError(
                f"{len(past)} trained tensors ({past[0]}, ...) got a gradient that is not clipped by example: "
                "leave them out of what is trained under differential privacy"
            )
        if not any_rows or self.checked:
            return
        assert self._sink is not None
        without = [name for name in parameters if name not in self._sink.fed]
        if without:
            raise RunError(
                f"{len(without)} trained tensors get no gradient ({without[0]}{', ...' if len(without) > 1 else ''}): "
                "the model does not use the modules they sit on; leave those out of what is trained"
            )
        self.checked = True


def check_uncoupled(model: Any) -> None:
    """Refuses what ties one example's gradient to the others of its batch.

    Raises:
        InputError: a loss that balances experts over a batch.
    """
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    if getattr(config, "output_router_logits", False):
        raise InputError(
            "the model's loss balances its experts over a whole batch (output_router_logits), so that no example's "
            "gradient stands alone: set output_router_logits to false under differential privacy"
        )
