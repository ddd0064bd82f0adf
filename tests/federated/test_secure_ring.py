"""Fixed point, Shamir's shares and mask streams: exact, within their bounds, and refused outside."""

import itertools
import secrets
from fractions import Fraction

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.core.errors import InputError
from deltaw.core.generators import generator
from deltaw.federated.secure import ring, shamir
from deltaw.federated.secure.masks import add_stream, derived_key, pair_key, pair_sign, self_key

BOUNDS = {
    "clients": st.integers(1, 200),
    "clip": st.floats(1e-6, 1e6),
    "weight_bound": st.integers(1, 100_000),
    "noise_bound": st.integers(0, 10_000),
}


@settings(max_examples=200, deadline=None)
@given(**BOUNDS)
def test_the_sum_cannot_overflow_and_one_bit_more_could(clients, clip, weight_bound, noise_bound):
    bits = ring.fraction_bits(clients=clients, clip=clip, weight_bound=weight_bound, noise_bound=noise_bound)
    worst = torch.tensor([clip, -clip, np.nextafter(clip, 0)], dtype=torch.float64)
    for draws in (None, generator(0, "rounding")):
        words = ring.encode(worst, clip=clip, fraction_bits=bits, weight=weight_bound, generator=draws)
        assert (words.long().abs() + noise_bound).max().item() * clients <= ring.LIMIT
    more = Fraction(clip * weight_bound) * Fraction(2) ** (bits + 1)
    assert (-(-more.numerator // more.denominator) + noise_bound) * clients > ring.LIMIT


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 50), st.floats(1e-3, 1e3), st.integers(1, 1000))
def test_words_stand_for_the_values_to_half_a_unit(seed, clients, clip, weight):
    bits = ring.fraction_bits(clients=clients, clip=clip, weight_bound=weight)
    vector = (torch.rand(50, dtype=torch.float64, generator=generator(seed)) * 2 - 1) * clip
    exact, unit = vector * weight, 2.0**-bits
    near = ring.decode(ring.encode(vector, clip=clip, fraction_bits=bits, weight=weight), fraction_bits=bits)
    assert ((near - exact).abs() <= unit / 2 * (1 + 1e-9)).all()
    words = ring.encode(vector, clip=clip, fraction_bits=bits, weight=weight, generator=generator(seed, "r"))
    assert ((ring.decode(words, fraction_bits=bits) - exact).abs() < unit * (1 + 1e-9)).all()


def test_stochastic_rounding_has_no_bias_and_leaves_whole_numbers_alone():
    vector = torch.full((200_000,), 0.3, dtype=torch.float64)
    words = ring.encode(vector, clip=1.0, fraction_bits=0, generator=generator(3))
    assert set(words.tolist()) == {0, 1}
    assert abs(words.double().mean().item() - 0.3) < 6 * (0.21 / 200_000) ** 0.5
    whole = torch.arange(-5, 6).double()
    assert torch.equal(ring.encode(whole, clip=5, fraction_bits=0, generator=generator(4)), whole.int())


@pytest.mark.parametrize(
    ("vector", "reason"),
    [
        ([0.0, float("nan"), float("inf")], "2 of 3 values are not finite"),
        ([0.0, -float("inf")], "1 of 2 values are not finite"),
        ([0.5, 1.1, -3.0], r"2 of 3 values are beyond the clip of 1 \(largest 3\)"),
        ([-3.0, 0.5], "1 of 2 values are beyond the clip"),
        ([], "expected floating-point values"),
        ([[0.5]], "expected floating-point values"),
    ],
)
def test_what_words_cannot_hold_is_refused(vector, reason):
    with pytest.raises(InputError, match=reason):
        ring.encode(torch.tensor(vector), clip=1.0, fraction_bits=20)


def test_bounds_without_room_are_refused():
    for wrong in ({"clip": float("nan")}, {"clip": 0.0}, {"clients": 0}, {"weight_bound": 0}, {"noise_bound": -1}):
        with pytest.raises(InputError, match="expected counts"):
            ring.fraction_bits(**{"clients": 3, "clip": 1.0, **wrong})
    for wrong in ({"weight_bound": 2**30}, {"noise_bound": 2**30}):
        with pytest.raises(InputError, match="overflow 32-bit words"):
            ring.fraction_bits(clients=3, clip=1.0, **wrong)


def test_integers_are_taken_as_they_are_within_their_bound():
    largest = ring.LIMIT // 5 // 7
    vector = torch.tensor([largest, -largest, 0, 3])
    assert torch.equal(ring.encode_integers(vector, clients=5, weight=7).long(), vector * 7)
    for beyond in (largest + 1, -largest - 1, torch.iinfo(torch.int64).min):
        with pytest.raises(InputError, match=f"expected at most {largest}"):
            ring.encode_integers(torch.tensor([0, beyond]), clients=5, weight=7)
    with pytest.raises(InputError, match="expected integer values"):
        ring.encode_integers(torch.tensor([1.0]), clients=5)


def recovered_or_none(shares, *, threshold):
    try:
        return shamir.recover(shares, threshold=threshold)
    except ValueError as error:
        assert "belong to no secret" in str(error)
        return None


@pytest.mark.parametrize(("threshold", "count"), [(t, n) for n in range(1, 6) for t in range(1, n + 1)])
def test_every_large_enough_subset_of_shares_gives_the_secret(threshold, count):
    for secret in (bytes(32), b"\xff" * 32, secrets.token_bytes(32)):
        shares = dict(enumerate(shamir.split(secret, threshold=threshold, count=count), 1))
        for size in range(1, count + 1):
            for chosen in itertools.combinations(shares, size):
                given_ = {x: shares[x] for x in chosen}
                if size >= threshold:
                    assert shamir.recover(given_, threshold=threshold) == secret
                else:
                    with pytest.raises(ValueError, match="expected at least"):
                        shamir.recover(given_, threshold=threshold)
                    # A polynomial of too low a degree would be found by fewer.
                    assert recovered_or_none(given_, threshold=size) != secret


def test_shares_below_the_threshold_fit_every_secret():
    # For each candidate there is a share at the missing place that completes the known ones to it.
    shares = dict(enumerate(shamir.split(secrets.token_bytes(32), threshold=3, count=3), 1))
    for candidate in (bytes(32), b"\x01" * 32, secrets.token_bytes(32)):
        # f(0), f(1), f(2) determine f(3) = f(0) - 3 f(1) + 3 f(2) of a parabola.
        f = [int.from_bytes(each, "big") for each in (candidate, shares[1], shares[2])]
        third = (f[0] - 3 * f[1] + 3 * f[2]) % shamir.PRIME
        completed = {1: shares[1], 2: shares[2], 3: third.to_bytes(33, "big")}
        assert shamir.recover(completed, threshold=3) == candidate


def test_a_hundred_shares_and_wrong_ones():
    secret = secrets.token_bytes(32)
    shares = dict(enumerate(shamir.split(secret, threshold=67, count=100), 1))
    assert shamir.recover({x: shares[x] for x in range(34, 101)}, threshold=67) == secret
    wrong = {**shares, 5: (int.from_bytes(shares[5], "big") ^ 1).to_bytes(33, "big")}
    assert recovered_or_none(wrong, threshold=67) != secret
    for bad in (b"\xff" * 33, b"", bytes(32)):
        with pytest.raises(ValueError, match="share 1 is no number"):
            shamir.recover({1: bad, 2: shares[2]}, threshold=2)
    for threshold, count, size in ((0, 3, 32), (4, 3, 32), (2, 3, 31)):
        with pytest.raises(ValueError, match="expected 32"):
            shamir.split(bytes(size), threshold=threshold, count=count)


def test_streams_are_chacha20s_in_whole_and_known():
    # RFC 8439, A.1, test vector 1.
    words = np.zeros(4, dtype=np.uint32)
    add_stream(words, bytes(32), sign=1)
    assert words.tobytes().hex() == "76b8e0ada0f13d90405d6ae55386bd28"
    for length in (1, 15, 16, 17, 1 << 16, (1 << 16) + 1, 3 * (1 << 16) - 5):
        key = secrets.token_bytes(32)
        stream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(4 * length))
        start = np.frombuffer(secrets.token_bytes(4 * length), dtype=np.uint32)
        words = start.copy()
        add_stream(words, key, sign=1)
        assert np.array_equal(words, start + np.frombuffer(stream, dtype="<u4"))
        add_stream(words, key, sign=-1)
        assert np.array_equal(words, start)


def test_both_of_a_pair_have_one_key_and_every_purpose_another():
    mine, theirs, third = (X25519PrivateKey.generate() for _ in range(3))
    raw = {key: key.public_key().public_bytes_raw() for key in (mine, theirs, third)}
    here = {"session": b"s" * 32, "phase": 0, "names": ("a", "b")}
    key = pair_key(mine, raw[theirs], **here)
    assert key == pair_key(theirs, raw[mine], **{**here, "names": ("b", "a")})
    assert pair_sign("a", "b") + pair_sign("b", "a") == 0
    seed = bytes(32)
    others = [
        pair_key(mine, raw[third], **here),
        pair_key(mine, raw[theirs], **{**here, "phase": 1}),
        pair_key(mine, raw[theirs], **{**here, "session": b"t" * 32}),
        pair_key(mine, raw[theirs], **{**here, "names": ("a", "c")}),
        *(self_key(seed, session=b"s" * 32, phase=phase, name=name) for phase in (0, 1) for name in "ab"),
        derived_key(seed, session=b"s" * 32, purpose=["shares", "a", "b"]),
        derived_key(seed, session=b"s" * 32, purpose=["shares", "b", "a"]),
    ]
    assert len({key, *others}) == 1 + len(others)
