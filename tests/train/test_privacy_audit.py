"""The audit of private training: its bound from below stays under what is stated, and finds out what breaks privacy."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch
from scipy import stats

from deltaw.core.generators import generator
from deltaw.privacy.noise import SecureNoise

SOURCE = Path(__file__).parents[2] / "benchmarks" / "privacy_audit.py"
SETTING = dict(canaries=600, steps=24, sampling_rate=0.3)


@pytest.fixture(scope="module")
def privacy_audit():
    spec = importlib.util.spec_from_file_location("privacy_audit", SOURCE)
    module = sys.modules["privacy_audit"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["privacy_audit"]


def repeatable():
    return SecureNoise(insecure_test_key=bytes(range(32)))


def test_the_bound_lies_below_the_statement_and_rises_without_noise(privacy_audit):
    found = {}
    for drawn in (2.0, 0.0):
        found[drawn] = privacy_audit.audit(privacy_audit.Setting(2.0, drawn, **SETTING), noise=repeatable())
    assert 3 < found[2.0].stated_epsilon < 4 and found[0.0].stated_epsilon == found[2.0].stated_epsilon
    assert 0.3 < found[2.0].lower_bound < found[2.0].stated_epsilon
    assert found[0.0].lower_bound > found[0.0].stated_epsilon
    assert found[0.0].right == found[0.0].guesses == 600


@pytest.mark.parametrize("broken", ["each tensor by itself", "not at all"])
def test_clipping_that_is_broken_shows(privacy_audit, monkeypatch, broken):
    """The noise is right and each canary moves the sum by more than it was made for."""
    own = privacy_audit.PlantedSink

    class Unclipped(own):
        def end(self):
            bound, self.max_grad_norm = self.max_grad_norm, 1e9
            monkeypatch.setattr(privacy_audit, "LENGTH", 100.0 * bound / 1e9)
            super().end()
            self.max_grad_norm = bound

    class ByTensor(own):
        # Two tensors, each clipped to the bound: together longer by the root of two.
        def end(self):
            bound, self.max_grad_norm = self.max_grad_norm, self.max_grad_norm * math.sqrt(2)
            super().end()
            self.max_grad_norm = bound

    monkeypatch.setattr(privacy_audit, "PlantedSink", Unclipped if broken == "not at all" else ByTensor)
    setting = privacy_audit.Setting(6.0, 6.0, **SETTING)
    found = privacy_audit.audit(setting, noise=repeatable())
    monkeypatch.setattr(privacy_audit, "PlantedSink", own)
    right = privacy_audit.audit(setting, noise=repeatable())
    assert found.lower_bound > right.lower_bound
    assert (found.lower_bound > found.stated_epsilon) == (broken == "not at all")


def test_p_values_are_those_of_randomized_response(privacy_audit):
    """At delta 0 the theorem is a binomial tail, and randomized response reaches it."""
    for eps, guesses, right in [(0.0, 10, 8), (1.0, 50, 43), (3.0, 200, 197)]:
        chance = math.exp(eps) / (1 + math.exp(eps))
        expected = stats.binomtest(right, guesses, chance, alternative="greater").pvalue
        assert privacy_audit.p_value(500, guesses, right, eps, 0.0) == pytest.approx(expected, rel=1e-9)
    # Of 2000 trainings by randomized response 5 % may be refuted at their own epsilon.
    draw = generator(0, "responses")
    rights = (torch.rand(2000, 100, generator=draw) < math.e / (1 + math.e)).sum(1).tolist()
    bounds = {right: privacy_audit.lower_bound(100, 100, right, 0.0, 0.95) for right in set(rights)}
    refuted = sum(bounds[right] > 1.0 for right in rights) / 2000
    assert 0.02 < refuted < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 2000)


def test_p_values_with_delta_are_the_theorem_term_by_term(privacy_audit):
    m, r, v, eps, delta = 40, 12, 9, 0.7, 1e-3
    chance = math.exp(eps) / (1 + math.exp(eps))
    mass = [math.comb(r, k) * chance**k * (1 - chance) ** (r - k) for k in range(r + 1)]
    worst = max(sum(mass[v - i : v]) / i for i in range(1, v + 1))
    expected = sum(mass[v:]) + 2 * m * delta * worst
    assert privacy_audit.p_value(m, r, v, eps, delta) == pytest.approx(expected, rel=1e-9)
    assert privacy_audit.p_value(m, r, 0, eps, delta) == 1.0
    bound = privacy_audit.lower_bound(m, r, 12, delta, 0.95)
    assert privacy_audit.p_value(m, r, 12, bound, delta) <= 0.05 < privacy_audit.p_value(m, r, 12, bound + 1e-3, delta)
    assert privacy_audit.lower_bound(m, r, 6, delta, 0.95) == 0.0


def test_canaries_are_where_they_were_put(privacy_audit):
    """Without noise and with every unit in every step, a sum along a canary is its bound, or next to nothing."""
    setting = privacy_audit.Setting(1.0, 0.0, 300, 2, 1.0)
    own = privacy_audit.deltaw.train.private.ExampleGradients
    privacy_audit.deltaw.train.private.ExampleGradients = privacy_audit.PlantedSink
    try:
        coins, seen = privacy_audit.observed(setting, repeatable())
    finally:
        privacy_audit.deltaw.train.private.ExampleGradients = own
    # Real rows add what they have along a canary's coordinates.
    off = (seen - coins.float()).abs()
    assert float((off < 0.3).float().mean()) > 0.98 and float(off.mean()) < 0.1
    assert 100 < int(coins.sum()) < 200
