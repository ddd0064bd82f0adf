"""Noise on whole updates: joint clipping, exact statistics, what dropouts leave, what is accounted and charged."""

import math
from dataclasses import replace

import pytest
import torch
from scipy import stats

from deltaw.core.errors import InputError
from deltaw.core.generators import generator
from deltaw.privacy.accounting import PrivacySpec, across_organisations, collusion, epsilon
from deltaw.privacy.integer_noise import norm_bound
from deltaw.privacy.ledger import BudgetError, Ledger
from deltaw.privacy.noise import SecureNoise
from deltaw.privacy.updates import TAIL, UpdateNoise, clipped, plan_updates

DELTA = 1e-5
LARGEST = 2**31 - 1


def key(number):
    return SecureNoise(insecure_test_key=number.to_bytes(32, "big"))


def own(**changes):
    asked = {"clip": 2.0, "noise_multiplier": 4.0, "target_epsilon": None, "rounds": 5, "delta": DELTA, "clients": 5}
    return plan_updates(**{**asked, **changes})


def shared(**changes):
    return own(**{"stay": 4, "largest": LARGEST // 5, "dim": 3000, **changes})


def change(*sizes, seed=0, scale=1.0):
    draw = generator(seed, "change")
    return {f"k{i}": scale * torch.randn(size, generator=draw) for i, size in enumerate(sizes)}


def flat(tensors):
    return torch.cat([tensors[name].double().reshape(-1) for name in sorted(tensors)])


def test_all_tensors_are_clipped_as_one():
    long = change((4, 3), (7,), (2, 2, 2))
    assert flat(long).norm() > 2.0
    short = clipped(long, 2.0)
    torch.testing.assert_close(flat(short), flat(long) * 2.0 / flat(long).norm(), rtol=1e-11, atol=0)
    assert flat(short).norm() <= 2.0
    assert short["k2"].shape == (2, 2, 2)
    small = {name: 0.1 * value for name, value in long.items()}
    assert torch.equal(flat(clipped(small, 2.0)), flat(small))
    assert not flat(clipped({"k": torch.zeros(3)}, 2.0)).any()


def test_own_noise_is_the_clipped_change_with_a_gaussian_of_the_stated_width():
    update = change((200, 500), (1000,), scale=3.0)
    released = UpdateNoise(own(), name="a", noise=key(1)).release(update, run="r", round_=0)
    assert {name: value.shape for name, value in released.items()} == {n: v.shape for n, v in update.items()}
    noise = (flat(released) - flat(clipped(update, 2.0))) / 8.0
    assert stats.kstest(noise.numpy(), "norm").pvalue > 1e-3
    n = len(noise)
    assert abs(float(noise.square().sum()) - n) < 5 * math.sqrt(2 * n)
    again = UpdateNoise(own(), name="a", noise=key(2)).release(update, run="r", round_=0)
    assert not torch.equal(released["k0"], again["k0"])


def test_without_noise_the_change_is_as_it_is_but_for_the_grid():
    update = change((3, 2), (4,), scale=0.1)
    whole = UpdateNoise(own(noise_multiplier=0), name="a").release(update, run="r", round_=0)
    assert torch.equal(flat(whole), flat(update))
    plan = shared(noise_multiplier=0)
    vectors = [flat(change((5,), seed=seed, scale=0.1)) for seed in range(4)]
    sums = sum(UpdateNoise(plan, name="a").release_integers(vector, run="r", round_=0) for vector in vectors)
    torch.testing.assert_close(plan.decode(sums, 5), sum(vectors), rtol=0, atol=4 * plan.granularity)


@pytest.mark.parametrize("there", [4, 5])
def test_shared_noise_of_those_that_stay_is_at_least_what_is_stated(there):
    plan = shared()
    vector = flat(change((3000,), scale=0.001))
    draws = []
    for number in range(6):
        # Every client has the same change, so that what is left of the sum beside it is noise and rounding.
        sums = sum(
            UpdateNoise(plan, name="a", noise=key(100 * number + client)).release_integers(vector, run="r", round_=0)
            for client in range(there)
        )
        draws.append(plan.decode(sums, len(vector)) - there * vector)
    noise = torch.cat(draws)
    stated, n = (plan.noise_multiplier * plan.clip) ** 2, len(noise)
    expected = stated * there / 4
    assert float(noise.square().mean()) == pytest.approx(expected, rel=5 * math.sqrt(2 / n))
    assert expected >= stated
    assert stats.kstest((noise / math.sqrt(expected)).numpy(), "norm").pvalue > 1e-3


def test_integers_of_a_long_change_are_no_longer_than_the_bound_that_is_accounted():
    plan = shared(noise_multiplier=0)
    vector = flat(change((3000,), scale=10.0))
    whole = UpdateNoise(plan, name="a").release_integers(vector, run="r", round_=0)
    assert float(whole.double().norm()) <= plan.integer.l2
    torch.testing.assert_close(
        plan.decode(whole, 3000), vector * plan.clip / vector.norm(), rtol=0, atol=1.01 * plan.granularity
    )
    with pytest.raises(InputError, match="3001 values"):
        UpdateNoise(plan, name="a").release_integers(torch.zeros(3001), run="r", round_=0)


@pytest.mark.parametrize(("multiplier", "summed", "stay"), [(0.1, 5, 4), (4.0, 50, 34), (50.0, 1000, 667)])
def test_the_grid_is_fine_and_leaves_the_words_room(multiplier, summed, stay):
    largest = LARGEST // summed
    plan = shared(noise_multiplier=multiplier, stay=stay, largest=largest, dim=16_400_000)
    assert plan.integer.l2 + TAIL * math.sqrt(plan.integer.variance) <= largest
    assert plan.integer.l2 == norm_bound(clip=2.0, granularity=plan.granularity, dim=16_400_000)
    assert plan.spec.noise_multiplier == pytest.approx(multiplier, rel=1e-9)
    if summed <= 50:
        assert plan.integer.l2 * plan.granularity <= 2.0 * (1 + 3e-6)


def test_what_is_accounted_is_what_the_mechanisms_are():
    plan = own()
    gaussian = PrivacySpec(
        unit="client", sampling_rate=1.0, noise_multiplier=4.0, steps=5, delta=DELTA, sampling="full"
    )
    assert plan.spec == gaussian
    record, spent = plan.record(), epsilon(gaussian)
    assert (record["epsilon"], record["epsilon_rdp"]) == (spent.epsilon, spent.epsilon_rdp)
    assert (record["level"], record["unit"], record["sampling"], record["noise"]) == (
        "update", "client", "full", "gaussian",
    )  # fmt: skip
    assert record["collusion"] == dict.fromkeys("01234", spent.epsilon)
    noise = UpdateNoise(plan, name="a")
    assert noise.facts(1)["epsilon"] == epsilon(replace(gaussian, steps=2)).epsilon < spent.epsilon
    assert noise.facts(4)["epsilon"] == record["epsilon"]

    summed = shared()
    assert summed.spec == PrivacySpec.of_integers(summed.integer, steps=5, delta=DELTA)
    record, table = summed.record(), collusion(summed.spec, clients=4, noise="shared")
    # Five clients of whom four stay: with four colluders, as with three, the client's own share is left.
    assert record["collusion"] == {str(count): table[min(count, 3)] for count in range(5)}
    assert record["epsilon"] == table[0] < table[1] < table[3]
    assert record["noise_clients"] == 4 and record["noise"] == "skellam"
    # The integers cost hardly more than the Gaussian by the same accountant, for which it has whole orders only.
    assert spent.epsilon_rdp < record["epsilon"] < spent.epsilon_rdp * (1 + 1e-3)


def test_a_target_is_kept_and_nearly_used():
    for plan in (make(noise_multiplier=None, target_epsilon=6.0) for make in (own, shared)):
        assert 5.98 < plan.record()["epsilon"] <= 6.0 and plan.record()["target_epsilon"] == 6.0
        less = plan.noise_multiplier * 0.99
        changes = {"noise_multiplier": less}
        if plan.integer is not None:
            changes["integer"] = replace(plan.integer, variance=plan.integer.variance * 0.99**2)
        assert epsilon(replace(plan.spec, **changes)).epsilon > 6.0


def test_no_noise_promises_nothing():
    plan = own(noise_multiplier=0)
    assert "epsilon" not in plan.record() and "nothing is hidden" in plan.record()["statement"]
    assert UpdateNoise(plan, name="a").facts(0) == {}


@pytest.mark.parametrize(
    ("plan", "changes"),
    [
        (own, {"clip": 2.5}),
        (own, {"noise_multiplier": 4.5}),
        (own, {"rounds": 6}),
        (own, {"delta": 1e-6}),
        (shared, {"stay": 3}),
        (shared, {"dim": 3001}),
        (shared, {"noise_multiplier": 4.5}),
    ],
)
def test_terms_tell_plans_apart(plan, changes):
    assert plan().terms == plan(clip=2).terms != plan(**changes).terms


def test_plans_that_cannot_be_are_refused():
    with pytest.raises(InputError, match="does not fit into words"):
        shared(noise_multiplier=1e6, largest=LARGEST // 50)
    for both in ({"noise_multiplier": None}, {"target_epsilon": 3.0}):
        with pytest.raises(InputError, match="expected one"):
            own(**both)


@pytest.mark.parametrize("make", [own, shared])
def test_a_ledger_is_charged_once_a_round_and_refuses_what_is_over_its_budget(tmp_path, make):
    plan = make()
    two = epsilon(replace(plan.spec, steps=2)).epsilon
    ledger = Ledger.open(tmp_path / "a.jsonl", two * 1.01, DELTA, unit="client")
    noise = UpdateNoise(plan, name="a", ledger=ledger)

    def released(round_):
        if make is own:
            return noise.release({"k": torch.ones(3)}, run="r", round_=round_)
        return noise.release_integers(torch.ones(3), run="r", round_=round_)

    noise.charge(run="r", round_=0)
    released(0)
    released(0)
    assert [entry.key for entry in ledger.entries()] == ["r/a/0"]
    assert ledger.entries()[0].spec == replace(plan.spec, steps=1)
    released(1)
    assert ledger.spent().epsilon == pytest.approx(two, rel=1e-9)
    with pytest.raises(BudgetError, match="over the budget"):
        released(2)
    assert len(ledger.entries()) == 2


def test_rounds_beyond_the_statement_are_refused_without_a_ledger_too():
    noise = UpdateNoise(own(), name="a")
    for round_ in (5, -1):
        with pytest.raises(BudgetError, match="stated for 5 rounds"):
            noise.release({"k": torch.ones(3)}, run="r", round_=round_)


def test_releases_without_noise_do_not_fit_any_budget(tmp_path):
    ledger = Ledger.open(tmp_path / "a.jsonl", 100.0, DELTA, unit="client")
    with pytest.raises(BudgetError, match="inf"):
        UpdateNoise(own(noise_multiplier=0), name="a", ledger=ledger).charge(run="r", round_=0)


def test_data_at_two_organisations_of_one_sum_is_a_group_and_of_two_releases_composes():
    plan = own()
    together, sentence = across_organisations({"a": [plan.spec], "b": [plan.spec]}, delta=DELTA)
    assert together == epsilon([plan.spec, plan.spec]) and "compose" in sentence

    half = epsilon(replace(plan.spec, noise_multiplier=2.0))
    group, sentence = across_organisations({"a": [plan.spec], "b": [plan.spec]}, delta=DELTA, noise="shared")
    assert group == half and "2 times as far" in sentence and f"{half.epsilon:.3g}" in sentence
    # One sum moved twice as far is more than two sums moved once, and below the bound that knows no mechanism.
    assert group.epsilon > together.epsilon
    alone = epsilon(plan.spec).epsilon
    general = (1 + math.exp(alone)) * DELTA
    assert epsilon(replace(plan.spec, noise_multiplier=2.0), delta=general).epsilon < 2 * alone

    summed = shared()
    three = {name: [summed.spec] for name in "abc"}
    group, _ = across_organisations(three, delta=DELTA, noise="shared")
    integer = replace(summed.integer, l2=3 * summed.integer.l2)
    assert group == epsilon(PrivacySpec.of_integers(integer, steps=5, delta=DELTA))


def test_groups_of_one_sum_need_one_sum():
    different = {"a": [own().spec], "b": [own(noise_multiplier=5.0).spec]}
    example = {name: [replace(own().spec, unit="example")] for name in "ab"}
    for specs in (different, example):
        with pytest.raises(InputError, match="the same releases"):
            across_organisations(specs, delta=DELTA, noise="shared")
    with pytest.raises(InputError, match="no organisations"):
        across_organisations({}, delta=DELTA)
