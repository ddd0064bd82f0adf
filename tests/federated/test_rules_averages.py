"""fedavg-ab, ffa and rolora against dense float64 arithmetic."""

import dataclasses

import pytest
import torch
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
    mean_of,
    relative,
    rule_and_layout,
    state_of,
    weights_of,
)

from deltaw.core.errors import InputError
from deltaw.federated.rules import make_rule
from deltaw.federated.state import GlobalState


@pytest.mark.parametrize("count", [1, 2, 5])
def test_fedavg_is_the_mean_of_factors_and_says_how_far_from_the_mean_of_products(count):
    rule, layout = rule_and_layout("fedavg-ab")
    start = state_of(layout, count)
    locals_, weights = clients_of(start, layout, rule, count), weights_of(count)
    state, facts = a_round(rule, start, locals_, weights, layout)
    assert_same(state.tensors, mean_of(locals_, weights))
    if count == 1:
        assert "product_error" not in facts
        return
    error = relative(dense(state.tensors, layout), dense_mean(start, locals_, weights, layout))
    assert error > 0.01
    assert facts["product_error"] == pytest.approx(error, rel=1e-10)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_error_with_a_start_taken_from_the_base(init):
    layout = layout_of(config={"init": init})
    rule = make_rule("fedavg-ab")
    origin = {}
    for path, (out, in_, r, _) in SITES.items():
        origin |= {f"{path}:start_A": torch.randn(r, in_).double(), f"{path}:start_B": torch.randn(out, r).double()}
    own = drawn(layout, "distances", size=0.2)
    locals_, weights = clients_of(GlobalState(own), layout, rule, 3), weights_of(3)

    def update(tensors):
        return {
            path: scale
            * (
                (origin[f"{path}:start_B"] + tensors[B]) @ (origin[f"{path}:start_A"] + tensors[A])
                - origin[f"{path}:start_B"] @ origin[f"{path}:start_A"]
            )
            for path, A, B, scale in layout.sites()
        }

    whole = dataclasses.replace(
        layout,
        shapes={**layout.shapes, **{key: tuple(value.shape) for key, value in origin.items()}},
        frozen=frozenset(origin),
    )
    state, facts = a_round(rule, GlobalState(own | origin), locals_, weights, whole)
    each = [update(local) for local in locals_]
    mean = {path: sum(w * one[path] for w, one in zip(weights, each, strict=True)) for path in SITES}
    assert facts["product_error"] == pytest.approx(relative(update(state.tensors), mean), rel=1e-9)
    assert_same({key: state.tensors[key] for key in origin}, origin, tolerance=0)
    # Without the start's factors the size of the update is not known, and nothing is said.
    assert "product_error" not in a_round(rule, GlobalState(own), locals_, weights, layout)[1]


def test_dora_is_averaged_and_nothing_is_said_of_products():
    layout = layout_of(method="dora", loose={"q:magnitude": (13,)})
    rule = make_rule("fedavg-ab")
    start = state_of(layout, "dora")
    locals_, weights = clients_of(start, layout, rule, 3), weights_of(3)
    state, facts = a_round(rule, start, locals_, weights, layout)
    assert_same(state.tensors, mean_of(locals_, weights))
    assert facts == {}


@pytest.mark.parametrize("count", [2, 4])
def test_ffa_is_exact(count):
    rule, layout = rule_and_layout("ffa")
    start = state_of(layout, count)
    locals_, weights = clients_of(start, layout, rule, count), weights_of(count)
    assert not any(key in layout.frozen for key in locals_[0])
    state, facts = a_round(rule, start, locals_, weights, layout)
    mean = dense_mean(start, locals_, weights, layout)
    assert_same(dense(state.tensors, layout), mean)
    assert facts["product_error"] < 1e-14
    narrow = GlobalState({key: value.float() for key, value in start.tensors.items()})
    single = [{key: value.float() for key, value in local.items()} for local in locals_]
    state, facts = a_round(rule, narrow, single, weights, layout)
    assert relative(dense(state.tensors, layout), mean) < 3e-7
    assert 0 < facts["product_error"] < 3e-7


def test_ffa_refuses_two_trained_factors_and_rolora_a_frozen_one():
    with pytest.raises(InputError, match=r"rule ffa needs a frozen A at every site, and q trains both.*freeze_a true"):
        make_rule("ffa").check(layout_of())
    layout = layout_of()
    frozen = layout_of(frozen=frozen_factors(layout))
    with pytest.raises(InputError, match="q:lora_A of q is frozen: set freeze_a false"):
        make_rule("rolora").check(frozen)


def test_rolora_trains_b_then_a_and_is_exact_in_each_round():
    rule, layout = rule_and_layout("rolora")
    state = state_of(layout, "rolora")
    for round_ in range(4):
        moving, resting = ("lora_A", "lora_B") if round_ % 2 else ("lora_B", "lora_A")
        trained = rule.trained(round_, layout)
        assert {key for key in layout.shapes if key.endswith(moving)} <= trained
        assert not any(key.endswith(resting) for key in trained)
        assert {"head:weight", "head:bias"} <= trained
        locals_, weights = clients_of(state, layout, rule, 3, round_, round_=round_), weights_of(3, round_)
        after, facts = a_round(rule, state, locals_, weights, layout)
        assert_same(dense(after.tensors, layout), dense_mean(state, locals_, weights, layout))
        assert facts["product_error"] < 1e-14
        for key in layout.shapes:
            assert torch.equal(after.tensors[key], state.tensors[key]) == (key not in trained)
        state = after


def test_b_moves_first_because_a_has_no_gradient():
    layout = layout_of({"q": SITES["q"]}, loose={})
    A = torch.randn(4, 9, requires_grad=True)
    B = torch.zeros(13, 4, requires_grad=True)
    (B @ A @ torch.randn(9, 5)).square().sum().backward()
    assert not A.grad.any()
    first = make_rule("rolora").trained(0, layout)
    assert first == {"q:lora_B"}
