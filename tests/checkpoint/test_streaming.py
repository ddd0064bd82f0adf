"""Reading safetensors tensor by tensor: what safetensors reads, and one line for whatever is damaged."""

import json
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from deltaw.checkpoint import streaming
from deltaw.checkpoint.streaming import read_folder, read_header
from deltaw.core.errors import InputError
from deltaw.core.generators import generator

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


def some_tensors():
    drawn = torch.randn(37, 5, generator=generator(0, "stored")) * 40
    tensors = {str(dtype): drawn.abs().to(dtype) for dtype in DTYPES}
    return tensors | {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "long": torch.arange(7001.0)}


def raw(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8)


def test_tensors_are_what_safetensors_reads(tmp_path):
    save_file(some_tensors(), tmp_path / "model.safetensors")
    expected, found = load_file(tmp_path / "model.safetensors"), read_folder(tmp_path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        got = found[name][...].to(device="cpu")
        assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape), name
        assert found[name].get_shape() == list(tensor.shape) and got.is_contiguous()
        if tensor.dim():
            assert torch.equal(raw(got), raw(tensor)), name
        else:
            assert got == tensor


@pytest.mark.parametrize("piece_bytes", [16, 96, 1 << 20])
@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float32, torch.float64])
def test_casting_on_the_way_is_casting_afterwards(tmp_path, monkeypatch, wanted, piece_bytes):
    monkeypatch.setattr(streaming, "_PIECE_BYTES", piece_bytes)
    tensors = {k: v for k, v in some_tensors().items() if v.is_floating_point()}
    save_file(tensors, tmp_path / "model.safetensors")
    for name, stored in read_folder(tmp_path).items():
        assert torch.equal(stored.to(dtype=wanted), tensors[name].to(wanted)), name


def test_shards_by_their_index(tmp_path):
    shards = {"model-1.safetensors": {"a": torch.ones(3)}, "model-2.safetensors": {"b": torch.zeros(2)}}
    for file, tensors in shards.items():
        save_file(tensors, tmp_path / file)
    places = {name: file for file, tensors in shards.items() for name in tensors}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    found = read_folder(tmp_path)
    assert torch.equal(found["a"].to(), torch.ones(3)) and torch.equal(found["b"].to(), torch.zeros(2))
    for broken, said in (
        ("{", "damaged: expected a weight_map"),
        ("[]", "damaged: expected a weight_map"),
        ('{"weight_map": {"a": "../model-1.safetensors"}}', r"names '\.\./model-1.safetensors'"),
        ('{"weight_map": {"a": "model-3.safetensors"}}', r"model-3.safetensors cannot be read"),
    ):
        index.write_text(broken)
        with pytest.raises(InputError, match=said) as caught:
            read_folder(tmp_path)
        assert "\n" not in str(caught.value)
    index.unlink()
    with pytest.raises(InputError, match=r"neither model.safetensors nor model.safetensors.index.json"):
        read_folder(tmp_path)


def written(file, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return file


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"shape": [3]}, "x needs 12 bytes and lies at 0 to 8 of 8"),
        ({"data_offsets": [8, 16]}, "x needs 8 bytes and lies at 8 to 16 of 8"),
        ({"data_offsets": [8, 0]}, "x needs 8 bytes and lies at 8 to 0 of 8"),
        ({"data_offsets": [-8, 0]}, "offsets -8 to 0"),
        ({"data_offsets": [0]}, "no dtype, shape or offsets for x"),
        ({"data_offsets": None}, "no dtype, shape or offsets for x"),
        ({"shape": [-2]}, r"shape \[-2\]"),
        ({"shape": 2}, "shape 2"),
        ({"shape": [True, 2]}, r"shape \[True, 2\]"),
        ({"dtype": "F4"}, "x is 'F4': expected one of F64, F32"),
    ],
)
def test_a_damaged_entry(tmp_path, entry, said):
    with pytest.raises(InputError, match=said) as caught:
        read_header(written(tmp_path / "x.safetensors", {"x": GOOD | entry}, bytes(8)))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("header", "length"),
    [(b"{}", 3), (b"{}", 1 << 40), (b"[]", None), (b"\xff{}", None), (b"{", None), (b"[" * 100_000, None)],
)
def test_a_damaged_header(tmp_path, header, length):
    with pytest.raises(InputError, match="damaged or no safetensors file"):
        read_header(written(tmp_path / "x.safetensors", header, length=length))


@given(at=st.integers(0, 200), value=st.integers(0, 255), keep=st.integers(0, 300))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_is_one_line_or_harmless(tmp_path, at, value, keep):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(4, 4), "b": torch.ones(3, dtype=torch.int64)}, file)
    content = bytearray(file.read_bytes())
    content[at % len(content)] = value
    file.write_bytes(content[: len(content) - 100 + keep])
    try:
        for stored in read_header(file).values():
            stored.to(dtype=torch.float32)
    except InputError as error:
        assert "\n" not in str(error)


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    save_file({"a": torch.ones(400)}, tmp_path / "model.safetensors")
    stored = read_folder(tmp_path)["a"]
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.truncate(200)
    with pytest.raises(InputError, match="became shorter while it was read"):
        stored.to()
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot be read"):
        stored.to()
