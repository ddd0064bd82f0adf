"""The norms: torch and Triton against float64 formulas under autograd, and torch against transformers to the bit.

Without a GPU the Triton kernels run in the interpreter, in a process of its own: it is chosen by a variable that Triton
reads when it is first imported. It rounds to bfloat16 wrongly, so bfloat16 is left to GPUs.
"""

import importlib.util
import os

import pytest
import torch

from deltaw.core.errors import InputError
from deltaw.core.generators import generator
from deltaw.kernels import norm

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)
STYLES = ("llama", "gemma")
SHAPES = [(1, 33), (7, 33), (2, 16400)] if INTERPRETED else [(1, 1), (1, 33), (7, 33), (5, 576), (2, 16400)]
LARGE = [] if INTERPRETED or not torch.cuda.is_available() else [(2047, 4096), (1000, 5120), (64, 16384), (33, 20000)]
EPS = 1e-5
#: The longest row that the kernels hold in registers.
WHOLE = 16384

TRITON = pytest.param(
    "triton",
    marks=[
        pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed"),
        pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="no CUDA device"),
        *([] if INTERPRETED else [pytest.mark.gpu]),
    ],
)


class Form:
    """One implementation of the three functions, and where its tensors are."""

    def __init__(self, name):
        self.device = "cuda" if name == "triton" and not INTERPRETED else "cpu"
        if name == "triton":
            from deltaw.kernels import norm_triton

            self.rms_norm = norm_triton.rms_norm
            self.add_rms_norm = norm_triton.add_rms_norm
            self.rms_norm_backward = norm_triton.rms_norm_backward
        else:
            self.rms_norm, self.add_rms_norm = norm.rms_norm, norm.add_rms_norm
            self.rms_norm_backward = norm.rms_norm_backward


@pytest.fixture(params=["torch", TRITON])
def form(request):
    return Form(request.param)


@pytest.fixture(autouse=True)
def poison():
    """Memory that nobody wrote to is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(not HAS_TRITON or INTERPRETED, reason="no Triton, or the interpreter's process")
def test_kernels_in_the_interpreter(passes_in_the_interpreter):
    passes_in_the_interpreter(__file__, "triton")


def rows(name, shape, dtype, device, *, layout="plain"):
    """Random rows; "view": columns of a wider buffer, every other row, with a stride of each name's own."""
    x = torch.randn(shape, generator=generator(0, name)).to(dtype).to(device)
    return x if layout == "plain" else view_of(x, margin=24 + 8 * ("x", "y", "g", "add").index(name))


def view_of(x, *, margin=16):
    framed = torch.full((2 * x.shape[0], x.shape[1] + margin), 7.0, dtype=x.dtype, device=x.device)
    view = framed[::2, 8 : 8 + x.shape[1]]
    return view.copy_(x)


def assert_frame(view):
    """What lies around a `view_of` was not written to."""
    framed = view._base
    assert (framed[1::2] == 7).all() and (framed[:, :8] == 7).all() and (framed[:, 8 + view.shape[1] :] == 7).all()


def assert_rounded(got, wanted, *, times=1):
    """Off by `times` roundings to the dtype at most, beside float32's error of sums and products."""
    share = times * torch.finfo(got.dtype).eps / 2 if got.dtype in (torch.float16, torch.bfloat16) else 0.0
    tiny = 1e-12 if got.dtype == torch.float64 else 4e-6
    torch.testing.assert_close(got.double(), wanted, rtol=share + tiny, atol=tiny)


def reference(x, weight, style, eps=EPS):
    """Float64, without any rounding."""
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * rstd * (weight.double() + (style == "gemma")), rstd.squeeze(-1)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("layout", ["plain", "view"])
@pytest.mark.parametrize("shape", SHAPES + LARGE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_is_float64s(form, dtype, shape, layout, style):
    x = rows("x", shape, dtype, form.device, layout=layout)
    # The weight may have another dtype than x.
    weight = rows("weight", shape[1:], torch.float32 if layout == "view" else dtype, form.device)
    wanted, wanted_rstd = reference(x.double(), weight, style)
    y, rstd = form.rms_norm(x, weight, eps=EPS, style=style)
    assert y.dtype == dtype and rstd.dtype == torch.float32 and y.is_contiguous()
    assert_rounded(y, wanted, times=2 if style == "llama" else 1)
    assert_rounded(rstd, wanted_rstd)

    out = view_of(torch.full_like(y, float("nan")))
    assert form.rms_norm(x, weight, eps=EPS, style=style, out=out)[0] is out
    assert torch.equal(out, y)
    assert_frame(out)
    form.rms_norm(x, weight, eps=EPS, style=style, out=x)
    assert torch.equal(x, y)
    if layout == "view":
        assert_frame(x)


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("place", [None, "x", "y", "view"])
@pytest.mark.parametrize("shape", SHAPES + LARGE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sum_and_norm_are_float64s(form, dtype, shape, place, factored):
    layout = "view" if place else "plain"
    x, y = (rows(name, shape, dtype, form.device, layout=layout) for name in "xy")
    weight = rows("weight", shape[1:], dtype, form.device)
    factor = rows("factor", shape[1:], torch.float32, form.device) if factored else None
    wanted = x.double() + y.double() * (1.0 if factor is None else factor.double())
    out = {None: None, "x": x, "y": y, "view": view_of(torch.full_like(x, float("nan")))}[place]
    norm_out = view_of(torch.full_like(x, float("nan"))) if place == "view" else None
    s, n, rstd = form.add_rms_norm(x, y, weight, eps=EPS, factor=factor, out=out, norm_out=norm_out)
    if norm_out is not None:
        assert n is norm_out
        assert_frame(norm_out)
    if out is not None:
        assert s is out
        assert_frame(out)
    assert s.dtype == n.dtype == dtype
    assert_rounded(s, wanted)
    # The norm is that of the rounded sum.
    wanted_n, wanted_rstd = reference(s.double(), weight, "llama")
    assert_rounded(n, wanted_n, times=2)
    assert_rounded(rstd, wanted_rstd)
    again = form.rms_norm(s, weight, eps=EPS)[0]
    if form.device == "cuda" and dtype == torch.float32 and shape[1] > WHOLE:
        # Of rows read in parts the compiler fuses sums of squares in one of the two kernels only.
        torch.testing.assert_close(n, again, rtol=1e-6, atol=0.0)
    else:
        assert torch.equal(n, again)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("place", [None, "g", "add", "x", "view"])
@pytest.mark.parametrize("shape", SHAPES + LARGE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_is_autograds(form, dtype, shape, place, style):
    layout = "view" if place else "plain"
    x, g, add = (rows(name, shape, dtype, form.device, layout=layout) for name in ("x", "g", "add"))
    weight = rows("weight", shape[1:], dtype, form.device)
    leaf = x.double().requires_grad_()
    y, rstd = reference(leaf, weight, style)
    (wanted,) = torch.autograd.grad(y, leaf, g.double())
    rstd = rstd.detach().float()
    assert_rounded(form.rms_norm_backward(g, x, weight, rstd, style=style), wanted)
    wanted += add.double()
    out = {None: None, "g": g, "add": add, "x": x, "view": view_of(torch.full_like(x, float("nan")))}[place]
    dx = form.rms_norm_backward(g, x, weight, rstd, style=style, add=add, out=out)
    if out is not None:
        assert dx is out
        assert_frame(out)
    assert dx.dtype == dtype
    assert_rounded(dx, wanted)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("place", [None, "x", "view"])
@pytest.mark.parametrize("shape", SHAPES + LARGE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_by_what_the_norm_gave(form, dtype, shape, place, style):
    layout = "view" if place else "plain"
    x, g, add = (rows(name, shape, dtype, form.device, layout=layout) for name in ("x", "g", "add"))
    weight = rows("weight", shape[1:], dtype, form.device).abs() + 0.1
    _, rstd = form.rms_norm(x, weight, eps=EPS, style=style, out=x)
    v = weight.double() + (style == "gemma")
    u, h = v * g.double(), x.double() / v
    wanted = rstd.double()[:, None] * (u - h * (u * h).mean(-1, keepdim=True)) + add.double()
    out = {None: None, "x": x, "view": view_of(torch.full_like(x, float("nan")))}[place]
    dx = form.rms_norm_backward(g, x, weight, rstd, style=style, normed=True, add=add, out=out)
    if out is not None:
        assert dx is out
        assert_frame(out)
    assert_rounded(dx, wanted)


def test_which_norms_can_be_undone():
    assert norm.invertible(torch.tensor([1.0, -0.3, 1e-30]), "llama")
    assert not norm.invertible(torch.tensor([1.0, 0.0]), "llama")
    assert norm.invertible(torch.tensor([1.0, 0.0]), "gemma") and not norm.invertible(torch.tensor([-1.0]), "gemma")
    half = torch.tensor([1.0, 0.07], dtype=torch.float16)
    assert norm.invertible(half, "llama") and not norm.invertible(half / 2, "llama")


@pytest.mark.parametrize("form", [TRITON], indirect=True)
@pytest.mark.parametrize("tile", [1, 128])
def test_tiles_of_any_size_agree(form, tile):
    x, g = (rows(name, (7, 100), torch.float32, form.device) for name in "xg")
    weight = rows("weight", (100,), torch.float32, form.device)
    y, rstd = form.rms_norm(x, weight, eps=EPS, tile=tile, per_thread=1)
    torch.testing.assert_close(y, form.rms_norm(x, weight, eps=EPS)[0], rtol=1e-6, atol=1e-6)
    dx = form.rms_norm_backward(g, x, weight, rstd, tile=tile, per_thread=1)
    torch.testing.assert_close(dx, form.rms_norm_backward(g, x, weight, rstd), rtol=1e-6, atol=1e-6)


def test_no_rows(form):
    x, weight = torch.empty(0, 33, device=form.device), torch.ones(33, device=form.device)
    s, n, rstd = form.add_rms_norm(x, x, weight, eps=EPS)
    assert s.shape == n.shape == (0, 33) and rstd.shape == (0,)
    assert form.rms_norm_backward(x, x, weight, rstd).shape == (0, 33)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("style", STYLES)
def test_torch_is_transformers_to_the_bit(style, dtype):
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, y = (rows(name, (9, 80), dtype, "cpu") for name in "xy")
    weight = rows("weight", (80,), dtype, "cpu")
    module = (GemmaRMSNorm if style == "gemma" else LlamaRMSNorm)(80, eps=EPS).to(dtype)
    module.weight.data.copy_(weight)
    with torch.no_grad():
        assert torch.equal(norm.rms_norm(x, weight, eps=EPS, style=style)[0], module(x))
        s, n, _ = norm.add_rms_norm(x, y, weight, eps=EPS, style=style)
        assert torch.equal(s, x + y) and torch.equal(n, module(x + y))


@pytest.mark.parametrize("style", STYLES)
def test_float64_stays_float64(style):
    x, y, g, add, weight, factor = (
        torch.randn(shape, dtype=torch.float64, generator=generator(1, name))
        for name, shape in zip("xygawf", [(7, 33)] * 4 + [(33,)] * 2, strict=True)
    )
    leaf = (x + factor * y).requires_grad_()
    wanted, wanted_rstd = reference(leaf, weight, style)
    s, n, rstd = norm.add_rms_norm(x, y, weight, eps=EPS, style=style, factor=factor)
    for got, expected in ((s, leaf), (n, wanted), (rstd, wanted_rstd)):
        assert_rounded(got, expected)
    (slope,) = torch.autograd.grad(wanted, leaf, g)
    dx = norm.rms_norm_backward(g, s, weight, rstd, style=style, add=add)
    assert dx.dtype == torch.float64
    assert_rounded(dx, slope + add)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_dispatch_on_cuda(dtype, monkeypatch):
    """The public functions take the kernels for all but float64."""
    from deltaw.kernels import norm_triton

    launched = []
    for name in ("rms_norm", "add_rms_norm", "rms_norm_backward"):
        kernel = getattr(norm_triton, name)
        monkeypatch.setattr(norm_triton, name, lambda *a, _k=kernel, **kw: launched.append(1) or _k(*a, **kw))
    x, g = (rows(name, (100, 4096), dtype, "cuda") for name in "xg")
    weight = rows("weight", (4096,), dtype, "cuda")
    wanted, _ = reference(x.double(), weight, "llama")
    y, rstd = norm.rms_norm(x, weight, eps=EPS)
    assert_rounded(y, wanted, times=2)
    norm.add_rms_norm(x, g, weight, eps=EPS)
    norm.rms_norm_backward(g, x, weight, rstd)
    assert len(launched) == (0 if dtype == torch.float64 else 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_beyond_two_to_the_31_values():
    count, columns = 2**31 // 16384 + 3, 16384
    x = rows("x", (97, columns), torch.bfloat16, "cuda").repeat(-(-count // 97), 1)[:count]
    weight = rows("weight", (columns,), torch.bfloat16, "cuda")
    y, rstd = norm.rms_norm(x, weight, eps=EPS)
    for part in (slice(0, 97), slice(count - 50, count)):
        assert_rounded(y[part], reference(x[part].double(), weight, "llama")[0], times=2)
    before = x[-50:].clone()
    dx = norm.rms_norm_backward(x, x, weight, rstd, out=y)
    assert_rounded(dx[-50:], norm.rms_norm_backward_torch(before, before, weight, rstd[-50:]).double(), times=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.ones(2, 3, 4)), r"expected \(rows, d\)"),
        (dict(x=torch.ones(2, 4, dtype=torch.int64)), "x is torch.int64"),
        (dict(x=torch.ones(4, 2).t()), "x has a stride of 2"),
        (dict(weight=torch.ones(3)), r"weight is .* of shape \(3,\).* expected floating values, \(4,\)"),
        (dict(y=torch.ones(2, 4).half()), "y is torch.float16"),
        (dict(out=torch.ones(2, 5)), "out is"),
        (dict(factor=torch.ones(2, 4)), "factor is"),
        (dict(style="bert"), "norm style 'bert': expected one of llama, gemma"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    given = dict(x=torch.ones(2, 4), y=torch.ones(2, 4), weight=torch.ones(4), eps=EPS) | change
    with pytest.raises(InputError, match=message):
        norm.add_rms_norm(**given)


def test_a_gradient_that_does_not_fit_is_refused():
    x, weight = torch.ones(2, 4), torch.ones(4)
    with pytest.raises(InputError, match=r"rstd is .* of shape \(3,\)"):
        norm.rms_norm_backward(x, x, weight, torch.ones(3))
    with pytest.raises(InputError, match="add is"):
        norm.rms_norm_backward(x, x, weight, torch.ones(2), add=torch.ones(4))
