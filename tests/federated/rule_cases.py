"""Random states, layouts and clients for the tests of rules, and the dense arithmetic to compare with."""

import torch

from deltaw.core.generators import generator
from deltaw.federated.rules import make_rule
from deltaw.federated.state import GlobalState, Layout

#: (out, in, r, scale): linears of odd shapes, one thinner than its rank, and an embedding (dim, vocab).
SITES = {"q": (13, 9, 4, 2.0), "v": (5, 17, 3, 0.5), "thin": (2, 7, 3, 1.0), "tokens": (6, 31, 2, 4.0)}
LOOSE = {"head:weight": (3, 6), "head:bias": (3,)}


def layout_of(sites=None, *, method="lora", config=None, frozen=(), loose=None):
    sites = SITES if sites is None else sites
    shapes = dict(LOOSE if loose is None else loose)
    for path, (out, in_, r, _) in sites.items():
        shapes |= {f"{path}:lora_A": (r, in_), f"{path}:lora_B": (out, r)}
    scales = {path: scale for path, (*_, scale) in sites.items()}
    return Layout(shapes, scales, method, config or {}, frozenset(frozen))


def drawn(layout, *names, dtype=torch.float64, size=1.0):
    """Random tensors of a layout."""
    return {
        key: (torch.randn(shape, generator=generator(0, *names, key), dtype=torch.float64) * size).to(dtype)
        for key, shape in layout.shapes.items()
    }


def state_of(layout, *names, dtype=torch.float64):
    return GlobalState(drawn(layout, "state", *names, dtype=dtype))


def clients_of(start, layout, rule, count, *names, round_=0, size=0.3):
    """What clients have after training: the rule's keys moved at random."""
    keys = rule.trained(round_, layout)
    went = [drawn(layout, "client", k, *names, size=size) for k in range(count)]
    return [{key: start.tensors[key] + one[key].to(start.tensors[key].dtype) for key in keys} for one in went]


def weights_of(count, *names):
    drawn_ = torch.rand(count, generator=generator(0, "weights", count, *names), dtype=torch.float64) + 0.1
    return (drawn_ / drawn_.sum()).tolist()


def a_round(rule, start, locals_, weights, layout, *, secure=False, rounding=None):
    """All phases: the last outcome with the facts of all. `secure` combines the mean alone."""
    broadcast, facts = {}, {}
    for phase in range(rule.phases):
        uploads = [rule.upload(phase, start, local, layout, broadcast) for local in locals_]
        given, shares = uploads, weights
        if secure:
            total = {
                key: sum(w * up[key].double() for w, up in zip(weights, uploads, strict=True)) for key in uploads[0]
            }
            given, shares = [{key: rounding(value) if rounding else value for key, value in total.items()}], [1.0]
        outcome = rule.combine(phase, start, given, shares, layout, broadcast)
        assert (outcome.state is None) == (phase < rule.phases - 1)
        broadcast = outcome.broadcast
        facts |= outcome.facts
    return outcome.state, facts


def dense(tensors, layout):
    """s B A of every site, float64."""
    return {path: s * tensors[B].double() @ tensors[A].double() for path, A, B, s in layout.sites()}


def dense_state(state, layout):
    """The whole update of a state: its product and what it carries."""
    found = dense(state.tensors, layout)
    for path, low in state.carried.items():
        found[path] = found[path] + low.scale * low.B.double() @ low.A.double()
    return found


def dense_mean(start, locals_, weights, layout):
    """The weighted mean of the clients' products, with what the state carries."""
    each = [dense({**start.tensors, **local}, layout) for local in locals_]
    carried = dense_state(start, layout)
    own = dense(start.tensors, layout)
    return {
        path: sum(w * one[path] for w, one in zip(weights, each, strict=True)) + carried[path] - own[path]
        for path in layout.scales
    }


def relative(found, expected):
    """The Frobenius error of all sites together."""
    return float(
        sum((found[p] - expected[p]).square().sum() for p in expected).sqrt()
        / sum(expected[p].square().sum() for p in expected).sqrt()
    )


def mean_of(locals_, weights):
    return {key: sum(w * local[key].double() for w, local in zip(weights, locals_, strict=True)) for key in locals_[0]}


def assert_same(found, expected, *, tolerance=1e-12):
    """Whole tensors by key."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key].double(), value.double(), atol=tolerance, rtol=tolerance, msg=key)


def frozen_factors(layout):
    """What `freeze_a` freezes: A, of the embedding B."""
    return {f"{path}:lora_{'B' if path == 'tokens' else 'A'}" for path in layout.scales}


def rule_and_layout(name, **options):
    """A rule with a layout that it takes."""
    layout = layout_of()
    if name == "ffa":
        layout = layout_of(config={"freeze_a": True}, frozen=frozen_factors(layout))
    return make_rule(name, **options), layout
