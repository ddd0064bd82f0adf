"""The thin products against float64, whole tensors: in torch, and the Triton kernels.

Without a GPU the kernels run in Triton's interpreter, in a process of their own: the interpreter is chosen by a
variable that Triton reads when it is first imported.
"""

import contextlib
import functools
import importlib.util
import itertools
import math
import os

import pytest
import torch

from deltaw.core.errors import InputError
from deltaw.core.generators import generator
from deltaw.kernels import low_rank
from deltaw.kernels.low_rank import add_product, add_product_torch, outer_sum, project, project_and_sum_torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: The interpreter multiplies the bits of bfloat16 as integers.
KERNEL_DTYPES = DTYPES[:2] if INTERPRETED else DTYPES
#: A rounding in float32 sums, and that of the result.
SUM = 2.0**-24
ROUNDED = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
needs_kernels = [
    needs_triton,
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="no CUDA device"),
    *([] if INTERPRETED else [pytest.mark.gpu]),
]
DEVICE = "cpu" if INTERPRETED else "cuda"


def kernels(function):
    for mark in needs_kernels:
        function = mark(function)
    return function


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_kernels_in_the_interpreter(passes_in_the_interpreter):
    passes_in_the_interpreter(__file__, "kernels_ and not interpreter")


@contextlib.contextmanager
def poisoned():
    """New memory is NaN."""
    torch.set_deterministic_debug_mode("error")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode("default")


def drawn(*shape, dtype, device="cpu", name="x"):
    return torch.randn(shape, generator=generator(0, name, *shape)).to(dtype).to(device)


def layouts(matrix):
    """The matrix, and the same values as columns of a wider buffer, at an odd offset of it, and as its transpose."""
    rows, columns = matrix.shape
    wide = torch.full((rows, 2 * columns + 3), float("nan"), dtype=matrix.dtype, device=matrix.device)
    yield matrix
    for low in (columns, 3):
        view = wide[:, low : low + columns]
        view.copy_(matrix)
        yield view
    yield matrix.t().contiguous().t()


def close(got, a, b, dtype, factor=1.0):
    """`got` is factor a b, summed in float32 (float64) and rounded to `dtype` once."""
    a, b = a.double(), b.double()
    wanted, size = factor * (a @ b), abs(factor) * (a.abs() @ b.abs())
    assert got.dtype == dtype and got.shape == wanted.shape and got.is_contiguous()
    # A sum of n roundings in any order strays by a small multiple of sqrt(n) of them.
    sums = (SUM if dtype != torch.float64 else 2.0**-53) * 4 * a.shape[1] ** 0.5
    # Below float16's smallest normal value roundings are of equal size.
    bound = size * sums + wanted.abs() * ROUNDED[dtype] + (2.0**-24 if dtype == torch.float16 else 1e-30)
    wrong = (got.double() - wanted).abs() > bound
    assert not wrong.any() and got.isfinite().all(), (wrong.sum(), (got.double() - wanted).abs().max())


def check_both(form, M, N, r, dtype, device, most=4):
    """`project_and_sum`, with 0.3 as its scale, on `most` layouts of the large operand."""
    g, B, h = (drawn(*shape, dtype=dtype, device=device, name=str(shape)) for shape in ((M, N), (N, r), (M, r)))
    for view in itertools.islice(layouts(g), most):
        with poisoned():
            k, dB = form(view, B, h, scale=0.3)
        close(k, g, B, dtype, 0.3)
        close(dB, g.t(), h, torch.promote_types(dtype, torch.float32), 0.3)
    out = framed(M, r, dtype=dtype, device=device, wider=5)
    place, dB = form(g, B, h, scale=0.3, sum_scale=-2.0, out=out)
    assert place is out and torch.equal(out, form(g, B, h, scale=0.3)[0])
    close(dB, g.t(), h, torch.promote_types(dtype, torch.float32), -2.0)
    out.fill_(math.nan)
    assert out._base.isnan().all()


def check_blocks(form, M, widths, r, dtype, device):
    """`project_and_sum_blocks` of linears whose columns lie in a frame, with poison where nothing is to be read."""
    N, ranks = sum(widths), r * len(widths)
    g = framed(M, N, dtype=dtype, device=device, wider=3).copy_(drawn(M, N, dtype=dtype))
    h = framed(M, ranks, dtype=dtype, device=device, wider=7).copy_(drawn(M, ranks, dtype=dtype))
    B = torch.zeros(N, ranks, dtype=dtype, device=device)
    for i, part in enumerate(B.split(list(widths))):
        part[:, i * r : (i + 1) * r] = drawn(len(part), r, dtype=dtype, name=f"B{i}")
    out = framed(M, ranks, dtype=dtype, device=device, wider=9)
    with poisoned():
        dB = form(g, B, h, widths=widths, sum_scale=0.3, out=out)
    for i, (dB_i, g_i) in enumerate(zip(dB.split(list(widths)), g.split(list(widths), 1), strict=True)):
        columns = slice(i * r, (i + 1) * r)
        close(out[:, columns].contiguous(), g, B[:, columns], dtype)
        close(dB_i, g_i.t(), h[:, columns], torch.promote_types(dtype, torch.float32), 0.3)
    out.fill_(math.nan)
    assert out._base.isnan().all()


def framed(*shape, dtype, device, wider):
    """Memory for a matrix in rows that lie `wider` further apart than they are long, with NaN around it."""
    frame = torch.full((shape[0] + 1, shape[1] + wider), math.nan, dtype=dtype, device=device)
    return frame[:-1, wider // 2 : wider // 2 + shape[1]]


def check_sum(form, M, N, P, dtype, device):
    """`add_product` with and without z, in frames and not, into memory of its own and over its operands."""
    onto, z, h, B = (
        framed(*shape, dtype=dtype, device=device, wider=wider).copy_(drawn(*shape, dtype=dtype, name=str(wider)))
        for wider, *shape in ((3, M, N), (6, M, N), (8, M, P), (1, N, P))
    )
    for more in (None, z):
        terms = [onto.double(), *([] if more is None else [more.double()])]
        product, sizes = h.double() @ B.double().t(), h.double().abs() @ B.double().abs().t()
        wanted, size = sum(terms) + product, sum(t.abs() for t in terms) + sizes
        sums = (SUM if dtype != torch.float64 else 2.0**-53) * (4 * P**0.5 + 3)
        bound = size * sums + wanted.abs() * ROUNDED[dtype] + (2.0**-24 if dtype == torch.float16 else 1e-30)
        out = framed(M, N, dtype=dtype, device=device, wider=5)
        kept = onto.clone(), z.clone()
        # Into a frame, into new memory, and over the operands.
        for place in (out, torch.empty(M, N, dtype=dtype, device=device), onto, more):
            if place is None:
                continue
            assert form(onto, h, B, z=more, out=place) is place
            assert place.isfinite().all() and ((place.double() - wanted).abs() <= bound).all()
            for t, values in zip((onto, z), kept, strict=True):
                assert t is place or torch.equal(t, values)
                t.copy_(values)
        out.fill_(math.nan)
        assert out._base.isnan().all()
    for t in (onto, z, h, B):
        t.fill_(math.nan)
        assert t._base.isnan().all()


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64))
@pytest.mark.parametrize(("M", "N", "r"), [(1, 1, 1), (37, 29, 16), (5, 130, 3), (2100, 40, 33)])
def test_torch_forms_and_dispatch_on_cpu(M, N, r, dtype):
    for form in (project_and_sum_torch, low_rank.project_and_sum):
        check_both(form, M, N, r, dtype, "cpu")
    for form in (low_rank.project_and_sum_blocks_torch, low_rank.project_and_sum_blocks):
        for widths in ((N,), (N, 3), (2, N, 3), (2, N, 3, 1)):
            check_blocks(form, M, widths, r, dtype, "cpu")
    for form in (add_product_torch, add_product):
        check_sum(form, M, N, r, dtype, "cpu")
    x, A, k = (drawn(*shape, dtype=dtype, name=str(shape)) for shape in ((M, N), (r, N), (M, r)))
    for view in layouts(x):
        with poisoned():
            h, dA = project(view, A), outer_sum(k, view)
        close(h, x, A.t(), dtype)
        close(dA, k.t(), x, torch.promote_types(dtype, torch.float32))


def test_thin_operands_are_taken_in_the_large_ones_dtype():
    x, A, B, h = (drawn(*s, dtype=torch.float32, name=str(s)) for s in ((9, 20), (4, 20), (20, 4), (9, 4)))
    low, half = x.bfloat16(), torch.bfloat16
    assert torch.equal(project(low, A), project(low, A.to(half)))
    got, wanted = (low_rank.project_and_sum(low, b, c, scale=1.5) for b, c in ((B, h), (B.to(half), h.to(half))))
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])
    assert torch.equal(outer_sum(h, low), outer_sum(h.to(half), low))
    got = add_product(low, h, B)
    assert got.is_contiguous() and torch.equal(got, add_product(low, h.to(half), B.to(half)))


@pytest.mark.parametrize(("M", "N"), [(0, 5), (5, 0), (0, 0)])
def test_nothing_sums_to_zero(M, N):
    g, A, h = torch.empty(M, N), torch.empty(3, N), torch.empty(M, 3)
    k, dB = low_rank.project_and_sum(g, A.t(), h, scale=2.0)
    for got, shape in ((project(g, A), (M, 3)), (k, (M, 3)), (dB, (N, 3)), (outer_sum(h, g), (3, N))):
        assert torch.equal(got, torch.zeros(shape))
    assert add_product(g, h, A.t().contiguous(), z=g).shape == (M, N)
    assert torch.equal(add_product(torch.ones(2, 3), torch.ones(2, 0), torch.ones(3, 0)), torch.ones(2, 3))


def test_shapes_that_do_not_match_are_errors():
    with pytest.raises(InputError, match=r"shapes \(2, 3\), \(4, 5\): expected x \(M, K\) and A \(R, K\)"):
        project(torch.ones(2, 3), torch.ones(4, 5))
    with pytest.raises(InputError, match=r"expected g \(M, N\), B \(N, r\) and h \(M, r\)"):
        low_rank.project_and_sum(torch.ones(2, 3), torch.ones(3, 4), torch.ones(2, 5), scale=1.0)
    with pytest.raises(InputError, match=r"expected g \(M, N\), B \(N, n r\) and h \(M, n r\), for n widths of N"):
        thin = torch.ones(3, 4), torch.ones(2, 4)
        low_rank.project_and_sum_blocks(torch.ones(2, 3), *thin, widths=(1, 1), out=torch.ones(2, 4))
    with pytest.raises(InputError, match=r"out is torch.float32 of shape \(2, 3\) .*expected torch.float32, \(2, 4\)"):
        thin = torch.ones(3, 4), torch.ones(2, 4)
        low_rank.project_and_sum(torch.ones(2, 3), *thin, scale=1.0, out=torch.ones(2, 3))
    with pytest.raises(InputError, match=r"expected k \(M, R\) and x \(M, K\)"):
        outer_sum(torch.ones(2, 3), torch.ones(3, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"h": torch.ones(3, 5)}, r"shapes \(3, 4\), \(3, 5\), \(4, 2\): expected onto \(M, N\), h"),
        ({"B": torch.ones(3, 2)}, r"expected onto \(M, N\), h \(M, P\) and B \(N, P\)"),
        ({"onto": torch.ones(4)}, r"shapes \(4,\)"),
        ({"onto": torch.ones(3, 4, dtype=torch.int64)}, "onto is torch.int64"),
        ({"onto": torch.ones(4, 3).t()}, "onto has a stride of 3"),
        ({"h": torch.ones(2, 3).t()}, "h has a stride of 3"),
        ({"B": torch.ones(2, 4).t()}, "B has a stride of 4"),
        ({"z": torch.ones(3, 5)}, r"z is .* of shape \(3, 5\)"),
        ({"z": torch.ones(3, 4).half()}, r"z is torch\.float16"),
        ({"out": torch.ones(3, 4).double()}, r"out is torch\.float64"),
        ({"out": torch.ones(4).expand(3, 4)}, r"out has strides \(0, 1\): expected rows that do not overlap"),
    ],
)
def test_what_add_product_refuses(change, message):
    given = {"onto": torch.ones(3, 4), "h": torch.ones(3, 2), "B": torch.ones(4, 2)} | change
    with pytest.raises(InputError, match=message):
        add_product(**given)


def test_large_sums_come_in_chunks(monkeypatch):
    monkeypatch.setattr(low_rank, "CHUNK_ROWS", 3)
    for dtype in (torch.bfloat16, torch.float64):
        check_sum(add_product_torch, 10, 7, 5, dtype, "cpu")


def with_options(name, **options):
    from deltaw.kernels import low_rank_triton

    return functools.partial(getattr(low_rank_triton, name), **options)


def blocks_form(**options):
    """The kernel as `project_and_sum_blocks` calls it."""
    form = with_options("project_and_sum", scale=1.0, **options)
    return lambda *tensors, widths, **rest: form(*tensors, widths=tuple(widths), **rest)[1]


def small_tiles():
    """Many parts, some, and none."""
    from deltaw.kernels.low_rank_triton import Tiles

    return [Tiles(16, 16, 4, 2, 132), Tiles(16, 32, 4, 1, 7), Tiles(32, 16, 4, 2, 1)]


@kernels
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize(
    ("M", "N", "r"), [(1, 1, 1), (16, 16, 16), (17, 33, 3), (150, 16, 16), (33, 150, 20), (16, 200, 64)]
)
def test_kernels_with_small_tiles(M, N, r, dtype):
    for tiles, most in zip(small_tiles(), (2, 1, 1), strict=True):
        check_both(with_options("project_and_sum", tiles=tiles), M, N, r, dtype, DEVICE, most)
    for tiles, widths in zip(small_tiles(), ((N, 5, 40), (5, N), (N, 16, 16)), strict=True):
        check_blocks(blocks_form(tiles=tiles), M, widths, r, dtype, DEVICE)
    check_sum(with_options("add_product", tile=(16, 16, 4)), M, N, r, dtype, DEVICE)


@kernels
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize(("M", "N", "r"), [(70, 300, 16), (200, 40, 5)])
def test_kernels_with_their_own_tiles(monkeypatch, M, N, r, dtype):
    from deltaw.kernels import low_rank_triton

    for least in (low_rank_triton.WIDE_COLUMNS, 1):
        monkeypatch.setattr(low_rank_triton, "WIDE_COLUMNS", least)
        check_both(with_options("project_and_sum"), M, N, r, dtype, DEVICE)
        check_blocks(blocks_form(), M, (N, 70, 300), r, dtype, DEVICE)
    check_sum(with_options("add_product"), M, N, r, dtype, DEVICE)


@kernels
def test_kernels_take_every_layout_of_thin_operands():
    g = drawn(40, 50, dtype=torch.float32, device=DEVICE)
    B, h = (drawn(*s, dtype=torch.float32, device=DEVICE, name=str(s)) for s in ((50, 5), (40, 5)))
    form = with_options("project_and_sum", tiles=small_tiles()[0], scale=0.3)
    wanted = form(g, B, h)
    for b, c in zip(layouts(B), layouts(h), strict=True):
        for got, expected in zip(form(g, b, c), wanted, strict=True):
            assert torch.equal(got, expected)


@kernels
def test_kernels_cut_the_work_for_the_card():
    from deltaw.kernels.low_rank_triton import _split

    for across, steps in ((1, 1), (1, 500), (16, 128), (56, 128), (128, 32), (131, 9), (500, 500)):
        each, number = _split(across, steps, 132)
        assert (number - 1) * each < steps <= number * each
        rounds = -(-across * number // 132)
        # No more than a third above the work spread evenly, but for what cannot be spread: a step, and a part's way.
        assert rounds * each <= 4 / 3 * max(1, across * steps / 132) + 2, (across, steps)
    assert _split(128, 32, 132) == (32, 1) and _split(16, 128, 132) == (16, 8)


@kernels
def test_kernels_take_the_tiles_that_fit(monkeypatch):
    from deltaw.kernels import low_rank_triton
    from deltaw.kernels.low_rank_triton import PROJECT_AND_SUM, _fitting

    class Matrix(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(low_rank_triton, "_shared_bytes", lambda device: room)
    # An H100, an A100 and a consumer's card, in KiB; tiles by columns and rank.
    for room, wanted in ((227, (1, 1, 0, 1)), (163, (1, 1, 1, 1)), (99, (2, 2, 2, 2))):
        room *= 1024
        sizes = ((4096, 16), (4096, 32), (8192, 16), (14336, 32))
        found = [_fitting(torch.empty(1, N).half().as_subclass(Matrix), rank) for N, rank in sizes]
        assert [PROJECT_AND_SUM.index(tiles) for tiles in found] == [*wanted]


@pytest.mark.gpu
@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize(
    ("M", "N", "r"), [(8192, 4096, 16), (8192, 14336, 16), (32768, 1024, 32), (2047, 28672, 64), (100, 4100, 48)]
)
def test_large_ones_by_dispatch(monkeypatch, M, N, r, dtype):
    monkeypatch.setattr(low_rank, "PROJECT_AND_SUM_RANK", 64)
    for name in ("project_and_sum_torch", "project_and_sum_blocks_torch", "add_product_torch"):
        monkeypatch.setattr(low_rank, name, None)
    g, B, h = (drawn(*s, dtype=dtype, device="cuda", name=str(s)) for s in ((M, N), (N, r), (M, r)))
    for view in itertools.islice(layouts(g), 2):
        first = None
        for _ in range(2):
            got = *low_rank.project_and_sum(view, B, h, scale=0.3), add_product(view, h, B, z=view)
            # Equal bits every time.
            assert first is None or all(map(torch.equal, got, first))
            first = got
        close(got[0], g, B, dtype, 0.3)
        close(got[1], g.t(), h, torch.float32, 0.3)
    check_blocks(low_rank.project_and_sum_blocks, M, (N, 1024, 1000), r, dtype, "cuda")
    check_sum(add_product, M, N, r, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64))
def test_what_goes_to_torch_on_cuda(monkeypatch, dtype):
    """Ranks and dtypes that are left to cuBLAS."""
    for name in ("bf16", "fp16"):
        # It may round parts of sums to 16 bits unless told.
        monkeypatch.setattr(torch.backends.cuda.matmul, f"allow_{name}_reduced_precision_reduction", False)
    g = drawn(1300, 500, dtype=dtype, device="cuda")
    A, B, h = (drawn(*s, dtype=dtype, device="cuda", name=str(s)) for s in ((128, 500), (500, 128), (1300, 128)))
    sums = torch.promote_types(dtype, torch.float32)
    for view in layouts(g):
        k, dB = low_rank.project_and_sum(view, B, h, scale=0.3)
        close(project(view, A), g, A.t(), dtype)
        close(k, g, B, dtype, 0.3)
        close(dB, g.t(), h, sums, 0.3)
        close(outer_sum(h, view), h.t(), g, sums)
    for rank in (128, 3):
        check_sum(add_product, 1300, 500, rank, dtype, "cuda")


@pytest.mark.gpu
@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_sums_beyond_two_to_the_31_values():
    """Columns of a buffer whose last rows lie past 2^31 values."""
    rows, columns = 150_000, 7_200
    both = torch.zeros(rows, 2 * columns, dtype=torch.bfloat16, device="cuda")
    onto, z = both[:, :columns], both[:, columns:]
    h, B = (drawn(*s, dtype=both.dtype, device="cuda", name=str(s)) for s in ((rows, 16), (columns, 16)))
    add_product(onto, h, B, z=z, out=z)
    last = slice(rows - 100, rows)
    close(z[last].contiguous(), h[last], B.t(), both.dtype)
    assert not onto[last].any()
