"""DoRA's fused linear against the plain expression in float64: outputs, every gradient, norms; fresh random shapes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deltaw.core.generators import derived_seed, generator
from deltaw.kernels.dora_linear import dora_linear, row_norms, scaled_rows, squared_row_norms
from deltaw.kernels.lora_linear import dropout_mask
from deltaw.models.sites import SiteWeight
from deltaw.quant import NF4, NF4Weight, quantize_model

DRAW = generator(0, "dora_linear")


@pytest.fixture(autouse=True)
def own_numbers(request):
    """A test's numbers do not depend on which ran before."""
    DRAW.manual_seed(derived_seed(0, request.node.name))


def numbers(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=DRAW, dtype=torch.float64).to(dtype)


class Dense:
    """A plain matrix as a base weight."""

    def __init__(self, W):
        self.W, self.shape, self.dtype, self.device = W, tuple(W.shape), W.dtype, W.device

    def matmul(self, x, bias=None):
        return F.linear(x, self.W, bias)

    def t_matmul(self, grad):
        return grad @ self.W

    def dequantize(self, rows=None, dtype=None):
        W = self.W if rows is None else self.W[rows]
        return W if dtype is None else W.to(dtype)


def case(out=10, columns=7, r=3, tokens=(2, 5), bias=True, dtype=torch.float64):
    made = {
        "x": numbers(*tokens, columns, dtype=dtype),
        "A": numbers(r, columns),
        "B": numbers(out, r),
        "m": numbers(out).abs() + 0.5,
        "bias": numbers(out, dtype=dtype) if bias else None,
    }
    return numbers(out, columns, dtype=dtype), {k: None if v is None else v.requires_grad_() for k, v in made.items()}


def plain(W, x, A, B, m, bias, scale, mask=None):
    """The definition, with W + scale B A built whole and its norm detached."""
    n = (W + scale * B @ A).detach().norm(dim=1)
    dropped = x if mask is None else x * mask
    y = (m / n) * (x @ W.t() + scale * dropped @ A.t() @ B.t())
    return y if bias is None else y + bias


def run(base, given, scale, **options):
    values = {k: None if v is None else v.detach().clone().requires_grad_() for k, v in given.items()}
    y, norm = dora_linear(
        values["x"], base, values["A"], values["B"], values["m"], squared_row_norms(base), scale=scale,
        bias=values["bias"], **options,
    )  # fmt: skip
    return values, y, norm


def gradients(values, y):
    weight = torch.randn(y.shape, generator=generator(1, "weights"), dtype=torch.float64)
    (y.double() * weight).sum().backward()
    return {k: v.grad for k, v in values.items() if v is not None}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("out", "columns", "r", "tokens"), [(10, 7, 3, (2, 5)), (4, 9, 6, (1,)), (1, 1, 1, (3, 1, 2))])
def test_equals_the_definition_in_float64(out, columns, r, tokens, bias, recompute):
    W, given = case(out, columns, r, tokens, bias)
    values, y, norm = run(Dense(W), given, 0.7, recompute=recompute)
    expected = plain(W, **given, scale=0.7)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(norm, (W + 0.7 * given["B"] @ given["A"]).norm(dim=1).detach(), rtol=1e-12, atol=0)
    got, wanted = gradients(values, y), gradients(given, expected)
    assert got.keys() == wanted.keys()
    for name in got:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("recompute", [False, True])
def test_dropout_is_on_the_low_rank_branch_alone(recompute):
    W, given = case()
    torch.random.default_generator.manual_seed(3)
    state = torch.get_rng_state()
    values, y, _ = run(Dense(W), given, 0.5, dropout=0.4, recompute=recompute)
    torch.set_rng_state(state)
    seed = int(torch.randint(0, 2**62, (), dtype=torch.int64))
    mask = dropout_mask(torch.empty(10, 7, dtype=torch.float64), 0.4, seed).view(2, 5, 7)
    expected = plain(W, **given, scale=0.5, mask=mask)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    got, wanted = gradients(values, y), gradients(given, expected)
    for name in ("x", "A", "B", "m", "bias"):
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-9, atol=1e-11)
    assert mask.eq(0).any()


@pytest.mark.parametrize("recompute", [False, True])
def test_sixteen_bits_are_off_by_their_rounding(recompute):
    W, given = case(48, 64, 4, (3, 20), bias=True, dtype=torch.bfloat16)
    given = {k: v.detach() if k in ("x", "bias") else v.detach().float() for k, v in given.items()}
    values, y, norm = run(Dense(W), given, 0.5, recompute=recompute)
    assert y.dtype == torch.bfloat16 and norm.dtype == torch.float32
    wide = {k: v.double().requires_grad_() for k, v in given.items()}
    expected = plain(W.double(), **wide, scale=0.5)
    assert (y.double() - expected).norm() < 6e-3 * expected.norm()
    got, wanted = gradients(values, y), gradients(wide, expected)
    for name in got:
        assert got[name].dtype == given[name].dtype
        assert (got[name].double() - wanted[name]).norm() < 1.5e-2 * wanted[name].norm(), name


def test_on_four_bits_the_weight_is_what_it_decodes_to():
    W, given = case(48, 64, 4, (3, 20), bias=False, dtype=torch.float32)
    given = {k: None if v is None else v.detach().float() for k, v in given.items()}
    packed = NF4Weight.quantize(W)
    values, y, norm = run(packed, given, 0.5)
    wide = {k: None if v is None else v.double().requires_grad_() for k, v in given.items()}
    dense = packed.dequantize().double()
    expected = plain(dense, **wide, scale=0.5)
    assert (y.double() - expected).norm() < 1e-5 * expected.norm()
    assert (norm - (dense + 0.5 * given["B"].double() @ given["A"].double()).norm(dim=1)).abs().max() < 1e-5
    got, wanted = gradients(values, y), gradients(wide, expected)
    for name in got:
        assert (got[name].double() - wanted[name]).norm() < 1e-5 * wanted[name].norm(), name


@pytest.mark.parametrize("recompute", [False, True])
def test_a_weight_in_few_bits_is_decoded_once_forward_and_once_backward(recompute):
    W, given = case(bias=False)
    model = nn.Linear(7, 10, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(W)
    weight = SiteWeight(quantize_model(nn.Sequential(model), NF4())[0], "linear")
    decoded = []
    original = NF4Weight.dequantize

    def counted(self, *args, **kwargs):
        decoded.append(kwargs.get("dtype"))
        return original(self, *args, **kwargs)

    squared = squared_row_norms(weight)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(NF4Weight, "dequantize", counted)
        x, A, B, m = (given[name] for name in ("x", "A", "B", "m"))
        y, _ = dora_linear(x, weight, A, B, m, squared, scale=0.5, recompute=recompute)
        assert len(decoded) == 1
        got = gradients({"x": x, "A": A, "B": B, "m": m}, y)
        assert len(decoded) == 2
    for value in (x, A, B, m):
        value.grad = None
    wanted = gradients(given, plain(weight.dequantize().double(), **given, scale=0.5))
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-9, atol=1e-11)


def test_a_known_norm_is_used_and_given_back():
    W, given = case()
    known = numbers(10).abs() + 1
    _, y, norm = run(Dense(W), given, 0.5, norm=known)
    torch.testing.assert_close(norm, known, rtol=0, atol=0)
    z = given["x"] @ W.t() + 0.5 * given["x"] @ given["A"].t() @ given["B"].t()
    torch.testing.assert_close(y, given["m"] / known * z + given["bias"], rtol=1e-11, atol=1e-11)


def test_a_magnitude_of_zero_still_learns():
    W, given = case()
    given["m"] = given["m"].detach().index_fill(0, torch.tensor([2, 5]), 0.0).requires_grad_()
    for recompute in (False, True):
        values, y, _ = run(Dense(W), given, 0.5, recompute=recompute)
        given["m"].grad = None
        expected = plain(W, **given, scale=0.5)
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-4)
        got, wanted = gradients(values, y)["m"], gradients(given, expected)["m"]
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


def test_what_is_kept_for_the_backward_pass():
    """Not z, not the product, and with recomputation not the output either."""
    W, given = case(64, 64, 2, (50,), bias=False)
    for recompute, large in ((False, {"x", "y"}), (True, {"x"})):
        kept = []
        keep = kept.append
        with torch.autograd.graph.saved_tensors_hooks(lambda t, keep=keep: keep(t) or t, lambda t: t):
            values, y, _ = run(Dense(W), given, 0.5, recompute=recompute)
        found = {id(t): t for t in kept if t.numel() >= 50 * 64}
        names = {"x" if t.data_ptr() == values["x"].data_ptr() else "y" for t in found.values()}
        assert names == large
        assert all(t.data_ptr() in (values["x"].data_ptr(), y.data_ptr()) for t in found.values())


def test_norms_by_the_factored_identity_never_go_below_zero():
    W = numbers(6, 5, dtype=torch.float32)
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    # The update cancels the weight: what is left is rounding.
    norms = row_norms(W.square().sum(1), W @ V.t(), V, -(U * S), 1.0)
    assert torch.isfinite(norms).all() and norms.max() < 1e-2 and norms.min() > 0


def test_rows_are_scaled_exactly_where_the_factor_is_one_and_finely_near_it():
    z = numbers(20, 6, dtype=torch.bfloat16)
    assert torch.equal(scaled_rows(z, torch.ones(6)), z)
    near = torch.tensor([1.001, 0.999, 1.1, 0.7, 1.4, 1.0])
    far = torch.tensor([1.001, 3.3, 0.1, -1.0, 0.0, 1e-3])
    for c in (near, far):
        exact = z.double() * c.double()
        got = scaled_rows(z, c)
        assert got.dtype == z.dtype
        assert ((got.double() - exact).abs() <= 1.5 * 2**-8 * exact.abs() + 1e-30).all()
        assert torch.equal(scaled_rows(z.clone(), c, in_place=True), got)


def test_autocast_chooses_the_dtypes():
    W, given = case(bias=True)
    given = {k: v.detach().float() for k, v in given.items()}
    lin = torch.nn.Linear(7, 10)
    with torch.no_grad():
        lin.weight.copy_(W)
    weight = SiteWeight(lin, "linear")
    with torch.autocast("cpu", torch.bfloat16):
        values, y, _ = run(weight, given, 0.5)
    assert y.dtype == torch.bfloat16
    expected = plain(W, **{k: v.double() for k, v in given.items()}, scale=0.5)
    assert (y.double() - expected).norm() < 2e-2 * expected.norm()
    assert all(torch.isfinite(g).all() and g.any() for g in gradients(values, y).values())


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("four_bits", [False, True])
def test_on_a_gpu_sixteen_bits_are_off_by_their_rounding(four_bits, recompute):
    W, given = case(192, 256, 8, (3, 50), bias=True, dtype=torch.bfloat16)
    given = {k: v.detach() if k in ("x", "bias") else v.detach().float() for k, v in given.items()}
    device = {k: v.cuda() for k, v in given.items()}
    base = NF4Weight.quantize(W.cuda()) if four_bits else Dense(W.cuda())
    values, y, norm = run(base, device, 0.5, recompute=recompute)
    dense = base.dequantize().cpu().double()
    wide = {k: v.double().requires_grad_() for k, v in given.items()}
    expected = plain(dense, **wide, scale=0.5)
    assert y.dtype == torch.bfloat16 and norm.dtype == torch.float32
    assert (y.cpu().double() - expected).norm() < 6e-3 * expected.norm()
    weight = torch.randn(y.shape, generator=generator(1, "weights"), dtype=torch.float64)
    (y.double() * weight.cuda()).sum().backward()
    wanted = gradients(wide, expected)
    for name, value in values.items():
        assert (value.grad.cpu().double() - wanted[name]).norm() < 1.5e-2 * wanted[name].norm(), name
