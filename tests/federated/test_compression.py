"""Compressed uploads: what is read back, bytes on the wire, error feedback, and payloads that are not to be trusted."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.core.errors import InputError, RunError
from deltaw.core.generators import generator
from deltaw.federated.compression import BLOCK, KINDS, Compressor, wire_bytes
from deltaw.federated.messages import Message, MessageError, pack, unpack
from deltaw.quant.codebooks import NF4_VALUES

SHAPES = {"q:lora_A": (3, 37), "q:lora_B": (41, 3), "head:bias": (5,), "one": ()}


def drawn(shapes, *names, size=1.0):
    return {key: torch.randn(shape, generator=generator(0, *names, key)) * size for key, shape in shapes.items()}


def joint(tensors):
    return torch.cat([tensors[key].flatten() for key in sorted(tensors)])


def shapes_of(tensors):
    return {key: tuple(value.shape) for key, value in tensors.items()}


def sent(compressor, tensors, memory=None):
    """What the other side reads from real bytes, and the memory."""
    made = compressor.compress(tensors, memory)
    message = unpack(pack(Message("upload", made.header, made.tensors)))
    return compressor.decompress(message.tensors, message.header, shapes_of(tensors)), made.memory


def reference(kind, x, share=0.01):
    """The value of each kind, from its definition, one value at a time."""
    if kind == "none":
        return x
    if kind == "bfloat16":
        return x.bfloat16().float()
    if kind == "topk":
        kept = sorted(range(len(x)), key=lambda i: -abs(float(x[i])))[: math.ceil(share * len(x))]
        return torch.tensor([float(v) if i in set(kept) else 0.0 for i, v in enumerate(x)])
    found = []
    for block in x.double().split(BLOCK[kind]):
        a = float(block.abs().max())
        codes = [k / 127 for k in range(-127, 128)] if kind == "int8" else NF4_VALUES
        found += [a * min(codes, key=lambda c, v=float(v), a=a: abs(c * a - v)) for v in block]
    return torch.tensor(found)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(st.integers(1, 700), st.integers(0, 1 << 30), st.sampled_from([1e-6, 1.0, 300.0]))
def test_what_is_read_back(kind, count, seed, size):
    tensors = drawn({"b": (count,), "a": (2, 3)}, seed, size=size)
    compressor = Compressor(kind, share=0.1)
    found, memory = sent(compressor, tensors)
    assert shapes_of(found) == shapes_of(tensors) and {value.dtype for value in found.values()} == {torch.float32}
    expected = reference(kind, joint(tensors), 0.1)
    torch.testing.assert_close(joint(found), expected, atol=1e-6 * size, rtol=0)
    torch.testing.assert_close(joint(memory), joint(tensors) - joint(found), atol=0, rtol=0)
    assert shapes_of(memory) == shapes_of(tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_subnormals_and_one_large_value(kind):
    tensors = {"a": torch.zeros(300), "b": torch.full((64,), 1e-42), "c": torch.zeros(700)}
    tensors["c"][5] = -3e38
    found, _ = sent(Compressor(kind), tensors)
    assert not found["a"].any()
    assert torch.isfinite(joint(found)).all()
    assert float(found["c"][5]) == pytest.approx(-3e38, rel=4e-3)


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "nf4", "topk"])
def test_with_error_feedback_the_mean_over_rounds_tends_to_the_truth(kind):
    truth = drawn(SHAPES, "truth")
    size = float(joint(truth).norm())
    for feedback in (True, False):
        compressor = Compressor(kind, error_feedback=feedback, share=0.1)
        total, memory, errors = torch.zeros(len(joint(truth))), {}, {}
        for round_ in range(1, 401):
            found, memory = sent(compressor, truth, memory)
            total += joint(found)
            errors[round_] = float((total / round_ - joint(truth)).norm()) / size
        if feedback:
            # |e| / T, with a memory that stays bounded.
            assert errors[400] < errors[4] / 20
            assert errors[400] == pytest.approx(float(joint(memory).norm()) / size / 400, rel=0.05, abs=1e-6)
        else:
            assert errors[400] == pytest.approx(errors[1], rel=1e-2)
            assert memory == {}


def test_the_sum_of_what_is_sent_is_the_sum_of_what_was_meant_less_the_memory():
    compressor, memory, meant, arrived = Compressor("nf4"), {}, 0, 0
    for round_ in range(30):
        tensors = drawn(SHAPES, "changing", round_)
        found, memory = sent(compressor, tensors, memory)
        meant, arrived = meant + joint(tensors).double(), arrived + joint(found).double()
    torch.testing.assert_close(arrived + joint(memory).double(), meant, atol=2e-5, rtol=0)


def test_keys_that_rest_keep_their_memory():
    """rolora uploads A and B in turns."""
    compressor = Compressor("nf4")
    tensors = drawn(SHAPES, "turns")
    even = {key: tensors[key] for key in ("q:lora_B", "head:bias")}
    odd = {key: tensors[key] for key in ("q:lora_A", "head:bias")}
    first = compressor.compress(even).memory
    second = compressor.compress(odd, first).memory
    assert second.keys() == {"q:lora_A", "q:lora_B", "head:bias"}
    torch.testing.assert_close(second["q:lora_B"], first["q:lora_B"], atol=0, rtol=0)
    assert not torch.equal(second["head:bias"], first["head:bias"])
    assert first.keys() == even.keys(), "what was handed in is not written to"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.001, 0.3, 1.0])
def test_bytes_are_those_of_the_payload(kind, share):
    tensors = drawn(SHAPES)
    made = Compressor(kind, share=share).compress(tensors)
    payload = sum(value.numel() * value.element_size() for value in made.tensors.values())
    assert wire_bytes(SHAPES, kind, share=share) == payload
    assert payload < len(pack(Message("upload", made.header, made.tensors))) < payload + 1000


def test_a_70b_shaped_upload_on_the_wire():
    """80 layers, hidden 8192, keys and values of 1024: LoRA of r 8 on query and value."""
    shapes = {}
    for layer in range(80):
        for name, out in (("q", 8192), ("v", 1024)):
            path = f"model.layers.{layer}.self_attn.{name}_proj"
            shapes |= {f"{path}:lora_A": (8, 8192), f"{path}:lora_B": (out, 8)}
    n = sum(math.prod(shape) for shape in shapes.values())
    assert n == 16_384_000
    # One tensor drawn once, since what is sent is as large whatever the values are.
    values = torch.randn(8 * 8192, generator=generator(0))
    tensors = {key: values[: math.prod(shape)].view(shape) for key, shape in shapes.items()}
    megabytes = {}
    for kind in ("bfloat16", "nf4"):
        made = Compressor(kind, error_feedback=False).compress(tensors)
        megabytes[kind] = len(pack(Message("upload", made.header, made.tensors))) / 1e6
        assert wire_bytes(shapes, kind) / 1e6 == pytest.approx(megabytes[kind], abs=1e-3)
    masked = pack(Message("masked", tensors={"words": torch.zeros(n + 1, dtype=torch.int32)}))
    assert wire_bytes(shapes, "none", secure=True) / 1e6 == pytest.approx(len(masked) / 1e6, abs=1e-3)
    assert megabytes["bfloat16"] == pytest.approx(32.8, abs=0.05)
    assert megabytes["nf4"] == pytest.approx(8.192 + 1.024, abs=1e-3) and megabytes["nf4"] < 10
    assert len(masked) / 1e6 == pytest.approx(65.5, abs=0.05)


def test_what_cannot_be_compressed():
    for value in (float("nan"), float("inf")):
        with pytest.raises(RunError, match="an update with NaN or infinity"):
            Compressor("nf4").compress({"a": torch.tensor([1.0, value])})
    with pytest.raises(InputError, match="unknown compression 'nf8': did you mean 'nf4'"):
        Compressor("nf8")
    for share in (0.0, 1.5, True, "1"):
        with pytest.raises(InputError, match=r"share is .*: expected a number above 0"):
            Compressor("topk", share=share)
    with pytest.raises(InputError, match="compression int8 under secure aggregation"):
        wire_bytes(SHAPES, "int8", secure=True)


def broken(payload, name, change):
    return {**payload, name: change(payload[name])}


@pytest.mark.parametrize(
    ("kind", "name", "change"),
    [
        ("none", "values", lambda t: t[:-1]),
        ("none", "values", lambda t: t.double()),
        ("bfloat16", "values", lambda t: t.float()),
        ("int8", "codes", lambda t: t.view(torch.uint8)),
        ("int8", "scales", lambda t: t[:0]),
        ("nf4", "codes", lambda t: torch.cat([t, t])),
        ("nf4", "scales", lambda t: t[:, None]),
        ("topk", "places", lambda t: t.flip(0)),
        ("topk", "places", lambda t: t - 1000),
        ("topk", "places", lambda t: t + 100_000),
        ("topk", "places", lambda t: torch.full_like(t, 3)),
        ("topk", "values", lambda t: t[1:]),
    ],
)
def test_payloads_of_other_forms_are_refused(kind, name, change):
    compressor = Compressor(kind, share=0.1)
    made = compressor.compress(drawn(SHAPES))
    with pytest.raises(MessageError, match=kind):
        compressor.decompress(broken(made.tensors, name, change), made.header, SHAPES)
    with pytest.raises(MessageError, match="payload of"):
        compressor.decompress({}, made.header, SHAPES)
    other = Compressor("none" if kind != "none" else "nf4")
    with pytest.raises(MessageError, match=f"an upload with compression '{kind}'"):
        other.decompress(made.tensors, made.header, SHAPES)
    with pytest.raises(MessageError, match="compression None"):
        compressor.decompress(made.tensors, {}, SHAPES)
