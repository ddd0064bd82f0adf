"""8-bit quantisation and products: torch against float64, the Triton kernels against torch, to the bit.

The kernels run in Triton's interpreter, in a process of their own, or on a GPU.
"""

import importlib.util
import os

import pytest
import torch

from deltaw.core.errors import InputError
from deltaw.core.generators import generator
from deltaw.kernels import fp8, norm
from deltaw.quant.codebooks import nf4_code
from deltaw.quant.weight import NF4Weight

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: Half the distance of two neighbouring values of each dtype, relative.
ROUNDING = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SHAPES = [(1, 1), (3, 17), (33, 64), (70, 200)]
#: The interpreter takes a millisecond and more for each operation of each program.
KERNEL_SHAPES = [(1, 1), (5, 40)] if INTERPRETED else [*SHAPES, (300, 1000)]
TILED_SHAPES = [(1, 1), (35, 70)] if INTERPRETED else [*SHAPES, (300, 1000)]
#: Of 4-bit weights: blocks straddle rows, share rows, and one has an odd row.
NF4_SHAPES = [(5, 10), (40, 64), (33, 96), (17, 576), (9, 33)]

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
needs_kernels = [
    needs_triton,
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="no CUDA device"),
    # What numpy says of infinities and NaN in the interpreter.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    *([] if INTERPRETED else [pytest.mark.gpu]),
]
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"


def kernels(function):
    for mark in needs_kernels:
        function = mark(function)
    return function


def on_gpu(function):
    for mark in (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")):
        function = mark(function)
    return function


def matrix(shape, dtype=torch.float32, *, seed="x", device="cpu"):
    """Normal values over a few powers of ten, by row, with a row of zeros where there are several."""
    x = torch.randn(shape, generator=generator(0, seed)) * 10.0 ** (torch.arange(shape[0]) % 5 - 2).unsqueeze(1)
    if shape[0] > 2:
        x[1] = 0
    return x.to(dtype).to(device)


def awkward(dtype, device="cpu"):
    """Rows of every kind of trouble, the last four with infinities or NaN."""
    x = torch.randn(12, 50, generator=generator(1, "awkward"))
    x[0] = 0
    x[1] = -0.0
    x[2] *= 1e-42
    x[3] = x[3] * 1e-42 * (torch.arange(50) == 7)
    x[4] *= torch.finfo(dtype).max / x[4].abs().max()
    x[5] = torch.linspace(-1, 1, 50)
    x[6] *= 10.0 ** -torch.arange(50).div(5)
    x[7] = 3.0
    x[8, 3] = float("inf")
    x[9, 49] = -float("inf")
    x[10, 0] = float("nan")
    x[11, 1:3] = torch.tensor([float("nan"), float("inf")])
    return x.to(dtype).to(device)


def assert_same(got, wanted):
    """Bits of 8-bit floats and of float32, a NaN being as good as another."""
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and a.is_contiguous()
        a, b = a.float(), b.float()
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(a.nan_to_num(0.0).view(torch.int32), b.nan_to_num(0.0).view(torch.int32))


def nearest_e4m3(values):
    """The nearest of all finite e4m3 values, at a middle the one with an even code: (n,) float64 to float64."""
    codes = torch.arange(0x7F, dtype=torch.uint8)
    table = codes.view(torch.float8_e4m3fn).double()
    middles = (table[:-1] + table[1:]) / 2
    size = values.abs()
    # The first middle not below it, so that a middle goes down; up again where the lower code is odd.
    at = torch.searchsorted(middles, size)
    tie = (at < len(middles)) & (size == middles[at.clamp(max=len(middles) - 1)])
    return table[at + (tie & (at % 2 == 1))] * torch.where(values.signbit(), -1.0, 1.0)


def stand_for(q, scale):
    return q.double() * scale.double().unsqueeze(1)


def rounding(exact, dtype):
    """What rounding to a dtype may change, a little more."""
    smallest = torch.finfo(dtype).smallest_normal * ROUNDING[dtype]
    return 1.02 * (exact.abs() * ROUNDING[dtype]).clamp(min=smallest)


def step(exact, scale):
    """Half of what neighbouring 8-bit values differ by at most, for values in units of scale."""
    return (exact.abs() / 16).clamp(min=2.0**-10 * scale.double().unsqueeze(1))


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_kernels_in_the_interpreter(passes_in_the_interpreter):
    passes_in_the_interpreter(__file__, "test_kernel_")


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_take_the_nearest_codes(shape, dtype):
    x = matrix(shape, dtype)
    q, scale = fp8.quantize_rows(x)
    assert q.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32
    largest = x.double().abs().amax(1)
    torch.testing.assert_close(scale.double(), torch.where(largest == 0, 1.0, largest / 448), rtol=2e-7, atol=0)
    wide = norm.wide_dtype(dtype)
    scaled = x.to(wide) * (1 / scale.to(wide)).unsqueeze(1)
    assert torch.equal(q.double(), nearest_e4m3(scaled.double().flatten()).view(shape))
    assert (q.double().abs().amax(1) == torch.where(largest == 0, 0.0, 448.0)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_every_kind(dtype):
    x = awkward(dtype)
    q, scale = fp8.quantize_rows(x)
    assert scale[8:].isnan().all() and q[8:].double().isnan().all()
    good = slice(None, 8)
    exact = x[good].double()
    assert torch.isfinite(scale[good]).all() and (scale[:2] == 1).all() and (q[:2].float() == 0).all()
    assert ((stand_for(q[good], scale[good]) - exact).abs() <= 1.000001 * step(exact, scale[good])).all()


def test_rows_by_strides():
    x = matrix((40, 33))
    assert_same(fp8.quantize_rows(x.t()), fp8.quantize_rows(x.t().contiguous()))
    assert_same(fp8.quantize_rows(x[:, 4:20]), fp8.quantize_rows(x[:, 4:20].contiguous()))
    q, scale = fp8.quantize_rows(x[:0])
    assert q.shape == (0, 33) and scale.shape == (0,)


def test_rounding_averages_out_over_the_turns():
    W = torch.randn(20, 300, generator=generator(0, "turns"))
    errors = []
    for turn in range(64):
        q, scale, qT, column_scale = fp8.quantize_rows_and_columns(W, spread=fp8.spreads(20, 300, turn, W.device))
        errors.append(torch.stack([q.float() * scale[:, None] - W, (qT.float() * column_scale[:, None]).t() - W]))
    one = torch.stack([error.norm() for error in errors]).mean()
    assert torch.stack(errors).mean(0).norm() < 0.1 * one
    assert 0.025 < one / (2**0.5 * W.norm()) < 0.028


@pytest.mark.parametrize("shape", SHAPES)
def test_columns_are_the_rows_of_the_transpose(shape):
    W = matrix(shape)
    q, row_scale, qT, column_scale = fp8.quantize_rows_and_columns(W)
    assert_same((q, row_scale), fp8.quantize_rows(W))
    assert_same((qT, column_scale), fp8.quantize_rows(W.t()))
    more = matrix((7, shape[1]), seed="more")
    assert_same(fp8.quantize_rows_and_columns([W, more]), fp8.quantize_rows_and_columns(torch.cat([W, more])))
    spread = fp8.spreads(*shape, 5, W.device)
    assert spread.shape == (sum(shape),) and 1 <= float(spread.min()) and float(spread.max()) < 2
    q, row_scale, qT, column_scale = fp8.quantize_rows_and_columns(W, spread=spread)
    for codes, scale, w, factor in zip(
        (q, qT), (row_scale, column_scale), (W, W.t()), spread.split(shape), strict=True
    ):
        largest = w.abs().amax(1).float() * factor
        assert torch.equal(scale, (largest * (1 / 448)).masked_fill(largest == 0, 1.0))
        assert ((codes.float() * scale[:, None] - w.float()).abs() <= w.float().abs() / 16 + scale[:, None] / 512).all()


def test_columns_behind_rows_are_columns_of_them():
    x, more = matrix((9, 33), torch.bfloat16), matrix((9, 7), torch.bfloat16, seed="more")
    wanted = fp8.quantize_rows(torch.cat([x, more, x.new_zeros(9, 88)], 1))
    assert_same(fp8.quantize_rows(x, behind=more), wanted)
    found = fp8.quantize_rows(x, behind=more.t().contiguous().t())
    assert_same(found, wanted)


def low_rank(P, K, dtype, device="cpu"):
    """A of rows from tiny to huge with one of zeros, and W's scales and 8 bits by columns, with room for A."""
    A = matrix((P, K), dtype, seed="A", device=device)
    W = torch.randn(70, K, generator=generator(0, "W")).to(dtype).to(device) * 0.1
    _, _, qT, scale = fp8.quantize_rows_and_columns_torch([W], room=(0, 58))
    wide = qT.as_strided((K, 128), qT.stride())
    wide[:, 70:] = 0.0
    return A, W, wide, scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_low_rank_part_goes_along_in_a_product(dtype):
    A, W, whole, scale = low_rank(16, 96, dtype)
    before = whole[:, :70].float()
    factor = fp8.write_columns(A, whole[:, 70:86], scale)
    assert torch.equal(whole[:, :70].float(), before) and whole[:, 70:].float().abs().amax(0).eq(448).sum() == 15
    written, exact = whole[:, 70:86].float() * scale[:, None] * factor, A.t().float()
    assert ((written - exact).abs() <= exact.abs() / 15 + scale[:, None] * factor / 500).all()
    assert factor[1] == 1 and not written[:, 1].any()

    g, k = matrix((40, 70), dtype, seed="g"), matrix((40, 16), dtype, seed="k")
    q, scales = fp8.quantize_rows(g, behind=k, factor=factor)
    got = fp8.matmul_fp8(q, scales, whole, scale, out_dtype=torch.float32).double()
    wanted = g.double() @ W.double() + k.double() @ A.double()
    assert (got - wanted).norm() < 0.05 * wanted.norm()
    with pytest.raises(
        InputError, match=r"A is torch\.\w+ \(16, 96\), q .* \(96, 15\) .*: expected a floating \(P, K\)"
    ):
        fp8.write_columns(A, whole[:, 71:86], scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("four_bits", [False, True])
def test_what_rounding_takes(four_bits, dtype):
    W = matrix((40, 64), torch.float32 if four_bits else dtype)
    part = NF4Weight.quantize(W) if four_bits else W
    exact = part.dequantize(dtype=torch.float32) if four_bits else W
    lost = torch.full((80, 64), torch.nan, dtype=dtype)
    spread = fp8.spreads(80, 64, 5, W.device)
    given = {"room": (5, 7), "lost": lost, "spread": spread}
    made = (
        fp8.quantize_nf4([part, part], nf4_code(), **given)
        if four_bits
        else fp8.quantize_rows_and_columns([W, W], **given)
    )
    q, scale, qT, _ = made
    same = q.contiguous(), scale, qT.contiguous(), made[3]
    assert_same(same, fp8.quantize_rows_and_columns([exact, exact], spread=spread))
    assert q.stride() == (69, 1) and q.untyped_storage().nbytes() == 80 * 69
    assert qT.stride() == (87, 1) and qT.untyped_storage().nbytes() == 64 * 87
    wanted = torch.cat([exact, exact]).double() - q.double() * scale.double()[:, None]
    rounding = torch.finfo(dtype).eps * wanted.abs() + 2**-23 * torch.cat([exact, exact]).double().abs()
    assert ((lost.double() - wanted).abs() <= rounding).all() and wanted.any()


@pytest.mark.parametrize("lost", [torch.empty(8, 5), torch.empty(8, 5).t(), torch.empty(5, 8, dtype=torch.int32)])
def test_no_place_for_what_rounding_takes(lost):
    with pytest.raises(
        InputError, match=r"lost is torch\.\w+ of shape .*: expected a floating dtype, .* \(5, 8\) on cpu"
    ):
        fp8.quantize_rows_and_columns(torch.ones(5, 8), lost=lost)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", NF4_SHAPES)
def test_four_bits_become_eight(shape, double_quant):
    weight = NF4Weight.quantize(matrix(shape), double_quant=double_quant, dtype=torch.bfloat16)
    exact = weight.dequantize(dtype=torch.float32)
    got = fp8.quantize_nf4(weight, nf4_code())
    assert_same(got, fp8.quantize_rows_and_columns(exact))
    assert_same(fp8.quantize_nf4([weight, weight], nf4_code()), fp8.quantize_rows_and_columns([exact, exact]))


def test_the_error_is_what_the_header_says():
    """Root mean squares of the relative error of values, and of a product's error relative to the product's."""
    x, W = (torch.randn(n, 768, generator=generator(0, n), dtype=torch.float64) for n in (384, 512))
    q, scale = fp8.quantize_rows(x)
    qW, w_scale = fp8.quantize_rows(W)
    error = stand_for(q, scale) - x
    plain = q.double().abs() >= 2.0**-6
    assert (error / x)[plain].square().mean().sqrt().item() == pytest.approx(0.026, abs=0.0005)
    assert (error / x)[plain].abs().max() <= 1 / 16 * 1.00001
    got = fp8.matmul_fp8(q, scale, qW, w_scale, out_dtype=torch.float32)
    wanted = x @ W.t()
    assert ((got - wanted).square().mean() / wanted.square().mean()).sqrt().item() == pytest.approx(0.037, abs=0.0005)


def operands(m, n, k, device="cpu"):
    # Sums stay below float16's largest.
    q, scale = fp8.quantize_rows(matrix((m, k), device=device) / 64)
    qW, w_scale = fp8.quantize_rows(matrix((n, k), seed="W", device=device) / 64)
    return q, scale, qW, w_scale


def check_product(m, n, k, device, dtype, *, fast=False, room=0):
    """Every form of the product against float64, with an allowance for the roundings of each step."""
    q, scale, qW, w_scale = operands(m, n, k, device)
    q, qW = (t.new_empty(len(t), k + room)[:, :k].copy_(t) for t in (q, qW))
    terms = {
        "bias": torch.randn(n, generator=generator(0, "bias")).to(device, dtype),
        "accumulate": torch.randn(m, n, generator=generator(0, "sum")).to(device, dtype),
    }
    a, b = stand_for(q, scale), stand_for(qW, w_scale)
    sizes = a.abs() @ b.abs().t()
    kept = terms["accumulate"].clone()
    # The tensor cores' sums have some 13 bits, those of short stretches are added in float32 unless it is to be fast.
    precision = 2.0**-20 if device == "cpu" else 2.0**-9 if fast else 2.0**-11
    for names in ((), ("bias",), ("accumulate",), ("bias", "accumulate")):
        chosen = {name: terms[name] for name in names}
        got = fp8.matmul_fp8(q, scale, qW, w_scale, out_dtype=dtype, fast_accumulation=fast, **chosen)
        wanted = a @ b.t() + sum(term.double() for term in chosen.values())
        before = (a @ b.t() + terms["bias"].double() * ("bias" in names)).abs()
        allowed = sizes * precision + rounding(wanted, dtype) + rounding(before, dtype)
        assert got.dtype == dtype and got.is_contiguous() and got.shape == (m, n)
        assert ((got.double() - wanted).abs() <= allowed).all()
    assert torch.equal(terms["accumulate"], kept)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (5, 7, 33), (64, 96, 160)])
def test_products(m, n, k, dtype):
    for room in (0, 16):
        check_product(m, n, k, "cpu", dtype, room=room)


def check_broken_rows(device):
    x = awkward(torch.float32, device)
    x[4] = 4.0
    q, scale = fp8.quantize_rows(x)
    # A column of zeros: nothing may hide behind a product with 0.
    W = matrix((16, 50), device=device).index_fill(1, torch.tensor([0, 1, 2, 3, 49], device=device), 0.0)
    product = fp8.matmul_fp8(q, scale, *fp8.quantize_rows(W))
    assert product[8:].isnan().all() and product[:8].isfinite().all() and (product[:2] == 0).all()
    product = fp8.matmul_fp8(*fp8.quantize_rows(W), q, scale)
    assert product[:, 8:].isnan().all() and product[:, :8].isfinite().all()


def test_infinities_and_nan_stay_visible():
    check_broken_rows("cpu")


def test_input_errors():
    x = matrix((4, 32))
    with pytest.raises(InputError, match=r"x is torch.int64 of shape \(4, 32\): expected a matrix"):
        fp8.quantize_rows(x.long())
    with pytest.raises(InputError, match="expected a matrix with columns"):
        fp8.quantize_rows(x[:, :0])
    with pytest.raises(InputError, match="all of the same columns"):
        fp8.quantize_rows_and_columns([x, x[:, 1:]])
    with pytest.raises(InputError, match="at least one"):
        fp8.quantize_nf4([], nf4_code())
    with pytest.raises(InputError, match="one dtype and one device"):
        fp8.quantize_rows_and_columns([x, x.double()])
    q, scale = fp8.quantize_rows(x)
    with pytest.raises(InputError, match=r"operands are torch\.float8_e4m3fn"):
        fp8.matmul_fp8(q, scale, x, scale)
    with pytest.raises(InputError, match=r"w_scale is torch.float64 of shape \(4,\)"):
        fp8.matmul_fp8(q, scale, q, scale.double())
    with pytest.raises(InputError, match=r"accumulate is .* expected floating values, \(4, 4\)"):
        fp8.matmul_fp8(q, scale, q, scale, accumulate=x)


@pytest.fixture(params=["portable"] if INTERPRETED else ["portable", "native"])
def conversion(request, monkeypatch):
    """The module, converting by integers, which is the interpreter's only way, and by the processor."""
    from deltaw.kernels import fp8_triton

    if request.param == "portable":
        monkeypatch.setattr(fp8_triton, "_native", lambda tensor: False)
    return fp8_triton


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [None, 16])
@pytest.mark.parametrize("shape", KERNEL_SHAPES)
def test_kernel_for_rows(conversion, shape, block, dtype):
    x = matrix((shape[0], shape[1] + 3), dtype, device=DEVICE)[:, 1:-2]
    assert_same(conversion.quantize_rows(x, block=block), fp8.quantize_rows_torch(x))
    for more in (matrix((shape[0], 7), dtype, seed="more", device=DEVICE), 1e3 * x[:, :1]):
        wanted = fp8.quantize_rows_torch(x, behind=more)
        assert_same(conversion.quantize_rows(x, behind=more, block=block), wanted)
        factor = torch.rand(more.shape[1], generator=generator(0, "factor")).to(DEVICE)
        wanted = fp8.quantize_rows_torch(x, behind=more, factor=factor)
        assert_same(conversion.quantize_rows(x, behind=more, factor=factor, block=block), wanted)


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [None, 16])
def test_kernel_for_rows_of_every_kind(conversion, block, dtype):
    x = awkward(dtype, DEVICE)
    assert_same(conversion.quantize_rows(x, block=block), fp8.quantize_rows_torch(x))


@kernels
def test_kernel_rounds_like_torch(conversion):
    """Every bfloat16 number that scaling can make, and every float32 next to a middle of two codes."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    table = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (table[1:] + table[:-1]) / 2
    near = torch.cat([middles, middles.nextafter(middles * 2), middles.nextafter(middles * 0)])
    x = torch.cat([bits[bits.abs() <= 448], near, -near, torch.tensor([448.0])]).unsqueeze(0).to(DEVICE)
    q, scale = conversion.quantize_rows(x)
    assert scale.item() == 1.0
    assert torch.equal(q.view(torch.uint8), x.to(torch.float8_e4m3fn).view(torch.uint8))
    assert torch.equal(q.cpu().double().flatten(), nearest_e4m3(x.cpu().double().flatten()))


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", TILED_SHAPES)
def test_kernel_for_rows_and_columns(conversion, shape, dtype):
    W = matrix((shape[0], shape[1] + 3), dtype, device=DEVICE)[:, 1:-2]
    wanted = fp8.quantize_rows_and_columns_torch([W])
    assert_same(conversion.quantize_rows_and_columns([W]), wanted)
    assert_same(conversion.quantize_rows_and_columns([W], absmax_tile=(16, 32), tile=(32, 16)), wanted)
    parts = [W, matrix((7, shape[1]), dtype, seed="more", device=DEVICE), W[:1]]
    assert_same(conversion.quantize_rows_and_columns(parts), fp8.quantize_rows_and_columns_torch(parts))
    spread = fp8.spreads(sum(map(len, parts)), shape[1], 3, W.device)
    wanted = fp8.quantize_rows_and_columns_torch(parts, spread=spread)
    assert_same(conversion.quantize_rows_and_columns(parts, spread=spread), wanted)


@kernels
@pytest.mark.parametrize("form", ["dense", "nf4", "nested"])
@pytest.mark.parametrize("shape", [(5, 40), (70, 128)] if INTERPRETED else [(5, 40), (70, 128), (300, 1000)])
def test_kernel_for_what_rounding_takes(conversion, form, shape):
    weights = [matrix((rows, shape[1])) for rows in (shape[0], 3)]
    code, parts = nf4_code(torch.device(DEVICE)), [weight.to(DEVICE) for weight in weights]
    exact = parts
    if form != "dense":
        packed = [NF4Weight.quantize(weight, double_quant=form == "nested").to(DEVICE) for weight in weights]
        exact = [one.dequantize(dtype=torch.float32) for one in packed]
        parts = [(one.codes, one.scales, one.shape[0], one.block_size) for one in packed]
    for dtype in (torch.float32, torch.bfloat16):
        lost, wanted_lost = (torch.full((shape[0] + 3, shape[1]), torch.nan, dtype=dtype, device=DEVICE) for _ in "12")
        wanted = fp8.quantize_rows_and_columns_torch(exact, room=(16, 48), lost=wanted_lost)
        given = {"room": (16, 48), "lost": lost}
        made = (
            conversion.quantize_rows_and_columns(parts, **given)
            if form == "dense"
            else conversion.quantize_nf4(parts, code, shape[1], **given)
        )
        assert_same([t.contiguous() for t in made], [t.contiguous() for t in wanted])
        assert made[0].stride(0) == shape[1] + 16 and made[2].stride(0) == shape[0] + 3 + 48
        # The interpreter rounds to bfloat16 towards zero.
        off = 2**-7 if INTERPRETED and dtype == torch.bfloat16 else 0.0
        torch.testing.assert_close(lost, wanted_lost, rtol=off, atol=0.0)
        assert lost.any()


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("P", "K"), [(3, 5), (16, 70)] if INTERPRETED else [(3, 5), (16, 70), (48, 4096), (16, 14336)])
def test_kernel_for_a_low_rank_part(conversion, P, K, dtype):
    A, _, whole, scale = low_rank(P, K, dtype, DEVICE)
    other = whole.clone()
    factor = conversion.write_columns(A, whole[:, 70 : 70 + P], scale)
    assert_same((whole, factor), (other, fp8.write_columns_torch(A, other[:, 70 : 70 + P], scale)))


@kernels
def test_kernel_for_columns_shows_nan(conversion):
    W = awkward(torch.float32, DEVICE)
    assert_same(conversion.quantize_rows_and_columns([W]), fp8.quantize_rows_and_columns_torch([W]))


@kernels
@pytest.mark.parametrize("block_size", [32, 64, 4096])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(5, 10), (9, 96)] if INTERPRETED else NF4_SHAPES[:-1])
def test_kernel_for_four_bits(conversion, shape, double_quant, block_size):
    code = nf4_code(torch.device(DEVICE))
    weights = [
        NF4Weight.quantize(matrix((rows, shape[1])), double_quant=double_quant, block_size=block_size).to(DEVICE)
        for rows in (shape[0], 3)
    ]
    wanted = fp8.quantize_rows_and_columns_torch([weight.dequantize(dtype=torch.float32) for weight in weights])
    parts = [(weight.codes, weight.scales, weight.shape[0], block_size) for weight in weights]
    assert_same(conversion.quantize_nf4(parts, code, shape[1]), wanted)
    spread = fp8.spreads(len(wanted[0]), shape[1], 3, code.device)
    exact = [weight.dequantize(dtype=torch.float32) for weight in weights]
    assert_same(
        conversion.quantize_nf4(parts, code, shape[1], spread=spread),
        fp8.quantize_rows_and_columns_torch(exact, spread=spread),
    )
    assert_same(conversion.quantize_nf4(parts, code, shape[1], absmax_tile=(16, 16), tile=(16, 32)), wanted)


@on_gpu
@needs_triton
def test_what_is_dispatched_to_kernels():
    x = matrix((70, 20001), torch.bfloat16, device="cuda")
    assert_same(fp8.quantize_rows(x), fp8.quantize_rows_torch(x))
    assert_same(fp8.quantize_rows_and_columns(x), fp8.quantize_rows_and_columns_torch([x]))
    for columns in (20001, 14336):
        more = x[:, -64:]
        assert_same(
            fp8.quantize_rows(x[:, :columns], behind=more), fp8.quantize_rows_torch(x[:, :columns], behind=more)
        )
    for shape in (*NF4_SHAPES, (4096, 14336)):
        packed = NF4Weight.quantize(matrix(shape)).to("cuda")
        code, exact = nf4_code(packed.device), packed.dequantize(dtype=torch.float32)
        lost, wanted = (torch.empty(shape, dtype=torch.bfloat16, device="cuda") for _ in "12")
        made = fp8.quantize_nf4(packed, code, lost=lost)
        assert_same(made, fp8.quantize_rows_and_columns_torch([exact], lost=wanted))
        assert torch.equal(lost, wanted)


@on_gpu
@needs_triton
def test_beyond_two_to_the_31_values():
    rows, columns = (1 << 19) + 77, 4096 + 16
    x = matrix((1009, columns), torch.bfloat16, device="cuda").repeat(-(-rows // 1009), 1)[:rows]
    q, scale = fp8.quantize_rows(x)
    by_rows, row_scale, qT, column_scale = fp8.quantize_rows_and_columns(x)
    assert torch.equal(by_rows.view(torch.uint8), q.view(torch.uint8)) and torch.equal(row_scale, scale)
    # The rows repeat, so the whole matrix' columns have the scales of one period.
    wanted, wanted_scale = fp8.quantize_rows_torch(x[:1009].t())
    assert torch.equal(column_scale, wanted_scale)
    period = fp8.quantize_rows_torch(x[:1009])
    for start in (0, 1009 * 500, 1009 * 517, 1009 * (rows // 1009)):
        part = slice(start, start + 1009)
        count = len(scale[part])
        assert_same((q[part], scale[part]), [t[:count] for t in period])
        assert torch.equal(qT[:, part].contiguous().view(torch.uint8), wanted[:, :count].contiguous().view(torch.uint8))


@on_gpu
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 1, 1), (5, 7, 33), (64, 96, 160), (1000, 576, 1536), (333, 500, 250), (2048, 6144, 4096)]
)
def test_products_on_the_gpu(m, n, k, dtype, fast):
    for room in (0, 16):
        check_product(m, n, k, "cuda", dtype, fast=fast, room=room)


@on_gpu
def test_infinities_and_nan_stay_visible_on_the_gpu():
    check_broken_rows("cuda")
