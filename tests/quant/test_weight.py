"""4-bit weights: every way to read one against the definition, their bytes, and the fused products on them."""

import math
import weakref

import pytest
import tiny
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.core.errors import InputError
from deltaw.core.generators import generator
from deltaw.core.protocols import BaseWeight
from deltaw.kernels import nf4
from deltaw.kernels.lora_linear import lora_linear
from deltaw.kernels.nf4 import NestedScales
from deltaw.quant.codebooks import NF4_VALUES, dynamic_code
from deltaw.quant.config import NF4
from deltaw.quant.weight import NF4Weight, dequantize_all

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(1, 1), (1, 63), (3, 5), (7, 64), (13, 65), (64, 64), (5, 130), (70, 33), (300, 70)]
#: Of the fused product and its gradients, against float64.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=generator(seed, "weight", *shape)).to(dtype)


def values_of(weight, dtype=None):
    """The definition: (out, in), from the codes' halves, one value at a time, float32 rounded once."""
    halves = torch.tensor([half for byte in weight.codes.tolist() for half in (byte >> 4, byte & 15)])
    count = weight.shape[0] * weight.shape[1]
    absmax = weight.scales
    if isinstance(absmax, NestedScales):
        blocks = torch.arange(len(absmax.q))
        absmax = absmax.code[absmax.q.long()] * absmax.absmax[blocks // 256] + absmax.offset
    flat = torch.tensor(NF4_VALUES)[halves[:count]] * absmax[torch.arange(count) // weight.block_size]
    return flat.view(weight.shape).to(dtype or weight.dtype)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_way_of_reading_gives_the_definitions_values(shape, dtype, double):
    W = drawn(*shape, dtype=dtype)
    weight = NF4Weight.quantize(W, double_quant=double)
    assert isinstance(weight, BaseWeight) and weight.double_quant == double
    assert (weight.shape, weight.dtype, weight.device) == (shape, dtype, W.device)
    expected = values_of(weight)
    assert torch.equal(weight.dequantize(), expected) and weight.dequantize().dtype == dtype
    for other in DTYPES:
        assert torch.equal(weight.dequantize(dtype=other), values_of(weight, other))
        assert torch.equal(weight.to(dtype=other).dequantize(), values_of(weight, other))
    rows = shape[0]
    for start, stop in {(0, rows), (rows // 3, rows // 2), (rows // 2, rows), (1, 2), (rows, rows), (rows - 1, None)}:
        part = weight.dequantize(slice(start, stop))
        assert part.dtype == dtype and torch.equal(part, expected[start:stop]), (start, stop)
    index = torch.tensor([[0, rows - 1, rows // 2], [rows // 3, 0, 0]])
    assert torch.equal(weight.take(index), expected[index])
    assert torch.equal(weight.take(index.int(), dtype=torch.float32), values_of(weight, torch.float32)[index])
    assert weight.take(index[:0]).shape == (0, 3, shape[1])
    again = NF4Weight.from_codes(weight.indices(), weight.scales, dtype=dtype)
    assert weight.indices().shape == shape and torch.equal(again.codes, weight.codes)
    x = drawn(2, 3, shape[1], seed=1, dtype=torch.float64)
    exact = values_of(weight, torch.float64)
    torch.testing.assert_close(weight.matmul(x), x @ exact.t(), rtol=1e-12, atol=1e-12)
    bias, g = drawn(rows, seed=2, dtype=torch.float64), drawn(2, rows, seed=3, dtype=torch.float64)
    torch.testing.assert_close(weight.matmul(x, bias), x @ exact.t() + bias, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weight.t_matmul(g), g @ exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 33, 64])
def test_values_go_where_they_are_told(columns, dtype):
    weight = NF4Weight.quantize(drawn(9, columns), dtype=torch.float16)
    buffer = torch.full((20, columns), 7.0, dtype=dtype)
    given = buffer[4:7]
    assert weight.dequantize(slice(5, 8), out=given) is given
    assert torch.equal(given, values_of(weight, dtype)[5:8])
    assert (buffer[:4] == 7).all() and (buffer[7:] == 7).all()
    assert torch.equal(weight.dequantize(dtype=dtype, out=buffer[11:]), values_of(weight, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 33, 64])
def test_rows_may_lie_apart(monkeypatch, columns, dtype):
    monkeypatch.setattr(nf4, "DEQUANTIZE_CHUNK", 128)
    weight = NF4Weight.quantize(drawn(9, columns), dtype=torch.float16)
    buffer = torch.full((11, columns + 5), 7.0, dtype=dtype)
    given = buffer[2:9, 3:-2]
    assert weight.dequantize(slice(1, 8), out=given) is given
    expected = torch.full_like(buffer, 7.0)
    expected[2:9, 3:-2] = values_of(weight, dtype)[1:8]
    assert torch.equal(buffer, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_weights_lie_under_one_another(dtype):
    weights = [NF4Weight.quantize(drawn(rows, 33, seed=rows), double_quant=rows > 1) for rows in (3, 1, 7)]
    out = torch.full((11, 40), math.nan, dtype=dtype)[:, 7:]
    assert dequantize_all(weights, out) is out
    assert torch.equal(out, torch.cat([values_of(weight, dtype) for weight in weights]))


def test_a_buffer_that_does_not_fit_is_an_error():
    weight = NF4Weight.quantize(drawn(4, 6))
    for out, dtype, message in [
        (torch.empty(4, 5), None, r"shape \(4, 5\): expected \(4, 6\)"),
        (torch.empty(24), None, r"shape \(24,\): expected \(4, 6\)"),
        (torch.empty(6, 4).t(), None, r"strides \(1, 4\).* expected torch.float32, 24 values in contiguous rows"),
        (torch.empty(6).expand(4, 6), None, r"strides \(0, 1\).* in contiguous rows"),
        (torch.empty(4, 6), torch.float16, "expected torch.float16, 24 values"),
        (torch.empty(4, 6, device="meta"), None, "on meta: .* on cpu"),
    ]:
        with pytest.raises(InputError, match=message):
            weight.dequantize(dtype=dtype, out=out)
    for weights, shape in [
        ([weight, weight], (7, 6)),
        ([weight, NF4Weight.quantize(drawn(4, 5))], (8, 6)),
        ([], (0, 6)),
    ]:
        with pytest.raises(InputError, match="expected all rows, equally long"):
            dequantize_all(weights, torch.empty(shape))


@pytest.mark.parametrize("block_size", [64, 128, 4096])
def test_codes_are_the_nearest_and_scales_the_largest(block_size):
    W = drawn(33, 77)
    weight = NF4Weight.quantize(W, double_quant=False, block_size=block_size)
    short = -W.numel() % block_size
    blocks = F.pad(W.flatten(), (0, short)).view(-1, block_size)
    assert torch.equal(weight.absmax(), blocks.abs().amax(1))
    distance = (blocks.double() / blocks.abs().amax(1, keepdim=True).double()).unsqueeze(-1) - torch.tensor(NF4_VALUES)
    nearest = distance.abs().argmin(-1).flatten()[: W.numel()].view(W.shape)
    assert torch.equal(weight.indices().long(), nearest)


def layouts(W):
    yield "transposed", W.t().contiguous().t()
    yield "strided", torch.stack([W, W + 1], dim=-1)[..., 0]
    yield "rows", torch.cat([W, W])[: len(W)]
    yield "wants a gradient", W.clone().requires_grad_(True)


@pytest.mark.parametrize("name", ["transposed", "strided", "rows", "wants a gradient"])
def test_layouts_of_the_source_do_not_matter(name):
    W = drawn(13, 37)
    source = dict(layouts(W))[name]
    tiny.assert_same(NF4Weight.quantize(source).tensors(), NF4Weight.quantize(W).tensors())
    expanded = NF4Weight.quantize(W[:1].expand(9, 37))
    tiny.assert_same(expanded.tensors(), NF4Weight.quantize(W[:1].repeat(9, 1)).tensors())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_value_that_is_no_number_is_an_error_with_the_name(value, dtype):
    W = drawn(9, 70, dtype=dtype)
    W[8, 69] = W[0, 0] = value
    with pytest.raises(InputError, match=r"cannot quantise h.0.weight: 2 of its 630 values are NaN or infinite"):
        NF4Weight.quantize(W, name="h.0.weight")


def test_what_is_no_matrix_is_an_error():
    with pytest.raises(InputError, match=r"bias of shape \(5,\): expected a matrix"):
        NF4Weight.quantize(torch.ones(5), name="bias")
    with pytest.raises(InputError, match="expected a floating dtype"):
        NF4Weight.quantize(torch.ones(5, 5, dtype=torch.int64))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_empty_matrices(shape):
    weight = NF4Weight.quantize(torch.ones(shape))
    assert weight.dequantize().shape == shape and weight.indices().shape == shape
    assert weight.matmul(torch.ones(2, shape[1])).tolist() == torch.zeros(2, shape[0]).tolist()


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("block_size", [64, 256])
def test_resident_bytes_are_the_arithmetic(double, block_size):
    W = drawn(1024, 1027, dtype=torch.bfloat16)
    weight = NF4Weight.quantize(W, double_quant=double, block_size=block_size)
    held = {tensor.untyped_storage().data_ptr(): tensor for tensor in weight.tensors().values()}
    if double:
        # One for all weights of a device.
        assert weight.scales.code is dynamic_code(True, W.device)
        del held[weight.scales.code.untyped_storage().data_ptr()]
    resident = sum(tensor.untyped_storage().nbytes() for tensor in held.values())
    assert weight.nbytes == resident
    bits = NF4(double_quant=double, block_size=block_size).bits
    assert 8 * resident / W.numel() == pytest.approx(bits, rel=1e-3)
    if block_size == 64:
        assert bits == pytest.approx(4.127 if double else 4.5, abs=5e-4)


def test_double_quantisation_is_blocks_of_256_around_the_mean():
    weight, plain = (NF4Weight.quantize(drawn(300, 70), double_quant=double) for double in (True, False))
    assert torch.equal(weight.codes, plain.codes)
    scales = plain.absmax()
    nested = weight.scales
    torch.testing.assert_close(nested.offset, scales.double().mean().float(), rtol=1e-6, atol=0)
    centred = F.pad(scales - nested.offset, (0, -len(scales) % 256)).view(-1, 256)
    assert torch.equal(nested.absmax, centred.abs().amax(1)) and len(nested.absmax) == 2
    # Half the widest gap between the 8-bit values, 0.0137, times the largest of the block.
    error = F.pad(weight.absmax() - scales, (0, -len(scales) % 256)).view(-1, 256).abs().amax(1)
    assert bool((error <= 0.0071 * nested.absmax).all()) and bool(error.any())


@pytest.mark.parametrize("double", [True, False])
def test_moving_keeps_every_bit_and_shares_what_stays(double):
    weight = NF4Weight.quantize(drawn(13, 37), double_quant=double)
    tiny.assert_same(weight.to("cpu").tensors(), weight.tensors())
    assert weight.to("cpu", torch.bfloat16).codes is weight.codes
    meta = weight.to("meta")
    assert meta.device.type == "meta" and meta.nbytes == weight.nbytes
    assert {n: (t.shape, t.dtype, t.device.type) for n, t in meta.tensors().items()} == {
        n: (t.shape, t.dtype, "meta") for n, t in weight.tensors().items()
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double", [True, False])
def test_absorbing_is_quantising_the_sum(dtype, double):
    weight = NF4Weight.quantize(drawn(13, 37, dtype=dtype), double_quant=double, block_size=128)
    A, B = drawn(3, 37, seed=1), drawn(13, 3, seed=2)
    got = weight.absorbed(A, B, 0.5)
    total = torch.addmm(weight.dequantize().float(), B, A, alpha=0.5)
    expected = NF4Weight.quantize(total, double_quant=double, block_size=128, dtype=dtype)
    assert (got.dtype, got.block_size, got.double_quant) == (dtype, 128, double)
    tiny.assert_same(got.tensors(), expected.tensors())
    assert not torch.equal(got.codes, weight.codes)
    assert torch.equal(weight.absorbed(torch.zeros_like(A), B, 1.0).indices(), weight.indices())


# The fused low-rank product on 4-bit weights.


def norm_of(*terms):
    """Of what is summed up from separately rounded terms, if none cancelled another."""
    return sum(float(term.square().sum()) for term in terms) ** 0.5


def sizes(x, A, B, bias, g, W, scale):
    """What bfloat16's roundings are relative to, for y, dx, dA, dB and db: the terms of each sum."""
    h, k = x @ A.t(), scale * g @ B
    over_tokens = [(k.norm(dim=1) * x.norm(dim=1),), (scale * g.norm(dim=1) * h.norm(dim=1),), (g,)]
    return [norm_of(x @ W.t(), scale * h @ B.t(), bias), norm_of(g @ W, k @ A), *(norm_of(*t) for t in over_tokens)]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    batch=st.lists(st.integers(1, 5), min_size=0, max_size=3),
    inner=st.integers(1, 200),
    out=st.integers(1, 200),
    r=st.integers(1, 12),
    double=st.booleans(),
    with_bias=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_fused_product_and_gradients_against_float64(dtype, batch, inner, out, r, double, with_bias, seed):
    weight = NF4Weight.quantize(drawn(out, inner, seed=seed, dtype=dtype), double_quant=double)
    x = drawn(*batch, inner, seed=seed + 1, dtype=dtype)
    A, B = drawn(r, inner, seed=seed + 2, dtype=dtype), drawn(out, r, seed=seed + 3, dtype=dtype)
    bias = drawn(out, seed=seed + 4, dtype=dtype) * with_bias
    g = drawn(*batch, out, seed=seed + 5, dtype=dtype)
    tensors = [t.requires_grad_(True) for t in (x, A, B, bias)]
    y = lora_linear(x, weight, A, B, scale=0.5, bias=bias if with_bias else None)
    got = [y, *torch.autograd.grad(y, tensors[: 3 + with_bias], g)]

    exact, W = [t.detach().double().requires_grad_(True) for t in tensors], weight.dequantize().double()
    wanted = exact[0] @ W.t() + 0.5 * exact[0] @ exact[1].t() @ exact[2].t() + exact[3]
    expected = [wanted, *torch.autograd.grad(wanted, exact, g.double())]
    flat = [t.detach() for t in (exact[0].view(-1, inner), *exact[1:], g.double().view(-1, out), W)]
    for what, mine, theirs, size in zip("yxABb", got, expected, sizes(*flat, 0.5), strict=with_bias):
        assert mine.dtype == dtype and mine.shape == theirs.shape
        # Measured against the terms summed, which may all but cancel.
        size = max(size, float(theirs.detach().norm()))
        error = float((mine.detach().double() - theirs.detach()).norm())
        assert error <= TOLERANCE[dtype] * size, (what, error / size)


@pytest.mark.parametrize("wants", [(0, 1, 2), (1, 2), (0,)])
def test_no_dequantised_weight_lives_between_forward_and_backward(monkeypatch, wants):
    made, own = [], NF4Weight.dequantize

    def counting(weight, *args, **kwargs):
        values = own(weight, *args, **kwargs)
        made.append(weakref.ref(values))
        return values

    monkeypatch.setattr(NF4Weight, "dequantize", counting)
    weight = NF4Weight.quantize(drawn(96, 80))
    x, A, B = drawn(3, 5, 80), drawn(2, 80, seed=1), drawn(96, 2, seed=2)
    for number in wants:
        (x, A, B)[number].requires_grad_(True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.detach()) or t, lambda t: t):
        y = lora_linear(x, weight, A, B, scale=0.5)
    assert len(made) == 1 and made[0]() is None
    kept = sum(t.numel() for t in saved if t.is_floating_point())
    assert kept <= x.numel() + 15 * 2 + A.numel() + B.numel() < 96 * 80
    y.sum().backward()
    assert len(made) == (2 if 0 in wants else 1) and all(values() is None for values in made)
