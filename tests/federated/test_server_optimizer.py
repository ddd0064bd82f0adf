"""The server's steps against torch's SGD and against the paper's recurrence written out."""

import itertools

import pytest
import torch
from rule_cases import LOOSE, a_round, assert_same, clients_of, drawn, layout_of, rule_and_layout, state_of, weights_of

from deltaw.core.errors import InputError
from deltaw.federated.messages import Message, pack, unpack
from deltaw.federated.rules import RULES, make_rule
from deltaw.federated.server_optimizer import ServerOptimizer
from deltaw.federated.state import GlobalState


def run(optimizer, rounds=6, dtype=torch.float64, trained=lambda round_, layout: set(layout.shapes)):
    """States over rounds in which the changes are drawn; memory goes through bytes, as a checkpoint's does."""
    layout = layout_of()
    state, memory, states, deltas = state_of(layout, dtype=dtype), {}, [], []
    states.append(state)
    for round_ in range(rounds):
        keys = trained(round_, layout)
        delta = {key: value if key in keys else 0 * value for key, value in drawn(layout, round_, size=0.1).items()}
        aggregate = GlobalState({key: value + delta[key].to(dtype) for key, value in state.tensors.items()})
        state, memory = optimizer.step(state, aggregate, memory, trained=keys)
        memory = unpack(pack(Message("memory", tensors=memory))).tensors
        states.append(state)
        deltas.append(delta)
    return states, deltas, memory


@pytest.mark.parametrize(("rate", "beta"), [(1.0, 0.9), (0.3, 0.5), (0.7, 0.0)])
def test_momentum_is_torchs_sgd_on_the_negative_change(rate, beta):
    states, deltas, _ = run(ServerOptimizer(kind="momentum", learning_rate=rate, beta1=beta))
    parameters = {key: torch.nn.Parameter(value.clone()) for key, value in states[0].tensors.items()}
    sgd = torch.optim.SGD(parameters.values(), lr=rate, momentum=beta)
    for state, delta in zip(states[1:], deltas, strict=True):
        for key, parameter in parameters.items():
            parameter.grad = -delta[key]
        sgd.step()
        assert_same(state.tensors, {key: value.detach() for key, value in parameters.items()})


@pytest.mark.parametrize("options", [{}, {"learning_rate": 0.1, "beta1": 0.5, "beta2": 0.9, "tau": 1e-2}])
def test_adam_is_the_papers(options):
    states, deltas, memory = run(ServerOptimizer(kind="adam", **options))
    rate, b1, b2, tau = ({"learning_rate": 0.01, "beta1": 0.9, "beta2": 0.99, "tau": 1e-3} | options).values()
    for key in states[0].tensors:
        x, m = states[0].tensors[key].clone(), 0.0
        v = torch.full_like(x, tau * tau)
        for state, delta in zip(states[1:], deltas, strict=True):
            m = b1 * m + (1 - b1) * delta[key]
            v = b2 * v + (1 - b2) * delta[key] ** 2
            x = x + rate * m / (v**0.5 + tau)
            torch.testing.assert_close(state.tensors[key], x, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(memory[f"first/{key}"], m, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(memory[f"second/{key}"], v, atol=1e-12, rtol=1e-12)


def test_with_a_large_tau_adam_is_momentum():
    tau, rate = 1e6, 0.5
    # v starts at tau^2 and with this beta2 stays there, so that the divisor is 2 tau.
    adam, _, _ = run(ServerOptimizer(kind="adam", learning_rate=rate * 2 * tau, tau=tau, beta1=0.9, beta2=1 - 1e-15))
    momentum, _, _ = run(ServerOptimizer(kind="momentum", learning_rate=rate * 0.1, beta1=0.9))
    assert_same(adam[-1].tensors, momentum[-1].tensors, tolerance=1e-9)


def test_none_takes_what_the_rule_made():
    layout = layout_of()
    start, aggregate = state_of(layout, 0), state_of(layout, 1)
    state, memory = ServerOptimizer().step(start, aggregate, {}, trained=set(layout.shapes))
    assert state is aggregate and memory == {}


@pytest.mark.parametrize("kind", ["momentum", "adam"])
def test_keys_that_rest_stay(kind):
    rule = make_rule("rolora")
    states, _, memory = run(ServerOptimizer(kind=kind), trained=rule.trained)
    for round_, (before, after) in enumerate(itertools.pairwise(states)):
        for key in layout_of().shapes:
            moves = key in rule.trained(round_, layout_of())
            assert torch.equal(before.tensors[key], after.tensors[key]) != moves
    assert {f"first/{key}" for key in layout_of().shapes} <= memory.keys()


@pytest.mark.parametrize("kind", ["momentum", "adam"])
def test_frozen_factors_and_dtypes_stay(kind):
    rule, layout = rule_and_layout("ffa")
    start = state_of(layout, dtype=torch.float32)
    locals_ = clients_of(start, layout, rule, 3)
    aggregate, _ = a_round(rule, start, locals_, weights_of(3), layout)
    state, memory = ServerOptimizer(kind=kind).step(start, aggregate, {}, trained=rule.trained(0, layout))
    assert {value.dtype for value in [*state.tensors.values(), *memory.values()]} == {torch.float32}
    for key in layout.shapes:
        assert torch.equal(state.tensors[key], start.tensors[key]) == (key in layout.frozen)
    assert not any(key.split("/")[1] in layout.frozen for key in memory)
    assert all(f"first/{key}" in memory for key in LOOSE)


@pytest.mark.parametrize("name", RULES)
def test_rules_that_it_goes_with(name):
    rule = make_rule(name)
    ServerOptimizer().check(rule)
    for kind in ("momentum", "adam"):
        if name not in ("product", "fedex", "sketch"):
            ServerOptimizer(kind=kind).check(rule)
        else:
            with pytest.raises(InputError, match=f"server optimizer {kind} with rule {name}: .* no gradient"):
                ServerOptimizer(kind=kind).check(rule)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "adamw"}, "unknown server optimizer 'adamw': did you mean 'adam'"),
        ({"kind": "adam", "tau": 0}, "tau is 0: expected a number above 0"),
        ({"kind": "adam", "beta2": 1.0}, "beta2 is 1.0: expected a number from 0 to below 1"),
        ({"learning_rate": float("nan"), "beta1": True}, "learning_rate is nan.*; beta1 is True"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(InputError, match=message):
        ServerOptimizer(**options)
