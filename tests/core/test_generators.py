import hashlib

import torch
from hypothesis import given
from hypothesis import strategies as st

from deltaw.core.generators import derived_seed, generator


def test_derived_seed_is_sha256_of_the_path():
    expected = int.from_bytes(hashlib.sha256(b"7\x1finit\x1fa.b").digest()[:8], "big") >> 1
    assert derived_seed(7, "init", "a.b") == expected
    assert derived_seed(7, "step", 3) == derived_seed(7, "step", "3")


@given(st.integers(-(2**70), 2**70), st.lists(st.text(max_size=5), max_size=3))
def test_derived_seeds_fit_torch_and_repeat(seed, names):
    found = derived_seed(seed, *names)
    assert 0 <= found < 2**63 and found == derived_seed(seed, *names)


def test_paths_seeds_and_order_tell_apart():
    paths = [(0,), (1,), (0, "a"), (0, "b"), (0, "a", "b"), (0, "b", "a"), (0, "ab"), (10,), (1, "0")]
    assert len({derived_seed(*path) for path in paths}) == len(paths)


def test_generators_repeat_and_leave_the_global_one_alone():
    before = torch.get_rng_state()
    first = torch.randn(5, generator=generator(3, "x"))
    assert torch.equal(first, torch.randn(5, generator=generator(3, "x")))
    assert not torch.equal(first, torch.randn(5, generator=generator(3, "y")))
    assert torch.equal(before, torch.get_rng_state())
    assert generator(3, "x", device="cpu").device == torch.device("cpu")
