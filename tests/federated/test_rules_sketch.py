"""sketch against dense float64 truncated decompositions, from single uploads and from sums in fixed point."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_cases import (
    SITES,
    a_round,
    assert_same,
    clients_of,
    dense,
    dense_mean,
    drawn,
    frozen_factors,
    layout_of,
    relative,
    state_of,
    weights_of,
)

from deltaw.core.errors import InputError
from deltaw.federated.rules import make_rule
from deltaw.federated.state import GlobalState


def best(matrices, layout, rank=None):
    """The nearest updates of the sites' ranks, and the relative error of all together."""
    found, missed, size = {}, 0.0, 0.0
    for path, key_A, *_ in layout.sites():
        r = rank or layout.shapes[key_A][0]
        U, s, Vh = torch.linalg.svd(matrices[path], full_matrices=False)
        found[path] = U[:, :r] @ torch.diag(s[:r]) @ Vh[:r]
        missed += float(s[r:].square().sum())
        size += float(s.square().sum())
    return found, math.sqrt(missed / size)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(0, 1 << 30),
    st.sampled_from([0.25, 3.0]),
)
def test_wide_enough_it_is_the_best_of_its_rank(out, in_, r, count, seed, scale):
    layout = layout_of({"site": (out, in_, r, scale)}, loose={})
    rule = make_rule("sketch", clients=count)
    start = state_of(layout, seed)
    locals_, weights = clients_of(start, layout, rule, count, seed), weights_of(count, seed)
    mean = dense_mean(start, locals_, weights, layout)
    nearest, error = best(mean, layout)
    state, facts = a_round(rule, start, locals_, weights, layout, secure=bool(seed % 2))
    assert relative(dense(state.tensors, layout), nearest) < 1e-9
    assert facts["sketch_exact"] == 1.0 and facts["sketch_error"] == 0.0
    assert facts["truncation_error"] == pytest.approx(error, rel=1e-6, abs=1e-12)


def shared_rank(start, layout, count, size=0.3):
    """Clients whose products lie in one row space, so that their mean has the sites' rank."""
    locals_ = []
    for k in range(count):
        local = {
            **start.tensors,
            **{key: value + start.tensors[key] for key, value in drawn(layout, k, size=size).items()},
        }
        for path in layout.scales:
            mix = torch.randn(len(local[f"{path}:lora_A"]), len(local[f"{path}:lora_A"]), dtype=torch.float64)
            local[f"{path}:lora_A"] = mix @ start.tensors[f"{path}:lora_A"].double()
        locals_.append({key: value.to(start.tensors[key].dtype) for key, value in local.items()})
    return locals_


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 3e-6)])
@pytest.mark.parametrize("secure", [False, True])
def test_a_mean_of_the_rank_is_met_exactly(dtype, bound, secure):
    layout, rule = layout_of(), make_rule("sketch")
    start = GlobalState(drawn(layout, "exact", dtype=dtype))
    locals_, weights = shared_rank(start, layout, 4), weights_of(4)
    mean = dense_mean(start, locals_, weights, layout)
    state, facts = a_round(rule, start, locals_, weights, layout, secure=secure)
    assert relative(dense(state.tensors, layout), mean) < bound
    assert facts["truncation_error"] < bound
    assert facts["sketch_error"] < bound


def test_sums_in_fixed_point_are_enough():
    layout, rule = layout_of(), make_rule("sketch")
    start = state_of(layout, "fixed")
    locals_, weights = shared_rank(start, layout, 3), weights_of(3)
    step = 2.0**-20
    state, _ = a_round(
        rule, start, locals_, weights, layout, secure=True, rounding=lambda value: (value / step).round() * step
    )
    error = relative(dense(state.tensors, layout), dense_mean(start, locals_, weights, layout))
    assert 1e-9 < error < 3e-5


def test_narrow_sketches_stay_within_halkos_bound_and_the_estimate_is_near():
    """One site, 60 singular values of which 24 are not zero, and 12 columns for rank 4."""
    layout = layout_of({"site": (60, 70, 4, 1.0)}, loose={})
    rule = make_rule("sketch", columns=12)
    missed, estimates, tails = [], [], []
    for number in range(20):
        start = state_of(layout, "narrow", number)
        locals_, weights = clients_of(start, layout, rule, 6, number), weights_of(6, number)
        M = dense_mean(start, locals_, weights, layout)["site"]
        uploads = [rule.upload(0, start, local, layout, {}) for local in locals_]
        outcome = rule.combine(0, start, uploads, weights, layout, {})
        Q = outcome.broadcast["site:basis"]
        torch.testing.assert_close(Q.T @ Q, torch.eye(12, dtype=torch.float64), atol=1e-12, rtol=0)
        missed.append(float((M - Q @ (Q.T @ M)).norm() / M.norm()))
        estimates.append(outcome.facts["sketch_error"])
        tails.append(float(torch.linalg.svdvals(M)[4:].norm() / M.norm()))
        assert outcome.facts["sketch_exact"] == 0.0
    # Theorem 10.5 is about the mean: sqrt(1 + 4/7) times the tail.
    assert 0.01 < sum(missed) / 20 < math.sqrt(1 + 4 / 7) * sum(tails) / 20
    # The estimate is for a column less, and so a little larger; single ones scatter by about a tenth.
    assert 1.0 < (sum(estimates) / 20) / (sum(missed) / 20) < 1.4


def test_clients_see_the_same_test_matrix_and_another_one_after_the_state_has_moved():
    layout, rule = layout_of(), make_rule("sketch")
    start = state_of(layout, "omega")
    other = GlobalState({**start.tensors, "q:lora_B": start.tensors["q:lora_B"] + 1})
    local = dict(start.tensors)
    first, again = (rule.upload(0, state, local, layout, {}) for state in (start, GlobalState(dict(local))))
    assert_same(first, again, tolerance=0)
    moved = rule.upload(0, other, local, layout, {})
    assert {key for key in first if not torch.equal(first[key], moved[key])} == {"q:sketch"}


def test_factors_are_balanced_and_no_direction_dies():
    layout, rule = layout_of(), make_rule("sketch")
    start = state_of(layout, "balanced")
    state, _ = a_round(rule, start, clients_of(start, layout, rule, 3), weights_of(3), layout)
    for path in ("q", "v", "tokens"):
        A, B = state.tensors[f"{path}:lora_A"], state.tensors[f"{path}:lora_B"]
        torch.testing.assert_close(A @ A.T, B.T @ B, atol=1e-11, rtol=1e-11)
    # A matrix (2, 7) has two singular values; the third of three directions starts anew.
    A, B = state.tensors["thin:lora_A"], state.tensors["thin:lora_B"]
    assert A[2].any() and not B[:, 2].any() and A[2].abs().max() <= 1 / math.sqrt(7)


def test_nobody_moved_from_a_zero_product():
    layout, rule = layout_of(), make_rule("sketch")
    tensors = dict(state_of(layout).tensors)
    for path in SITES:
        tensors[f"{path}:lora_B"] = torch.zeros_like(tensors[f"{path}:lora_B"])
    start = GlobalState(tensors)
    state, facts = a_round(rule, start, [dict(tensors)] * 2, [0.5, 0.5], layout)
    assert all(not product.any() for product in dense(state.tensors, layout).values())
    assert all(state.tensors[f"{path}:lora_A"].any(dim=1).all() for path in SITES)
    assert not {"truncation_error", "sketch_error"} & facts.keys()


def test_a_smaller_rank():
    layout = layout_of({"q": SITES["q"]}, loose={})
    rule = make_rule("sketch", rank=2, clients=3)
    start = state_of(layout, "rank")
    locals_, weights = clients_of(start, layout, rule, 3), weights_of(3)
    state, facts = a_round(rule, start, locals_, weights, layout)
    nearest, error = best(dense_mean(start, locals_, weights, layout), layout, rank=2)
    assert_same(dense(state.tensors, layout), nearest, tolerance=1e-10)
    assert facts["truncation_error"] == pytest.approx(error, rel=1e-9)
    assert state.tensors["q:lora_A"][2:].any(dim=1).all() and not state.tensors["q:lora_B"][:, 2:].any()


def test_columns_asked_for():
    layout = layout_of({"big": (40, 50, 3, 1.0), "small": (5, 50, 3, 1.0)}, loose={})
    start = state_of(layout)
    for options, wide in (
        ({}, 11),
        ({"columns": 4}, 4),
        ({"rank": 2}, 10),
        ({"clients": 7}, 21),
        ({"columns": 90}, 40),
    ):
        made = make_rule("sketch", **options).upload(0, start, start.tensors, layout, {})
        assert {key: tuple(value.shape) for key, value in made.items()} == {
            "big:sketch": (40, wide),
            "small:sketch": (5, min(5, wide)),
        }


def test_what_does_not_fit_is_refused():
    layout = layout_of()
    with pytest.raises(InputError, match="rank is 4, and v has r 3: give at most that"):
        make_rule("sketch", rank=4).check(layout)
    with pytest.raises(InputError, match="columns is 3: expected at least the rank, 4"):
        make_rule("sketch", columns=3).check(layout)
    with pytest.raises(InputError, match="q:lora_A is frozen: set freeze_a false"):
        make_rule("sketch").check(layout_of(frozen=frozen_factors(layout)))
