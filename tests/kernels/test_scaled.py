"""Scaled columns, their sums and the residual's against float64; Triton's form by its interpreter.

The interpreter is chosen by a variable that Triton reads when it is first imported, hence a process of its own.
"""

import importlib.util
import os

import pytest
import torch

from deltaw.core.errors import InputError
from deltaw.core.generators import generator
from deltaw.kernels import scaled

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
#: A rounding to the dtype; that of float32's and float64's arithmetic comes on top.
ROUNDED = {torch.float64: 0.0, torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# The interpreter does not round to bfloat16 as a GPU does.
KERNEL_DTYPES = [torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])]
CASES = [("torch", dtype) for dtype in ROUNDED] + [
    pytest.param(
        "triton",
        dtype,
        marks=[
            pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed"),
            pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="no CUDA device"),
            *([] if INTERPRETED else [pytest.mark.gpu]),
        ],
    )
    for dtype in KERNEL_DTYPES
]
SHAPES = [(1, 1), (69, 37), (5, 1030)]
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.skipif(not HAS_TRITON or INTERPRETED, reason="no Triton, or the interpreter's process")
def test_kernels_in_the_interpreter(passes_in_the_interpreter):
    passes_in_the_interpreter(__file__, "triton")


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that nobody wrote to is NaN; only on CPU, as the mode has demands on CUDA's products."""
    torch.use_deterministic_algorithms(not torch.cuda.is_available())
    yield
    torch.use_deterministic_algorithms(False)


def functions(form, **options):
    """Both functions of a form, with memory for the result where none is given, and their device."""
    source, device = scaled, "cpu"
    if form == "triton":
        from deltaw.kernels import scaled_triton as source

        device = "cpu" if INTERPRETED else "cuda"

    def made(function):
        def call(first, *rest, out=None):
            return function(first, *rest, out=torch.empty_like(first) if out is None else out, **options)

        return call if form == "triton" else function

    return made(source.scale_and_sum), made(source.scaled_add), device


def drawn(name, *shape, dtype, device, wider=0):
    """Random values; in rows that lie `wider` further apart than they are long, with 7s between them."""
    framed = torch.full((*shape[:-1], shape[-1] + wider), 7.0, dtype=dtype, device=device)
    inside = framed[..., wider // 2 : wider // 2 + shape[-1]]
    return inside.copy_(torch.randn(shape, generator=generator(0, name, *shape)))


def intact(t):
    """Whether the frame around t, which is gone after, is."""
    t.fill_(7.0)
    return (t._base == 7).all()


def assert_near(got, want, dtype, terms):
    """Off by a rounding to the dtype and by the sum's, relative to its terms' magnitudes."""
    tiny = 2.0**-51 if got.dtype == torch.float64 else 2.0**-22
    least = 2.0**-24 if dtype == torch.float16 else 0.0
    assert got.isfinite().all()
    assert ((got.double() - want).abs() <= ROUNDED[dtype] * want.abs() + tiny * terms + least).all()


@pytest.mark.parametrize(("form", "dtype"), CASES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("wider", [0, 5])
def test_scaling_and_sums_are_float64s(monkeypatch, form, dtype, shape, wider):
    monkeypatch.setattr(scaled, "_ELEMENTS", 100)
    scale_and_sum, _, device = functions(form)
    g = drawn("g", *shape, dtype=dtype, device=device, wider=wider)
    y = drawn("y", *shape, dtype=dtype, device=device, wider=3 * wider)
    c = drawn("c", shape[1], dtype=dtype if wider else torch.float32, device=device)
    product, terms = g.double() * c.double(), g.double() * y.double()
    out = drawn("out", *shape, dtype=dtype, device=device, wider=2 * wider + 1)
    kept = g.clone(), y.clone()
    # Into a frame, into new memory, and over the inputs, g first.
    for place in (out, None, g, y):
        values, sums = scale_and_sum(g, y, c, out=place)
        assert values.is_contiguous() if place is None else values is place
        assert values.dtype == dtype and sums.dtype == scaled.wide_dtype(dtype) and sums.shape == (shape[1],)
        assert_near(values, product, dtype, product.abs())
        assert_near(sums, terms.sum(0), torch.float64, terms.abs().sum(0) * max(1.0, shape[0] ** 0.5 / 2))
        for t, values in zip((g, y), kept, strict=True):
            assert t is place or torch.equal(t, values)
            t.copy_(values)
    assert intact(out)
    assert not wider or (intact(g) and intact(y))


@pytest.mark.parametrize(("form", "dtype"), CASES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("biased", [False, True])
def test_the_residuals_sum_is_float64s(monkeypatch, form, dtype, shape, biased):
    monkeypatch.setattr(scaled, "_ELEMENTS", 100)
    _, scaled_add, device = functions(form)
    residual = drawn("residual", *shape, dtype=dtype, device=device, wider=4)
    z = drawn("z", *shape, dtype=dtype, device=device, wider=2)
    c = drawn("c", shape[1], dtype=torch.float32, device=device)
    bias = drawn("bias", shape[1], dtype=dtype, device=device) if biased else None
    parts = [residual.double(), z.double() * c.double()] + ([bias.double().expand(shape)] if biased else [])
    wanted, terms = sum(parts), sum(t.abs() for t in parts)
    out = drawn("out", *shape, dtype=dtype, device=device, wider=3)
    kept = residual.clone(), z.clone()
    for place in (out, None, residual, z):
        made = scaled_add(residual, z, c, bias, out=place)
        assert made.dtype == dtype and (made.is_contiguous() if place is None else made is place)
        assert_near(made, wanted, dtype, terms)
        for t, values in zip((residual, z), kept, strict=True):
            assert t is place or torch.equal(t, values)
            t.copy_(values)
    assert intact(out)
    assert intact(residual) and intact(z)


@pytest.mark.parametrize(("form", "dtype"), [CASES[len(ROUNDED)]])
def test_tiles_of_any_size_agree(form, dtype):
    scale_and_sum, scaled_add, device = functions(form)
    small_sum, _, _ = functions(form, tile=(1, 32, 1), strip=5)
    _, small_add, _ = functions(form, tile=(2, 16, 1))
    g, y = (drawn(name, 23, 70, dtype=dtype, device=device) for name in "gy")
    c = drawn("c", 70, dtype=dtype, device=device)
    (values, sums), (others, other_sums) = scale_and_sum(g, y, c), small_sum(g, y, c)
    assert torch.equal(values, others)
    torch.testing.assert_close(sums, other_sums, rtol=0, atol=1e-5)
    torch.testing.assert_close(scaled_add(g, y, c, c), small_add(g, y, c, c), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("form", "dtype"), CASES)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_nothing_is_nothing(form, dtype, shape):
    scale_and_sum, scaled_add, device = functions(form)
    empty, c = torch.empty(shape, dtype=dtype, device=device), torch.ones(shape[1], device=device)
    values, sums = scale_and_sum(empty, empty, c)
    assert values.shape == shape and torch.equal(sums, torch.zeros_like(sums)) and sums.shape == shape[1:]
    assert scaled_add(empty, empty, c).shape == shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"g": torch.ones(3)}, r"g is torch.float32 of shape \(3,\): expected floating values, \(rows, N\)"),
        ({"g": torch.ones(3, 4, dtype=torch.int64)}, "g is torch.int64"),
        ({"y": torch.ones(3, 5)}, r"y is .* of shape \(3, 5\)"),
        ({"y": torch.ones(3, 4).half()}, r"y is torch\.float16"),
        ({"y": torch.ones(4, 3).t()}, "y has a stride of 3"),
        ({"c": torch.ones(3)}, r"c is .* of shape \(3,\).* expected floating values, \(4,\)"),
        ({"c": torch.ones(8)[::2]}, "c has a stride of 2"),
        ({"out": torch.ones(3, 4).double()}, r"out is torch\.float64"),
        ({"out": torch.ones(4).expand(3, 4)}, r"out has strides \(0, 1\): expected rows that do not overlap"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    given = {"g": torch.ones(3, 4), "y": torch.ones(3, 4), "c": torch.ones(4)} | change
    with pytest.raises(InputError, match=message):
        scaled.scale_and_sum(**given)


def test_a_bias_that_does_not_fit_is_refused():
    x = torch.ones(3, 4)
    with pytest.raises(InputError, match=r"bias is .* of shape \(3,\)"):
        scaled.scaled_add(x, x, torch.ones(4), torch.ones(3))
    with pytest.raises(InputError, match=r"residual is .*: expected floating values, \(rows, N\)"):
        scaled.scaled_add(x[0], x, torch.ones(4))


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize("dtype", ROUNDED)
def test_dispatch_on_cuda(dtype, monkeypatch):
    """The public functions take the kernels for all but float64, and the same sums every time."""
    from deltaw.kernels import scaled_triton

    launched = []
    for name in ("scale_and_sum", "scaled_add"):
        kernel = getattr(scaled_triton, name)
        monkeypatch.setattr(scaled_triton, name, lambda *a, _k=kernel, **kw: launched.append(1) or _k(*a, **kw))
    g, y = (drawn(name, 4100, 3000, dtype=dtype, device="cuda") for name in "gy")
    c = drawn("c", 3000, dtype=torch.float32, device="cuda")
    (values, sums), (_, again) = scaled.scale_and_sum(g, y, c), scaled.scale_and_sum(g, y, c)
    product, terms = g.double() * c.double(), g.double() * y.double()
    assert_near(values, product, dtype, product.abs())
    assert_near(sums, terms.sum(0), torch.float64, terms.abs().sum(0) * 10)
    assert torch.equal(sums, again)
    assert_near(scaled.scaled_add(y, g, c), product + y.double(), dtype, product.abs() + y.double().abs())
    assert len(launched) == (0 if dtype == torch.float64 else 3)


@pytest.mark.gpu
@ON_GPU
def test_beyond_two_to_the_31_values():
    """Columns of a buffer whose last rows lie past 2^31 values."""
    rows, columns = 150_000, 7_200
    both = torch.empty(rows, 2 * columns, dtype=torch.bfloat16, device="cuda")
    for start in range(0, rows, 10_000):
        both[start : start + 10_000] = torch.randn(10_000, 1, generator=generator(start, "x")).to("cuda")
    g, y = both[:, :columns], both[:, columns:]
    c = drawn("c", columns, dtype=torch.float32, device="cuda")
    last = slice(rows - 100, rows)
    wanted = scaled.scaled_add_torch(y[last], g[last], c, out=torch.empty_like(g[last]))
    scaled.scaled_add(y, g, c, out=y)
    torch.testing.assert_close(y[last], wanted, rtol=8e-3, atol=1e-6)
    wanted = scaled.scale_and_sum_torch(g[last], y[last], c, out=torch.empty_like(g[last]))[0]
    scaled.scale_and_sum(g, y, c, out=g)
    torch.testing.assert_close(g[last], wanted, rtol=8e-3, atol=1e-6)
