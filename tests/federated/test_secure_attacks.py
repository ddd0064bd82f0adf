"""What an attacker sees and can do: uploads are uniform, colluders learn the residual only, lies are found."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from secure_rounds import identity, names_of, parties, plain_sum, random_vectors, share_keys, unmask, upload

from deltaw.core.generators import generator
from deltaw.federated.secure import IdentityKey, SecureError, SecureServer, attempt_context, ring, shamir
from deltaw.federated.secure import client as client_module
from deltaw.federated.secure.masks import add_stream, pair_key, pair_sign, self_key
from deltaw.federated.secure.statements import from_text, signed, to_text

LENGTH = 200_000
# Each draw of fresh keys is a new experiment, so the level is far below what a suite run for years would meet.
LEVEL = 1e-9


def as_words(tensor):
    return tensor.numpy().view(np.uint32).copy()


def looks_uniform(words):
    """Chi-square over the values of bytes in each of the four places, and each bit position's share of ones."""
    places = words.view(np.uint8).reshape(-1, 4)
    chance = [stats.chisquare(np.bincount(places[:, place], minlength=256)).pvalue for place in range(4)]
    ones = [int(((words >> np.uint32(bit)) & np.uint32(1)).sum()) for bit in range(32)]
    chance += [2 * stats.norm.sf(abs(count - len(words) / 2) / math.sqrt(len(words) / 4)) for count in ones]
    return bool(min(chance) > LEVEL)


def without_own(words, client, phase=0):
    """The words without the client's own mask."""
    attempt, left = client._attempt, words.copy()
    key = self_key(attempt.seeds[phase], session=attempt.transcript.session, phase=phase, name=client.name)
    add_stream(left, key, sign=-1)
    return left


def without_pairs(words, client, peers, phase=0, *, private=None):
    """The words without the masks that the client shares with some peers, by the secrets of either side."""
    attempt, left = client._attempt, words.copy()
    transcript = attempt.transcript
    for peer in peers:
        key = pair_key(
            private or attempt.mask_keys[phase],
            transcript.mask_keys[peer][phase],
            session=transcript.session,
            phase=phase,
            names=(client.name, peer),
        )
        add_stream(left, key, sign=-pair_sign(client.name, peer))
    return left


def sent_words(vectors, **settings):
    server, clients = parties(len(vectors), **settings)
    share_keys(server, clients)
    return server, clients, upload(server, clients, vectors)


def constant(names, value=1.0):
    return {name: torch.full((LENGTH,), value) for name in names}


def leave_out(monkeypatch, purpose):
    """A client that forgets one kind of mask; both kinds where purpose is None."""
    for kind in ("self", "pair"):
        if purpose in (kind, None):
            monkeypatch.setattr(client_module, f"{kind}_key", lambda *args, **kwargs: None)
    monkeypatch.setattr(
        client_module, "add_stream", lambda words, key, *, sign: key and add_stream(words, key, sign=sign)
    )


@pytest.mark.parametrize("forgotten", ["nothing", "self", "pair", None])
def test_an_upload_is_uniform_and_so_is_what_either_mask_alone_leaves(monkeypatch, forgotten):
    if forgotten != "nothing":
        leave_out(monkeypatch, forgotten)
    _, clients, sent = sent_words(constant(names_of(3)))
    name = "bank-01"
    words, peers = as_words(sent[name]), [peer for peer in clients if peer != name]
    assert looks_uniform(words) is (forgotten is not None)
    # The server learns own masks in every round, and pair masks of whoever it says has dropped out.
    assert looks_uniform(without_own(words, clients[name])) is (forgotten != "pair")
    assert looks_uniform(without_pairs(words, clients[name], peers)) is (forgotten != "self")
    both = without_own(without_pairs(words, clients[name], peers), clients[name])
    assert looks_uniform(both) is (forgotten != "nothing")


def test_uploads_of_different_vectors_have_one_distribution():
    names = names_of(3)
    noisy = random_vectors(names, LENGTH, generator=generator(0))
    _, _, first = sent_words(constant(names, -3.0))
    _, _, second = sent_words(noisy)
    counts = [np.bincount(as_words(sent["bank-00"]).view(np.uint8), minlength=256) for sent in (first, second)]
    assert stats.chi2_contingency(counts).pvalue > LEVEL
    plain = [ring.encode(vectors["bank-00"], clip=8.0, fraction_bits=26) for vectors in (constant(names, -3.0), noisy)]
    counts = [np.bincount(as_words(words).view(np.uint8), minlength=256) + 1 for words in plain]
    assert stats.chi2_contingency(counts).pvalue < LEVEL


def test_masks_of_another_attempt_and_of_another_phase_are_unrelated():
    names = names_of(3)
    server, clients = parties(3, phases=2)
    peers = {name: identity(name).public for name in names}
    share_keys(server, clients)
    seen = [as_words(upload(server, clients, constant(names))["bank-00"])]
    unmask(server, clients)
    seen.append(as_words(upload(server, clients, constant(names), phase=1)["bank-00"]))
    again = SecureServer(attempt_context("run", 0, 1), peers, settings=server.settings)
    share_keys(again, clients)
    seen.append(as_words(upload(again, clients, constant(names))["bank-00"]))
    for one, other in itertools.combinations(seen, 2):
        assert looks_uniform(one - other)


def revealed_seed(told, server, owner):
    transcript = server._transcript
    shares = {transcript.number(name): from_text(message["seeds"][owner]) for name, message in told.items()}
    return shamir.recover(shares, threshold=server.threshold)


@pytest.mark.parametrize("count", [3, 5])
def test_all_but_one_colluding_with_the_server_learn_exactly_the_residual(count):
    vectors = random_vectors(names_of(count), 500, generator=generator(1))
    server, clients, sent = sent_words(vectors, weight_bound=9)
    result, told = unmask(server, clients)
    honest = clients.pop("bank-02")
    residual = result.total - plain_sum(server, vectors, clients)
    assert torch.equal(residual, plain_sum(server, vectors, ["bank-02"]))
    # The same by hand: the seed that everybody reveals, and the colluders' own keys.
    words = as_words(sent["bank-02"])
    seed = revealed_seed(told, server, "bank-02")
    session = server._transcript.session
    add_stream(words, self_key(seed, session=session, phase=0, name="bank-02"), sign=-1)
    public = honest._attempt.transcript.mask_keys["bank-02"][0]
    for name, colluder in clients.items():
        key = pair_key(colluder._attempt.mask_keys[0], public, session=session, phase=0, names=(name, "bank-02"))
        add_stream(words, key, sign=-pair_sign("bank-02", name))
    expected = ring.encode(vectors["bank-02"], clip=8.0, fraction_bits=server.fraction_bits)
    assert np.array_equal(words[:-1], as_words(expected)) and words[-1] == 1


def test_of_two_honest_clients_colluders_learn_the_sum_alone():
    names = names_of(5)
    vectors = constant(names)
    server, clients, sent = sent_words(vectors)
    result, told = unmask(server, clients)
    honest, colluders = names[:2], names[2:]
    seen = {}
    for name in honest:
        words = as_words(sent[name])
        key = self_key(revealed_seed(told, server, name), session=server._transcript.session, phase=0, name=name)
        add_stream(words, key, sign=-1)
        seen[name] = without_pairs(words, clients[name], colluders)
        assert looks_uniform(seen[name])
    both = plain_sum(server, vectors, honest)
    assert torch.equal(result.total - plain_sum(server, vectors, colluders), both)
    total = torch.from_numpy((seen[honest[0]] + seen[honest[1]])[:-1].view(np.int32))
    assert torch.equal(ring.decode(total, fraction_bits=server.fraction_bits), both)


def test_who_drops_out_of_the_second_phase_keeps_its_first_vector():
    names = names_of(4)
    server, clients = parties(4, phases=2, threshold=3)
    share_keys(server, clients)
    first = upload(server, clients, constant(names))
    unmask(server, clients)
    upload(server, clients, constant(names), phase=1, absent=("bank-03",))
    _, told = unmask(server, clients, phase=1)
    shares = {server._transcript.number(name): from_text(message["keys"]["bank-03"]) for name, message in told.items()}
    key = client_module.X25519PrivateKey.from_private_bytes(shamir.recover(shares, threshold=3))
    victim = clients["bank-03"]
    assert key.private_bytes_raw() == victim._attempt.mask_keys[1].private_bytes_raw()
    # The server has its first seed and its second key: with a key common to both phases the vector would lie open.
    words = without_own(as_words(first["bank-03"]), victim)
    assert looks_uniform(without_pairs(words, victim, names[:3], private=key))
    assert not looks_uniform(without_pairs(words, victim, names[:3]))


def test_who_dropped_out_of_the_first_phase_is_not_in_the_second():
    names = names_of(4)
    server, clients = parties(4, phases=2, threshold=3)
    share_keys(server, clients)
    vectors = constant(names)
    upload(server, clients, vectors, absent=("bank-03",))
    unmask(server, clients)
    words = clients["bank-03"].mask(server.shares_for("bank-03"), vectors["bank-03"])
    for phase in (0, 1):
        receipt = {**clients["bank-03"].receipt(), "phase": phase}
        with pytest.raises(SecureError, match="dropped out before"):
            server.add_upload("bank-03", words, receipt)
    with pytest.raises(SecureError, match="cannot mask a vector of phase 1"):
        clients["bank-03"].mask({}, vectors["bank-03"], phase=1)


def test_a_server_cannot_have_contradictory_survivors_signed():
    server, clients = parties(4, threshold=3)
    share_keys(server, clients)
    upload(server, clients, random_vectors(clients, 4, generator=generator(3)))
    names = sorted(clients)
    honest = clients["bank-00"].agree(names, [])
    lied = clients["bank-01"].agree(names[:3], names[3:])
    with pytest.raises(SecureError, match="bank-00 has signed other survivors of phase 0 in this attempt"):
        clients["bank-00"].agree(names[:3], names[3:])
    third = clients["bank-02"].agree(names, [])
    with pytest.raises(SecureError, match="bank-01 signed other survivors of phase 0 than bank-00"):
        clients["bank-00"].unmask({"bank-00": honest, "bank-01": lied, "bank-02": third})
    with pytest.raises(SecureError, match="2 clients signed the survivors of phase 0: expected at least 3"):
        clients["bank-00"].unmask({"bank-00": honest, "bank-02": third})
    with pytest.raises(SecureError, match="its signature is not that organisation's"):
        clients["bank-00"].unmask({"bank-00": honest, "bank-02": third, "bank-01": {**honest, "name": "bank-01"}})
    with pytest.raises(SecureError, match="bank-01's agreement is refused: it signed other survivors"):
        server.survivors()
        server.add_agreement("bank-01", lied)


def test_a_signature_of_one_that_dropped_out_does_not_count():
    server, clients = parties(4, threshold=3)
    share_keys(server, clients)
    upload(server, clients, random_vectors(clients, 4, generator=generator(3)), absent=("bank-03",))
    here, gone = server.survivors()
    given = {name: clients[name].agree(here, gone) for name in here[:2]}
    said = {key: given["bank-00"][key] for key in ("session", "phase", "survivors", "dropped")}
    colluding = signed(identity("bank-03"), kind="agree", name="bank-03", context=server.context, **said)
    with pytest.raises(SecureError, match="bank-03 signed other survivors"):
        clients["bank-00"].unmask({**given, "bank-03": colluding})
    with pytest.raises(SecureError, match="dropped out before"):
        server.add_agreement("bank-03", colluding)


@pytest.mark.parametrize(
    ("survivors", "dropped", "reason"),
    [
        ([1, 2, 3], [0], "bank-00 is said to have dropped out"),
        ([0, 1], [2, 3], "2 survivors of phase 0: expected at least 3"),
        ([0, 1, 2], [], "not the clients that took part"),
        ([0, 1, 2, 3], [3], "not the clients that took part"),
        ([0, 0, 1, 2], [3], "not the clients that took part"),
        ([0, 1, 2, 3, 4], [], "not the clients that took part"),
        (None, None, "cannot be read"),
    ],
)
def test_survivors_that_would_reveal_too_much_are_not_signed(survivors, dropped, reason):
    server, clients = parties(4, threshold=3)
    share_keys(server, clients)
    upload(server, clients, random_vectors(clients, 4, generator=generator(3)))
    told = [each and [f"bank-{number:02d}" for number in each] for each in (survivors, dropped)]
    told = [[] if each == [] and survivors else each for each in told]
    with pytest.raises(SecureError, match=reason):
        clients["bank-00"].agree(*told)


def test_one_round_gives_no_second_sum_over_other_clients():
    server, clients = parties(4, threshold=3)
    peers = {name: identity(name).public for name in clients}
    share_keys(server, clients)
    vectors = random_vectors(clients, 20, generator=generator(4))
    upload(server, clients, vectors)
    unmask(server, clients)
    again = SecureServer(attempt_context("run", 0, 1), peers, settings=server.settings)
    share_keys(again, clients)
    upload(again, clients, vectors, absent=("bank-03",))
    with pytest.raises(SecureError, match="the two sums would show their difference"):
        unmask(again, clients)
    same = SecureServer(attempt_context("run", 0, 2), peers, settings=server.settings)
    share_keys(same, clients)
    upload(same, clients, vectors)
    assert torch.equal(unmask(same, clients)[0].total, plain_sum(same, vectors, clients))
    later = SecureServer(attempt_context("run", 1, 0), peers, settings=server.settings)
    share_keys(later, clients)
    upload(later, clients, vectors, absent=("bank-03",))
    assert torch.equal(unmask(later, clients)[0].total, plain_sum(later, vectors, names_of(3)))


def test_clients_that_were_shown_different_keys_share_nothing():
    server, clients = parties(4, threshold=3)
    adverts = {name: client.advertise(server.context) for name, client in clients.items()}
    part = {name: adverts[name] for name in names_of(3)}
    shared = {name: clients[name].share(part if name == "bank-00" else adverts) for name in names_of(3)}
    for name, advert in adverts.items():
        server.add_advert(name, advert)
    server.adverts()
    with pytest.raises(SecureError, match="bank-00 was shown other keys than"):
        server.add_shares("bank-00", shared["bank-00"])
    crossed = {name: shared[name]["sealed"]["bank-00"] for name in ("bank-01", "bank-02")}
    with pytest.raises(SecureError, match="bank-01's shares for bank-00 are refused"):
        clients["bank-00"].mask(crossed, torch.zeros(3))


def test_false_lists_of_keys_are_refused():
    server, clients = parties(4, threshold=3)
    adverts = {name: client.advertise(server.context) for name, client in clients.items()}
    client = clients["bank-00"]
    old = copy.deepcopy(adverts["bank-01"])
    fresh = clients["bank-01"].advertise(attempt_context("run", 0, 9))
    stranger = signed(
        IdentityKey.make(),
        kind="advertise",
        name="bank-01",
        context=server.context,
        **{key: old[key] for key in ("terms", "mask_keys", "share_key")},
    )
    own = signed(
        identity("bank-00"),
        kind="advertise",
        name="bank-00",
        context=server.context,
        **{key: adverts["bank-00"][key] for key in ("terms", "mask_keys")},
        share_key=old["share_key"],
    )
    low_order = signed(
        identity("bank-01"),
        kind="advertise",
        name="bank-01",
        context=server.context,
        terms=old["terms"],
        mask_keys=[to_text(bytes(32))],
        share_key=to_text(bytes(32)),
    )
    for wrong, reason in [
        ({**adverts, "bank-01": fresh}, "another run, round or attempt"),
        ({**adverts, "bank-01": adverts["bank-02"]}, "message of 'bank-02'"),
        ({**adverts, "bank-01": stranger}, "signature is not that organisation's"),
        ({**adverts, "bank-01": low_order}, "bank-01's share key is refused"),
        ({**adverts, "bank-00": own}, "has others for it"),
        ({**adverts, "mallory": old}, "not among the participants"),
        ({name: adverts[name] for name in names_of(4)[1:]}, "lacks bank-00's own"),
        ({name: adverts[name] for name in names_of(2)}, "expected at least 3"),
        ({**adverts, 3: old}, "cannot be read"),
        (None, "cannot be read"),
        ([["bank-00"], ["bank-01"], ["bank-02"]], "cannot be read|not among"),
    ]:
        with pytest.raises(SecureError, match=reason):
            client.share(wrong)
    client.share(adverts)


def test_false_shares_are_refused():
    server, clients = parties(4, threshold=3)
    share_keys(server, clients)
    shares, theirs = server.shares_for("bank-00"), server.shares_for("bank-01")
    raw = from_text(shares["bank-01"])
    flipped = to_text(raw[:20] + bytes([raw[20] ^ 1]) + raw[21:])
    for wrong, reason in [
        ({**shares, "bank-01": flipped}, "changed on the way"),
        ({**shares, "bank-01": shares["bank-02"]}, "changed on the way"),
        ({**shares, "bank-02": theirs["bank-02"]}, "changed on the way"),
        ({**shares, "bank-01": ""}, "bank-01's shares"),
        ({**shares, "bank-01": 5}, "cannot be read"),
        ({**shares, "bank-00": shares["bank-01"]}, "expected them from others"),
        ({**shares, "mallory": shares["bank-01"]}, "expected them from others"),
        ({"bank-01": shares["bank-01"]}, "2 clients shared their keys: expected at least 3"),
        ({}, "1 clients shared"),
        (None, "cannot be read"),
    ]:
        with pytest.raises(SecureError, match=reason):
            clients["bank-00"].mask(wrong, torch.zeros(3))
    assert clients["bank-00"].mask(shares, torch.zeros(3)).shape == (4,)


def conversation(server, clients):
    """(stage, name, how it is taken, message) of a whole round; each is taken after it was looked at."""

    def told(stage, take, say, names=tuple(clients)):
        for name in names:
            message = say(name)
            yield stage, name, take, message
            take(name, message)

    yield from told("advert", server.add_advert, lambda name: clients[name].advertise(server.context))
    adverts = server.adverts()
    yield from told("shares", server.add_shares, lambda name: clients[name].share(adverts))
    words = {name: clients[name].mask(server.shares_for(name), torch.ones(3)) for name in clients}

    def take_upload(name, message):
        server.add_upload(name, words[name], message)

    absent = sorted(clients)[-1]
    here = [name for name in clients if name != absent]
    yield from told("upload", take_upload, lambda name: clients[name].receipt(), here)
    sets = server.survivors()
    yield from told("agreement", server.add_agreement, lambda name: clients[name].agree(*sets), here)
    agreements = server.agreements()
    yield from told("unmask", server.add_unmask, lambda name: clients[name].unmask(agreements), here)


def changed(value):
    """Values of other kinds, and ones that differ a little at any depth."""
    yield from (None, 5, "x", [], {}, {"bank-00": None})
    if isinstance(value, str):
        yield value[:-6] + ("A" if value[-6:-5] != "A" else "B") + value[-5:]
    elif isinstance(value, int):
        yield from (value + 1, -1)
    elif isinstance(value, list) and value:
        yield from (value[:-1], [*value, value[0]])
        yield from ([each, *value[1:]] for each in changed(value[0]))
    elif isinstance(value, dict) and value:
        first, *others = value
        yield {key: value[key] for key in others}
        yield from ({**value, first: each} for each in changed(value[first]))


def form(value):
    if isinstance(value, dict):
        return {key: form(each) for key, each in value.items()}
    return [form(each) for each in value] if isinstance(value, list) else (type(value), len(str(value)))


@pytest.mark.parametrize("stage", ["advert", "shares", "upload", "agreement", "unmask"])
def test_a_change_in_any_field_of_any_message_is_found(stage):
    server, clients = parties(4, threshold=3)
    tried = 0
    for at, name, take, message in conversation(server, clients):
        if (at, name) != (stage, "bank-01"):
            continue
        for field in message:
            with pytest.raises(SecureError, match="expected the fields"):
                take(name, {key: value for key, value in message.items() if key != field})
            for value in changed(message[field]):
                if value == message[field]:
                    continue
                with pytest.raises(SecureError):
                    take(name, {**message, field: value})
                tried += 1
                # A sender may sign anything, and other keys, ciphertexts or shares of the right form are its own doing.
                own = field in ("mask_keys", "share_key", "sealed", "seeds", "keys")
                if field in ("kind", "name", "context", "signature") or (own and form(value) == form(message[field])):
                    continue
                said = {key: each for key, each in message.items() if key not in ("context", "signature")}
                with pytest.raises(SecureError):
                    take(name, signed(identity(name), context=server.context, **{**said, field: value}))
        for wrong in (None, 5, "text", [], {}, {**message, "more": 1}):
            with pytest.raises(SecureError):
                take(name, wrong)
    assert tried > 30
    assert server.result().weight == 3
