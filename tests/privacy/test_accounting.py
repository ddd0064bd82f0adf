import json
import math
from dataclasses import replace

import dp_accounting
import pytest
from dp_accounting import pld, rdp
from scipy import optimize, stats

from deltaw.core.errors import InputError, MissingExtraError
from deltaw.privacy import accounting
from deltaw.privacy.accounting import (
    IntegerSum,
    PrivacySpec,
    Spent,
    across_organisations,
    calibrate,
    calibrate_integers,
    check_delta,
    collusion,
    epsilon,
    statement,
    steps_left,
)
from deltaw.privacy.integer_noise import norm_bound

DELTA = 1e-5


def spec(**changes):
    return PrivacySpec(
        **{"unit": "example", "sampling_rate": 0.01, "noise_multiplier": 1.0, "steps": 1000, "delta": DELTA, **changes}
    )


FULL = spec(unit="client", sampling_rate=1.0, sampling="full", noise_multiplier=4.0, steps=10)
SKELLAM = IntegerSum(name="skellam", clients=4, variance=4e8, l2=1e4, dim=5000)


def oracle(*runs, delta=DELTA):
    """Both of dp-accounting's accountants over (rate, multiplier, steps)."""
    event = dp_accounting.ComposedDpEvent(
        [
            dp_accounting.SelfComposedDpEvent(
                dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(multiplier)), steps
            )
            for rate, multiplier, steps in runs
        ]
    )
    found = []
    for accountant in (pld.PLDAccountant(), rdp.RdpAccountant()):
        accountant.compose(event)
        found.append(accountant.get_epsilon(delta))
    return found


def analytic(sigma, delta=DELTA):
    """The Gaussian mechanism's exact epsilon (Balle and Wang 2018, Theorem 8)."""

    def excess(e):
        return stats.norm.cdf(0.5 / sigma - e * sigma) - math.exp(e) * stats.norm.cdf(-0.5 / sigma - e * sigma) - delta

    return optimize.brentq(excess, 0, 100)


def test_the_known_numbers():
    spent = epsilon(spec())
    assert round(spent.epsilon_pld, 4) == 1.8282 and round(spent.epsilon_rdp, 4) == 2.1014
    assert spent.epsilon == spent.epsilon_pld and spent.delta == DELTA


@pytest.mark.parametrize(
    "runs",
    [
        [(0.05, 1.3, 400)],
        [(0.01, 1.0, 300), (0.01, 1.0, 700)],
        [(0.02, 0.9, 200), (0.05, 2.0, 50), (1.0, 6.0, 3)],
        [(0.001, 0.8, 300), (0.01, 1.0, 1)],
    ],
)
def test_runs_compose_as_dp_accounting_composes_them(runs):
    spent = epsilon([spec(sampling_rate=q, noise_multiplier=s, steps=n) for q, s, n in runs])
    by_pld, by_rdp = oracle(*runs)
    assert spent.epsilon_pld == pytest.approx(by_pld, rel=1e-4)
    assert spent.epsilon_rdp == pytest.approx(by_rdp, rel=1e-9)
    assert spent.epsilon_pld < spent.epsilon_rdp


def test_rdp_is_as_opacus_has_it():
    from opacus.accountants import RDPAccountant

    other = RDPAccountant()
    other.history = [(1.0, 0.01, 1000), (1.5, 0.02, 100)]
    both = [spec(), spec(noise_multiplier=1.5, sampling_rate=0.02, steps=100)]
    # Opacus has other orders; the minimum over orders is flat.
    assert epsilon(both).epsilon_rdp == pytest.approx(other.get_epsilon(DELTA), rel=5e-3)


@pytest.mark.parametrize("multiplier, steps", [(4.0, 10), (1.0, 1), (12.0, 100)])
def test_full_batches_are_the_gaussian_mechanism(multiplier, steps):
    spent = epsilon(replace(FULL, noise_multiplier=multiplier, steps=steps))
    assert spent.epsilon_pld == pytest.approx(analytic(multiplier / math.sqrt(steps)), rel=1e-3)


def test_no_steps_no_noise_and_a_delta_of_their_own():
    assert epsilon(spec(steps=0)) == Spent(0.0, 0.0, DELTA)
    assert epsilon([], delta=1e-6) == Spent(0.0, 0.0, 1e-6)
    assert epsilon([spec(), spec(noise_multiplier=0.0, steps=1)]).epsilon == math.inf
    assert epsilon(spec(noise_multiplier=0.0, steps=0)).epsilon == 0
    assert epsilon([spec(delta=1e-6), spec(delta=1e-7, steps=0)], delta=DELTA) == epsilon(spec())
    with pytest.raises(InputError, match="deltas"):
        epsilon([spec(), spec(delta=1e-6)])
    with pytest.raises(InputError, match="deltas"):
        epsilon([])
    with pytest.raises(InputError, match="client and example do not compose"):
        epsilon([spec(), FULL])


def test_hardly_any_noise_is_told_in_little_time(capfd):
    spent = epsilon(spec(noise_multiplier=0.02, sampling_rate=0.5, steps=100))
    assert 1e4 < spent.epsilon_pld < 1e6
    absurd = epsilon(spec(noise_multiplier=1e-3, sampling_rate=1.0, steps=100))
    assert absurd.epsilon_pld is None and 1e6 < absurd.epsilon < 1e9
    out, err = capfd.readouterr()
    assert not out and not err


@pytest.mark.parametrize("target, rate, steps", [(3.0, 0.05, 400), (0.1, 0.01, 1000), (2.0, 1.0, 20)])
def test_calibrated_noise_stays_in_the_budget_and_less_does_not(target, rate, steps):
    multiplier = calibrate(target_epsilon=target, delta=DELTA, sampling_rate=rate, steps=steps)
    run = spec(sampling_rate=rate, steps=steps, noise_multiplier=multiplier)
    assert 0.995 * target < epsilon(run).epsilon <= target
    assert epsilon(replace(run, noise_multiplier=multiplier * 0.997)).epsilon > target
    left = steps_left(target_epsilon=target, delta=DELTA, sampling_rate=rate, noise_multiplier=multiplier)
    assert epsilon(replace(run, steps=left)).epsilon <= target < epsilon(replace(run, steps=left + 1)).epsilon
    assert steps <= left < steps * 1.02 + 1


def test_calibration_counts_what_was_spent_before():
    already = [spec()]
    multiplier = calibrate(target_epsilon=2.5, delta=DELTA, sampling_rate=1.0, steps=50, already=already)
    new = spec(sampling_rate=1.0, steps=50, noise_multiplier=multiplier)
    assert 2.48 < epsilon([*already, new]).epsilon <= 2.5
    assert steps_left(target_epsilon=1.83, delta=DELTA, sampling_rate=0.5, noise_multiplier=0.7, already=already) == 0
    for function, more in ((calibrate, {"steps": 10}), (steps_left, {"noise_multiplier": 1.0})):
        with pytest.raises(InputError, match=r"epsilon 1\.828 is spent of 1.5: nothing is left"):
            function(target_epsilon=1.5, delta=DELTA, sampling_rate=0.1, already=already, **more)
        with pytest.raises(InputError, match="target epsilon of 0"):
            function(target_epsilon=0, delta=DELTA, sampling_rate=0.1, **more)


def test_what_no_noise_can_do_is_refused(monkeypatch):
    monkeypatch.setattr(accounting, "LARGEST_MULTIPLIER", 20.0)
    with pytest.raises(InputError, match="no noise keeps 1000000 steps"):
        calibrate(target_epsilon=0.01, delta=DELTA, sampling_rate=1.0, steps=10**6)


def test_the_integer_sum_costs_nearly_what_the_gaussian_does():
    integer = epsilon(PrivacySpec.of_integers(SKELLAM, steps=10, delta=DELTA))
    gaussian = epsilon(replace(FULL, noise_multiplier=SKELLAM.noise_multiplier))
    assert SKELLAM.noise_multiplier == pytest.approx(4.0)
    assert integer.epsilon_pld is None and integer.epsilon == integer.epsilon_rdp
    assert gaussian.epsilon_rdp <= integer.epsilon * (1 + 2e-3) and integer.epsilon < 1.02 * gaussian.epsilon_rdp
    discrete = PrivacySpec.of_integers(replace(SKELLAM, name="discrete-gaussian"), steps=10, delta=DELTA)
    assert epsilon(discrete).epsilon == pytest.approx(integer.epsilon, rel=1e-3)


def test_integers_and_floats_compose_by_rdp():
    integer = PrivacySpec.of_integers(SKELLAM, steps=10, delta=DELTA)
    both = epsilon([integer, FULL])
    accountant = rdp.RdpAccountant(orders=accounting.WHOLE_ORDERS)
    # Of the same noise multiplier: twenty steps of the Gaussian, but for the Skellam's small excess.
    accountant.compose(dp_accounting.GaussianDpEvent(4.0), 20)
    assert both.epsilon_pld is None
    assert both.epsilon == pytest.approx(accountant.get_epsilon(DELTA), rel=1e-3)


@pytest.mark.parametrize("name", ["skellam", "discrete-gaussian"])
def test_calibrated_integers_stay_in_the_budget(name):
    l2 = norm_bound(clip=1.0, granularity=1e-3, dim=300)
    asked = IntegerSum(name=name, clients=3, variance=0.0, l2=l2, dim=300)
    found = calibrate_integers(asked, target_epsilon=3.0, delta=DELTA, steps=10)
    assert replace(found, variance=0.0) == asked
    assert 2.995 < epsilon(PrivacySpec.of_integers(found, steps=10, delta=DELTA)).epsilon <= 3.0
    already = [PrivacySpec.of_integers(found, steps=10, delta=DELTA)]
    more = calibrate_integers(asked, target_epsilon=4.0, delta=DELTA, steps=10, already=already)
    assert 3.99 < epsilon([*already, PrivacySpec.of_integers(more, steps=10, delta=DELTA)]).epsilon <= 4.0
    with pytest.raises(InputError, match="no noise keeps"):
        calibrate_integers(asked, target_epsilon=1e-4, delta=DELTA, steps=10**6)


def test_colluders_change_nothing_where_each_adds_its_own_noise():
    for run in (spec(), FULL):
        table = collusion(run, clients=5, noise="own")
        assert table == dict.fromkeys(range(5), epsilon(run).epsilon)


def test_colluders_take_their_share_of_the_noise_off():
    table = collusion(FULL, clients=4, noise="shared")
    assert list(table) == [0, 1, 2, 3]
    for colluders, value in table.items():
        sigma = 4.0 * math.sqrt((4 - colluders) / 4)
        assert value == pytest.approx(analytic(sigma / math.sqrt(10)), rel=1e-3)
    # The last honest client has its own share, half of the standard deviation.
    assert table[3] == epsilon(replace(FULL, noise_multiplier=2.0)).epsilon

    integers = collusion(PrivacySpec.of_integers(SKELLAM, steps=10, delta=DELTA), clients=4, noise="shared")
    alone = PrivacySpec.of_integers(replace(SKELLAM, clients=1), steps=10, delta=DELTA)
    assert integers[3] == epsilon(alone).epsilon
    assert sorted(integers.values()) == list(integers.values())


def test_collusion_that_makes_no_sense_is_refused():
    with pytest.raises(InputError, match="hides a client, not a unit 'example'"):
        collusion(spec(), clients=3, noise="shared")
    with pytest.raises(InputError, match="1 or more"):
        collusion(spec(), clients=0, noise="own")
    with pytest.raises(InputError, match="not the 4 of the integer noise"):
        collusion(PrivacySpec.of_integers(SKELLAM, steps=1, delta=DELTA), clients=5, noise="shared")


def test_a_customer_of_two_banks_pays_for_both():
    runs = {"bank-a": [spec(unit="customer")], "bank-b": [spec(unit="customer", noise_multiplier=2.0)]}
    together, sentence = across_organisations(runs, delta=DELTA)
    assert together == epsilon([*runs["bank-a"], *runs["bank-b"]])
    assert together.epsilon > 1.83
    assert "bank-a and bank-b" in sentence and f"{together.epsilon:.3g}" in sentence and "bank-a 1.83" in sentence


@pytest.mark.parametrize("delta, examples", [(1e-3, 1000), (1e-5, 10**6), (0.0, 10), (1e-5, 0)])
def test_a_delta_that_says_nothing_is_refused(delta, examples):
    with pytest.raises(InputError, match="set a smaller delta"):
        check_delta(delta, examples)
    check_delta(1e-5, 99_999)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"unit": "row"}, "unit 'row' .known: example, customer, client"),
        ({"adjacency": "replace-one"}, "only add-or-remove-one"),
        ({"sampling": "shuffle"}, "shuffled epochs, are not accounted"),
        ({"sampling": "full"}, "sampling_rate 0.01"),
        ({"sampling_rate": 0.0}, "sampling_rate 0.0"),
        ({"noise_multiplier": -1.0}, "noise_multiplier -1.0"),
        ({"noise_multiplier": math.nan}, "noise_multiplier nan"),
        ({"steps": -1}, "steps -1"),
        ({"delta": 1.0}, "delta 1.0"),
        ({"integer": SKELLAM}, "sampling_rate 0.01"),
        ({"integer": SKELLAM, "sampling_rate": 1.0}, "the integer noise's is 4.0"),
    ],
)
def test_wrong_specifications_are_refused(changes, says):
    with pytest.raises(InputError, match=says):
        spec(**changes)


def test_several_mistakes_are_told_together():
    with pytest.raises(InputError, match=r"steps -1 .*delta 2"):
        spec(steps=-1, delta=2)


@pytest.mark.parametrize("changes", [{"name": "laplace"}, {"clients": 0}, {"variance": -1.0}, {"l2": 0.0}, {"dim": 0}])
def test_wrong_integer_sums_are_refused(changes):
    with pytest.raises(InputError):
        replace(SKELLAM, **changes)


@pytest.mark.parametrize("one", [spec(), FULL, PrivacySpec.of_integers(SKELLAM, steps=3, delta=DELTA)])
def test_specifications_travel_as_json(one):
    assert PrivacySpec.from_json(json.loads(json.dumps(one.as_json()))) == one
    with pytest.raises(InputError, match="not a privacy specification"):
        PrivacySpec.from_json({**one.as_json(), "epochs": 3})


def test_the_statement_says_all_of_it():
    line = statement(epsilon(spec()), spec())
    for part in ("1.828", "2.101", "1e-05", "example", "add-or-remove-one", "Poisson sampling of rate 0.01"):
        assert part in line
    integer = PrivacySpec.of_integers(SKELLAM, steps=1, delta=DELTA)
    assert "Renyi" in statement(epsilon(integer), integer) and "no sampling" in statement(epsilon(integer), integer)


def test_without_dp_accounting_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "dp_accounting", None)
    with pytest.raises(MissingExtraError, match=r"deltaw\[privacy\]"):
        epsilon(spec(steps=17))
