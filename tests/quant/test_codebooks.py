"""The codebooks against their definitions and against bitsandbytes' constants."""

import pytest
import torch

from deltaw.quant.codebooks import NF4_VALUES, dynamic_code, nf4_code, normal_float_code


@pytest.fixture(scope="module")
def peer():
    return pytest.importorskip("bitsandbytes.functional", exc_type=ImportError)


def test_the_constants_are_the_quantiles_of_the_normal():
    derived = normal_float_code()
    assert derived.shape == (16,) and derived.dtype == torch.float64
    torch.testing.assert_close(torch.tensor(NF4_VALUES, dtype=torch.float64), derived, rtol=0, atol=5e-7)
    assert derived[0] == -1 and derived[7] == 0 and derived[15] == 1


def test_the_constants_are_those_of_bitsandbytes(peer):
    assert torch.equal(nf4_code(), peer.get_4bit_type("nf4", device="cpu"))
    assert nf4_code().tolist() == list(NF4_VALUES) and nf4_code() is nf4_code()


@pytest.mark.parametrize("signed", [True, False])
def test_the_dynamic_type_is_that_of_bitsandbytes(peer, signed):
    made = dynamic_code(signed)
    assert made.dtype == torch.float32 and torch.equal(made, peer.create_dynamic_map(signed=signed))
    assert bool((made[1:] > made[:-1]).all()) and len(made) == 256
