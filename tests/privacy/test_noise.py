import copy
import importlib.util
import math
import os
import pickle
import struct

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from scipy import stats

from deltaw.core.errors import InputError
from deltaw.core.generators import generator
from deltaw.privacy import chacha
from deltaw.privacy import noise as noise_module
from deltaw.privacy.noise import SecureNoise

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

KEY = bytes(range(32))
#: A fresh stream fails a right sampler once in 10^9 runs.
SAFE = 1e-9


def oracle_words(key, call, count):
    nonce = bytes(4) + call.to_bytes(12, "little")
    raw = Cipher(algorithms.ChaCha20(key, nonce), mode=None).encryptor().update(bytes(8 * count))
    return torch.tensor(struct.unpack(f"<{count}q", raw), dtype=torch.int64)


def state_words(key, call, device="cpu"):
    return torch.frombuffer(bytearray(key + call.to_bytes(12, "little")), dtype=torch.int32).to(device)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1000, 4097])
@pytest.mark.parametrize("call", [0, 1, 2**32, 2**96 - 1])
def test_the_keystream_is_chacha20_bit_for_bit(count, call):
    key = os.urandom(32)
    wanted = oracle_words(key, call, count)
    assert torch.equal(chacha.keystream(key, call=call, count=count), wanted)
    blocks = chacha.blocks_torch(state_words(key, call), -(-count // 8))
    assert torch.equal(blocks.view(torch.int64).view(-1)[:count], wanted)


def test_the_block_of_rfc_8439():
    """Section 2.3.2: key 00..1f, block 1, nonce 000000090000004a00000000."""
    call = int.from_bytes(bytes.fromhex("000000090000004a00000000"), "little")
    block = chacha.blocks_torch(state_words(KEY, call), 2)[1]
    assert block.numpy().tobytes().hex() == (
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e"
    )


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_kernel_in_the_interpreter(passes_in_the_interpreter):
    passes_in_the_interpreter(__file__, "blocks_of_the_kernel")


@needs_triton
@pytest.mark.parametrize("count", [pytest.param(n, marks=[] if INTERPRETED else pytest.mark.gpu) for n in (0, 130)])
def test_blocks_of_the_kernel(count):
    from deltaw.privacy import chacha_triton

    key, device = os.urandom(32), "cpu" if INTERPRETED else "cuda"
    words = state_words(key, 2**64 + 3, device)
    assert torch.equal(chacha_triton.blocks(words, count), chacha.blocks_torch(words, count))


@pytest.mark.gpu
def test_the_device_makes_the_hosts_stream():
    host, device = SecureNoise(insecure_test_key=KEY), SecureNoise(insecure_test_key=KEY)
    assert torch.equal(host.words(1_000_003), device.words(1_000_003, device="cuda").cpu())
    sums = [torch.randn(5001, generator=generator(0, "sums"))]
    on_host = host.release(sums, noise_multiplier=1.0, max_grad_norm=0.5)[0]
    on_device = device.release([sums[0].cuda()], noise_multiplier=1.0, max_grad_norm=0.5)[0].cpu()
    # Logarithms and cosines differ in their last bits, which are below the grid but where a rounding is near.
    torch.testing.assert_close(on_device, on_host, rtol=1e-6, atol=2.0**-29)


def box_muller(words):
    """The formula of the page's head, in numpy."""
    values = (words & noise_module.LOW_63_BITS).numpy().astype(np.float64)
    u, v = values[: len(values) // 2], values[len(values) // 2 :]
    radius = np.sqrt(-2 * np.log((u + 0.5) * 2.0**-63))
    return np.concatenate([radius * np.cos(2 * np.pi * 2.0**-63 * v), radius * np.sin(2 * np.pi * 2.0**-63 * v)])


@pytest.mark.parametrize("shape", [(0,), (1,), (7, 3), (2, 5, 100)])
@pytest.mark.parametrize("draws", [1, 4])
def test_normals_are_sums_of_draws_from_the_keystream(shape, draws):
    count = math.prod(shape)
    got = SecureNoise(insecure_test_key=KEY).normal(shape, 3.5, dtype=torch.float64, draws=draws)
    each = [box_muller(oracle_words(KEY, call, count + count % 2))[:count] for call in range(draws)]
    torch.testing.assert_close(
        got, torch.from_numpy(sum(each) * 3.5 / math.sqrt(draws)).view(shape), rtol=1e-12, atol=1e-12
    )
    single = SecureNoise(insecure_test_key=KEY).normal(shape, 3.5, draws=draws)
    assert single.dtype == torch.float32 and torch.equal(single, got.float())


@pytest.mark.parametrize("source", [SecureNoise(insecure_test_key=KEY), SecureNoise()], ids=["key", "fresh"])
@pytest.mark.parametrize("draws", [1, 4])
def test_normals_are_normal_and_independent(source, draws):
    z = source.normal((2, 200_000), 2.0, dtype=torch.float64, draws=draws).numpy() / 2
    assert stats.kstest(z.ravel(), "norm").pvalue > SAFE
    # Both of a pair: the squared length is exponential, the angle uniform, and neighbours do not go together.
    assert stats.kstest((z**2).sum(0) / 2, "expon").pvalue > SAFE
    assert stats.kstest(np.arctan2(z[1], z[0]) / (2 * np.pi) + 0.5, "uniform").pvalue > SAFE
    for lag in (1, 2, 100_000):
        assert abs(np.mean(z[0][lag:] * z[0][:-lag])) < 6.2 / math.sqrt(len(z[0]) - lag)
    edges = np.concatenate([[-np.inf], np.arange(-4, 4.1, 0.5), [np.inf]])
    expected = np.diff(stats.norm.cdf(edges)) * z.size
    assert stats.chisquare(np.histogram(z, edges)[0], expected).pvalue > SAFE


def test_the_tail_reaches_beyond_what_53_bits_give():
    largest = box_muller(torch.tensor([0, 0]))[0]
    assert 9.4 < largest < 9.5


def grid(multiplier, bound):
    return 2.0 ** (math.floor(math.log2(multiplier * bound)) - 30)


@pytest.mark.parametrize("multiplier, bound", [(1.0, 1.0), (0.7, 0.013), (30.0, 5.0)])
def test_a_release_is_shifted_by_its_sums_and_by_nothing_else(multiplier, bound):
    """With the same noise two releases differ by exactly what the rounded sums do, so the noise shows no sum."""
    step = grid(multiplier, bound)
    x = torch.randn(3001, dtype=torch.float64, generator=generator(1, "x")) * bound
    y = torch.randn(3001, dtype=torch.float64, generator=generator(1, "y")) * bound * 1e3
    release = [
        SecureNoise(insecure_test_key=KEY).release([v], noise_multiplier=multiplier, max_grad_norm=bound)[0]
        for v in (x, y, torch.zeros_like(x))
    ]
    for value in release:
        assert torch.equal(value / step, (value / step).round())
    assert torch.equal(release[0] - release[2], (x / step).round() * step)
    assert torch.equal(release[1] - release[2], (y / step).round() * step)
    # The noise itself: the rounded normals, widened for the rounding of the sums.
    std = multiplier * (bound + step * math.sqrt(3001))
    z = box_muller(oracle_words(KEY, 0, 3002))[:3001] * std
    assert (release[2] - torch.from_numpy(z)).abs().max() <= step / 2 * (1 + 1e-6)


def test_a_release_of_many_tensors_is_of_their_dtype_and_form():
    base = torch.randn(40, 30, generator=generator(2, "sums"))
    sums = [base.t(), base[::2, 3:7].bfloat16(), torch.zeros(0), base.double().clone(), torch.tensor(0.25)]
    values = sum(t.numel() for t in sums)
    kept = [t.clone() for t in sums]
    got = SecureNoise(insecure_test_key=KEY).release(sums, noise_multiplier=2.0, max_grad_norm=0.1)
    step = grid(2.0, 0.1)
    std, call = 2.0 * (0.1 + step * math.sqrt(values)), 0
    for before, original, after in zip(kept, sums, got, strict=True):
        assert torch.equal(before, original), "the argument was written to"
        assert after.dtype == before.dtype and after.shape == before.shape
        count = before.numel()
        z = torch.from_numpy(box_muller(oracle_words(KEY, call, count + count % 2))[:count]) * (std / step)
        wanted = ((before.reshape(-1).double() / step).round() + z.round()) * step
        close = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-23, torch.float64: 1e-15}[before.dtype]
        torch.testing.assert_close(after.reshape(-1).double(), wanted, rtol=close, atol=1.01 * step)
        call += 1
    written = [t.clone() for t in sums]
    same = SecureNoise(insecure_test_key=KEY).release(written, noise_multiplier=2.0, max_grad_norm=0.1, write=True)
    assert all(a is b for a, b in zip(same, written, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(same, got, strict=True))


def test_a_strided_view_is_released_in_place():
    whole = torch.zeros(6, 8)
    SecureNoise().release([whole[:, ::2]], noise_multiplier=1.0, max_grad_norm=1.0, write=True)
    assert (whole[:, ::2] != 0).all() and (whole[:, 1::2] == 0).all()


def test_no_noise_leaves_sums_as_they_are():
    sums = [torch.randn(9, generator=generator(3, "sums"))]
    released = SecureNoise().release(sums, noise_multiplier=0, max_grad_norm=1.0)
    assert torch.equal(released[0], sums[0]) and released[0] is not sums[0]
    assert torch.equal(SecureNoise().normal((3,), 0.0), torch.zeros(3))


def test_released_noise_has_its_variance():
    zeros = [torch.zeros(300_000), torch.zeros(17, 1000)]
    z = torch.cat([t.view(-1) for t in SecureNoise().release(zeros, noise_multiplier=1.5, max_grad_norm=0.2)])
    assert stats.kstest(z.numpy() / 0.3, "norm").pvalue > SAFE


@pytest.mark.parametrize("p", [0.0, 2.0**-40, 0.003, 0.5, 1 - 2.0**-53, 1.0])
def test_bernoulli_compares_with_the_exact_probability(p):
    mask = SecureNoise(insecure_test_key=KEY).bernoulli(5000, p)
    words = (oracle_words(KEY, 0, 5000) & noise_module.LOW_63_BITS).tolist()
    assert mask.dtype == torch.bool
    assert mask.tolist() == [word < int(p * 2**63) for word in words]


def test_bernoulli_samples_at_its_rate():
    taken = int(SecureNoise().bernoulli(200_000, 0.03).sum())
    assert stats.binomtest(taken, 200_000, 0.03).pvalue > SAFE


def test_streams_never_repeat():
    one, other = SecureNoise(), SecureNoise()
    streams = torch.stack([one.words(64), one.words(64), other.words(64)])
    assert len(streams.unique()) == 192


# Python 3.12 warns of forks beside threads; nothing here waits for one.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_has_a_stream_of_its_own():
    source = SecureNoise()
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.write(writer, source.words(8).numpy().tobytes())
        os._exit(0)
    os.waitpid(child, 0)
    theirs = struct.unpack("<8q", os.read(reader, 64))
    os.close(reader), os.close(writer)
    assert not set(theirs) & set(source.words(8).tolist())


@pytest.mark.parametrize("way", [pickle.dumps, copy.copy, copy.deepcopy])
def test_noise_is_neither_saved_nor_copied(way):
    with pytest.raises(TypeError, match="values would repeat"):
        way(SecureNoise())
    assert "key" not in repr(SecureNoise()).lower()


@pytest.mark.parametrize(
    "call",
    [
        lambda: SecureNoise(insecure_test_key=b"short"),
        lambda: SecureNoise(insecure_test_key=b""),
        lambda: SecureNoise().normal((3,), -1.0),
        lambda: SecureNoise().normal((3,), math.nan),
        lambda: SecureNoise().normal((3,), 1.0, draws=0),
        lambda: SecureNoise().release([], noise_multiplier=-1, max_grad_norm=1),
        lambda: SecureNoise().release([], noise_multiplier=1, max_grad_norm=0),
        lambda: SecureNoise().release([], noise_multiplier=math.inf, max_grad_norm=1),
        lambda: SecureNoise().bernoulli(3, 1.5),
        lambda: SecureNoise().bernoulli(-1, 0.5),
    ],
)
def test_wrong_arguments_are_refused(call):
    with pytest.raises(InputError):
        call()
