"""Homomorphic aggregation: the sum within its precision, at its price in bytes, and no key at the server."""

import sys

import pytest
import torch

from deltaw.core.errors import InputError, MissingExtraError
from deltaw.core.generators import generator
from deltaw.federated.secure import SecureError, SecureSettings, ckks

NAMES = ("bank-a", "bank-b", "bank-c")


def test_a_missing_library_is_told_with_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tenseal", None)
    with pytest.raises(MissingExtraError, match=r"deltaw\[homomorphic\]"):
        ckks.make_context()


@pytest.fixture(scope="module")
def contexts():
    pytest.importorskip("tenseal")
    return ckks.make_context()


def made(contexts, **settings):
    settings = SecureSettings(**settings)
    clients = {name: ckks.CkksClient(name, contexts[0], settings=settings, clients=3) for name in NAMES}
    return ckks.CkksServer(contexts[1]), clients


def test_the_sum_comes_back_at_its_precision_and_price(contexts):
    server, clients = made(contexts, clip=4.0, weight_bound=100)
    draws, length = generator(0), 5000
    vectors = {name: torch.rand(length, generator=draws) * 8 - 4 for name in NAMES}
    weights = dict(zip(NAMES, (1, 50, 100), strict=True))
    for name, client in clients.items():
        data = client.mask(vectors[name], weight=weights[name])
        server.add_upload(name, data)
    # 5,001 values in 3 ciphertexts of 2,048 places; 32 bytes a place, where a masked word has 4.
    assert 3 * 65_000 < data.numel() < 3 * 66_500
    total, names = server.result()
    exact = sum(weights[name] * vectors[name].double() for name in NAMES)
    for client in clients.values():
        result = client.unmask(total, names)
        assert (result.weight, result.clients) == (151, NAMES)
        # Half of the grid that results are rounded to; the noise below it is 2^-10 as large.
        assert client.scale_bits == 47
        assert (result.total - exact).abs().max() < 2.0**-23 * 0.51


def test_the_server_cannot_decrypt_and_wrong_contexts_are_refused(contexts):
    settings = SecureSettings()
    with pytest.raises(InputError, match="has the secret key"):
        ckks.CkksServer(contexts[0])
    with pytest.raises(InputError, match="has no secret key"):
        ckks.CkksClient("bank-a", contexts[1], settings=settings, clients=3)
    with pytest.raises(InputError, match="no context of CKKS"):
        ckks.CkksServer(b"junk")
    server, clients = made(contexts)
    server.add_upload("bank-a", clients["bank-a"].mask(torch.ones(4)))
    with pytest.raises(ValueError, match=r"(?i)secret.?key|private key"):
        server._sum[0].decrypt()


def test_what_is_no_upload_is_refused_and_leaves_the_sum(contexts):
    server, clients = made(contexts)
    with pytest.raises(SecureError, match="no client sent"):
        server.result()
    one = clients["bank-a"].mask(torch.full((9,), 2.0))
    server.add_upload("bank-a", one)
    for name, data, reason in [
        ("bank-a", one, "sent one before"),
        ("bank-b", one[:-3], "cut off"),
        ("bank-b", torch.zeros(40, dtype=torch.uint8), "cut off"),
        ("bank-b", clients["bank-b"].mask(torch.ones(8)), "another length"),
        ("bank-b", one[:0], "another length"),
        ("bank-b", torch.cat([one[:200], one[200:] ^ 255]), "refused"),
    ]:
        with pytest.raises(SecureError, match=reason):
            server.add_upload(name, data)
    server.add_upload("bank-b", clients["bank-b"].mask(torch.full((9,), 0.5)))
    total, names = server.result()
    result = clients["bank-c"].unmask(total, names)
    torch.testing.assert_close(result.total, torch.full((9,), 2.5, dtype=torch.float64), atol=1e-6, rtol=0)
    with pytest.raises(SecureError, match="not the sum over 3 clients"):
        clients["bank-c"].unmask(total, NAMES)
    with pytest.raises(SecureError, match="cannot be decrypted"):
        clients["bank-c"].unmask(total[:-1], names)


def test_bounds_are_those_of_masked_vectors(contexts):
    _, clients = made(contexts, clip=1.0, weight_bound=3)
    for vector, weight, reason in [
        (torch.tensor([2.0]), 1, "beyond the clip"),
        (torch.tensor([float("nan")]), 1, "not finite"),
        (torch.tensor([1.0]), 4, "weight 4"),
    ]:
        with pytest.raises(InputError, match=reason):
            clients["bank-a"].mask(vector, weight=weight)
    with pytest.raises(InputError, match="CKKS needs a clip"):
        made(contexts, clip=None)
    with pytest.raises(InputError, match="too few bits"):
        made(contexts, clip=2.0**40)
