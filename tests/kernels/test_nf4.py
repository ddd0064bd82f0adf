"""The 4-bit and 8-bit quantisers against bitsandbytes on CPU and against the plain definition in torch."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.core.errors import InputError
from deltaw.core.generators import generator
from deltaw.kernels import nf4
from deltaw.kernels.nf4 import NestedScales, dequantize_4bit, dequantize_8bit, quantize_4bit, quantize_8bit

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@functools.cache
def peer():
    return pytest.importorskip("bitsandbytes.functional", exc_type=ImportError)


@functools.cache
def code4():
    return peer().get_4bit_type("nf4", device="cpu")


@functools.cache
def code8():
    return peer().create_dynamic_map()


@pytest.fixture(autouse=True)
def eager():
    """Bitsandbytes compiles what its C++ does not take (odd rows), once a shape; the arithmetic is the same."""
    with torch.compiler.set_stance("force_eager"):
        yield


@st.composite
def matrices(draw):
    shape = draw(st.lists(st.integers(1, 90), min_size=1, max_size=2).map(tuple)) + draw(
        st.sampled_from([(), (), (64,), (33,), (1,)])
    )
    dtype = draw(st.sampled_from(DTYPES))
    exponent = draw(st.integers(-6, 3) if dtype == torch.float16 else st.integers(-30, 30))
    x = torch.randn(shape, generator=generator(draw(st.integers(0, 2**32)), "x")) * 10.0**exponent
    x = x.to(dtype)
    zeros = draw(st.integers(-1, x.numel() // 64))
    if zeros >= 0:
        x.view(-1)[64 * zeros :][:64] = 0
    layout = draw(st.sampled_from(["plain", "transposed", "strided"]))
    if layout == "transposed" and x.dim() > 1:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    elif layout == "strided":
        x = torch.stack([x, x + 1], dim=-1)[..., 0]
    return x


def peer_flat(packed, state):
    """What bitsandbytes reads back, flat; as one row where its AVX-512 kernel takes other blocks' scales."""
    row = state.shape[-1]
    if (row % 16 == 0 and row % state.blocksize) or state.shape.numel() <= 2:
        state.shape = (state.shape.numel(),)
    return peer().dequantize_4bit(packed, state).reshape(-1)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(x=matrices(), block_size=st.sampled_from([64, 64, 32, 128, 2048, 4096]))
def test_codes_and_values_are_those_of_bitsandbytes(x, block_size):
    packed, state = peer().quantize_4bit(x, quant_type="nf4", blocksize=block_size)
    codes, absmax = quantize_4bit(x, code4(), block_size=block_size)
    count, short = x.numel(), x.numel() % block_size
    if short:
        # Its absmax of a short last block is 1e-38 at least, and it divides there.
        assert state.absmax[-1] == max(absmax[-1].item(), 1e-38)
        full = count - short
        assert torch.equal(state.absmax[:-1], absmax[:-1])
        assert torch.equal(packed.view(-1)[: full // 2], codes[: full // 2])
        rest = nf4.nearest(x.reshape(-1)[full:].float() / state.absmax[-1], code4())
        rest = torch.cat([rest, rest.new_full((short % 2,), 7)]).view(-1, 2)
        rest = rest.to(torch.uint8)
        assert torch.equal(packed.view(-1)[full // 2 :], (rest[:, 0] << 4) | rest[:, 1])
    else:
        assert torch.equal(packed.view(-1), codes) and torch.equal(state.absmax, absmax)
    values = dequantize_4bit(
        packed.view(-1), code4(), state.absmax, start=0, stop=count, dtype=x.dtype, block_size=block_size
    )
    assert torch.equal(values, peer_flat(packed, state))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(x=matrices(), block_size=st.sampled_from([64, 64, 32, 4096]), data=st.data())
def test_values_of_double_quantisation_are_those_of_bitsandbytes(x, block_size, data):
    packed, state = peer().quantize_4bit(x, quant_type="nf4", blocksize=block_size, compress_statistics=True)
    scales = NestedScales(state.absmax, state.state2.code, state.state2.absmax, state.offset)
    wanted = peer_flat(packed, state)
    start = data.draw(st.integers(0, x.numel()))
    stop = data.draw(st.integers(start, x.numel()))
    read = functools.partial(dequantize_4bit, packed.view(-1), code4(), scales, dtype=x.dtype, block_size=block_size)
    assert torch.equal(read(start=0, stop=x.numel()), wanted)
    assert torch.equal(read(start=start, stop=stop), wanted[start:stop])


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    count=st.integers(1, 3000),
    seed=st.integers(0, 2**32),
    exponent=st.integers(-30, 30),
    zeros=st.booleans(),
)
def test_8bit_codes_are_those_of_bitsandbytes_but_for_its_grid(count, seed, exponent, zeros):
    x = torch.randn(count, generator=generator(seed, "x")) * 10.0**exponent
    if zeros:
        x[:256] = 0
    theirs, state = peer().quantize_blockwise(x, blocksize=256)
    q, absmax = quantize_8bit(x, code8())
    assert torch.equal(absmax, state.absmax) and torch.equal(state.code, code8())
    wanted = peer().dequantize_blockwise(theirs, state)
    assert torch.equal(dequantize_8bit(theirs, code8(), absmax), wanted)
    differ = (q != theirs).nonzero()[:, 0]
    zero = absmax[differ // 256] == 0
    assert torch.equal(dequantize_8bit(q, code8(), absmax)[differ[zero]], wanted[differ[zero]].abs())
    differ = differ[~zero]
    scaled = x[differ].double() / absmax[differ // 256].double()
    codes = code8().double()
    ours_off = (scaled - codes[q[differ].long()]).abs()
    theirs_off = (scaled - codes[theirs[differ].long()]).abs()
    # Half a cell of 2 / 65,535 is what its grid moves the middle by; so much twice is what it loses by that.
    assert (ours_off <= theirs_off + 1e-7).all()
    assert (theirs_off - ours_off <= 2 / 65535 + 1e-6).all()
    assert len(differ) <= 3 + count / 100


@settings(max_examples=40, deadline=None, derandomize=True)
@given(x=matrices(), block_size=st.sampled_from(nf4.BLOCK_SIZES), data=st.data())
def test_ranges_are_parts_of_the_plain_definition(x, block_size, data):
    count = x.numel()
    codes, absmax = quantize_4bit(x, code4(), block_size=block_size)
    offset = absmax.mean()
    q8, nested = quantize_8bit(absmax - offset, code8())
    scales = NestedScales(q8, code8(), nested, offset)
    start = data.draw(st.integers(0, count))
    stop = data.draw(st.integers(start, count))
    q = torch.stack([codes >> 4, codes & 15], dim=1).flatten()[:count].long()
    blocks = torch.arange(count) // block_size
    at = torch.arange(len(absmax))
    for given_scales, plain in ((absmax, absmax), (scales, code8()[q8.long()] * nested[at // 256] + offset)):
        dense = code4()[q] * plain[blocks]
        for dtype in DTYPES:
            got = dequantize_4bit(
                codes, code4(), given_scales, start=start, stop=stop, dtype=dtype, block_size=block_size
            )
            assert torch.equal(got, dense[start:stop].to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("start", "stop"), [(0, 1000), (1, 999), (130, 900), (64, 1000)])
@pytest.mark.parametrize("shift", [0, 1])
def test_chunks_out_and_unaligned_memory_change_nothing(monkeypatch, dtype, start, stop, shift):
    x = torch.randn(1000, generator=generator(0, "x"))
    whole, scales = quantize_4bit(x, code4())
    wanted = dequantize_4bit(whole, code4(), scales, start=0, stop=1000, dtype=dtype)[start:stop]
    monkeypatch.setattr(nf4, "QUANTIZE_CHUNK", 256)
    monkeypatch.setattr(nf4, "DEQUANTIZE_CHUNK", 128)
    codes, absmax = quantize_4bit(x, code4())
    assert torch.equal(codes, whole) and torch.equal(absmax, scales)
    moved = torch.cat([codes.new_zeros(shift), codes])[shift:]
    out = torch.full((stop - start + 2,), 7.0, dtype=dtype)
    target = out[1:-1] if shift else out[: stop - start]
    got = dequantize_4bit(moved, code4(), absmax, start=start, stop=stop, dtype=dtype, out=target)
    assert got is target and torch.equal(got, wanted)
    assert out[-1] == 7 and (out[0] == 7 or not shift)


def test_the_nearest_code_at_and_around_middles():
    for code in (code4(), code8(), torch.tensor([-1.0, -0.999, 0.001, 0.002, 1.0])):
        middles = (code[:-1] + code[1:]) / 2
        up, down = torch.tensor(2.0), torch.tensor(-2.0)
        x = torch.cat([middles, middles.nextafter(up), middles.nextafter(down), code, torch.linspace(-1, 1, 9999)])
        x = torch.cat([x, torch.tensor([-1e30, -2.0, 2.0, 1e30, float("inf")])])
        got = nf4.nearest(x, code)
        assert torch.equal(got.long(), (x[:, None] > middles).sum(1)) and got.dtype == torch.int32


def test_nothing_infinite_is_hidden_in_the_scales():
    x = torch.randn(4, 64, generator=generator(0, "x"))
    x[1, 3], x[2, 5] = float("nan"), float("-inf")
    _, absmax = quantize_4bit(x, code4())
    assert absmax.isnan().tolist() == [False, True, False, False]
    assert absmax.isinf().tolist() == [False, False, True, False]


def test_extremes():
    tiny = torch.full((64,), 1e-42)
    codes, absmax = quantize_4bit(tiny, code4())
    assert absmax.item() == tiny[0] and (codes == 0x77).all()
    huge = torch.full((64,), 3.4e38)
    codes, absmax = quantize_4bit(huge, code4())
    assert torch.equal(dequantize_4bit(codes, code4(), absmax, start=0, stop=64, dtype=torch.float32), huge)
    codes, absmax = quantize_4bit(torch.zeros(0, 5), code4())
    assert codes.shape == absmax.shape == (0,)
    assert dequantize_4bit(codes, code4(), absmax, start=0, stop=0, dtype=torch.float16).shape == (0,)


def test_errors_name_what_was_given():
    codes, absmax = quantize_4bit(torch.ones(64, requires_grad=True), code4())
    assert not absmax.requires_grad
    with pytest.raises(InputError, match=r"block size 48: expected one of 32, 64"):
        quantize_4bit(torch.ones(64), code4(), block_size=48)
    with pytest.raises(InputError, match=r"cannot quantise torch\.int64"):
        quantize_4bit(torch.ones(64, dtype=torch.int64), code4())
    with pytest.raises(InputError, match="values 3 to 65 of 64"):
        dequantize_4bit(codes, code4(), absmax, start=3, stop=65, dtype=torch.float32)
    with pytest.raises(InputError, match=r"out is torch\.float16 of shape \(64,\).*: expected torch\.float32, 64"):
        dequantize_4bit(
            codes, code4(), absmax, start=0, stop=64, dtype=torch.float32, out=torch.empty(64, dtype=torch.float16)
        )
