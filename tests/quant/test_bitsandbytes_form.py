"""bitsandbytes' quantised weights read here and ours read there, bit for bit.

Its AVX kernel takes every row to begin a block, so the oracle is its own call on the same values as one row, which is
padded to an even length. Odd rows it quantises by code that it would compile for each shape.
"""

import copy
import functools
import json
import math

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.core.errors import InputError
from deltaw.core.generators import generator
from deltaw.quant import NF4Weight, dynamic_code, from_bitsandbytes, to_bitsandbytes
from deltaw.quant.bitsandbytes import STATE_KEY

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@functools.cache
def peer():
    return pytest.importorskip("bitsandbytes.functional", exc_type=ImportError)


@pytest.fixture(autouse=True)
def eager():
    with torch.compiler.set_stance("force_eager"):
        yield


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=generator(seed, "form", *shape)).to(dtype)


def their_values(packed, state, dtype=None):
    """(out, in), as bitsandbytes dequantises them."""
    flat, count = copy.copy(state), math.prod(state.shape)
    flat.shape, flat.dtype = torch.Size((1, count + count % 2)), dtype or state.dtype
    return peer().dequantize_4bit(packed, flat).flatten()[:count].view(state.shape)


def saved_by_them(packed, state):
    """What a folder holds, by what comes after `weight.`."""
    return state.as_dict(packed=True)


def quantized_by_them(shape, dtype, *, double=True, block_size=64, seed=0, quant_type="nf4", layout="plain"):
    W = drawn(*shape, seed=seed, dtype=dtype)
    if layout == "transposed":
        W = W.t().contiguous().t()
    return peer().quantize_4bit(W, blocksize=block_size, compress_statistics=double, quant_type=quant_type)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 150), st.integers(1, 150) | st.sampled_from([64, 128, 192, 256, 1024])),
    dtype=st.sampled_from(DTYPES),
    double=st.booleans(),
    block_size=st.sampled_from([64, 64, 64, 128, 512, 4096]),
    layout=st.sampled_from(["plain", "transposed"]),
    seed=st.integers(0, 10**6),
)
def test_values_are_theirs_to_the_bit(shape, dtype, double, block_size, layout, seed):
    packed, state = quantized_by_them(shape, dtype, double=double, block_size=block_size, layout=layout, seed=seed)
    expected = their_values(packed, state)
    saved = saved_by_them(packed, state)
    for source in (state, saved):
        weight = from_bitsandbytes(packed, source)
        assert (weight.shape, weight.dtype, weight.block_size) == (shape, dtype, block_size)
        assert weight.double_quant == double and weight.codes.data_ptr() == packed.data_ptr()
        got = weight.dequantize()
        assert got.dtype == dtype and torch.equal(got, expected)
        for other in DTYPES:
            assert torch.equal(weight.dequantize(dtype=other), their_values(packed, state, other))
    # What is written is what they wrote, key by key.
    made = {key.removeprefix("."): tensor for key, tensor in to_bitsandbytes(weight).items()}
    assert torch.equal(made.pop(""), packed)
    states = [json.loads(bytes(tensors.pop(STATE_KEY).tolist())) for tensors in (made, dict(saved))]
    assert states[0] == states[1]
    tiny.assert_same(made, {key: tensor for key, tensor in saved.items() if key != STATE_KEY})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", [(5, 64), (33, 30), (70, 128), (64, 512)])
def test_ours_is_read_there(shape, double, dtype):
    weight = NF4Weight.quantize(drawn(*shape, dtype=dtype), double_quant=double)
    written = to_bitsandbytes(weight)
    tensors = {key.removeprefix("."): tensor for key, tensor in written.items() if key}
    state = peer().QuantState.from_dict(dict(tensors), device=torch.device("cpu"))
    assert state.dtype == dtype and tuple(state.shape) == shape and state.nested == double
    assert torch.equal(their_values(written[""], state), weight.dequantize())
    again = from_bitsandbytes(written[""], tensors)
    assert (again.shape, again.dtype, again.block_size) == (shape, dtype, 64)
    tiny.assert_same(again.tensors(), weight.tensors())
    # Files may hold no tensor twice, and none that all weights share.
    pointers = [tensor.data_ptr() for tensor in written.values()]
    assert len(set(pointers)) == len(pointers) and dynamic_code(True).data_ptr() not in pointers


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_codes_may_be_stored_as_another_dtype(storage):
    """`bnb_4bit_quant_storage`, which lets FSDP shard them."""
    packed, state = quantized_by_them((16, 64), torch.bfloat16)
    weight = from_bitsandbytes(packed.view(-1).view(storage).view(-1, 1), state)
    assert torch.equal(weight.dequantize(), their_values(packed, state))


def test_a_live_parameter():
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(64, 48, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    layer.load_state_dict({"weight": drawn(48, 64)})
    layer.to("cpu")
    weight = from_bitsandbytes(layer.weight, layer.weight.quant_state)
    assert torch.equal(weight.dequantize(), their_values(layer.weight.data, layer.weight.quant_state))
    x = drawn(5, 64, seed=1)
    torch.testing.assert_close(weight.matmul(x), layer(x).detach())


def changed(tensors, **changes):
    """The tensors with some of the state's JSON changed."""
    state = json.loads(bytes(tensors[STATE_KEY].tolist())) | changes
    return tensors | {STATE_KEY: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}


DAMAGE = {
    "another type": (lambda t: changed(t, quant_type="fp4"), "quantised as 'fp4': only nf4 is known"),
    "no matrix": (lambda t: changed(t, shape=[2, 8, 64]), r"shape \(2, 8, 64\): expected a matrix"),
    "another shape": (lambda t: changed(t, shape=[16, 65]), "damaged: 512 bytes and 16 scales do not fit"),
    "a scale too few": (lambda t: t | {"absmax": t["absmax"][:-1]}, "damaged: 512 bytes and 15 scales"),
    "another codebook": (lambda t: t | {"quant_map": t["quant_map"] * 1.01}, "not NormalFloat's"),
    "no scales": (lambda t: {k: v for k, v in t.items() if k != "absmax"}, "lacks absmax"),
    "no state": (lambda t: {k: v for k, v in t.items() if k != STATE_KEY}, f"lacks {STATE_KEY}"),
    "no JSON": (lambda t: t | {STATE_KEY: t[STATE_KEY][:-5]}, "damaged quantisation state"),
    "another dtype": (lambda t: changed(t, dtype="float8"), "damaged quantisation state"),
    "nested blocks": (lambda t: changed(t, nested_blocksize=128), "scales in blocks of 128: expected 256"),
    "nested scales": (lambda t: t | {"nested_absmax": torch.ones(2)}, "expected 256"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_line_with_the_name(name):
    damage, said = DAMAGE[name]
    packed, state = quantized_by_them((16, 64), torch.bfloat16)
    with pytest.raises(InputError, match=f"h.0.weight.*{said}") as caught:
        from_bitsandbytes(packed, damage(saved_by_them(packed, state)), name="h.0.weight")
    assert "\n" not in str(caught.value)


def test_fp4_in_memory_is_refused():
    packed, state = quantized_by_them((16, 64), torch.bfloat16, quant_type="fp4")
    for source in (state, saved_by_them(packed, state)):
        with pytest.raises(InputError, match="quantised as 'fp4'"):
            from_bitsandbytes(packed, source)
