"""What holds for every rule, over the registry."""

import pickle

import pytest
import torch
from rule_cases import (
    LOOSE,
    a_round,
    assert_same,
    clients_of,
    dense_mean,
    dense_state,
    layout_of,
    mean_of,
    relative,
    rule_and_layout,
    state_of,
    weights_of,
)

from deltaw.core.errors import InputError, RunError
from deltaw.core.generators import generator
from deltaw.federated.messages import Message, pack, unpack
from deltaw.federated.rules import RULES, make_rule

COUNT = 5
SECURE = ("fedavg-ab", "ffa", "rolora", "sketch")


def begun(rule, layout, *names, dtype=torch.float64):
    return rule.begin(state_of(layout, *names, dtype=dtype), layout, 0, generator(0, "begin", *names))


@pytest.mark.parametrize("name", RULES)
def test_clients_that_agree_give_what_they_agree_on(name):
    rule, layout = rule_and_layout(name)
    rule.check(layout)
    start = begun(rule, layout, name)
    local = clients_of(start, layout, rule, 1, name)[0]
    # A bound on the norm is the one rule that may change even that, where the norms are equal it does not.
    state, facts = a_round(rule, start, [local] * COUNT, [1 / COUNT] * COUNT, layout)
    assert relative(dense_state(state, layout), dense_mean(start, [local], [1.0], layout)) < 1e-12
    assert_same({key: state.tensors[key] for key in LOOSE}, {key: local[key] for key in LOOSE})
    assert facts.get("product_error", 0.0) < 1e-12
    assert all(isinstance(value, float) for value in facts.values())


@pytest.mark.parametrize("name", RULES)
def test_states_keep_their_keys_shapes_and_dtypes_over_rounds_and_messages(name):
    rule, layout = rule_and_layout(name)
    state = state_of(layout, name, dtype=torch.float32)
    frozen = {key: state.tensors[key].clone() for key in layout.frozen}
    for round_ in range(3):
        start = rule.begin(state, layout, round_, generator(0, name, round_))
        again = rule.begin(state, layout, round_, generator(0, name, round_))
        assert_same(start.tensors, again.tensors, tolerance=0)
        locals_ = clients_of(start, layout, rule, COUNT, name, round_, round_=round_)
        broadcast = {}
        for phase in range(rule.phases):
            uploads = [rule.upload(phase, start, local, layout, broadcast) for local in locals_]
            still = {key: start.tensors[key] for key in rule.trained(round_, layout)}
            unmoved = rule.upload(phase, start, still, layout, broadcast)
            wanted = {key: tuple(value.shape) for key, value in unmoved.items()}
            for number, upload in enumerate(uploads):
                assert {key: tuple(value.shape) for key, value in upload.items()} == wanted
                assert {value.dtype for value in upload.values()} == {torch.float32}
                uploads[number] = dict(unpack(pack(Message("upload", tensors=upload))).tensors)
            outcome = rule.combine(phase, start, uploads, weights_of(COUNT), layout, broadcast)
            if outcome.broadcast is not None:
                broadcast = dict(unpack(pack(Message("broadcast", tensors=outcome.broadcast))).tensors)
        state = outcome.state
        assert {key: tuple(value.shape) for key, value in state.tensors.items()} == dict(layout.shapes)
        assert {value.dtype for value in state.tensors.values()} == {torch.float32}
        assert {low.A.dtype for low in state.carried.values()} <= {torch.float32}
    assert_same({key: state.tensors[key] for key in frozen}, frozen, tolerance=0)


@pytest.mark.parametrize("name", RULES)
def test_tensors_of_no_site_are_averaged(name):
    rule, layout = rule_and_layout(name)
    start = begun(rule, layout, name)
    locals_, weights = clients_of(start, layout, rule, COUNT, name), weights_of(COUNT)
    state, _ = a_round(rule, start, locals_, weights, layout)
    means = {key: value for key, value in mean_of(locals_, weights).items() if key in LOOSE}
    found = {key: state.tensors[key] for key in LOOSE}
    if name in ("trimmed-mean", "median", "norm-bound", "multi-krum"):
        assert any((found[key] - means[key]).abs().max() > 1e-6 for key in LOOSE)
    else:
        assert_same(found, means)


@pytest.mark.parametrize("name", SECURE)
def test_secure_rules_need_the_sum_alone(name):
    rule, layout = rule_and_layout(name)
    assert rule.secure
    for round_ in range(2):
        start = rule.begin(state_of(layout, name), layout, round_, generator(0, name))
        locals_, weights = clients_of(start, layout, rule, COUNT, name, round_=round_), weights_of(COUNT)
        alone, _ = a_round(rule, start, locals_, weights, layout, secure=True)
        single, _ = a_round(rule, start, locals_, weights, layout)
        assert_same(dense_state(alone, layout), dense_state(single, layout), tolerance=1e-10)
        assert_same({key: alone.tensors[key] for key in LOOSE}, {key: single.tensors[key] for key in LOOSE})


def test_which_rules_need_sums_alone_and_which_add_differences():
    assert tuple(name for name in RULES if RULES[name].secure) == SECURE
    assert {name for name in RULES if not RULES[name].additive} == {"product", "fedex", "sketch"}


@pytest.mark.parametrize("name", RULES)
def test_rules_can_be_sent_to_other_processes(name):
    rule = make_rule(name)
    assert pickle.loads(pickle.dumps(rule)) == rule


METHODS = ("lora", "dora", "adalora", "bitfit", "bottleneck", "prefix", "full")


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("method", METHODS)
def test_methods_that_a_rule_is_right_for(name, method):
    rule, layout = rule_and_layout(name)
    if method not in ("lora", "dora", "adalora"):
        layout = layout_of({}, method=method)
    else:
        layout = layout_of(method=method, config=layout.config, frozen=layout.frozen)
    means = name in ("fedavg-ab", "trimmed-mean", "median", "norm-bound", "multi-krum")
    if method == "lora" or (means and method != "adalora"):
        rule.check(layout)
        return
    with pytest.raises(InputError, match=f"rule {name} is not right for method '{method}'") as error:
        rule.check(layout)
    assert "\n" not in str(error.value)
    if method in ("dora", "adalora"):
        assert {"dora": "its update is m V", "adalora": "prunes directions"}[method] in str(error.value)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("init", ["default", True, "gaussian", "eva", "loftq", "pissa", "pissa_niter_4", "olora"])
def test_starts_that_a_rule_is_right_for(name, init):
    rule, layout = rule_and_layout(name)
    layout = layout_of(config={**layout.config, "init": init}, frozen=layout.frozen)
    if name in ("product", "fedex", "sketch") and init in ("pissa", "pissa_niter_4", "olora"):
        with pytest.raises(InputError, match="of twice the rank: take another init, or freeze_a true"):
            rule.check(layout)
    else:
        rule.check(layout)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fedavg", {}, "unknown rule 'fedavg': did you mean 'fedavg-ab'"),
        ("median", {"f": 1}, "rule median has no options, and was given f"),
        ("sketch", {"colums": 3}, "unknown option of rule sketch 'colums': did you mean 'columns'"),
        ("sketch", {"columns": 3, "clients": 2}, "columns and clients both"),
        ("sketch", {"rank": 0}, "rank is 0: expected a whole number of at least 1"),
        ("product", {"truncate": 1.5}, "truncate is 1.5"),
        ("fedex", {"truncate": 0}, "truncate is 0"),
        ("trimmed-mean", {"f": 0}, "f is 0"),
        ("multi-krum", {"f": True}, "f is True"),
        ("norm-bound", {"bound": -1.0}, "bound is -1.0: expected a number above 0"),
    ],
)
def test_unknown_rules_and_options(name, options, message):
    with pytest.raises(InputError, match=message):
        make_rule(name, **options)


@pytest.mark.parametrize("name", RULES)
def test_too_few_uploads_other_keys_and_wrong_weights(name):
    rule, layout = rule_and_layout(name)
    start = begun(rule, layout, name)
    uploads = [rule.upload(0, start, one, layout, {}) for one in clients_of(start, layout, rule, COUNT, name)]
    few = rule.least_uploads - 1
    with pytest.raises(RunError, match=f"rule {name} got {few} uploads: it needs at least {few + 1}"):
        rule.combine(0, start, uploads[:few], [1 / few] * few if few else [], layout, {})
    with pytest.raises(InputError, match="summing to 1"):
        rule.combine(0, start, uploads, [0.3] * COUNT, layout, {})
    lacking = [*uploads[:-1], dict(list(uploads[-1].items())[1:])]
    with pytest.raises(RunError, match="uploads differ in their keys"):
        rule.combine(0, start, lacking, [1 / COUNT] * COUNT, layout, {})
