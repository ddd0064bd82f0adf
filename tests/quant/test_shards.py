"""Parts of 4-bit weights, put together as FSDP2 does: the weight to the bit, whatever its shape and the processes."""

import pytest
import tiny
import torch
import torch.nn as nn

from deltaw.core.generators import generator
from deltaw.quant import NF4Tensor, NF4Weight
from deltaw.quant.shards import SPLIT, STEP, shardable


def weight_of(rows, columns, *, transposed=False, **options):
    values = torch.randn((rows, columns), generator=generator(0, "shards", rows, columns))
    return NF4Tensor(NF4Weight.quantize(values, **options), transposed)


def parts_of(weight, world):
    """What each process would keep, padded, and by its rows: FSDP2's steps with a parameter."""
    parameter = shardable(weight)
    chunks = list(torch.chunk(parameter, world, dim=0))
    chunks += [chunks[0].new_empty(0)] * (world - len(chunks))
    kept = []
    for chunk in chunks:
        padded = parameter.new_zeros(chunks[0].size())
        if chunk.numel():
            padded.narrow(dim=0, start=0, length=chunk.size(0)).copy_(chunk)
        assert padded.view(-1).shape == (padded.numel(),)
        kept.append(padded.narrow(dim=0, start=0, length=chunk.size(0) if chunk.numel() else 0))
    return kept


def gathered(parts, dtype):
    sent = [part.fsdp_pre_all_gather(None) for part in parts]
    assert {tuple(t.numel() for t in inputs) for inputs, _ in sent} == {tuple(t.numel() for t in sent[0][0])}
    outputs = tuple(torch.cat(tensors) for tensors in zip(*(inputs for inputs, _ in sent), strict=True))
    found, more = parts[-1].fsdp_post_all_gather(outputs, None, dtype)
    assert more == ()
    # The next time the same memory is filled again, and nothing is to be made.
    assert parts[-1].fsdp_post_all_gather(outputs, None, dtype, out=found) is None
    assert all(found.packed.tensors()[n].data_ptr() == t.data_ptr() for n, t in zip(SPLIT, outputs, strict=True))
    return found


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("options", [{}, {"double_quant": False}, {"block_size": 4096}], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (13, 37), (64, 64), (2, 4099), (300, 130)], ids=str)
def test_what_is_gathered_is_the_weight(shape, options, transposed, world):
    weight = weight_of(*shape, transposed=transposed, **options)
    before = {name: tensor.clone() for name, tensor in weight.packed.tensors().items()}
    parts = parts_of(weight, world)
    assert [part.shape[1] for part in parts] == [weight.shape[1]] * world
    assert sum(len(part) for part in parts) == len(weight)
    for name in SPLIT:
        # They are copies: what the whole weight took is free.
        weight.packed.tensors()[name].zero_()
    found = gathered(parts, weight.dtype)
    assert (found.shape, found.dtype, found.transposed) == (weight.shape, weight.dtype, transposed)
    tiny.assert_same(found.packed.tensors(), before)
    expected = weight.packed.with_tensors(before).dequantize()
    assert torch.equal(found.dequantize(), expected.t() if transposed else expected)


def test_a_part_is_padded_again_as_it_was():
    """FSDP2 does so before the first pass."""
    weight = weight_of(13, 37)
    again = []
    for part in parts_of(weight, 4):
        padded = part.new_zeros((4, 37))
        padded.narrow(dim=0, start=0, length=len(part)).copy_(part)
        again.append(padded.narrow(dim=0, start=0, length=len(part)))
    tiny.assert_same(gathered(again, weight.dtype).packed.tensors(), weight.packed.tensors())


def test_a_part_takes_its_share_of_the_bytes():
    weight = weight_of(256, 192)
    runs = [part.runs for part in parts_of(weight, 4)]
    assert [{name: run.numel() for name, run in own.items()} for own in runs] == [{"codes": 6144, "absmax": 192}] * 4
    odd = parts_of(weight_of(13, 37), 4)
    # 241 bytes of codes and 8 scales, each in runs of a multiple of 16.
    assert [part.runs["codes"].numel() for part in odd] == [64] * 4 and STEP == 16
    assert repr(odd[3]) == "NF4Shard((1, 37), torch.float32, 80 bytes on cpu)"


def test_it_comes_in_the_dtype_that_is_asked_for():
    weight = weight_of(13, 37)
    found = gathered(parts_of(weight, 2), torch.bfloat16)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.dequantize(), weight.packed.dequantize(dtype=torch.bfloat16))


def test_nothing_else_is_done_with_a_part():
    part = parts_of(weight_of(13, 37), 2)[0]
    linear = nn.Linear(37, 7)
    linear.weight = nn.Parameter(part, requires_grad=False)
    for use in (
        lambda: linear(torch.ones(2, 37)),
        lambda: part + 1,
        lambda: part.zero_(),
        lambda: part[1:],
        lambda: torch.chunk(part, 2, dim=1),
        lambda: part.copy_(torch.ones(7, 37)),
        lambda: torch.ones(7, 37).copy_(part),
    ):
        with pytest.raises(NotImplementedError, match="4-bit weight"):
            use()
