"""Update-level differential privacy: an organisation's whole change of a round is clipped and noised before it leaves.

The unit is a client. Two federations are neighbours if in one of them a client's changes are zero in place of what they
are; that it takes part, when, and with how many rows is known anyway. With D_k (d,) the change of client k in a round,
all trained tensors together, and C the bound (McMahan et al., arXiv 1710.06963),

    D_k min(1, C / ||D_k||)

is noised in one of two ways, z being the noise multiplier:

- *own*: the client adds N(0, (z C)^2) itself. Each upload is a Gaussian release, whoever sees it.
- *shared*: for secure aggregation, where only a sum is seen. The client rounds to integers of g = C / 2^20 or coarser
  (`integer_noise.rounded`) and adds Skellam noise of variance (z l2)^2 / t, with l2 the integers' norm bound and t the
  fewest clients whose vectors a sum may have, the threshold. A sum of t or more has noise of at least z l2, however
  many drop out; where nobody does it has more. Integers and noise of the sum are exact modulo 2^32, with room for 12
  standard deviations (Kairouz, Liu and Steinke, arXiv 2102.06387; Agarwal, Kairouz and Liu, arXiv 2110.04995).

Vectors are not rotated: rotation lets a ring of few bits hold coarse grids. Here l2 is above C / g by less than 3e-6 of
itself for 16 million values in 7 clients' sums of 32 bits, and epsilon by as much, which a rotation could save at most.

Every round is accounted in full. Where a round asks a part of the clients only, a public seed says whom, and what
everybody knows amplifies nothing.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deltaw.core.errors import InputError
from deltaw.privacy.accounting import (
    IntegerSum,
    PrivacySpec,
    Spent,
    calibrate,
    calibrate_integers,
    collusion,
    epsilon,
    statement,
)
from deltaw.privacy.integer_noise import norm_bound, rounded, skellam
from deltaw.privacy.ledger import BudgetError, Ledger
from deltaw.privacy.noise import SecureNoise

#: Integer steps of the clipping bound, and the fewest before a sum is called too large for its words.
STEPS, FEWEST_STEPS = 2.0**20, 2.0**8
#: Standard deviations of noise that words have room for: beyond has a chance below 1e-30 a value.
TAIL = 12.0


@dataclass(frozen=True, kw_only=True)
class UpdatePlan:
    """What all clients of a federation do to their changes; made by `plan_updates`.

    Attributes:
        clip: C, the most that a client's whole change may be long.
        noise_multiplier: z, the noise's standard deviation over the bound: own, or of a sum of the fewest clients.
        rounds: releases of a client.
        delta: of the statement.
        clients: of the federation, K.
        target_epsilon: that z was found for.
        integer: of shared noise, the sum's mechanism.
        granularity: of shared noise, what one integer step stands for.
    """

    clip: float
    noise_multiplier: float
    rounds: int
    delta: float
    clients: int
    target_epsilon: float | None = None
    integer: IntegerSum | None = None
    granularity: float = 1.0

    @property
    def spec(self) -> PrivacySpec:
        """What the accounting knows of all rounds."""
        if self.integer is not None:
            return PrivacySpec.of_integers(self.integer, steps=self.rounds, delta=self.delta)
        return PrivacySpec(
            unit="client", sampling_rate=1.0, noise_multiplier=self.noise_multiplier, steps=self.rounds,
            delta=self.delta, sampling="full",
        )  # fmt: skip

    @property
    def terms(self) -> str:
        """A hash of the plan: clients whose noise protects each other must have the same."""
        # Without l2 and the variance, whose last bits differ from one machine's library to another's.
        said = [float(v) for v in (self.clip, self.noise_multiplier, self.rounds, self.delta, self.granularity)]
        summed = None if self.integer is None else (self.integer.name, self.integer.clients, self.integer.dim)
        return hashlib.sha256(repr((said, summed)).encode()).hexdigest()

    def length(self, size: int) -> int:
        """Integers for a vector of `size` reals."""
        return size

    def decode(self, total: Tensor, size: int) -> Tensor:
        """The sum of the reals (size,), float64, of a sum of integers."""
        return total.double() * self.granularity

    def record(self) -> dict[str, Any]:
        """What `run.json` says of it."""
        found: dict[str, Any] = {
            "level": "update",
            "unit": "client",
            "adjacency": self.spec.adjacency,
            "sampling": "full",
            "sampling_rate": 1.0,
            "noise": "gaussian" if self.integer is None else self.integer.name,
            "noise_multiplier": self.noise_multiplier,
            "max_grad_norm": self.clip,
            "steps": self.rounds,
            "delta": self.delta,
        }
        if self.integer is not None:
            found["noise_clients"] = self.integer.clients
        if self.target_epsilon is not None:
            found["target_epsilon"] = self.target_epsilon
        if not self.noise_multiplier:
            return found | {"statement": "no noise was added: nothing is hidden"}
        spent, table = _spent(self.spec), _collusion(self.spec, self.clients)
        return found | {
            "epsilon": spent.epsilon,
            "epsilon_rdp": spent.epsilon_rdp,
            "statement": statement(spent, self.spec),
            "collusion": {str(count): value for count, value in table.items()},
        }


@functools.lru_cache(maxsize=64)
def plan_updates(
    *,
    clip: float,
    noise_multiplier: float | None,
    target_epsilon: float | None,
    rounds: int,
    delta: float,
    clients: int,
    stay: int | None = None,
    largest: int = 2**31 - 1,
    dim: int = 0,
) -> UpdatePlan:
    """The plan of a federation: with own noise, or with shared noise where `stay` is given.

    All clients get the same from the same arguments, whatever their ledgers hold.

    Args:
        clip: C.
        noise_multiplier: z; or None for a target.
        target_epsilon: of all rounds together; z is then the least, to 4 digits, that keeps to it.
        rounds: releases of a client.
        delta: of the statement.
        clients: of the federation.
        stay: t, the fewest clients whose vectors a sum has.
        largest: the largest magnitude that one client's integers may have in the sum's words.
        dim: the most values that a client sends in a round.

    Raises:
        InputError: neither or both of multiplier and target, a target that no noise keeps to, words too small.
    """
    if (noise_multiplier is None) == (target_epsilon is None):
        raise InputError("neither or both of a noise multiplier and a target epsilon: expected one")
    known: dict[str, Any] = {"clip": clip, "rounds": rounds, "delta": delta, "clients": clients}
    known["target_epsilon"] = target_epsilon
    if stay is None:
        if noise_multiplier is None:
            assert target_epsilon is not None
            noise_multiplier = calibrate(target_epsilon=target_epsilon, delta=delta, sampling_rate=1.0, steps=rounds)
        return UpdatePlan(noise_multiplier=noise_multiplier, **known)
    steps = STEPS
    while steps >= FEWEST_STEPS:
        l2 = norm_bound(clip=clip, granularity=clip / steps, dim=dim)
        integer, z = IntegerSum(name="skellam", clients=stay, variance=1.0, l2=l2, dim=dim), noise_multiplier
        if z is None:
            assert target_epsilon is not None
            found = calibrate_integers(integer, target_epsilon=target_epsilon, delta=delta, steps=rounds)
            z = _rounded_up(found.noise_multiplier)
        integer = replace(integer, variance=(z * l2) ** 2 / stay)
        if l2 + TAIL * math.sqrt(integer.variance) <= largest:
            return UpdatePlan(noise_multiplier=z, integer=integer, granularity=clip / steps, **known)
        steps /= 2
    raise InputError(
        f"noise of {z:.4g} times the bound does not fit into words that hold {largest}: take fewer clients a round, "
        "less noise, or no secure aggregation"
    )


def _rounded_up(value: float) -> float:
    """To 4 digits, so that machines whose last bits differ agree."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 3)
    return float(f"{math.ceil(value / unit) * unit:.8g}")


# Clients on one machine have the same plan, and a PLD takes its time.
@functools.lru_cache(maxsize=1024)
def _spent(spec: PrivacySpec) -> Spent:
    return epsilon(spec)


@functools.lru_cache(maxsize=64)
def _collusion(spec: PrivacySpec, clients: int) -> dict[int, float]:
    """Epsilon by colluders, 0 to K - 1. Of shared noise at worst all of them are among the fewest that a sum has."""
    if spec.integer is None:
        return collusion(spec, clients=clients, noise="own")
    table = collusion(spec, clients=spec.integer.clients, noise="shared")
    return {count: table[min(count, len(table) - 1)] for count in range(clients)}


def clipped(change: Mapping[str, Tensor], clip: float) -> dict[str, Tensor]:
    """A change made shorter where the norm of all its tensors together is above `clip`; float64.

    Args:
        change: by key, finite values.
        clip: C > 0.
    """
    wide = {key: value.detach().double() for key, value in change.items()}
    norm = math.sqrt(sum(float(value.square().sum()) for value in wide.values()))
    # A hair below, so that no rounding of the norm or of the product leaves it above.
    factor = clip / norm * (1 - 1e-12) if norm > clip else 1.0
    return {key: value * factor for key, value in wide.items()}


class UpdateNoise:
    """One client's side: clips, noises, charges the organisation's ledger. What a federation's `Client` calls.

    Args:
        plan: of the federation.
        name: of the client.
        ledger: for the unit `client`; None: nothing bounds what several runs spend together.
        noise: the source; None makes one.
    """

    def __init__(
        self, plan: UpdatePlan, *, name: str, ledger: Ledger | None = None, noise: SecureNoise | None = None
    ) -> None:
        self.plan, self.name, self.ledger = plan, name, ledger
        self._noise = noise or SecureNoise()

    @property
    def terms(self) -> str:
        """The plan's."""
        return self.plan.terms

    def charge(self, *, run: str, round_: int) -> None:
        """Charges the ledger for a round's release, once however often asked; to be made before it leaves.

        Raises:
            BudgetError: a round beyond those that epsilon is stated for, or more than the ledger's budget.
        """
        plan = self.plan
        if not 0 <= round_ < plan.rounds:
            said = f"round {round_ + 1} of a run whose epsilon is stated for {plan.rounds} rounds: nothing is sent"
            raise BudgetError(said, spent=math.nan, asked=math.inf, budget=math.nan)
        if self.ledger is not None:
            self.ledger.charge((run, self.name, round_), replace(plan.spec, steps=1))

    def release(self, change: Mapping[str, Tensor], *, run: str, round_: int) -> dict[str, Tensor]:
        """A round's change, clipped and with own noise: float32 by key.

        Args:
            change: by key, finite values.
            run: the federation's run.
            round_: from 0.

        Raises:
            BudgetError: as `charge`.
        """
        assert self.plan.integer is None
        self.charge(run=run, round_=round_)
        short = clipped(change, self.plan.clip)
        noised = self._noise.release(
            list(short.values()), noise_multiplier=self.plan.noise_multiplier, max_grad_norm=self.plan.clip, write=True
        )
        return {key: value.to(torch.float32) for key, value in zip(short, noised, strict=True)}

    def release_integers(self, vector: Tensor, *, run: str, round_: int) -> Tensor:
        """A round's change (n,), clipped, as integers with this client's share of the noise: int64 (n,).

        Raises:
            BudgetError: as `charge`.
            InputError: a longer vector than is accounted for.
        """
        plan, integer = self.plan, self.plan.integer
        assert integer is not None
        if len(vector) > integer.dim:
            raise InputError(f"a change of {len(vector)} values, where noise is accounted for {integer.dim}")
        self.charge(run=run, round_=round_)
        whole = rounded(vector, granularity=plan.granularity, clip=plan.clip, noise=self._noise)
        return whole + skellam(whole.shape, variance=integer.variance, noise=self._noise)

    def facts(self, round_: int) -> dict[str, float]:
        """For the round's log: epsilon up to it, as of a client that was in every round."""
        if not self.plan.noise_multiplier:
            return {}
        return {"epsilon": _spent(replace(self.plan.spec, steps=round_ + 1)).epsilon}

    def record(self) -> dict[str, Any]:
        """The plan's, for `run.json`."""
        return self.plan.record()
