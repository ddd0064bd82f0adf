"""Robust rules against references written out, and against clients who lie."""

import math
import statistics

import pytest
import torch
from rule_cases import (
    a_round,
    assert_same,
    clients_of,
    dense,
    dense_mean,
    layout_of,
    mean_of,
    relative,
    rule_and_layout,
    state_of,
    weights_of,
)

from deltaw.federated.rules import make_rule

ROBUST = ("trimmed-mean", "median", "norm-bound", "multi-krum")


def joint(tensors):
    return torch.cat([tensors[key].flatten() for key in sorted(tensors)])


def lied(start, locals_, liars):
    """The liars' differences with their sign flipped, times 1,000."""
    return [
        {key: start.tensors[key] - 1000 * (value - start.tensors[key]) for key, value in local.items()}
        if k in liars
        else local
        for k, local in enumerate(locals_)
    ]


@pytest.mark.parametrize(("count", "f"), [(3, 1), (4, 1), (7, 2), (7, 3)])
def test_trimmed_mean_of_every_value(count, f):
    rule, layout = rule_and_layout("trimmed-mean", f=f)
    start = state_of(layout, count, f)
    locals_ = clients_of(start, layout, rule, count)
    state, facts = a_round(rule, start, locals_, weights_of(count), layout)
    for key in layout.shapes:
        rows = zip(*(local[key].flatten().tolist() for local in locals_), strict=True)
        expected = torch.tensor([statistics.fmean(sorted(row)[f : count - f]) for row in rows], dtype=torch.float64)
        torch.testing.assert_close(state.tensors[key].flatten(), expected, atol=1e-13, rtol=1e-13)
    assert facts["left_out"] == 2 * f
    assert sum(facts[f"trimmed:{k}"] for k in range(count)) == pytest.approx(2 * f)


@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_median_of_every_value(count):
    rule, layout = rule_and_layout("median")
    start = state_of(layout, count)
    locals_ = clients_of(start, layout, rule, count)
    state, _ = a_round(rule, start, locals_, weights_of(count), layout)
    for key in layout.shapes:
        rows = zip(*(local[key].flatten().tolist() for local in locals_), strict=True)
        expected = torch.tensor([statistics.median(row) for row in rows], dtype=torch.float64)
        torch.testing.assert_close(state.tensors[key].flatten(), expected, atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("bound", [None, 0.5, 1e6])
def test_norm_bound_scales_whole_updates(bound):
    rule, layout = rule_and_layout("norm-bound", bound=bound)
    start = state_of(layout, "bound")
    locals_, weights = clients_of(start, layout, rule, 4), weights_of(4)
    # One is twice as far as the others, so that norms differ.
    locals_[2] = {key: start.tensors[key] + 2 * (value - start.tensors[key]) for key, value in locals_[2].items()}
    state, facts = a_round(rule, start, locals_, weights, layout)
    origin = joint(start.tensors)
    norms = [float((joint(local) - origin).norm()) for local in locals_]
    c = statistics.median(norms) if bound is None else bound
    expected = origin + sum(
        w * (joint(local) - origin) * min(1.0, c / norm) for w, local, norm in zip(weights, locals_, norms, strict=True)
    )
    torch.testing.assert_close(joint(state.tensors), expected, atol=1e-12, rtol=1e-12)
    clipped = [k for k, norm in enumerate(norms) if norm > c]
    assert len(clipped) == {None: 2, 0.5: 4, 1e6: 0}[bound]
    assert facts["bound"] == pytest.approx(c) and facts["clipped"] == len(clipped)
    assert {name for name in facts if name.startswith("clipped:")} == {f"clipped:{k}" for k in clipped}


@pytest.mark.parametrize(("count", "f"), [(5, 1), (7, 2), (8, 1)])
@pytest.mark.parametrize("shapes", [None, {"head:bias": (1,)}])
def test_multi_krum_chooses_by_distances(count, f, shapes):
    """Of single numbers too, where who is left out hangs on how many neighbours count."""
    rule = make_rule("multi-krum", f=f)
    layout = layout_of() if shapes is None else layout_of({}, method="bitfit", loose=shapes)
    for number in range(1 if shapes is None else 30):
        start = state_of(layout, "krum", count, number)
        locals_ = clients_of(start, layout, rule, count, number)
        state, facts = a_round(rule, start, locals_, weights_of(count), layout)
        vectors = [joint(local) for local in locals_]
        scores = []
        for k in range(count):
            others = sorted(float((vectors[k] - vectors[j]).square().sum()) for j in range(count) if j != k)
            scores.append(sum(others[: count - f - 2]))
        chosen = sorted(range(count), key=scores.__getitem__)[: count - f]
        expected = sum(vectors[k] for k in chosen) / len(chosen)
        torch.testing.assert_close(joint(state.tensors), expected, atol=1e-13, rtol=1e-13)
        assert facts["left_out"] == f
        out = {f"left_out:{k}" for k in range(count) if k not in chosen}
        assert {name for name in facts if name.startswith("left_out:")} == out


@pytest.mark.parametrize("liars", [(0,), (4,), (1, 6)])
def test_liars_cannot_move_it_far(liars):
    count, f = 7, len(liars)
    rules = {
        "trimmed-mean": make_rule("trimmed-mean", f=f),
        "median": make_rule("median"),
        "norm-bound": make_rule("norm-bound"),
        "multi-krum": make_rule("multi-krum", f=f),
        "fedavg-ab": make_rule("fedavg-ab"),
    }
    layout = layout_of()
    start = state_of(layout, "liars")
    honest = clients_of(start, layout, rules["median"], count, liars)
    locals_ = lied(start, honest, liars)
    truthful = [joint(local) for k, local in enumerate(honest) if k not in liars]
    low, high = torch.stack(truthful).amin(0), torch.stack(truthful).amax(0)
    mean, origin = torch.stack(truthful).mean(0), joint(start.tensors)
    spread = max(float((vector - mean).norm()) for vector in truthful)
    found, facts = {}, {}
    for name, rule in rules.items():
        state, facts[name] = a_round(rule, start, locals_, [1 / count] * count, layout)
        found[name] = joint(state.tensors)
    for name in ("trimmed-mean", "median"):
        assert (found[name] >= low - 1e-12).all() and (found[name] <= high + 1e-12).all()
    torch.testing.assert_close(found["multi-krum"], mean, atol=1e-12, rtol=1e-12)
    assert {f"left_out:{k}" for k in liars} <= facts["multi-krum"].keys()
    assert all(facts["trimmed-mean"][f"trimmed:{k}"] > 0.99 for k in liars)
    c = facts["norm-bound"]["bound"]
    shrunk = sum((v - origin) * min(1.0, c / float((v - origin).norm())) for v in truthful) / len(truthful)
    assert float((found["norm-bound"] - origin - shrunk).norm()) <= 2 * f / count * c + 1e-12
    assert {f"clipped:{k}" for k in liars} <= facts["norm-bound"].keys()
    assert float((found["fedavg-ab"] - mean).norm()) > 50 * spread
    assert float((found["norm-bound"] - mean).norm()) < spread


@pytest.mark.parametrize("name", ROBUST)
def test_claimed_weights(name):
    """A liar who claims nearly all examples gains by it under norm bounding alone, up to the bound."""
    rule, layout = rule_and_layout(name)
    start = state_of(layout, "claims")
    locals_ = clients_of(start, layout, rule, 5)
    equal, _ = a_round(rule, start, locals_, [0.2] * 5, layout)
    claimed, facts = a_round(rule, start, locals_, [0.96, 0.01, 0.01, 0.01, 0.01], layout)
    if name == "norm-bound":
        moved = float((joint(claimed.tensors) - joint(start.tensors)).norm())
        assert moved <= facts["bound"] * (1 + 1e-12)
    else:
        assert_same(claimed.tensors, equal.tensors, tolerance=0)


@pytest.mark.parametrize("name", ROBUST)
def test_the_error_of_products_is_said(name):
    rule, layout = rule_and_layout(name)
    start = state_of(layout, "products")
    locals_, weights = clients_of(start, layout, rule, 5), weights_of(5)
    state, facts = a_round(rule, start, locals_, weights, layout)
    error = relative(dense(state.tensors, layout), dense_mean(start, locals_, weights, layout))
    assert facts["product_error"] == pytest.approx(error, rel=1e-10) and error > 0.01
    assert math.isfinite(relative(state.tensors, mean_of(locals_, weights)))
