"""Rounds of secure aggregation: the sum is exact whoever drops out, and what is out of order is refused."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from secure_rounds import (
    STAGES,
    identity,
    names_of,
    parties,
    plain_sum,
    random_vectors,
    share_keys,
    unmask,
    upload,
    wired,
)

from deltaw.core.errors import InputError
from deltaw.core.generators import generator
from deltaw.federated.secure import SecureClient, SecureError, SecureServer, SecureSettings, attempt_context

TWO_PHASES = [f"{stage} {phase}" for phase in (0, 1) for stage in STAGES if phase == 0 or stage != "share"]


def absent_from(fate, order, stage):
    """Who is gone at a stage: whose fate comes there or came before."""
    return {name for name, when in fate.items() if when is not None and order.index(when) <= order.index(stage)}


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_sum_is_exactly_that_of_those_who_uploaded(data):
    count = data.draw(st.integers(3, 7))
    phases = data.draw(st.sampled_from([1, 2]))
    order = TWO_PHASES if phases == 2 else [f"{stage} 0" for stage in STAGES]
    names = names_of(count)
    fate = {name: data.draw(st.sampled_from([None, None, None, *order])) for name in names}
    threshold = data.draw(st.one_of(st.none(), st.integers(count // 2 + 1, count)))
    whole = data.draw(st.booleans())
    weights = {name: data.draw(st.integers(1, 9)) for name in names}
    bounds = {"clip": None if whole else 1.5, "weight_bound": 9, "phases": phases, "threshold": threshold}
    server, clients = parties(count, **bounds)
    least = server.settings.least(count)

    here = set(names) - absent_from(fate, order, "share 0")
    enough = len(here) >= least
    if not enough:
        share_keys(server, clients, absent=set(names) - here)
        with pytest.raises(SecureError, match=f"{len(here)} clients shared their keys: expected at least {least}"):
            server.close_shares()
        return
    share_keys(server, clients, absent=set(names) - here)
    for phase in range(phases):
        vectors = random_vectors(names, 40 + phase, generator=generator(count, "vectors", phase), scale=1.5)
        if whole:
            vectors = {name: (1e6 * vector).long() for name, vector in vectors.items()}
        gone = {stage: absent_from(fate, order, f"{stage} {phase}") for stage in STAGES[1:]}
        sent = upload(server, clients, vectors, phase=phase, weights=weights, absent=gone["upload"])
        assert sorted(sent) == sorted(here - gone["upload"])
        here = set(sent)
        if len(here - gone["unmask"]) < least:
            with pytest.raises(SecureError, match=r"clients .*: expected at least"):
                unmask(server, clients, phase=phase, silent=gone["agree"], mute=gone["unmask"])
            return
        result, _ = unmask(server, clients, phase=phase, silent=gone["agree"], mute=gone["unmask"])
        assert torch.equal(result.total, plain_sum(server, vectors, here, weights))
        assert result.weight == sum(weights[name] for name in here)
        assert result.clients == tuple(sorted(here))


def test_the_sum_is_close_to_the_vectors_themselves():
    server, clients = parties(3)
    share_keys(server, clients)
    vectors = random_vectors(clients, 10_000, generator=generator(1), scale=8.0)
    upload(server, clients, vectors)
    result, _ = unmask(server, clients)
    exact = sum(vector.double() for vector in vectors.values())
    assert server.fraction_bits == 26
    assert (result.total - exact).abs().max() <= 3 * 2.0**-27


@pytest.mark.parametrize(
    ("count", "threshold", "least"),
    [(3, None, 3), (4, None, 3), (6, None, 5), (7, None, 5), (10, None, 7), (100, None, 67), (3, 2, 2), (10, 6, 6)],
)
def test_the_threshold_is_over_two_thirds_or_what_is_asked_for(count, threshold, least):
    assert SecureSettings(threshold=threshold).least(count) == least


@pytest.mark.parametrize(
    ("asked", "count", "reason"),
    [
        ({"threshold": 2}, 4, "threshold 2 of 4 clients: expected a majority"),
        ({"threshold": 5}, 4, "threshold 5 of 4 clients: expected a majority, and at most all"),
        ({}, 2, "2 clients in this round: expected at least 3"),
    ],
)
def test_thresholds_that_protect_nothing_are_refused(asked, count, reason):
    with pytest.raises(SecureError, match=reason):
        SecureSettings(**asked).least(count)


@pytest.mark.parametrize(
    "wrong", [{"threshold": 1}, {"minimum": 1}, {"phases": 3}, {"clip": -1.0}, {"weight_bound": 0}, {"max_norm": 0.0}]
)
def test_settings_outside_their_range_are_refused(wrong):
    with pytest.raises(InputError, match=f"{next(iter(wrong)).split('_')[0]}"):
        SecureSettings(**wrong)


def test_a_vector_beyond_its_bounds_never_leaves_the_client():
    server, clients = parties(3, clip=1.0, max_norm=2.0, weight_bound=5)
    share_keys(server, clients)
    client = clients["bank-00"]
    shares = server.shares_for("bank-00")
    good = torch.zeros(8)
    for vector, weight, reason in [
        (torch.full((8,), float("nan")), 1, "norm is nan"),
        (torch.full((8,), 0.9), 1, "norm is 2.5"),
        (torch.tensor([1.5, 0.0]), 1, "beyond the clip"),
        (good, 6, "weight 6: expected a whole number from 1 to 5"),
        (good, 0, "weight 0"),
        (good, True, "weight True"),
        (good, 1.0, "weight 1.0"),
        (good.long(), 1, "expected floating-point values"),
    ]:
        with pytest.raises(InputError, match=reason):
            client.mask(shares, vector, weight=weight)
    with pytest.raises(SecureError, match="has masked no vector"):
        client.receipt()
    assert client.mask(shares, good).shape == (9,)


def test_steps_out_of_their_order_are_refused():
    server, clients = parties(3, phases=2)
    client, zeros = clients["bank-00"], {name: torch.zeros(4) for name in clients}
    with pytest.raises(SecureError, match="advertise comes first"):
        client.share({})
    share_early = dict(zip(clients, itertools.repeat({}), strict=False))
    with pytest.raises(SecureError, match="no attempt"):
        client.mask(share_early, zeros["bank-00"])
    for early in (lambda: server.threshold, lambda: server.add_shares("bank-00", {}), lambda: server.result()):
        with pytest.raises(SecureError):
            early()
    share_keys(server, clients)
    shares = server.shares_for("bank-00")
    for phase in (1, 2, -1):
        with pytest.raises(SecureError, match=f"cannot mask a vector of phase {phase} now"):
            client.mask(shares, zeros["bank-00"], phase=phase)
    with pytest.raises(SecureError, match="masked nothing in phase 0"):
        client.agree(list(clients), [])
    upload(server, clients, zeros)
    with pytest.raises(SecureError, match="has signed no survivors"):
        client.unmask({})
    with pytest.raises(SecureError, match="cannot mask a vector of phase 0 now: out of order, or a second one"):
        client.mask(shares, zeros["bank-00"])
    with pytest.raises(SecureError, match="cannot mask a vector of phase 1"):
        client.mask({}, zeros["bank-00"], phase=1)
    with pytest.raises(SecureError, match="has shared its keys in this attempt already"):
        client.share(server.adverts())
    with pytest.raises(SecureError, match="begun before"):
        client.advertise(server.context)
    unmask(server, clients)
    with pytest.raises(SecureError, match="out of order, or a second one"):
        client.mask({}, zeros["bank-00"], phase=0)
    upload(server, clients, zeros, phase=1)
    unmask(server, clients, phase=1)
    with pytest.raises(SecureError, match="cannot mask a vector of phase 2"):
        client.mask({}, zeros["bank-00"], phase=2)


def test_the_same_request_again_gets_the_same_answer_where_that_reveals_nothing_new():
    server, clients = parties(3)
    share_keys(server, clients)
    upload(server, clients, {name: torch.zeros(4) for name in clients})
    client, (here, gone) = clients["bank-01"], server.survivors()
    assert client.agree(here, gone) == client.agree(here[::-1], gone)
    _, told = unmask(server, clients)
    agreements = {name: other.agree(here, gone) for name, other in clients.items()}
    assert client.unmask(agreements) == told["bank-01"]


def test_late_repeated_and_foreign_messages_do_not_disturb_the_sum():
    server, clients = parties(4, threshold=3)
    old = {name: client.advertise(attempt_context("run", 0, 7)) for name, client in clients.items()}
    with pytest.raises(SecureError, match="another run, round or attempt"):
        server.add_advert("bank-00", old["bank-00"])
    with pytest.raises(SecureError, match="not among the participants"):
        server.add_advert("bank-99", old["bank-00"])
    adverts = {name: client.advertise(server.context) for name, client in clients.items()}
    with pytest.raises(SecureError, match="message of 'bank-01'"):
        server.add_advert("bank-00", adverts["bank-01"])
    for name in names_of(3):
        server.add_advert(name, adverts[name])
    with pytest.raises(SecureError, match="it sent one before"):
        server.add_advert("bank-00", adverts["bank-00"])
    known = server.adverts()
    with pytest.raises(SecureError, match="bank-03's advertise message is refused: it came too late"):
        server.add_advert("bank-03", adverts["bank-03"])
    shared = {name: clients[name].share(known) for name in known}
    with pytest.raises(SecureError, match="never took part"):
        server.add_shares("bank-03", shared["bank-00"])
    for name, message in shared.items():
        server.add_shares(name, message)
    with pytest.raises(SecureError, match="it sent one before"):
        server.add_shares("bank-00", shared["bank-00"])
    vectors = random_vectors(known, 30, generator=generator(2))
    members = server.close_shares()
    with pytest.raises(SecureError, match="too late"):
        server.add_shares("bank-00", shared["bank-00"])
    with pytest.raises(SecureError, match="takes no further part"):
        server.shares_for("bank-03")
    words = {name: clients[name].mask(server.shares_for(name), vectors[name]) for name in members}
    first = clients["bank-00"].receipt()
    for wrong, receipt, reason in [
        (words["bank-01"], first, "not those that it signed"),
        (words["bank-00"][:-1], first, "not those that it signed"),
        (words["bank-00"].long(), first, "expected a vector of int32 words"),
        (words["bank-00"][None], first, "expected a vector of int32 words"),
        (words["bank-00"], clients["bank-01"].receipt(), "message of 'bank-01'"),
        (words["bank-00"], None, "got NoneType"),
    ]:
        with pytest.raises(SecureError, match=reason):
            server.add_upload("bank-00", wrong, receipt)
    for name in members:
        server.add_upload(name, words[name], clients[name].receipt())
    with pytest.raises(SecureError, match="it sent one before"):
        server.add_upload("bank-00", words["bank-00"], first)
    here, gone = server.survivors()
    with pytest.raises(SecureError, match="too late"):
        server.add_upload("bank-00", words["bank-00"], first)
    result, told = unmask(server, clients)
    assert torch.equal(result.total, plain_sum(server, vectors, here))
    with pytest.raises(SecureError, match="too late"):
        server.add_unmask("bank-00", told["bank-00"])
    assert gone == []


def test_uploads_of_another_length_are_refused():
    server, clients = parties(4, threshold=3)
    share_keys(server, clients)
    vectors = {name: torch.ones(5 if name == "bank-03" else 6) for name in clients}
    with pytest.raises(SecureError, match="bank-03's upload is refused: 6 words, others sent 7"):
        upload(server, clients, vectors)
    result, _ = unmask(server, clients)
    assert torch.equal(result.total, torch.full((6,), 3.0, dtype=torch.float64))


def test_participants_with_other_settings_or_keys_are_told():
    server, clients = parties(3)
    peers = {name: identity(name).public for name in names_of(3)}
    other = SecureClient("bank-02", identity("bank-02"), peers, settings=SecureSettings(clip=4.0))
    with pytest.raises(SecureError, match="bank-02 has other settings or another list of participants"):
        server.add_advert("bank-02", other.advertise(server.context))
    larger = {**peers, "bank-03": identity("bank-03").public}
    other = SecureClient("bank-02", identity("bank-02"), larger, settings=SecureSettings())
    with pytest.raises(SecureError, match="another list of participants"):
        server.add_advert("bank-02", other.advertise(server.context))
    with pytest.raises(InputError, match="another key for bank-00"):
        SecureClient("bank-00", identity("bank-01"), peers, settings=SecureSettings())
    with pytest.raises(InputError, match="the same identity key"):
        SecureServer(server.context, {**peers, "twin": peers["bank-00"]}, settings=SecureSettings())
    for context in (b"", b"x", b"[1,2,3]", b'["run",0]', b'["run", 0, 0]', b"\xff"):
        with pytest.raises(SecureError, match="attempt's context is refused"):
            SecureServer(context, peers, settings=SecureSettings())
        with pytest.raises(SecureError, match="attempt's context is refused"):
            clients["bank-00"].advertise(context)


def test_a_second_attempt_after_one_that_failed():
    server, clients = parties(4)
    share_keys(server, clients, absent=("bank-02", "bank-03"))
    with pytest.raises(SecureError, match="2 clients shared their keys: expected at least 3; begin another attempt"):
        server.shares_for("bank-00")
    peers = {name: identity(name).public for name in clients}
    server = SecureServer(attempt_context("run", 0, 1), peers, settings=server.settings)
    share_keys(server, clients)
    vectors = random_vectors(clients, 20, generator=generator(5))
    upload(server, clients, vectors, absent=("bank-03",))
    result, _ = unmask(server, clients)
    assert torch.equal(result.total, plain_sum(server, vectors, names_of(3)))


def test_wrong_shares_of_one_client_are_found_and_done_without():
    server, clients = parties(5, threshold=3)
    share_keys(server, clients)
    vectors = random_vectors(clients, 20, generator=generator(6))
    upload(server, clients, vectors, absent=("bank-04",))
    liar = clients["bank-00"]._attempt
    liar.shares = {name: [(b"\x00" * 32 + b"\x07", b"\x00" * 32 + b"\x09")] for name in liar.shares}
    result, _ = unmask(server, clients)
    assert torch.equal(result.total, plain_sum(server, vectors, names_of(4)))


def test_wrong_shares_without_enough_others_end_the_attempt():
    server, clients = parties(3)
    share_keys(server, clients)
    upload(server, clients, random_vectors(clients, 20, generator=generator(7)))
    liar = clients["bank-00"]._attempt
    liar.shares["bank-01"] = liar.shares["bank-02"]
    with pytest.raises(SecureError, match="bank-01's masks cannot be taken off"):
        unmask(server, clients)


def test_a_weight_beyond_the_bound_is_found_in_the_sum():
    server, clients = parties(3, weight_bound=4)
    share_keys(server, clients)
    clients["bank-00"].settings = SecureSettings(weight_bound=40)
    upload(
        server, clients, {name: torch.zeros(3) for name in clients}, weights=dict.fromkeys(clients, 1) | {"bank-00": 40}
    )
    with pytest.raises(SecureError, match="sum of the weights is 42"):
        unmask(server, clients)


def test_messages_hold_nothing_but_plain_values():
    server, clients = parties(3)
    advert = clients["bank-00"].advertise(server.context)
    assert wired(advert) == advert
    assert set(advert) == {"kind", "name", "context", "terms", "mask_keys", "share_key", "signature"}
