"""product and fedex against the dense mean of products in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_cases import (
    a_round,
    assert_same,
    clients_of,
    dense,
    dense_mean,
    dense_state,
    frozen_factors,
    layout_of,
    mean_of,
    relative,
    state_of,
    weights_of,
)

from deltaw.core.generators import generator
from deltaw.federated.rules import folded, make_rule
from deltaw.federated.state import GlobalState

sizes = st.integers(1, 12)


def lora_start(layout, *names, dtype=torch.float64):
    """LoRA's own start: B = 0, of the embedding A = 0."""
    tensors = dict(state_of(layout, *names, dtype=dtype).tensors)
    for path in layout.scales:
        tensors[f"{path}:lora_{'A' if path == 'tokens' else 'B'}"].zero_()
    return GlobalState(tensors)


@pytest.mark.parametrize("name", ["product", "fedex"])
@settings(max_examples=40, deadline=None)
@given(sizes, sizes, st.integers(1, 5), st.integers(1, 5), st.integers(0, 1 << 30), st.sampled_from([0.25, 2.0]))
def test_any_shape_and_number_of_clients(name, out, in_, r, count, seed, scale):
    layout = layout_of({"site": (out, in_, r, scale)}, loose={})
    rule = make_rule(name)
    start, weights = state_of(layout, seed), weights_of(count, seed)
    for round_ in range(2):
        start = rule.begin(start, layout, round_, generator(seed, round_))
        locals_ = clients_of(start, layout, rule, count, seed, round_)
        expected = dense_mean(start, locals_, weights, layout)
        start, facts = a_round(rule, start, locals_, weights, layout)
        scale_of_errors = max(1.0, float(expected["site"].abs().max()))
        assert_same(dense_state(start, layout), expected, tolerance=1e-11 * scale_of_errors)
        low = start.carried.get("site")
        assert facts == {"carried_rank": float(0 if low is None else len(low.A))}
        assert low is None or len(low.A) <= min(out, in_)


@pytest.mark.parametrize("name", ["product", "fedex"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 3e-7)])
def test_many_rounds_stay_exact(name, dtype, bound):
    layout, rule = layout_of(), make_rule(name)
    state = lora_start(layout, name, dtype=dtype)
    total = dense(state.tensors, layout)
    for round_ in range(6):
        start = rule.begin(state, layout, round_, generator(1, round_))
        locals_, weights = clients_of(start, layout, rule, 3, name, round_), weights_of(3, round_)
        # A reference of its own: what the clients' products add to what the round began with.
        began = dense(start.tensors, layout)
        for path in total:
            gain = sum(
                w * (dense({**start.tensors, **local}, layout)[path] - began[path])
                for w, local in zip(weights, locals_, strict=True)
            )
            total[path] = total[path] + gain
        state, _ = a_round(rule, start, locals_, weights, layout)
    assert relative(dense_state(state, layout), total) < bound * (1 if dtype == torch.float64 else 3)


def test_ranks_grow_by_k_r_or_by_k_minus_1_times_r():
    layout = layout_of({"q": (40, 50, 4, 2.0)}, loose={})
    for name, each in (("product", 3 * 4), ("fedex", 2 * 4)):
        rule, state = make_rule(name), lora_start(layout)
        for round_ in range(5):
            start = rule.begin(state, layout, round_, generator(0, round_))
            locals_ = clients_of(start, layout, rule, 3, name, round_)
            state, facts = a_round(rule, start, locals_, weights_of(3), layout)
            assert facts == {"carried_rank": float(min(40, each * (round_ + 1)))}


def test_a_round_begins_with_fresh_factors_of_product_zero():
    layout, rule = layout_of(), make_rule("product")
    state = lora_start(layout, dtype=torch.float32)
    first = rule.begin(state, layout, 0, generator(0, 0))
    linears = [path for path in layout.scales if path != "tokens"]
    # The method's own first draw stands for a linear.
    assert_same(
        {f"{p}:lora_A": first.tensors[f"{p}:lora_A"] for p in linears},
        {f"{p}:lora_A": state.tensors[f"{p}:lora_A"] for p in linears},
        tolerance=0,
    )
    after, _ = a_round(rule, first, clients_of(first, layout, rule, 2), [0.5, 0.5], layout)
    assert all(not product.any() for product in dense(after.tensors, layout).values())
    second = rule.begin(after, layout, 1, generator(0, 1))
    third = rule.begin(after, layout, 1, generator(0, 2))
    assert second.carried is after.carried
    assert all(not product.any() for product in dense(second.tensors, layout).values())
    for path in linears:
        A = second.tensors[f"{path}:lora_A"]
        assert A.any(dim=1).all() and A.abs().max() <= 1 / math.sqrt(A.shape[1])
        assert not torch.equal(A, third.tensors[f"{path}:lora_A"])
        assert not torch.equal(A, first.tensors[f"{path}:lora_A"])
    B = second.tensors["tokens:lora_B"]
    assert B.any() and not torch.equal(B, first.tensors["tokens:lora_B"])
    assert not second.tensors["tokens:lora_A"].any()


def test_kaiming_start_is_loras():
    layout, rule = layout_of({"q": (4, 900, 16, 1.0)}, loose={}), make_rule("product")
    empty = GlobalState({key: torch.zeros(shape) for key, shape in layout.shapes.items()})
    A = rule.begin(empty, layout, 1, generator(3)).tensors["q:lora_A"]
    sorted_ = A.flatten().sort().values * 30 / 2 + 0.5
    uniform = (torch.arange(len(sorted_)) + 0.5) / len(sorted_)
    # The Kolmogorov-Smirnov distance; 1.95 / sqrt(n) is passed once in a thousand, and the draw is a fixed one.
    assert (sorted_ - uniform).abs().max() < 1.95 / math.sqrt(len(sorted_))


@pytest.mark.parametrize("name", ["product", "fedex"])
def test_a_start_whose_product_is_not_zero_is_kept(name):
    """LoftQ's: what it adds to the 4-bit base must not get lost."""
    layout, rule = layout_of(config={"init": "loftq"}), make_rule(name)
    state = state_of(layout, "loftq")
    start = rule.begin(state, layout, 0, generator(0))
    assert_same(start.tensors, state.tensors, tolerance=0)
    locals_ = [{key: start.tensors[key].clone() for key in layout.shapes}] * 2
    after, _ = a_round(rule, start, locals_, [0.4, 0.6], layout)
    assert_same(dense_state(after, layout), dense(state.tensors, layout))


@pytest.mark.parametrize("name", ["product", "fedex"])
def test_a_frozen_factor_stays(name):
    layout = layout_of()
    layout = layout_of(config={"freeze_a": True, "init": "pissa"}, frozen=frozen_factors(layout))
    rule, state = make_rule(name), lora_start(layout)
    rule.check(layout)
    for round_ in range(3):
        start = rule.begin(state, layout, round_, generator(0, round_))
        locals_, weights = clients_of(start, layout, rule, 3, round_), weights_of(3)
        expected = dense_mean(start, locals_, weights, layout)
        after, _ = a_round(rule, start, locals_, weights, layout)
        assert_same(dense_state(after, layout), expected)
        frozen = layout.frozen
        assert_same({k: after.tensors[k] for k in frozen}, {k: state.tensors[k] for k in frozen}, tolerance=0)
        state = after
    assert bool(state.carried) == (name == "product")


def test_fedex_keeps_the_means_and_carries_the_residual():
    layout, rule = layout_of(), make_rule("fedex")
    start = state_of(layout, "fedex")
    locals_, weights = clients_of(start, layout, rule, 4), weights_of(4)
    state, _ = a_round(rule, start, locals_, weights, layout)
    means = mean_of(locals_, weights)
    assert_same(state.tensors, means)
    for path, key_A, key_B, scale in layout.sites():
        residual = sum(
            w * scale * (local[key_B] - means[key_B]) @ (local[key_A] - means[key_A])
            for w, local in zip(weights, locals_, strict=True)
        )
        low = state.carried[path]
        torch.testing.assert_close(low.scale * low.B @ low.A, residual, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", ["product", "fedex"])
@pytest.mark.parametrize("truncate", [1, 4])
def test_truncation_is_the_best_of_its_rank_and_says_what_it_lost(name, truncate):
    layout = layout_of({"q": (13, 9, 3, 2.0), "v": (8, 17, 2, 0.5)}, loose={})
    exact, cut = make_rule(name), make_rule(name, truncate=truncate)
    start = state_of(layout, "truncation")
    locals_, weights = clients_of(start, layout, exact, 4), weights_of(4)
    whole, _ = a_round(exact, start, locals_, weights, layout)
    state, facts = a_round(cut, start, locals_, weights, layout)
    missed = size = 0.0
    for path in layout.scales:
        low = whole.carried[path]
        U, s, Vh = torch.linalg.svd(low.scale * low.B @ low.A, full_matrices=False)
        best = U[:, :truncate] @ torch.diag(s[:truncate]) @ Vh[:truncate]
        kept = state.carried[path]
        assert len(kept.A) == truncate
        torch.testing.assert_close(kept.scale * kept.B @ kept.A, best, atol=1e-11, rtol=1e-11)
        missed += float(s[truncate:].square().sum())
        size += float(s.square().sum())
    assert facts["truncation_error"] == pytest.approx(math.sqrt(missed / size), rel=1e-9)
    assert 0.01 < facts["truncation_error"] < 1
    assert facts["carried_rank"] == truncate


def test_folded_gives_the_carried_update_away():
    layout, rule = layout_of(), make_rule("product")
    start = rule.begin(state_of(layout), layout, 0, generator(0))
    state, _ = a_round(rule, start, clients_of(start, layout, rule, 2), [0.5, 0.5], layout)
    bare, carried = folded(state)
    assert not bare.carried and bare.tensors is state.tensors and carried is state.carried
    both = dense_state(GlobalState(bare.tensors, carried), layout)
    assert_same(both, dense_state(state, layout), tolerance=0)
    # The next round begins anew as if nothing had been folded.
    assert_same(rule.begin(bare, layout, 1, generator(5)).tensors, rule.begin(state, layout, 1, generator(5)).tensors)
