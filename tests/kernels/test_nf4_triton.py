"""The Triton kernels against their torch reference, whole tensors and to the bit.

Without a GPU they run in Triton's interpreter, in a process of their own: the interpreter is chosen by a variable that
Triton reads when it is first imported.
"""

import importlib.util
import os

import pytest
import torch

from deltaw.core.generators import generator
from deltaw.kernels import nf4
from deltaw.quant.codebooks import dynamic_code, nf4_code

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: The interpreter rounds to bfloat16 wrongly: ties away from zero, and no carry into the exponent.
OUT_DTYPES = (torch.float64, *(DTYPES[:2] if INTERPRETED else DTYPES))

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
needs_kernels = [
    needs_triton,
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="no CUDA device"),
    *([] if INTERPRETED else [pytest.mark.gpu]),
]


def kernels(function):
    for mark in needs_kernels:
        function = mark(function)
    return function


@pytest.fixture
def device():
    return "cpu" if INTERPRETED else "cuda"


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_kernels_in_the_interpreter(passes_in_the_interpreter):
    passes_in_the_interpreter(__file__, "not interpreter")


def matrix(count, dtype, device, *, exponent=0, seed=0):
    x = torch.randn(count, generator=generator(seed, "x")) * 10.0**exponent
    x[70:140] = 0
    return x.to(dtype).to(device)


def both_scales(absmax):
    """Plain scales and their 8-bit form."""
    offset = absmax.mean()
    q, nested = nf4.quantize_8bit(absmax - offset, dynamic_code(device=absmax.device))
    return absmax, nf4.NestedScales(q, dynamic_code(device=absmax.device), nested, offset)


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [32, 64, 4096])
@pytest.mark.parametrize(("count", "exponent"), [(1, 0), (333, 3), (20001, -4)])
def test_quantising_is_the_reference(device, dtype, block_size, count, exponent):
    from deltaw.kernels import nf4_triton

    x = matrix(count, dtype, device, exponent=exponent)
    code = nf4_code(x.device)
    codes, absmax = nf4_triton.quantize_4bit(x, code, block_size=block_size)
    wanted_codes, wanted_absmax = nf4.quantize_4bit_torch(x, code, block_size=block_size)
    assert torch.equal(absmax, wanted_absmax)
    assert torch.equal(codes, wanted_codes)


@kernels
def test_quantising_takes_the_smaller_code_at_a_middle_and_shows_nan(device):
    from deltaw.kernels import nf4_triton

    code = nf4_code(torch.device(device))
    middles = (code[1:] + code[:-1]) / 2
    around = [
        middles,
        middles.nextafter(code[-1] + 1),
        middles.nextafter(code[0] - 1),
        code,
        code[-1:] * 0,
        code[-1:].expand(2),
    ]
    x = torch.cat([*around, code.new_full((64,), 1e-42), code.new_full((64,), 3e38), code.new_full((2,), float("nan"))])
    codes, absmax = nf4_triton.quantize_4bit(x, code)
    wanted_codes, wanted_absmax = nf4.quantize_4bit_torch(x, code)
    assert torch.equal(codes[:-1], wanted_codes[:-1])
    assert torch.equal(absmax[:-1], wanted_absmax[:-1]) and absmax[-1].isnan() and wanted_absmax[-1].isnan()


@kernels
@pytest.mark.parametrize("dtype", OUT_DTYPES)
@pytest.mark.parametrize("block_size", [32, 64, 4096])
@pytest.mark.parametrize(("start", "stop"), [(0, 20001), (0, 64), (77, 78), (1, 17000), (8192, 20000), (9, 9)])
def test_dequantising_is_the_reference(device, dtype, block_size, start, stop):
    from deltaw.kernels import nf4_triton

    code = nf4_code(torch.device(device))
    codes, absmax = nf4.quantize_4bit_torch(matrix(20001, torch.float32, device), code, block_size=block_size)
    for scales in both_scales(absmax):
        # A frame around the output shows what writes outside.
        frames = [torch.full((stop - start + 16,), 9.0, dtype=dtype, device=device) for _ in range(2)]
        for frame, read in zip(frames, (nf4_triton.dequantize_4bit, nf4.dequantize_4bit_torch), strict=True):
            read(codes, code, scales, start=start, stop=stop, out=frame[8:-8], block_size=block_size)
        assert torch.equal(*frames)
        assert (frames[0][:8] == 9).all() and (frames[0][-8:] == 9).all()


@kernels
@pytest.mark.parametrize("dtype", OUT_DTYPES)
@pytest.mark.parametrize("block_size", [32, 64, 4096])
@pytest.mark.parametrize(("start", "stop"), [(0, 20000), (0, 8), (8, 72), (4104, 12288), (8192, 20000), (9, 9)])
def test_dequantising_by_words_is_the_reference(monkeypatch, device, dtype, block_size, start, stop):
    from deltaw.kernels import nf4_triton

    # What is whole words must not silently go to the other kernel.
    monkeypatch.setattr(nf4_triton, "_dequantize_kernel", None)
    code = nf4_code(torch.device(device))
    codes, absmax = nf4.quantize_4bit_torch(matrix(20001, torch.float32, device), code, block_size=block_size)
    for scales in both_scales(absmax):
        got, wanted = (torch.full((stop - start + 16,), 9.0, dtype=dtype, device=device) for _ in range(2))
        place = {"start": start, "stop": stop, "block_size": block_size}
        nf4_triton.dequantize_4bit(codes, code, scales, out=got[8:-8], **place)
        nf4.dequantize_4bit_torch(codes, code, scales, out=wanted[8:-8], **place)
        assert torch.equal(got, wanted)


@kernels
@pytest.mark.parametrize(("start", "stop", "shift"), [(0, 20001, 0), (4, 20000, 0), (0, 16, 1), (0, 20000, 2)])
def test_ranges_that_are_no_words_take_the_other_kernel(monkeypatch, device, start, stop, shift):
    from deltaw.kernels import nf4_triton

    monkeypatch.setattr(nf4_triton, "_dequantize_words_kernel", None)
    code = nf4_code(torch.device(device))
    codes, absmax = nf4.quantize_4bit_torch(matrix(20001, torch.float32, device), code)
    # The same bytes at an address that is no word's.
    codes = torch.cat([codes.new_zeros(shift), codes])[shift:]
    got, wanted = torch.empty(stop - start, device=device), torch.empty(stop - start, device=device)
    nf4_triton.dequantize_4bit(codes, code, absmax, start=start, stop=stop, out=got)
    nf4.dequantize_4bit_torch(codes, code, absmax, start=start, stop=stop, out=wanted)
    assert torch.equal(got, wanted)


@kernels
def test_scales_are_rounded_twice(device):
    """With absmax = map * nested + offset in one rounding, a share of these values would differ."""
    from deltaw.kernels import nf4_triton

    count = 64 * (1000 if INTERPRETED else 100_000)
    code = nf4_code(torch.device(device))
    codes, absmax = nf4.quantize_4bit_torch(matrix(count, torch.float32, device, seed=1), code)
    scales = both_scales(absmax)[1]
    once = scales.code.double()[scales.q.long()] * scales.absmax.double().repeat_interleave(256)[: len(absmax)]
    assert ((once + scales.offset.double()).float() != scales.values()).sum() > len(absmax) / 100
    # By words and by blocks.
    for stop in (count, count - 1):
        got, wanted = torch.empty(stop, device=device), torch.empty(stop, device=device)
        for values, read in ((got, nf4_triton.dequantize_4bit), (wanted, nf4.dequantize_4bit_torch)):
            read(codes, code, scales, start=0, stop=stop, out=values)
        assert torch.equal(got, wanted)


@kernels
@pytest.mark.parametrize("dtype", OUT_DTYPES)
@pytest.mark.parametrize(
    ("rows", "columns", "apart", "block_size", "launched"),
    [
        (3, 64, 67, 64, "words"), (5, 1000, 1001, 32, "words"), (2, 4104, 5000, 4096, "words"),
        (700, 8, 16, 64, "words"), (1, 8, 9, 64, "words"), (7, 33, 40, 64, "blocks"), (2, 100, 128, 32, "blocks"),
        (9, 1, 5, 64, "blocks"),
    ],
)  # fmt: skip
def test_rows_may_lie_apart(monkeypatch, device, dtype, rows, columns, apart, block_size, launched):
    from deltaw.kernels import nf4_triton

    monkeypatch.setattr(nf4_triton, "_dequantize_kernel" if launched == "words" else "_dequantize_words_kernel", None)
    code, start = nf4_code(torch.device(device)), 3 * columns
    codes, absmax = nf4.quantize_4bit_torch(
        matrix((rows + 4) * columns, torch.float32, device), code, block_size=block_size
    )
    place = {"start": start, "stop": start + rows * columns, "block_size": block_size}
    for scales in both_scales(absmax):
        got, wanted = (torch.full((rows + 2, apart + 9), 9.0, dtype=dtype, device=device) for _ in range(2))
        nf4_triton.dequantize_4bit(codes, code, scales, out=got[1:-1, 8 : columns + 8], **place)
        flat = torch.empty(rows * columns, dtype=dtype, device=device)
        nf4.dequantize_4bit_torch(codes, code, scales, out=flat, **place)
        wanted[1:-1, 8 : columns + 8] = flat.view(rows, columns)
        assert torch.equal(got, wanted)


@pytest.mark.gpu
@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("columns", [None, 4096])
def test_beyond_two_to_the_31_values(columns, double_quant):
    """The kernels by way of their callers, compared chunk by chunk at the ends and in the middle."""
    count = 2**31 + (12345 if columns is None else 3 * columns)
    code = nf4_code(torch.device("cuda"))
    x = torch.randn(1 << 20, generator=generator(0, "x")).to("cuda", torch.bfloat16).repeat(-(-count // (1 << 20)))
    x = x[:count]
    codes, absmax = nf4.quantize_4bit(x, code)
    scales = both_scales(absmax)[double_quant]
    out = None
    if columns is not None:
        out = torch.empty(count // columns, columns + 24, dtype=torch.bfloat16, device="cuda")[:, :columns]
    values = nf4.dequantize_4bit(codes, code, scales, start=0, stop=count, dtype=torch.bfloat16, out=out)
    values = values.reshape(-1)
    for start, stop in ((0, 1 << 20), (2**31 - 12321, 2**31 + 777), (count - 9999, count)):
        # Whole blocks, but for the very last: a part of one has another scale.
        begin, end = start // 64 * 64, min(-(-stop // 64) * 64, count)
        part_codes, part_absmax = nf4.quantize_4bit_torch(x[begin:end], code)
        assert torch.equal(part_codes, codes[begin // 2 : -(-end // 2)])
        assert torch.equal(part_absmax, absmax[begin // 64 : -(-end // 64)])
        wanted = torch.empty(stop - start, dtype=torch.bfloat16, device="cuda")
        nf4.dequantize_4bit_torch(codes, code, scales, start=start, stop=stop, out=wanted)
        assert torch.equal(values[start:stop], wanted)
        again = nf4.dequantize_4bit(codes, code, scales, start=start, stop=stop, dtype=torch.bfloat16)
        assert torch.equal(again, wanted)
