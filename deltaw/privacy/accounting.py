"""What a training costs in privacy, by Google's dp-accounting: privacy loss distributions, and RDP as a cross-check.

A training is (epsilon, delta)-private for its unit U if for all data sets D, D' of which one has one U more than the
other, and all sets S of outcomes, P(M(D) in S) <= e^epsilon P(M(D') in S) + delta. An outcome is everything that
leaves the training: all its noised sums, hence also the weights.

A `PrivacySpec` is `steps` Gaussian mechanisms of noise `noise_multiplier` times the clipping bound, each on a Poisson
sample of rate `sampling_rate`. Several are composed, also where one was chosen by what another gave. PLD (Koskela et
al. 2020; Doroshenko et al. 2022) is tight up to a discretisation that only errs upward; RDP (Mironov 2017) is a looser
upper bound. Integer noise (`integer_noise.py`) is accounted by RDP only.

A unit that is at two organisations, a customer of two banks, is touched by both trainings: their mechanisms compose,
or, where one noised sum holds both updates, it moves that twice. Neither bank's epsilon holds for it alone
(`across_organisations`).
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from deltaw.core.errors import InputError, MissingExtraError
from deltaw.privacy.integer_noise import discrete_gaussian_rdp, l1_bound, skellam_rdp

UNITS = ("example", "customer", "client")
ADJACENCY = "add-or-remove-one"
#: Orders at which the integer mechanisms' bounds hold.
WHOLE_ORDERS = (*range(2, 64), *range(64, 256, 8), 256, 512, 1024)
#: Width of a PLD's cells: dp-accounting's own, and for searches.
FINE, COARSE = 1e-4, 1e-3
#: Above this epsilon RDP's bound is told alone.
LARGEST_PLD = 1e6
#: Where searches end.
LEAST_MULTIPLIER, LARGEST_MULTIPLIER, MOST_STEPS = 1e-3, 1e4, 10**9

#: (sampling rate, noise multiplier, steps)
Group = tuple[float, float, int]


@dataclass(frozen=True, kw_only=True)
class IntegerSum:
    """A sum of clients' integer vectors, each with integer noise of its own.

    Attributes:
        name: the noise, `skellam` or `discrete-gaussian`.
        clients: how many add noise that the observer does not know.
        variance: of one client's noise, in integer units.
        l2: `integer_noise.norm_bound`, what one client changes.
        dim: length of the vectors.
    """

    name: str
    clients: int
    variance: float
    l2: float
    dim: int

    def __post_init__(self) -> None:
        if self.name not in ("skellam", "discrete-gaussian"):
            raise InputError(f"integer noise {self.name!r}; known: discrete-gaussian, skellam")
        if self.clients < 1 or not 0 <= self.variance < math.inf or not self.l2 > 0 or self.dim < 1:
            raise InputError(f"{self}: 1 client or more, a variance from 0 on, l2 above 0 and dim from 1 on are needed")

    @property
    def noise_multiplier(self) -> float:
        """Standard deviation of the whole noise over what one client changes."""
        return math.sqrt(self.clients * self.variance) / self.l2

    def rdp(self, order: float) -> float:
        """Renyi divergence of one sum."""
        if self.name == "skellam":
            l1 = l1_bound(self.l2, self.dim)
            return skellam_rdp(order, l2=self.l2, l1=l1, variance=self.clients * self.variance)
        sigma = math.sqrt(self.variance)
        return discrete_gaussian_rdp(order, l2=self.l2, dim=self.dim, sigma=sigma, clients=self.clients)


@dataclass(frozen=True, kw_only=True)
class PrivacySpec:
    """A number of noised releases of one kind.

    Attributes:
        unit: whose presence is hidden: `example`, `customer` (all rows of one) or `client` (all of an organisation's).
        sampling_rate: chance of a unit to be in a step; 1 for all units in every step.
        noise_multiplier: standard deviation of the noise over the clipping bound.
        steps: releases.
        delta: of the statement.
        adjacency: `add-or-remove-one`.
        sampling: `poisson`, each unit by itself; `full` where the rate is 1.
        integer: the mechanism, where the noise is of integers; `noise_multiplier` is then its own.

    Raises:
        InputError: an unknown unit, adjacency or sampling, or a number out of range.
    """

    unit: str
    sampling_rate: float
    noise_multiplier: float
    steps: int
    delta: float
    adjacency: str = ADJACENCY
    sampling: str = "poisson"
    integer: IntegerSum | None = None

    def __post_init__(self) -> None:
        wrong = []
        if self.unit not in UNITS:
            wrong.append(f"unit {self.unit!r} (known: {', '.join(UNITS)})")
        if self.adjacency != ADJACENCY:
            wrong.append(f"adjacency {self.adjacency!r} (only {ADJACENCY} is accounted)")
        if self.sampling not in ("poisson", "full"):
            wrong.append(f"sampling {self.sampling!r} (poisson or full: others, as shuffled epochs, are not accounted)")
        if not 0 < self.sampling_rate <= 1 or (self.sampling_rate < 1 and (self.sampling == "full" or self.integer)):
            wrong.append(f"sampling_rate {self.sampling_rate} (above 0, up to 1; 1 for full and for integer noise)")
        if not 0 <= self.noise_multiplier < math.inf:
            wrong.append(f"noise_multiplier {self.noise_multiplier} (0 or more)")
        if self.integer and not math.isclose(self.noise_multiplier, self.integer.noise_multiplier, rel_tol=1e-9):
            wrong.append(
                f"noise_multiplier {self.noise_multiplier} (the integer noise's is {self.integer.noise_multiplier})"
            )
        if self.steps < 0:
            wrong.append(f"steps {self.steps} (0 or more)")
        if not 0 < self.delta < 1:
            wrong.append(f"delta {self.delta} (between 0 and 1)")
        if wrong:
            raise InputError(f"privacy cannot be accounted for: {'; '.join(wrong)}")

    @classmethod
    def of_integers(cls, integer: IntegerSum, *, steps: int, delta: float) -> PrivacySpec:
        """`steps` sums under secure aggregation, of all clients."""
        multiplier = integer.noise_multiplier
        return cls(
            unit="client", sampling_rate=1.0, noise_multiplier=multiplier, steps=steps, delta=delta, sampling="full",
            integer=integer,
        )  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        """Plain values, from which `from_json` makes it again."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> PrivacySpec:
        """The inverse of `as_json`.

        Raises:
            InputError: a name that is unknown or missing.
        """
        integer = values.get("integer")
        try:
            return cls(**{**values, "integer": IntegerSum(**integer) if integer else None})
        except TypeError as error:
            raise InputError(f"not a privacy specification: {error}") from None


@dataclass(frozen=True)
class Spent:
    """What was spent: (epsilon, delta).

    Attributes:
        epsilon_pld: by privacy loss distributions; None with integer noise among the mechanisms, and above 10^6.
        epsilon_rdp: by Renyi divergences.
        delta: of both.
    """

    epsilon_pld: float | None
    epsilon_rdp: float
    delta: float

    @property
    def epsilon(self) -> float:
        """The statement: PLD's where there is one."""
        return self.epsilon_rdp if self.epsilon_pld is None else self.epsilon_pld


def epsilon(specs: PrivacySpec | Sequence[PrivacySpec], *, delta: float | None = None) -> Spent:
    """What one or several specifications cost together.

    Args:
        specs: composed; their units must agree.
        delta: of the statement; None takes the specifications' own, which must then agree.

    Raises:
        InputError: units or deltas that differ.
        MissingExtraError: dp-accounting is not installed.
    """
    specs = [specs] if isinstance(specs, PrivacySpec) else list(specs)
    if len(units := sorted({spec.unit for spec in specs})) > 1:
        raise InputError(f"units {' and '.join(units)} do not compose: account for each by itself")
    if delta is None:
        if len(deltas := {spec.delta for spec in specs}) != 1:
            raise InputError(f"deltas {sorted(deltas)}: give the delta of the statement")
        (delta,) = deltas
    return _spent(specs, delta, FINE)


def _spent(specs: Iterable[PrivacySpec], delta: float, width: float) -> Spent:
    specs = [spec for spec in specs if spec.steps]
    if any(not spec.noise_multiplier for spec in specs):
        return Spent(math.inf, math.inf, delta)
    steps: dict[tuple[float, float], int] = {}
    for spec in specs:
        if spec.integer is None:
            kind = (spec.sampling_rate, spec.noise_multiplier)
            steps[kind] = steps.get(kind, 0) + spec.steps
    groups = tuple(sorted((*kind, count) for kind, count in steps.items()))
    integers = tuple((spec.integer, spec.steps) for spec in specs if spec.integer is not None)
    rdp = _by_rdp(groups, integers, delta)
    if not groups and not integers:
        return Spent(0.0, 0.0, delta)
    # A PLD has about epsilon / width cells: large epsilons, which nobody wants, are told less finely or not at all.
    if integers or not rdp < LARGEST_PLD:
        return Spent(None, rdp, delta)
    while not rdp < 1e6 * width:
        width *= 10
    with _quiet():
        return Spent(float(_pld(groups, width).get_epsilon_for_delta(delta)), rdp, delta)


def _event(group: Group) -> Any:
    d = _dp_accounting()
    rate, multiplier, steps = group
    gaussian = d.GaussianDpEvent(multiplier)
    return d.SelfComposedDpEvent(gaussian if rate == 1 else d.PoissonSampledDpEvent(rate, gaussian), steps)


@functools.lru_cache(maxsize=8)
def _pld(groups: tuple[Group, ...], width: float) -> Any:
    """The composed privacy loss distribution; that of all but the last group is kept, as searches vary one."""
    d = _dp_accounting()
    if len(groups) > 1:
        return _pld(groups[:-1], width).compose(_pld(groups[-1:], width))
    accountant = d.pld.PLDAccountant(value_discretization_interval=width)
    accountant.compose(_event(groups[0]))
    return accountant._pld


def _by_rdp(groups: tuple[Group, ...], integers: tuple[tuple[IntegerSum, int], ...], delta: float) -> float:
    d = _dp_accounting()
    with _quiet():
        accountant = d.rdp.RdpAccountant(orders=WHOLE_ORDERS if integers else None)
        for group in groups:
            accountant.compose(_event(group))
        orders, total = accountant.orders, accountant.rdp.copy()
        for integer, steps in integers:
            total += [steps * integer.rdp(float(order)) for order in orders]
        return float(d.rdp.compute_epsilon(orders, total, delta)[0])


def _dp_accounting() -> Any:
    try:
        import dp_accounting  # type: ignore[import-untyped]
        import dp_accounting.pld
        import dp_accounting.rdp
    except ImportError:
        raise MissingExtraError("dp-accounting is not installed: pip install 'deltaw[privacy]'") from None
    return dp_accounting


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """RDP says on stderr which orders it leaves out; leaving orders out only makes its bound looser."""
    from absl import logging  # type: ignore[import-untyped]

    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def check_delta(delta: float, examples: int) -> None:
    """Refuses a delta at which publishing one unit in the clear would count as private.

    Args:
        delta: the statement's.
        examples: units in the data.

    Raises:
        InputError: delta is 1/examples or more.
    """
    if not 0 < delta * examples < 1:
        raise InputError(
            f"delta {delta:g} with {examples} units; it must be above 0 and below 1/{examples}, as publishing a "
            "random unit's data would satisfy a larger one: set a smaller delta"
        )


def calibrate(
    *,
    target_epsilon: float,
    delta: float,
    sampling_rate: float,
    steps: int,
    already: Sequence[PrivacySpec] = (),
) -> float:
    """The least noise multiplier, to 3 digits after the first (rounded up), with which a training stays in a budget.

    Args:
        target_epsilon: the budget, that of `already` included.
        delta: of the statement.
        sampling_rate: chance of a unit to be in a step.
        steps: of the training to come.
        already: what was spent before.

    Raises:
        InputError: a target of 0 or less, or one that `already` or every noise exceeds.
    """
    return _calibrated(target_epsilon, delta, sampling_rate, steps, tuple(already))


@functools.cache
def _calibrated(
    target_epsilon: float, delta: float, sampling_rate: float, steps: int, already: tuple[PrivacySpec, ...]
) -> float:
    """Seconds of work, and organisations of one size ask for the same."""
    spec = PrivacySpec(
        unit=already[0].unit if already else "example",
        sampling_rate=sampling_rate, noise_multiplier=1.0, steps=steps, delta=delta,
    )  # fmt: skip
    spent = _left(target_epsilon, delta, already)

    def excess(log_multiplier: float, width: float) -> float:
        composed = [*already, replace(spec, noise_multiplier=math.exp(log_multiplier))]
        return _excess(composed, delta, width, target_epsilon)

    high = 0.0
    while excess(high, COARSE) > 0:
        high += 1.0
        if high > math.log(LARGEST_MULTIPLIER):
            raise InputError(
                f"no noise keeps {steps} steps at rate {sampling_rate:g} within epsilon {target_epsilon:g} "
                f"({spent:.3g} is spent): take fewer steps, a lower rate, or a larger target"
            )
    low = high - 1.0
    while excess(low, COARSE) <= 0:
        low -= 1.0
        if low < math.log(LEAST_MULTIPLIER):
            return LEAST_MULTIPLIER
    high = _root(lambda x: excess(x, COARSE), low, high)
    # Finer cells only take epsilon down, by most where steps cost least.
    margin = 0.01
    while excess(high - margin, FINE) <= 0:
        margin *= 4
    found = math.exp(_root(lambda x: excess(x, FINE), high - margin, high + 1e-3))
    unit = 10.0 ** (math.floor(math.log10(found)) - 3)
    multiplier = math.ceil(found / unit) * unit
    while excess(math.log(multiplier), FINE) > 0:
        multiplier += unit
    return float(f"{multiplier:.8g}")


def calibrate_integers(
    integer: IntegerSum,
    *,
    target_epsilon: float,
    delta: float,
    steps: int,
    already: Sequence[PrivacySpec] = (),
) -> IntegerSum:
    """The integer sum with the least variance of each client's noise that stays in a budget, to 1e-4 above.

    Args:
        integer: the sum; its variance is replaced.
        target_epsilon: the budget, that of `already` included.
        delta: of the statement.
        steps: sums to come.
        already: what was spent before.

    Raises:
        InputError: as for `calibrate`.
    """
    spent = _left(target_epsilon, delta, already)

    def sized(log_multiplier: float) -> IntegerSum:
        return replace(integer, variance=(math.exp(log_multiplier) * integer.l2) ** 2 / integer.clients)

    def excess(log_multiplier: float) -> float:
        new = PrivacySpec.of_integers(sized(log_multiplier), steps=steps, delta=delta)
        return _excess([*already, new], delta, FINE, target_epsilon)

    least, largest = math.log(LEAST_MULTIPLIER), math.log(LARGEST_MULTIPLIER)
    if excess(largest) > 0:
        raise InputError(
            f"no noise keeps {steps} sums within epsilon {target_epsilon:g} ({spent:.3g} is spent): take fewer rounds "
            "or a larger target"
        )
    found = _root(excess, least, largest) if excess(least) > 0 else least
    while excess(found) > 0:
        found += 1e-4
    return sized(found)


def _root(excess: Callable[[float], float], low: float, high: float) -> float:
    from scipy.optimize import brentq  # type: ignore[import-untyped]

    return float(brentq(excess, low, high, xtol=1e-4))


def steps_left(
    *,
    target_epsilon: float,
    delta: float,
    sampling_rate: float,
    noise_multiplier: float,
    already: Sequence[PrivacySpec] = (),
) -> int:
    """How many more steps stay within a budget; arguments and errors as `calibrate`'s."""
    spec = PrivacySpec(
        unit=already[0].unit if already else "example",
        sampling_rate=sampling_rate, noise_multiplier=noise_multiplier, steps=1, delta=delta,
    )  # fmt: skip
    _left(target_epsilon, delta, already)

    def excess(log_steps: float, width: float) -> float:
        composed = [*already, replace(spec, steps=round(math.exp(log_steps)))]
        return _excess(composed, delta, width, target_epsilon)

    def fits(steps: int) -> bool:
        return steps == 0 or excess(math.log(steps), FINE) <= 0

    high = 0.0
    while excess(high, COARSE) <= 0:
        high += 3.0
        if high > math.log(MOST_STEPS):
            return MOST_STEPS
    guess = int(math.exp(_root(lambda x: excess(x, COARSE), high - 3.0, high))) if high else 0
    # From the guess by doubled strides to a pair of which one fits, then by halves.
    stride, up = 1, fits(guess)
    while fits(guess + stride) if up else not fits(max(guess - stride, 0)):
        stride *= 2
    least, most = (guess + stride // 2, guess + stride) if up else (max(guess - stride, 0), guess - stride // 2)
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if fits(middle) else (least, middle)
    return least


def _left(target_epsilon: float, delta: float, already: Sequence[PrivacySpec]) -> float:
    if not target_epsilon > 0:
        raise InputError(f"a target epsilon of {target_epsilon}; more than 0 is needed")
    spent = _spent(already, delta, FINE).epsilon
    if spent > target_epsilon:
        raise InputError(f"epsilon {spent:.4g} is spent of {target_epsilon:g}: nothing is left at delta {delta:g}")
    return spent


def _excess(specs: Sequence[PrivacySpec], delta: float, width: float, target: float) -> float:
    return math.log(max(_spent(specs, delta, width).epsilon, 1e-12)) - math.log(target)


def collusion(spec: PrivacySpec, *, clients: int, noise: Literal["own", "shared"]) -> dict[int, float]:
    """Epsilon of an honest client's units, against the server with 0, 1, ... K - 1 of the other clients.

    `own`: the client noises what it sends by itself with all of `noise_multiplier` (example-level DP; update-level
    without secure aggregation). Nobody else's noise is counted on, so nothing changes, whoever colludes.

    `shared`: K clients add 1/K of the variance each, and only the sum is seen (update-level under secure aggregation).
    c colluders know their own noise and take it off: sigma shrinks by sqrt((K - c)/K), with c = K - 1 to the client's
    own share.

    Args:
        spec: what an observer without colluders is given.
        clients: K.
        noise: whose noise protects.

    Raises:
        InputError: fewer than one client, another number than the integer sum's, shared noise at another unit.
    """
    if clients < 1 or (spec.integer is not None and spec.integer.clients != clients):
        known = f", not the {spec.integer.clients} of the integer noise" if spec.integer else "; 1 or more are needed"
        raise InputError(f"collusion among {clients} clients{known}")
    if noise == "own":
        return dict.fromkeys(range(clients), epsilon(spec).epsilon)
    if spec.unit != "client":
        raise InputError(f"noise shared by clients hides a client, not a unit {spec.unit!r}: set unit client")
    table = {}
    for colluders in range(clients):
        honest = clients - colluders
        integer = replace(spec.integer, clients=honest) if spec.integer else None
        multiplier = integer.noise_multiplier if integer else spec.noise_multiplier * math.sqrt(honest / clients)
        table[colluders] = epsilon(replace(spec, noise_multiplier=multiplier, integer=integer)).epsilon
    return table


def across_organisations(
    specs: Mapping[str, Sequence[PrivacySpec]], *, delta: float, noise: Literal["own", "shared"] = "own"
) -> tuple[Spent, str]:
    """What holds for somebody whose data is at all m given organisations, with a sentence that says so.

    `own`: every organisation releases by itself (example-level DP; update-level without secure aggregation). That is m
    mechanisms, which compose.

    `shared`: the organisations' updates are in the same noised sums (update-level under secure aggregation). That is
    one mechanism, of which a group of m changes m times as much: sigma counts as sigma / m. For any mechanism m = 2
    gives (2 epsilon, (1 + e^epsilon) delta) (Dwork and Roth 2014, Theorem 2.2); knowing the noise gives less.

    Args:
        specs: each organisation's releases.
        delta: of the statement.
        noise: whose noise protects, as for `collusion`.

    Raises:
        InputError: no organisations; shared noise that they state differently, or at another unit than the client.
    """
    own = [list(releases) for releases in specs.values()]
    if not own:
        raise InputError("no organisations: name at least one with its releases")
    names = " and ".join(specs)
    if noise == "own":
        together = epsilon([spec for releases in own for spec in releases], delta=delta)
        each = ", ".join(f"{name} {epsilon(list(r), delta=delta).epsilon:.3g}" for name, r in specs.items())
        return together, (
            f"A unit whose data is at {names} is touched by each training, and their losses compose: for it epsilon is "
            f"{together.epsilon:.3g} at delta {delta:g}, where each alone states {each}."
        )
    if any(releases != own[0] for releases in own) or any(spec.unit != "client" for spec in own[0]):
        raise InputError("shared noise is of one sum for the unit client: give all organisations the same releases")
    together = epsilon([_of_group(spec, len(own)) for spec in own[0]], delta=delta)
    return together, (
        f"A unit whose data is at {names} is in {len(own)} updates of the same noised sums, which it moves {len(own)} "
        f"times as far: for it epsilon is {together.epsilon:.3g} at delta {delta:g}, where each alone states "
        f"{epsilon(own[0], delta=delta).epsilon:.3g}."
    )


def _of_group(spec: PrivacySpec, size: int) -> PrivacySpec:
    """The mechanism as a group of that many clients sees it."""
    integer = replace(spec.integer, l2=size * spec.integer.l2) if spec.integer else None
    multiplier = integer.noise_multiplier if integer else spec.noise_multiplier / size
    return replace(spec, noise_multiplier=multiplier, integer=integer)


def statement(spent: Spent, spec: PrivacySpec) -> str:
    """One line with all that an epsilon means nothing without."""
    how = "Renyi divergences" if spent.epsilon_pld is None else f"PLD; {spent.epsilon_rdp:.4g} by RDP"
    sampled = f"Poisson sampling of rate {spec.sampling_rate:.4g}" if spec.sampling_rate < 1 else "no sampling"
    return (
        f"epsilon {spent.epsilon:.4g} ({how}) at delta {spent.delta:g} for one {spec.unit}, {spec.adjacency}, {sampled}"
    )
