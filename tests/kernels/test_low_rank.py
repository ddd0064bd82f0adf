"""The thin products against float64, whole tensors: in torch, and the Triton kernels.

Without a GPU the kernels run in Triton's interpreter, in a process of their own: the interpreter is chosen by a
variable that Triton reads when it is first imported.
"""

import contextlib
import importlib.util
import itertools
import os
import subprocess
import sys

import pytest
import torch

from deltaw.core.errors import InputError
from deltaw.core.generators import generator
from deltaw.kernels import low_rank
from deltaw.kernels.low_rank import outer_sum_torch, project_and_sum_torch, project_torch

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
def test_kernels_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", __file__, "-p", "no:cacheprovider", "-k", "kernels_ and not interpreter"]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout and "skipped" not in done.stdout


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


def check(project, project_and_sum, outer_sum, M, N, r, dtype, device, most=4):
    """All three on `most` layouts of the large operand; `project_and_sum` has its scale, 0.3."""
    g = drawn(M, N, dtype=dtype, device=device)
    A, B, h = (drawn(*shape, dtype=dtype, device=device, name="thin") for shape in ((r, N), (N, r), (M, r)))
    sums = torch.promote_types(dtype, torch.float32)
    for view in itertools.islice(layouts(g), most):
        with poisoned():
            got_h, (got_k, got_dB), got_dA = project(view, A), project_and_sum(view, B, h), outer_sum(h, view)
        close(got_h, g, A.t(), dtype)
        close(got_k, g, B, dtype, 0.3)
        close(got_dB, g.t(), h, sums, 0.3)
        close(got_dA, h.t(), g, sums)


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64))
@pytest.mark.parametrize(("M", "N", "r"), [(1, 1, 1), (37, 29, 16), (5, 130, 3), (2100, 40, 33)])
def test_torch_forms_and_dispatch_on_cpu(M, N, r, dtype):
    forms = project_torch, lambda g, B, h: project_and_sum_torch(g, B, h, scale=0.3), outer_sum_torch
    check(*forms, M, N, r, dtype, "cpu")
    check(
        low_rank.project,
        lambda g, B, h: low_rank.project_and_sum(g, B, h, scale=0.3),
        low_rank.outer_sum,
        M,
        N,
        r,
        dtype,
        "cpu",
    )


def test_thin_operands_are_taken_in_the_large_ones_dtype():
    x, A, B, h = (drawn(*s, dtype=torch.float32, name=str(s)) for s in ((9, 20), (4, 20), (20, 4), (9, 4)))
    low, half = x.bfloat16(), torch.bfloat16
    assert torch.equal(low_rank.project(low, A), low_rank.project(low, A.to(half)))
    got, wanted = (low_rank.project_and_sum(low, b, c, scale=1.5) for b, c in ((B, h), (B.to(half), h.to(half))))
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])
    assert torch.equal(low_rank.outer_sum(h, low), low_rank.outer_sum(h.to(half), low))


@pytest.mark.parametrize(("M", "N"), [(0, 5), (5, 0), (0, 0)])
def test_nothing_sums_to_zero(M, N):
    g, A, h = torch.empty(M, N), torch.empty(3, N), torch.empty(M, 3)
    k, dB = low_rank.project_and_sum(g, A.t(), h, scale=2.0)
    for got, shape in ((low_rank.project(g, A), (M, 3)), (k, (M, 3)), (dB, (N, 3)), (low_rank.outer_sum(h, g), (3, N))):
        assert torch.equal(got, torch.zeros(shape))


def test_shapes_that_do_not_match_are_errors():
    with pytest.raises(InputError, match=r"shapes \(2, 3\), \(4, 5\): expected x \(M, K\) and A \(R, K\)"):
        low_rank.project(torch.ones(2, 3), torch.ones(4, 5))
    with pytest.raises(InputError, match=r"expected g \(M, N\), B \(N, r\) and h \(M, r\)"):
        low_rank.project_and_sum(torch.ones(2, 3), torch.ones(3, 4), torch.ones(2, 5), scale=1.0)
    with pytest.raises(InputError, match=r"expected k \(M, R\) and x \(M, K\)"):
        low_rank.outer_sum(torch.ones(2, 3), torch.ones(3, 3))


def forms(tiles=None):
    from deltaw.kernels import low_rank_triton

    return (
        lambda x, A: low_rank_triton.project(x, A, tiles=tiles),
        lambda g, B, h: low_rank_triton.project_and_sum(g, B, h, scale=0.3, tiles=tiles),
        lambda k, x: low_rank_triton.outer_sum(k, x, tiles=tiles),
    )


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
        check(*forms(tiles), M, N, r, dtype, DEVICE, most)


@kernels
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize(("M", "N", "r"), [(70, 300, 16), (200, 40, 5)])
def test_kernels_with_their_own_tiles(M, N, r, dtype):
    check(*forms(), M, N, r, dtype, DEVICE)


@kernels
def test_kernels_take_every_layout_of_thin_operands():
    g = drawn(40, 50, dtype=torch.float32, device=DEVICE)
    A, B, h = (drawn(*s, dtype=torch.float32, device=DEVICE, name=str(s)) for s in ((5, 50), (50, 5), (40, 5)))
    project, project_and_sum, outer_sum = forms(small_tiles()[0])
    wanted = project(g, A), *project_and_sum(g, B, h), outer_sum(h, g)
    for a, b, c in zip(layouts(A), layouts(B), layouts(h), strict=True):
        for got, expected in zip((project(g, a), *project_and_sum(g, b, c), outer_sum(c, g)), wanted, strict=True):
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


@pytest.mark.gpu
@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize(
    ("M", "N", "r"), [(8192, 4096, 16), (8192, 14336, 16), (32768, 1024, 32), (2047, 28672, 64), (100, 4100, 48)]
)
def test_large_ones_by_dispatch(monkeypatch, M, N, r, dtype):
    monkeypatch.setattr(low_rank, "PROJECT_AND_SUM_RANK", 64)
    for name in ("project_torch", "project_and_sum_torch", "outer_sum_torch"):
        monkeypatch.setattr(low_rank, name, None)
    g = drawn(M, N, dtype=dtype, device="cuda")
    A, B, h = (drawn(*shape, dtype=dtype, device="cuda", name="thin") for shape in ((r, N), (N, r), (M, r)))
    for view in list(layouts(g))[:2]:
        first = None
        for _ in range(2):
            got = (
                low_rank.project(view, A),
                *low_rank.project_and_sum(view, B, h, scale=0.3),
                low_rank.outer_sum(h, view),
            )
            # Equal bits every time.
            assert first is None or all(map(torch.equal, got, first))
            first = got
        close(got[0], g, A.t(), dtype)
        close(got[1], g, B, dtype, 0.3)
        close(got[2], g.t(), h, torch.float32, 0.3)
        close(got[3], h.t(), g, torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64))
def test_what_goes_to_torch_on_cuda(monkeypatch, dtype):
    """Ranks and dtypes that the kernels leave to cuBLAS."""
    for name in ("bf16", "fp16"):
        # It may round parts of sums to 16 bits unless told.
        monkeypatch.setattr(torch.backends.cuda.matmul, f"allow_{name}_reduced_precision_reduction", False)
    g = drawn(300, 500, dtype=dtype, device="cuda")
    A, B, h = (drawn(*shape, dtype=dtype, device="cuda", name="thin") for shape in ((128, 500), (500, 128), (300, 128)))
    (k, dB), sums = low_rank.project_and_sum(g, B, h, scale=0.3), torch.promote_types(dtype, torch.float32)
    close(low_rank.project(g, A), g, A.t(), dtype)
    close(k, g, B, dtype, 0.3)
    close(dB, g.t(), h, sums, 0.3)
    close(low_rank.outer_sum(h, g), h.t(), g, sums)
