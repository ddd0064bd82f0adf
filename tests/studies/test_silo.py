"""An organisation's side of a federation: what it says its base is."""

import dataclasses

import pytest
import tiny
import torch

from deltaw.core.protocols import packed_of
from deltaw.quant import NF4, quantize_model
from deltaw.studies.silo import base_digest


def stored(packed):
    """Every tensor of a packed weight by the path of its fields."""
    for field in dataclasses.fields(packed):
        value = getattr(packed, field.name)
        if isinstance(value, torch.Tensor):
            yield field.name, value
        elif dataclasses.is_dataclass(value):
            yield from ((f"{field.name}.{name}", tensor) for name, tensor in stored(value))


def test_a_dense_base_is_told_by_every_value_and_by_the_labels():
    model = tiny.tiny("llama")
    digest = base_digest(model, ["a", "b"])
    assert digest == base_digest(tiny.tiny("llama"), ["a", "b"]) != base_digest(model, ["b", "a"])
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[-1, -1] += 1e-3
    assert base_digest(model, ["a", "b"]) != digest


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_base_in_four_bits_is_told_by_all_that_it_stores(double_quant):
    def made():
        model = tiny.tiny("llama")
        quantize_model(model, NF4(double_quant=double_quant))
        return model, packed_of(model.model.layers[0].mlp.up_proj.weight)

    model, packed = made()
    digest, names = base_digest(model, None), [name for name, _ in stored(packed)]
    assert digest == base_digest(made()[0], None)
    assert len(names) > (3 if double_quant else 1)
    for name in names:
        other, changed = made()
        tensor = dict(stored(changed))[name].view(-1)
        with torch.no_grad():
            tensor[-1] = tensor[-1] + 1
        assert base_digest(other, None) != digest, name
