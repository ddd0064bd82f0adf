"""A 4-bit weight in a parameter's place: every operation gives what the dense matrix gives, and none changes it."""

import copy
import io
import weakref

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from deltaw.core.generators import generator
from deltaw.quant import NF4Tensor, NF4Weight
from deltaw.quant.tensor import frozen


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=generator(seed, "tensor", *shape)).to(dtype)


def made(transposed=False, dtype=torch.float32, **options):
    """A tensor that looks (13, 37), and its values."""
    shape = (37, 13) if transposed else (13, 37)
    weight = NF4Tensor(NF4Weight.quantize(drawn(*shape, dtype=dtype), **options), transposed)
    assert (weight.shape, weight.dtype, weight.device.type) == ((13, 37), dtype, "cpu")
    return weight, weight.packed.dequantize().t() if transposed else weight.packed.dequantize()


def linear(dtype=torch.float32, **options):
    module = nn.Linear(37, 13).to(dtype)
    module.weight = frozen(NF4Weight.quantize(drawn(13, 37, dtype=dtype), **options))
    return module


both = pytest.mark.parametrize("transposed", [False, True])

#: What reads a weight (13, 37), given x (5, 37), z (5, 13) and a bias (13,) or (37,).
READ = {
    "linear": lambda w, x, z, b, c: F.linear(x, w),
    "linear with bias": lambda w, x, z, b, c: F.linear(x, w, b),
    "linear by name": lambda w, x, z, b, c: F.linear(input=x, weight=w, bias=b),
    "linear of a vector": lambda w, x, z, b, c: F.linear(x[0], w, b),
    "linear of a batch": lambda w, x, z, b, c: F.linear(x.view(1, 5, 1, 37), w, b),
    "linear of nothing": lambda w, x, z, b, c: F.linear(x[:0], w, b),
    "linear of a transposed input": lambda w, x, z, b, c: F.linear(x.t().contiguous().t(), w),
    "x @ w.t()": lambda w, x, z, b, c: x @ w.t(),
    "x @ w.T": lambda w, x, z, b, c: x @ w.T,
    "x @ w.mT": lambda w, x, z, b, c: x @ w.mT,
    "vector @ w.T": lambda w, x, z, b, c: x[0] @ w.T,
    "z @ w": lambda w, x, z, b, c: z @ w,
    "w @ x.t()": lambda w, x, z, b, c: w @ x.t(),
    "w.t() @ z.t()": lambda w, x, z, b, c: w.t() @ z.t(),
    "w @ w.t()": lambda w, x, z, b, c: w @ w.t(),
    "matmul": lambda w, x, z, b, c: torch.matmul(z, w),
    "matmul by name": lambda w, x, z, b, c: torch.matmul(input=z, other=w),
    "mm": lambda w, x, z, b, c: torch.mm(x, w.transpose(0, 1)),
    "mm by name": lambda w, x, z, b, c: z.mm(mat2=w),
    "transpose by name": lambda w, x, z, b, c: x @ w.transpose(dim0=-1, dim1=0),
    "transpose of one dimension": lambda w, x, z, b, c: F.linear(x, w.transpose(1, 1)),
    "t of t": lambda w, x, z, b, c: F.linear(x, torch.t(torch.transpose(w, -2, -1))),
    "addmm": lambda w, x, z, b, c: torch.addmm(c, z, w),
    "addmm by name": lambda w, x, z, b, c: torch.addmm(input=b, mat1=x, mat2=w.t()),
    "addmm of a matrix": lambda w, x, z, b, c: torch.addmm(x, z, w),
    "addmm with factors": lambda w, x, z, b, c: torch.addmm(c, z, w, beta=0.5, alpha=2.0),
    "bmm": lambda w, x, z, b, c: torch.bmm(z[None], w[None]),
    "einsum": lambda w, x, z, b, c: torch.einsum("oi,ti->to", w, x),
    "sum": lambda w, x, z, b, c: (x * w[2]).sum() + w.sum() + w.norm() + (w**2).mean(),
    "index": lambda w, x, z, b, c: x * w[3] + w[2:4].sum() + w[..., torch.tensor([1, 5])].sum(),
    "arithmetic": lambda w, x, z, b, c: (w + 1) * 2 - w / 3,
    "cat": lambda w, x, z, b, c: torch.cat([w, x]),
    "view": lambda w, x, z, b, c: w.reshape(37, 13) + w.reshape(-1)[5],
}


@both
@pytest.mark.parametrize("name", READ)
def test_reading_gives_what_the_dense_matrix_gives(name, transposed):
    weight, dense = made(transposed)
    given = [drawn(5, 37), drawn(5, 13), drawn(13), drawn(37)]
    results = []
    for matrix in (weight, dense):
        leaves = [t.clone().requires_grad_(True) for t in given]
        out = READ[name](matrix, *leaves)
        assert type(out) is torch.Tensor
        grads = [None] * 4
        if out.requires_grad:
            out.backward(drawn(*out.shape, seed=1))
            grads = [leaf.grad for leaf in leaves]
        results.append([out.detach(), *grads])
    assert results[0][0].shape == results[1][0].shape
    for got, expected in zip(*results, strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@both
def test_transposing_keeps_four_bits(transposed):
    weight, dense = made(transposed)
    for turned in (weight.t(), weight.T, weight.transpose(0, 1), torch.transpose(weight, 1, 0), torch.t(weight)):
        assert isinstance(turned, NF4Tensor) and turned.packed is weight.packed and turned.shape == (37, 13)
        assert torch.equal(turned.dequantize(), dense.t())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modules_compute_with_it(dtype):
    conv, embedding = Conv1D(13, 37).to(dtype), nn.Embedding(13, 37, padding_idx=2).to(dtype)
    twin_conv, twin_embedding = copy.deepcopy(conv), copy.deepcopy(embedding)
    conv.weight = frozen(NF4Weight.quantize(drawn(13, 37, dtype=dtype)), transposed=True)
    embedding.weight = frozen(NF4Weight.quantize(drawn(13, 37, dtype=dtype)))
    twin_conv.weight.data = conv.weight.dequantize()
    twin_embedding.weight.data = embedding.weight.dequantize()
    x = drawn(2, 5, 37, dtype=dtype)
    torch.testing.assert_close(conv(x), twin_conv(x))
    ids = torch.tensor([[0, 2, 12], [5, 5, 1]])
    assert torch.equal(embedding(ids), twin_embedding(ids)) and embedding(ids).dtype == dtype
    assert torch.equal(F.embedding(input=ids.int(), weight=embedding.weight), twin_embedding(ids))
    assert embedding(ids[:0]).shape == (0, 3, 37)
    for wrong in (-1, 13):
        with pytest.raises(IndexError, match="expected 0 to 12"):
            embedding(torch.tensor([0, wrong]))
    with pytest.raises(NotImplementedError, match="max_norm"):
        F.embedding(ids, embedding.weight, max_norm=1.0)


def test_autocast_chooses_the_dtype_as_for_a_dense_weight():
    module, x = linear(), drawn(5, 37).requires_grad_(True)
    dense = copy.deepcopy(module)
    dense.weight = nn.Parameter(module.weight.dequantize(), requires_grad=False)
    results = []
    for used in (module, dense):
        x.grad = used.bias.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            out = used(x)
            products = [torch.mm(x, used.weight.t()), x @ used.weight.t()]
        assert out.dtype == torch.bfloat16 and {p.dtype for p in products} == {torch.bfloat16}
        out.sum().backward()
        results.append([out.detach(), *(p.detach() for p in products), x.grad, used.bias.grad])
    for got, expected in zip(*results, strict=True):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2)


@both
def test_no_dense_matrix_is_kept_for_the_backward(monkeypatch, transposed):
    weight, _ = made(transposed)
    values, own = [], NF4Weight.dequantize

    def counting(packed, *args, **kwargs):
        found = own(packed, *args, **kwargs)
        values.append(weakref.ref(found))
        return found

    monkeypatch.setattr(NF4Weight, "dequantize", counting)
    for product, x in ((lambda x: F.linear(x, weight), drawn(5, 37)), (lambda x: x @ weight, drawn(5, 13))):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t) or t, lambda t: t):
            out = product(x.requires_grad_(True))
        assert not saved and len(values) == 1 and values[0]() is None
        out.sum().backward()
        assert len(values) == 2 and values[1]() is None
        values.clear()


# Moving, copying, saving.


@both
@pytest.mark.parametrize("double", [True, False])
def test_copies_keep_four_bits_and_every_bit(transposed, double):
    weight, dense = made(transposed, double_quant=double)
    own = weight.packed.tensors()
    for twin in (
        weight.clone(),
        copy.deepcopy(weight),
        weight.detach(),
        weight.data,
        weight.cpu(),
        weight.contiguous(),
    ):
        assert isinstance(twin, NF4Tensor) and twin.transposed == transposed and not twin.requires_grad
        tiny.assert_same(twin.packed.tensors(), own)
        assert torch.equal(twin.dequantize(), dense)
    for twin in (weight.clone(), copy.deepcopy(weight)):
        assert twin.packed.codes.data_ptr() != weight.packed.codes.data_ptr()
    assert weight.detach().packed.codes is weight.packed.codes


def test_looked_at_whole_by_strides_it_keeps_four_bits():
    weight, dense = made()
    whole = torch.as_strided(weight, (13, 37), (37, 1), storage_offset=0)
    assert isinstance(whole, NF4Tensor) and whole.packed is weight.packed
    for looks in (((3, 37), (37, 1), 0), ((11, 13), (1, 37), 0), ((12, 37), (37, 1), 5)):
        found = torch.as_strided(weight, *looks)
        assert type(found) is torch.Tensor and torch.equal(found, torch.as_strided(dense, *looks))


def test_other_dtypes_and_devices():
    weight, _ = made()
    for cast in (weight.to(torch.bfloat16), weight.bfloat16(), weight.to("cpu", torch.bfloat16)):
        assert isinstance(cast, NF4Tensor) and cast.dtype == torch.bfloat16 and cast.packed.codes is weight.packed.codes
        assert torch.equal(cast.dequantize(), weight.packed.dequantize(dtype=torch.bfloat16))
    meta = weight.to("meta")
    assert isinstance(meta, NF4Tensor) and meta.is_meta and meta.packed.nbytes == weight.packed.nbytes
    whole = weight.int()
    assert type(whole) is torch.Tensor and torch.equal(whole, weight.dequantize().int())


@pytest.mark.parametrize("double", [True, False])
def test_a_module_moves_and_shares_as_any(double):
    module = linear(double_quant=double)
    expected = module.weight.packed.dequantize(dtype=torch.bfloat16)
    module.to(torch.bfloat16)
    assert isinstance(module.weight, NF4Tensor) and isinstance(module.weight, nn.Parameter)
    assert not module.weight.requires_grad and torch.equal(module.weight.dequantize(), expected)
    assert module(drawn(2, 37, dtype=torch.bfloat16)).dtype == torch.bfloat16
    module.share_memory()
    assert all(tensor.is_shared() for tensor in module.weight.packed.tensors().values())
    assert copy.deepcopy(module).to("meta").weight.packed.codes.is_meta


def test_states_load_into_their_own_kind_alone():
    module, other = linear(), linear()
    before = other.weight.packed
    other.weight.packed.codes.zero_()
    other.load_state_dict(module.state_dict())
    assert other.weight.packed is before and before.codes.data_ptr() != module.weight.packed.codes.data_ptr()
    tiny.assert_same(other.weight.packed.tensors(), module.weight.packed.tensors())
    assigned = nn.Linear(37, 13, device="meta")
    assigned.load_state_dict(module.state_dict(), assign=True)
    assert isinstance(assigned.weight, NF4Tensor) and assigned.weight.packed.codes is module.weight.packed.codes
    dense = nn.Linear(37, 13)
    dense.load_state_dict(module.state_dict())
    assert torch.equal(dense.weight, module.weight.dequantize())
    for kind in (dense, linear(double_quant=False), linear(block_size=128)):
        codes = {name: tensor.clone() for name, tensor in module.weight.packed.tensors().items()}
        with pytest.raises(RuntimeError, match="a 4-bit weight takes the values of one of its own kind"):
            module.load_state_dict(kind.state_dict())
        tiny.assert_same(module.weight.packed.tensors(), codes)


@both
@pytest.mark.parametrize("double", [True, False])
def test_what_torch_saves_it_loads(transposed, double):
    weight, dense = made(transposed, torch.bfloat16, double_quant=double)
    parameter = frozen(weight.packed, transposed=transposed)
    file = io.BytesIO()
    torch.save({"weight": weight, "parameter": parameter, "tied": parameter}, file)
    file.seek(0)
    read = torch.load(file)
    for found in read.values():
        assert isinstance(found, NF4Tensor) and found.dtype == torch.bfloat16 and found.shape == weight.shape
        tiny.assert_same(found.packed.tensors(), weight.packed.tensors())
        assert torch.equal(found.dequantize(), dense)
    assert read["tied"] is read["parameter"] and isinstance(read["tied"], nn.Parameter)
    assert not read["tied"].requires_grad


# Frozen.


def with_index(w):
    w[0] = 1.0


def with_operator(w):
    w += 1


WRITE = {
    "mul_": lambda w: w.mul_(2),
    "zero_": lambda w: w.zero_(),
    "add_": with_operator,
    "an index": with_index,
    "data": lambda w: w.data.fill_(1),
    "init": lambda w: nn.init.normal_(w),
    "copy_": lambda w: w.copy_(torch.zeros(13, 37)),
    "out": lambda w: torch.add(torch.ones(13, 37), 1, out=w),
    "a list": lambda w: torch._foreach_mul_([torch.ones(2), w], 2.0),
    "an optimizer": lambda w: torch.optim.SGD([w], lr=1.0, foreach=False).step(),
}


@both
@pytest.mark.parametrize("name", WRITE)
def test_writing_is_refused(name, transposed):
    weight, dense = made(transposed)
    if name == "an optimizer":
        weight.grad = torch.ones(13, 37)
    with torch.no_grad(), pytest.raises(NotImplementedError, match="4-bit weight"):
        WRITE[name](weight)
    assert torch.equal(weight.dequantize(), dense)


def test_values_go_out_into_dense_tensors():
    weight, dense = made()
    assert torch.equal(torch.empty(13, 37).copy_(weight), dense)
    rows = torch.zeros(2, 37)
    rows[0] = weight[3]
    assert torch.equal(rows[0], dense[3])
    into = torch.empty(5, 13)
    torch.mm(drawn(5, 37), weight.t(), out=into)
    torch.testing.assert_close(into, drawn(5, 37) @ dense.t())
    assert bool((weight == dense).all()) and torch.equal(weight, dense) and torch.isfinite(weight).all()
    assert torch.equal(torch.stack(list(weight)), dense)


def test_its_looks():
    weight, _ = made()
    assert repr(weight) == f"NF4Tensor((13, 37), torch.float32, {weight.packed.nbytes:,} bytes on cpu)"
    assert weight.numel() == 481 and weight.dim() == 2 and weight.is_floating_point() and len(weight) == 13
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        weight.nothing  # noqa: B018
