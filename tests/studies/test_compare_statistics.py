"""The paired bootstrap against what is known of means, ratios and null hypotheses."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from deltaw.core.errors import InputError
from deltaw.core.generators import generator
from deltaw.studies.compare_statistics import paired_bootstrap, summarized


def rights(count, share, *names):
    drawn = torch.rand(count, generator=generator(0, *names)) < share
    return [(float(right), 1.0) for right in drawn]


def bootstrap(own, reference, **changes):
    return paired_bootstrap(own, reference, **{"generator": generator(0, "test"), "same_rows": True} | changes)


def test_the_interval_of_a_mean_is_the_normal_one():
    own, other = rights(2000, 0.8, "a"), rights(2000, 0.7, "b")
    differences = [a[0] - b[0] for a, b in zip(own, other, strict=True)]
    mean, error = statistics.fmean(differences), statistics.pstdev(differences) / math.sqrt(2000)
    found = bootstrap({0: own}, {0: other})
    assert found["difference"] == pytest.approx(mean, abs=1e-12)
    # The percentiles' own error with 10,000 resamples is about 3 % of a standard error.
    assert found["low"] == pytest.approx(mean - 1.96 * error, abs=0.1 * error)
    assert found["high"] == pytest.approx(mean + 1.96 * error, abs=0.1 * error)
    assert found["p"] < 0.001 and (found["seeds"], found["rows"], found["resamples"]) == (1, 2000, 10_000)


def test_p_is_the_normal_one_where_the_difference_is_small():
    # 20 rows gained and 10 lost among 400: z = 10 / sqrt(30 - 100 / 400).
    own = [(1.0, 1.0)] * 20 + [(0.0, 1.0)] * 10 + [(1.0, 1.0)] * 370
    other = [(0.0, 1.0)] * 20 + [(1.0, 1.0)] * 10 + [(1.0, 1.0)] * 370
    z = 10 / math.sqrt(30 - 100 / 400)
    # Ties of a discrete difference count on both sides, which widens p by their probability.
    tie = math.exp(-z * z / 2) / math.sqrt(2 * math.pi * 29.75)
    assert bootstrap({0: own}, {0: other})["p"] == pytest.approx(math.erfc(z / math.sqrt(2)) + tie, abs=0.015)


def test_equal_methods_differ_by_nothing():
    same = rights(50, 0.6, "same")
    found = bootstrap({0: same, 1: same}, {0: same, 1: same})
    assert (found["difference"], found["low"], found["high"], found["p"]) == (0.0, 0.0, 0.0, 1.0)


def test_seeds_that_disagree_widen_the_interval():
    base = [(0.0, 1.0)] * 100
    alike = {seed: [(float(i % 10 == 0), 1.0) for i in range(100)] for seed in range(3)}
    apart = {0: [(0.0, 1.0)] * 100, 1: alike[0], 2: [(float(i % 5 == 0), 1.0) for i in range(100)]}
    reference = dict.fromkeys(range(3), base)
    first, second = bootstrap(alike, reference), bootstrap(apart, reference)
    assert first["difference"] == pytest.approx(second["difference"])
    assert second["high"] - second["low"] > 1.3 * (first["high"] - first["low"])
    assert first["p"] < 0.001 < second["p"]


def test_a_ratio_of_sums_is_resampled_as_a_ratio():
    # Entity F1: rows with many entities weigh more, and rows without any nothing.
    draw = torch.rand(300, 3, generator=generator(0, "f1"))
    own = [(2.0 * int(6 * a), float(int(6 * a) + int(6 * b)) + int(6 * a)) for a, b, _ in draw.tolist()]
    other = [(2.0 * int(3 * a), float(int(6 * a) + int(6 * b))) for a, b, _ in draw.tolist()]
    found = bootstrap({0: own}, {0: other})
    ratio = lambda rows: sum(a for a, _ in rows) / sum(b for _, b in rows)  # noqa: E731
    assert found["difference"] == pytest.approx(ratio(own) - ratio(other))
    resampled = []
    random = generator(1, "plain")
    for _ in range(2000):
        rows = torch.randint(300, (300,), generator=random).tolist()
        resampled.append(ratio([own[i] for i in rows]) - ratio([other[i] for i in rows]))
    spread = statistics.stdev(resampled)
    quantiles = statistics.quantiles(resampled, n=40)
    assert found["low"] == pytest.approx(quantiles[0], abs=0.2 * spread)
    assert found["high"] == pytest.approx(quantiles[-1], abs=0.2 * spread)


def test_rows_of_their_own_for_each_seed_are_drawn_apart():
    own = {seed: rights(200, 0.7, "a", seed) for seed in (0, 1)}
    other = {seed: rights(200, 0.7, "b", seed) for seed in (0, 1)}
    own[1], other[1] = own[1][:150], other[1][:150]
    found = bootstrap(own, other, same_rows=False)
    assert found["low"] < found["difference"] < found["high"]
    with pytest.raises(InputError, match=r"got \[200, 150\]"):
        bootstrap(own, other)


def test_the_same_generator_gives_the_same_and_another_little_else():
    own, other = {0: rights(80, 0.7, "x")}, {0: rights(80, 0.6, "y")}
    first = bootstrap(own, other)
    assert first == bootstrap(own, other)
    second = bootstrap(own, other, generator=generator(1, "test"))
    assert second != first and second["low"] == pytest.approx(first["low"], abs=0.02)


def test_what_does_not_pair_is_refused():
    row = [(1.0, 1.0)]
    for own, other in (({}, {}), ({0: row}, {1: row}), ({0: row}, {0: row * 2}), ({0: []}, {0: []})):
        with pytest.raises(InputError, match="expected"):
            bootstrap(own, other)


def test_a_summary_has_a_spread_from_two_values_on():
    assert summarized([0.5]) == {"mean": 0.5, "n": 1, "values": [0.5]}
    assert summarized([1.0, 3.0]) == {"mean": 2.0, "n": 2, "values": [1.0, 3.0], "sd": math.sqrt(2)}
