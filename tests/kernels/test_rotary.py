"""The rotations: torch and Triton against float64 under autograd, and torch against transformers.

Without a GPU the Triton kernels run in the interpreter, in a process of its own: it is chosen by a variable that Triton
reads when it is first imported. It rounds to bfloat16 wrongly, so bfloat16 is left to GPUs.
"""

import importlib.util
import os

import pytest
import torch

from deltaw.core.errors import InputError
from deltaw.core.generators import generator
from deltaw.kernels import rotary

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)
STYLES = ("llama", "gemma")
#: (B, S, H, D), R, and whether the batch shares its angles.
SHAPES = [
    ((1, 1, 1, 2), 2, True),
    ((2, 3, 5, 80), 32, False),
    ((2, 2, 3, 80), 80, True),
    ((1, 2, 20, 128), 128, True),
    ((2, 1, 1, 33), 10, False),
]
LARGE = [
    ((4, 2048, 40, 128), 128, True),
    ((2, 515, 8, 64), 64, False),
    ((1, 300, 7, 256), 256, True),
    ((2, 100, 4, 256), 64, True),
    ((1, 513, 1, 96), 96, True),
]
LARGE = [] if INTERPRETED or not torch.cuda.is_available() else LARGE
LAYOUTS = ["view", "flipped"] if INTERPRETED else ["plain", "view", "flipped"]
EPS = 1e-5

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
        source = rotary
        if name == "triton":
            from deltaw.kernels import rotary_triton as source
        self.rotate, self.norm_rotate = source.rotate, source.norm_rotate
        self.norm_rotate_backward = source.norm_rotate_backward
        self.rotate_back_scaled = source.rotate_back_scaled


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


def heads(name, shape, dtype, device, *, layout="plain"):
    """Random heads; "view": some of a buffer with more heads; "flipped": heads before tokens."""
    batch, length, count, size = shape
    x = torch.randn(shape, generator=generator(0, name)).to(dtype).to(device)
    if layout == "flipped":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "view":
        framed = torch.full((batch, length, count + 3, size), 7.0, dtype=dtype, device=device)
        framed[:, :, 1:-2] = x
        return framed[:, :, 1:-2]
    return x


class Framed:
    """Room for heads with strides that no input has, within 7s."""

    def __init__(self, shape, dtype, device):
        batch, length, count, size = shape
        self.buffer = torch.full((length, count + 2, batch, size + 5), 7.0, dtype=dtype, device=device)
        self.inside = self.buffer[:, 1:-1, :, 3:-2].permute(2, 0, 1, 3)

    def untouched(self):
        """Whether nothing was written beside; what was written inside is gone after."""
        self.inside.fill_(7.0)
        return (self.buffer == 7).all()


def angles(shape, rotated, shared, device, *, dtype=torch.float32):
    """cos and sin without any relation between them or their halves, so that a transpose is no inverse."""
    size = (1 if shared else shape[0], shape[1], rotated)
    return [torch.randn(size, generator=generator(0, name)).to(dtype).to(device) for name in ("cos", "sin")]


def assert_rounded(got, wanted, *, times=1):
    """Off by `times` roundings to the dtype at most, beside float32's error of sums and products."""
    share = times * torch.finfo(got.dtype).eps / 2 if got.dtype in (torch.float16, torch.bfloat16) else 0.0
    tiny = 1e-12 if got.dtype == torch.float64 else 4e-6
    torch.testing.assert_close(got.double(), wanted, rtol=share + tiny, atol=tiny)


def turned(x, cos, sin):
    """Float64: the matrix of each token's rotation times each head."""
    rotated, size = cos.shape[-1], x.shape[-1]
    half = rotated // 2
    matrix = torch.zeros(*cos.shape[:2], size, size, dtype=torch.float64, device=x.device)
    matrix[..., range(size), range(size)] = 1.0
    low, high = range(half), range(half, rotated)
    matrix[..., range(rotated), range(rotated)] = cos.double()
    matrix[..., low, high] = -sin.double()[..., :half]
    matrix[..., high, low] = sin.double()[..., half:]
    return torch.einsum("bsij,bshj->bshi", matrix.expand(len(x), -1, -1, -1), x)


def normed(x, weight, style):
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
    return x * rstd * (weight.double() + (style == "gemma")), rstd.squeeze(-1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "rotated", "shared"), SHAPES + LARGE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation_is_float64s(form, dtype, shape, rotated, shared, layout):
    x = heads("x", shape, dtype, form.device, layout=layout)
    cos, sin = angles(shape, rotated, shared, form.device, dtype=torch.float32 if layout == "view" else dtype)
    leaf = x.double().requires_grad_()
    wanted = turned(leaf, cos, sin)
    g = heads("g", shape, dtype, form.device, layout=layout)
    (back,) = torch.autograd.grad(wanted, leaf, g.double())
    for t, expected, inverse in ((x, wanted.detach(), False), (g, back, True)):
        before, framed = t.clone(), Framed(shape, dtype, form.device)
        assert form.rotate(t, cos, sin, inverse=inverse, out=framed.inside) is framed.inside
        assert torch.equal(t, before)
        assert form.rotate(t, cos, sin, inverse=inverse) is t
        assert torch.equal(framed.inside[..., rotated:], t[..., rotated:])
        for got in (t, framed.inside):
            assert_rounded(got, expected)
        assert framed.untouched()
    if layout == "view":
        assert all((t._base[:, :, :1] == 7).all() and (t._base[:, :, -2:] == 7).all() for t in (x, g))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rotating", [True, False])
@pytest.mark.parametrize(("shape", "rotated", "shared"), SHAPES + LARGE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_and_rotation_are_float64s(form, dtype, shape, rotated, shared, rotating, layout, style):
    x = heads("x", shape, dtype, form.device, layout=layout)
    # With other strides than x.
    g = heads("g", shape, dtype, form.device, layout="view" if layout == "flipped" else "flipped")
    weight = torch.randn(shape[-1], generator=generator(0, "weight")).to(dtype).to(form.device)
    cos, sin = angles(shape, rotated, shared, form.device, dtype=dtype) if rotating else (None, None)
    leaf = x.double().requires_grad_()
    wanted, wanted_rstd = normed(leaf, weight, style)
    if rotating:
        wanted = turned(wanted, cos, sin)
    y, rstd = form.norm_rotate(x, weight, cos, sin, eps=EPS, style=style)
    assert y.dtype == dtype and y.is_contiguous() and rstd.dtype == torch.float32 and rstd.is_contiguous()
    assert_rounded(rstd, wanted_rstd.detach())
    if style == "gemma" or dtype == torch.float32:
        assert_rounded(y, wanted.detach())
    else:
        # The normalised values are rounded before products that may cancel.
        cos_, sin_ = (None, None) if cos is None else (cos.abs(), sin.abs())
        largest = rotated_bound(normed(x.double(), weight, style)[0].abs(), cos_, sin_)
        share = torch.finfo(dtype).eps / 2
        assert ((y.double() - wanted).abs() <= (2 * share + share**2) * largest + 4e-6 * (1 + largest)).all()

    (slope,) = torch.autograd.grad(wanted, leaf, g.double())
    before = g.clone(), x.clone()
    dx = form.norm_rotate_backward(g, x, weight, rstd, cos, sin, style=style)
    assert dx.dtype == dtype and dx.is_contiguous()
    framed = Framed(shape, dtype, form.device)
    assert form.norm_rotate_backward(g, x, weight, rstd, cos, sin, style=style, out=framed.inside) is framed.inside
    # Sums over the head of products of three random values, then times rstd: float32's error is not relative to dx.
    share = torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 0.0
    for got in (dx, framed.inside):
        torch.testing.assert_close(got.double(), slope, rtol=share + 1e-5, atol=1e-5 * float(slope.abs().max()))
    assert framed.untouched()
    assert torch.equal(g, before[0]) and torch.equal(x, before[1])


def rotations(shape, rotated, shared, device, *, scale):
    """cos and sin of true rotations, times a scale, as YaRN has it."""
    angle = torch.randn(1 if shared else shape[0], shape[1], rotated // 2, generator=generator(0, "angle"))
    angle = torch.cat([angle, angle], -1).to(device)
    return scale * angle.cos(), scale * angle.sin()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rotating", [True, False])
@pytest.mark.parametrize(("shape", "rotated", "shared"), SHAPES + LARGE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_scaled_outputs_go_back_in_one_pass(form, dtype, shape, rotated, shared, rotating, layout):
    g, y = (heads(name, shape, dtype, form.device, layout=layout) for name in "gy")
    c = 0.5 + torch.rand(shape[2] * shape[3], generator=generator(0, "c")).to(form.device)
    grad, before = g.double(), y.double()
    cos = sin = None
    if rotating:
        cos, sin = rotations(shape, rotated, shared, form.device, scale=1.3)
        leaf = torch.zeros_like(before, requires_grad=True)
        (grad,) = torch.autograd.grad(turned(leaf, cos, sin), leaf, grad)
        # Scaled rotations' inverse is their transpose over the square of the scale; the rest stays.
        (back,) = torch.autograd.grad(turned(leaf, cos, sin), leaf, before)
        before = torch.cat([back[..., :rotated] / 1.69, before[..., rotated:]], -1)
    kept = g.clone(), y.clone()
    framed = Framed(shape, dtype, form.device)
    sums = form.rotate_back_scaled(g, y, c, cos, sin, out=framed.inside)
    assert sums.dtype == torch.float32 and sums.shape == c.shape
    # cos and sin are float32.
    share = torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 0.0
    wanted = grad * c.double().view(shape[2:])
    torch.testing.assert_close(framed.inside.double(), wanted, rtol=share + 4e-6, atol=4e-6)
    terms = (grad * before).abs().sum((0, 1)).flatten()
    assert ((sums.double() - (grad * before).sum((0, 1)).flatten()).abs() <= 1e-5 * terms + 1e-7).all()
    assert framed.untouched()
    assert torch.equal(g, kept[0]) and torch.equal(y, kept[1])


def test_scaled_outputs_gradients_are_autograds():
    shape = (2, 3, 4, 10)
    g, z = (heads(name, shape, torch.float64, "cpu") for name in "gz")
    c = (0.5 + torch.rand(40, generator=generator(0, "c"), dtype=torch.float64)).requires_grad_()
    cos, sin = (t.double() for t in rotations(shape, 6, False, "cpu", scale=0.8))
    # Angles are float32, so the squares' sum is no square of the scale to the last bit.
    z.requires_grad_()
    y = turned(z * c.view(4, 10), cos, sin)
    dz, dc = torch.autograd.grad(y, (z, c), g)
    out = torch.empty_like(g)
    sums = rotary.rotate_back_scaled(g, y.detach(), c.detach(), cos, sin, out=out)
    torch.testing.assert_close(out, dz)
    torch.testing.assert_close(sums / c.detach(), dc, rtol=1e-6, atol=1e-9)
    with pytest.raises(InputError, match=r"c is torch\.float64 of shape \(39,\)"):
        rotary.rotate_back_scaled(g, y.detach(), c.detach()[1:], cos, sin, out=out)


def rotated_bound(x, cos, sin):
    """|x| |cos| + |x_j| |sin|, what a rotation's rounded operands can be off by a share of."""
    if cos is None:
        return x
    half = cos.shape[-1] // 2
    sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)
    return turned(x, cos, sin)


@pytest.mark.parametrize("form", [TRITON], indirect=True)
@pytest.mark.parametrize("tile", [1, 64])
def test_tiles_of_any_size_agree(form, tile):
    shape = (1, 2, 5, 40)
    x, g = (heads(name, shape, torch.float32, form.device) for name in "xg")
    weight = torch.randn(40, generator=generator(0, "weight")).to(form.device)
    cos, sin = angles(shape, 32, True, form.device)
    small = dict(tile=tile, per_thread=1)
    y, rstd = form.norm_rotate(x, weight, cos, sin, eps=EPS, **small)
    torch.testing.assert_close(y, form.norm_rotate(x, weight, cos, sin, eps=EPS)[0], rtol=1e-6, atol=1e-6)
    dx = form.norm_rotate_backward(g, x, weight, rstd, cos, sin, **small)
    wanted = form.norm_rotate_backward(g, x, weight, rstd, cos, sin)
    torch.testing.assert_close(dx, wanted, rtol=1e-6, atol=1e-5)
    wide = form.rotate(x, cos, sin, out=torch.empty_like(x), **small)
    form.rotate(x, cos, sin, **small)
    torch.testing.assert_close(wide, x, rtol=1e-6, atol=1e-6)
    form.rotate(x, cos, sin, inverse=True)
    again = heads("x", shape, torch.float32, form.device)
    form.rotate(again, cos, sin)
    form.rotate(again, cos, sin, inverse=True, **small)
    torch.testing.assert_close(x, again, rtol=1e-6, atol=1e-6)


def test_no_tokens(form):
    x, angle = torch.empty(1, 0, 2, 8, device=form.device), torch.empty(1, 0, 8, device=form.device)
    form.rotate(x, angle, angle)
    y, rstd = form.norm_rotate(x, torch.ones(8, device=form.device), angle, angle, eps=EPS)
    assert y.shape == x.shape and rstd.shape == (1, 0, 2)
    dx = form.norm_rotate_backward(y, x, torch.ones(8, device=form.device), rstd, angle, angle)
    assert dx.shape == x.shape


@pytest.mark.parametrize("rotated", [80, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_torch_is_transformers(dtype, rotated):
    """Nearer to float64 than transformers, which rounds both products and the sum in 16 bits."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as whole
    from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as partial

    shape = (2, 9, 3, 80)
    q, k = (heads(name, shape, dtype, "cpu", layout="flipped") for name in "qk")
    place = torch.arange(9.0)[:, None] * 10000 ** -torch.arange(0, 1, 2 / rotated)
    place = torch.cat([place, place], -1)[None]
    cos, sin = place.cos().to(dtype), place.sin().to(dtype)
    theirs = (whole if rotated == 80 else partial)(q, k, cos, sin, unsqueeze_dim=2)
    for x, their in zip((q, k), theirs, strict=True):
        exact = turned(x.double(), cos, sin)
        rotary.rotate(x, cos, sin)
        torch.testing.assert_close(x, their, rtol=0, atol=6 * torch.finfo(dtype).eps)
        assert (x.double() - exact).abs().sum() <= (their.double() - exact).abs().sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("style", STYLES)
def test_without_rotation_it_is_transformers_norm_to_the_bit(style, dtype):
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    x = heads("x", (2, 3, 4, 80), dtype, "cpu", layout="flipped")
    module = (Gemma3RMSNorm if style == "gemma" else Qwen3RMSNorm)(80, eps=EPS).to(dtype)
    module.weight.data.copy_(torch.randn(80, generator=generator(0, "weight")))
    with torch.no_grad():
        assert torch.equal(rotary.norm_rotate(x, module.weight, None, None, eps=EPS, style=style)[0], module(x))


@pytest.mark.parametrize("style", STYLES)
def test_float64_stays_float64(style):
    shape = (2, 3, 4, 10)
    x, g = (torch.randn(shape, dtype=torch.float64, generator=generator(1, name)) for name in "xg")
    weight = torch.randn(10, dtype=torch.float64, generator=generator(1, "weight"))
    cos, sin = angles(shape, 6, False, "cpu", dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    wanted = turned(normed(leaf, weight, style)[0], cos, sin)
    y, rstd = rotary.norm_rotate(x, weight, cos, sin, eps=EPS, style=style)
    (slope,) = torch.autograd.grad(wanted, leaf, g)
    dx = rotary.norm_rotate_backward(g, x, weight, rstd, cos, sin, style=style)
    wanted_turn = turned(x, cos, sin)
    rotary.rotate(x, cos, sin)
    for got, expected in ((y, wanted.detach()), (dx, slope), (x, wanted_turn)):
        assert got.dtype == torch.float64
        assert_rounded(got, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_dispatch_on_cuda(dtype, monkeypatch):
    """The public functions take the kernels for all but float64."""
    from deltaw.kernels import rotary_triton

    launched = []
    for name in ("rotate", "norm_rotate", "norm_rotate_backward"):
        kernel = getattr(rotary_triton, name)
        monkeypatch.setattr(rotary_triton, name, lambda *a, _k=kernel, **kw: launched.append(1) or _k(*a, **kw))
    shape = (2, 5, 4, 128)
    x = heads("x", shape, dtype, "cuda")
    cos, sin = angles(shape, 128, True, "cuda", dtype=dtype)
    weight = torch.ones(128, dtype=dtype, device="cuda")
    y, rstd = rotary.norm_rotate(x, weight, cos, sin, eps=EPS)
    rotary.norm_rotate_backward(y, x, weight, rstd, cos, sin)
    wanted = turned(x.double(), cos, sin)
    rotary.rotate(x, cos, sin)
    assert_rounded(x, wanted)
    assert len(launched) == (0 if dtype == torch.float64 else 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_beyond_two_to_the_31_values():
    shape = (3, 2**31 // (2 * 32 * 128) + 5, 32, 128)
    part = heads("x", (1, 1, 32, 128), torch.bfloat16, "cuda")
    x = part.expand(shape).contiguous()
    cos, sin = angles(shape, 128, True, "cuda", dtype=torch.bfloat16)
    weight = torch.ones(128, dtype=torch.bfloat16, device="cuda")
    ends = [(batch, place) for batch in (0, 1, 2) for place in (0, shape[1] - 1)]
    y, rstd = rotary.norm_rotate(x, weight, cos, sin, eps=EPS, style="gemma")
    zeros = torch.zeros_like(weight)
    y2, _ = rotary.norm_rotate(part, weight, None, None, eps=EPS, style="gemma")
    for batch, place in ends:
        at = slice(place, place + 1)
        wanted = turned(normed(part.double(), weight, "gemma")[0], cos[:, at], sin[:, at])
        assert_rounded(y[batch : batch + 1, at], wanted)
    assert_rounded(y2, normed(part.double(), weight, "gemma")[0])
    dx = rotary.norm_rotate_backward(x, x, zeros, rstd, cos, sin, style="gemma")
    rotary.rotate(x, cos, sin)
    for batch, place in ends:
        at = slice(place, place + 1)
        assert_rounded(x[batch : batch + 1, at], turned(part.double(), cos[:, at], sin[:, at]))
        wanted = rotary.norm_rotate_backward_torch(
            part, part, zeros, rstd[:1, :1], cos[:, at], sin[:, at], style="gemma"
        )
        assert_rounded(dx[batch : batch + 1, at], wanted.double(), times=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.ones(2, 3, 8)), r"expected \(batch, tokens, heads, head size\)"),
        (dict(x=torch.ones(2, 3, 8, 4).transpose(2, 3)), "x has a stride of 4"),
        (dict(weight=torch.ones(7)), r"weight is .* of shape \(7,\)"),
        (dict(cos=None), "cos or sin is missing"),
        (dict(cos=torch.ones(3, 3, 8)), r"cos has shape \(3, 3, 8\): expected \(2 or 1, 3, at most 8\)"),
        (dict(cos=torch.ones(1, 3, 10)), "at most 8"),
        (dict(cos=torch.ones(1, 3, 7)), "expected an even number"),
        (dict(sin=torch.ones(2, 3, 8)), r"sin is .* of shape \(2, 3, 8\).* expected floating values, \(1, 3, 8\)"),
        (dict(style="bert"), "norm style 'bert'"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    angle = torch.ones(1, 3, 8)
    given = dict(x=torch.ones(2, 3, 4, 8), weight=torch.ones(8), cos=angle, sin=angle, eps=EPS) | change
    with pytest.raises(InputError, match=message):
        rotary.norm_rotate(**given)


def test_storage_that_does_not_fit_is_refused():
    x, angle = torch.ones(2, 3, 4, 8), torch.ones(1, 3, 8)
    with pytest.raises(InputError, match=r"out is torch\.float16"):
        rotary.rotate(x, angle, angle, out=x.half())
    with pytest.raises(InputError, match="out has a stride of 4"):
        rotary.norm_rotate_backward(
            x, x, torch.ones(8), torch.ones(2, 3, 4), angle, angle, out=torch.ones(2, 3, 8, 4).transpose(2, 3)
        )


def test_a_gradient_that_does_not_fit_is_refused():
    x, weight = torch.ones(2, 3, 4, 8), torch.ones(8)
    with pytest.raises(InputError, match="rstd has strides"):
        rotary.norm_rotate_backward(x, x, weight, torch.ones(3, 2, 4).transpose(0, 1), None, None)
    with pytest.raises(InputError, match=r"g is torch\.float16"):
        rotary.norm_rotate_backward(x.half(), x, weight, torch.ones(2, 3, 4), None, None)
    with pytest.raises(InputError, match=r"g is .* of shape \(1, "):
        rotary.norm_rotate_backward(x[:1], x, weight, torch.ones(2, 3, 4), None, None)
