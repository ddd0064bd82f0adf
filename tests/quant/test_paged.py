import contextlib
import copy
import sys
import types

import pytest
import torch

from deltaw.core.errors import InputError
from deltaw.core.generators import generator
from deltaw.quant.codebooks import dynamic_code
from deltaw.quant.paged import PagedAdamW, paged_optimizer

OPTIONS = dict(lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
#: Short of a block, whole blocks, several buckets of 512, a scalar, nothing; the third is large enough for 8 bits.
SHAPES = [(3, 5), (256,), (70, 67), (), (0, 4), (2, 256)]


def parameters(draw, shapes=SHAPES, dtype=torch.float32, device="cpu"):
    return [torch.nn.Parameter(torch.randn(s, generator=draw).to(device, dtype)) for s in shapes]


def draw_gradients(params, draw):
    """Fresh gradients of very different magnitudes."""
    for p in params:
        scale = 10.0 ** torch.randint(-4, 2, (1,), generator=draw).item()
        p.grad = (torch.randn(p.shape, generator=draw) * scale).to(p.device, p.dtype)


def twins(params):
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def same_gradients(params, others):
    for p, other in zip(params, others, strict=True):
        other.grad = None if p.grad is None else p.grad.to(other.dtype).clone()


def close(params, others, **tolerance):
    for p, other in zip(params, others, strict=True):
        torch.testing.assert_close(p.detach(), other.detach(), **tolerance)


class Immediate:
    """A stream and an event that are always done, for trying the device's path on the CPU."""

    def wait_stream(self, other):
        pass

    wait_event = wait_stream

    def record_event(self):
        return Immediate()

    def synchronize(self):
        pass


def through_buffers(optimizer, monkeypatch):
    """Makes a CPU optimizer pack buckets and take them through buffers, as it does on CUDA."""
    monkeypatch.setattr(torch.cuda, "Stream", Immediate)
    monkeypatch.setattr(torch.cuda, "current_stream", Immediate)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    seen = []

    def buckets(entries, *, pack):
        made, copies = PagedAdamW._buckets(optimizer, entries, pack=True)
        seen[:] = made
        optimizer._step_through(torch.device("cpu"), made)
        return [], copies

    monkeypatch.setattr(optimizer, "_buckets", buckets)
    return seen


@pytest.mark.parametrize("bucket_elements", [256, 512, 4 * 2**20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_as_torch(dtype, bucket_elements):
    draw = generator(0, "as torch")
    params = parameters(draw, dtype=dtype)
    others = twins(params)

    def grouped(given):
        return [{"params": given[:2], "lr": 3e-3, "betas": (0.8, 0.9)}, {"params": given[2:], "weight_decay": 0.0}]

    ours = PagedAdamW(grouped(params), **OPTIONS, bucket_elements=bucket_elements)
    theirs = torch.optim.AdamW(grouped(others), **OPTIONS)
    for step in range(20):
        draw_gradients(params, draw)
        if step % 3 == 1:
            params[step % 5].grad = None
        same_gradients(params, others)
        ours.step()
        theirs.step()
    tolerance = dict(rtol=1e-6, atol=1e-7) if dtype == torch.float32 else dict(rtol=1e-14, atol=1e-15)
    close(params, others, **tolerance)
    for p, other in zip(params, others, strict=True):
        assert ours.state[p]["step"] == theirs.state[other]["step"].item()
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(ours.state[p][key], theirs.state[other][key], **tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_parameters_are_rounded_once(dtype):
    draw = generator(0, "half")
    params = parameters(draw, dtype=dtype)
    wide = [torch.nn.Parameter(p.detach().float()) for p in params]
    ours, theirs = PagedAdamW(params, **OPTIONS), torch.optim.AdamW(wide, **OPTIONS)
    for _ in range(10):
        draw_gradients(params, draw)
        same_gradients(params, wide)
        with torch.no_grad():
            for p, other in zip(params, wide, strict=True):
                other.copy_(p)
        ours.step()
        theirs.step()
        close(params, [other.to(dtype) for other in wide], rtol=0, atol=0)
    assert ours.state[params[0]]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("bits", [32, 8])
def test_parameters_and_gradients_that_are_not_contiguous(bits):
    draw = generator(0, "strides")
    straight = parameters(draw, [(70, 80), (64, 65)])
    params = [torch.nn.Parameter(p.detach().t().contiguous().t()) for p in straight]
    assert not params[0].is_contiguous()
    ours, theirs = PagedAdamW(params, **OPTIONS, bits=bits), PagedAdamW(straight, **OPTIONS, bits=bits)
    for _ in range(3):
        draw_gradients(straight, draw)
        for p, other in zip(params, straight, strict=True):
            p.grad = other.grad.t().contiguous().t()
        ours.step()
        theirs.step()
    close(params, straight, rtol=0, atol=0)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("bucket_elements", [256, 5120, 4 * 2**20])
def test_buckets_through_buffers(bits, bucket_elements, monkeypatch):
    draw = generator(0, "buffers")
    shapes = [(70, 67), (3, 5), (65, 64), (2, 256), (64, 64), (4097,)]
    params = parameters(draw, shapes) + parameters(draw, [(70, 71), (9,)], torch.bfloat16)
    others = twins(params)
    packed = PagedAdamW(params, **OPTIONS, bits=bits, bucket_elements=bucket_elements)
    plain = PagedAdamW(others, **OPTIONS, bits=bits)
    seen = through_buffers(packed, monkeypatch)
    for step in range(5):
        draw_gradients(params, draw)
        if step == 2:
            params[2].grad = None
        same_gradients(params, others)
        packed.step()
        plain.step()
    assert max(bucket.length for bucket in seen) <= bucket_elements
    if bucket_elements == 256:
        assert len(seen) > 30
    elif bucket_elements > 5120:  # the third is a step younger, and leaves a gap in the memory of the others
        pieces, stretches = ([7, 1], [2, 1]) if bits == 32 else ([4, 3, 1], [2, 1, 1])
        assert [len(bucket.pieces) for bucket in seen] == pieces
        assert [[len(slot) for slot in bucket.host()] for bucket in seen] == [
            [count] * (4 if bucket.quantised else 2) for count, bucket in zip(stretches, seen, strict=True)
        ]
    close(params, others, rtol=1e-6, atol=1e-7)
    for p, other in zip(params, others, strict=True):
        for key, value in plain.state[other].items():
            torch.testing.assert_close(packed.state[p][key], value, rtol=1e-6, atol=1e-10)


def stored(state, key):
    """The moment that 8-bit states stand for: flat, float64."""
    code = dynamic_code(key == "exp_avg").double()
    return code[state[key].long()] * state[f"{key}_absmax"].double().repeat_interleave(256)


def test_8_bits_as_bitsandbytes():
    """From the same state, parameters and scales are bitsandbytes' at each step, and codes the nearest ones.

    Its CPU code finds codes by a table of 65536 bins, so that some are next to the nearest, and for second moments
    below 1e-4 of the largest some further off.
    """
    bnb = pytest.importorskip("bitsandbytes")
    draw = generator(0, "bitsandbytes")
    params = parameters(draw, [(70, 67), (64, 64), (5000,)])
    others = twins(params)
    ours = PagedAdamW(params, **OPTIONS, bits=8)
    theirs = bnb.optim.AdamW8bit(others, **OPTIONS)
    for _ in range(8):
        draw_gradients(params, draw)
        same_gradients(params, others)
        before = {p: (stored(state, "exp_avg"), stored(state, "exp_avg_sq")) for p, state in ours.state.items()}
        ours.step()
        theirs.step()
        close(params, others, rtol=1e-6, atol=1e-7)
        for p, other in zip(params, others, strict=True):
            mine, its, n = ours.state[p], theirs.state[other], p.numel()
            m, v = before.get(p, [torch.zeros(-(-n // 256) * 256, dtype=torch.float64)] * 2)
            g = torch.nn.functional.pad(p.grad.flatten().double(), (0, len(m) - n))
            for number, key, value in ((1, "exp_avg", 0.9 * m + 0.1 * g), (2, "exp_avg_sq", 0.99 * v + 0.01 * g * g)):
                absmax, code = its[f"absmax{number}"], dynamic_code(number == 1).double()
                torch.testing.assert_close(mine[f"{key}_absmax"], absmax, rtol=1e-6, atol=0)
                scaled = value / mine[f"{key}_absmax"].double().repeat_interleave(256)
                nearest = (scaled[:, None] - code).abs().argmin(1)
                if number == 2:
                    nearest = torch.where((value > 0) & (nearest == 0), 1, nearest)
                got = mine[key].long()
                assert (got - nearest).abs().max() <= 1
                assert (got != nearest).float().mean() < 1e-3  # the last bit of float32, at a boundary
                wanted = its[f"state{number}"].flatten().long()
                assert (got[:n] != wanted).float().mean() < (0.005 if number == 1 else 0.1)
                its[f"state{number}"].copy_(mine[key][:n].view(p.shape))
                absmax.copy_(mine[f"{key}_absmax"])
        with torch.no_grad():
            for p, other in zip(params, others, strict=True):
                other.copy_(p)


def test_8_bits_store_no_zero_for_a_second_moment():
    p = torch.nn.Parameter(torch.zeros(4096))
    optimizer = PagedAdamW([p], lr=1.0, weight_decay=0.0, bits=8)
    p.grad = torch.full((4096,), 1e-6)
    p.grad[::256] = 1e-1
    optimizer.step()
    p.grad = torch.zeros(4096)
    optimizer.step()
    assert p.abs().max() < 3  # eps alone below the first moment that remains would give thousands


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_step_of_8_bits_is_that_of_32(dtype):
    draw = generator(0, "first")
    params = parameters(draw, dtype=dtype)
    others = twins(params)
    draw_gradients(params, draw)
    same_gradients(params, others)
    PagedAdamW(params, **OPTIONS, bits=8).step()
    PagedAdamW(others, **OPTIONS).step()
    close(params, others, rtol=0, atol=0)


def test_8_bits_train_a_regression_as_32_do():
    draw = generator(0, "regression")
    x, truth = torch.randn(256, 64, generator=draw), torch.randn(64, 80, generator=draw)
    y = x @ truth + 0.1 * torch.randn(256, 80, generator=draw)
    losses, weights = {}, {}
    for bits in (32, 8):
        weight = torch.nn.Parameter(torch.zeros(64, 80))
        optimizer = PagedAdamW([weight], lr=3e-2, weight_decay=0.0, bits=bits)
        assert len(optimizer.state) == 0
        for _ in range(300):
            optimizer.zero_grad()
            loss = (x @ weight - y).square().mean()
            loss.backward()
            optimizer.step()
        assert optimizer.state[weight]["exp_avg"].dtype == (torch.uint8 if bits == 8 else torch.float32)
        losses[bits], weights[bits] = loss.item(), weight.detach()
    assert losses[32] < 0.02
    assert losses[8] < 1.1 * losses[32]
    torch.testing.assert_close(weights[8], weights[32], rtol=0, atol=0.05)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_state_continues_bit_for_bit(bits, dtype, tmp_path):
    draw = generator(0, "resume")
    params = parameters(draw, dtype=dtype)
    optimizer = PagedAdamW([{"params": params[:3]}, {"params": params[3:], "lr": 1e-3}], **OPTIONS, bits=bits)
    for _ in range(3):
        draw_gradients(params, draw)
        params[1].grad = None
        optimizer.step()
    others = twins(params)
    resumed = PagedAdamW([{"params": others[:3]}, {"params": others[3:]}], lr=9.0, bits=bits)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    saved = torch.load(tmp_path / "optimizer.pt", map_location="cpu", weights_only=True)
    resumed.load_state_dict(saved)
    assert resumed.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    kept = copy.deepcopy(saved)
    for _ in range(3):
        draw_gradients(params, draw)
        same_gradients(params, others)
        optimizer.step()
        resumed.step()
    close(params, others, rtol=0, atol=0)
    for p, other in zip(params, others, strict=True):
        for key, value in optimizer.state[p].items():
            torch.testing.assert_close(resumed.state[other][key], value, rtol=0, atol=0)
    torch.testing.assert_close(saved["state"], kept["state"], rtol=0, atol=0)  # loading copied


def test_what_cannot_be_loaded_is_refused_and_changes_nothing():
    draw = generator(0, "refused")
    params = parameters(draw, [(64, 65), (8,)])
    optimizer = PagedAdamW(params, **OPTIONS)
    draw_gradients(params, draw)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())

    other = PagedAdamW(twins(params), **OPTIONS, bits=8)
    with pytest.raises(InputError, match="bits"):
        optimizer.load_state_dict(other.state_dict())
    torchs = torch.optim.AdamW(twins(params), **OPTIONS)
    with pytest.raises(InputError, match="paged"):
        optimizer.load_state_dict(torchs.state_dict())
    smaller = parameters(draw, [(64, 64), (8,)])
    draw_gradients(smaller, draw)
    other = PagedAdamW(smaller, **OPTIONS)
    other.step()
    with pytest.raises(InputError, match=r"parameter 0 is \(64, 64\)"):
        optimizer.load_state_dict(other.state_dict())
    strange = copy.deepcopy(before)
    strange["state"][1]["momentum"] = strange["state"][1].pop("exp_avg")
    with pytest.raises(InputError, match=r"parameter 1 has .*momentum"):
        optimizer.load_state_dict(strange)
    torch.testing.assert_close(optimizer.state_dict(), before, rtol=0, atol=0)


def test_a_group_added_later_and_a_schedule():
    draw = generator(0, "added")
    params = parameters(draw)
    others = twins(params)
    ours, theirs = PagedAdamW(params[:2], **OPTIONS), torch.optim.AdamW(others[:2], **OPTIONS)
    schedules = [torch.optim.lr_scheduler.StepLR(o, 2, 0.5) for o in (ours, theirs)]
    for step in range(6):
        if step == 3:
            ours.add_param_group({"params": params[2:], "lr": 1e-3})
            theirs.add_param_group({"params": others[2:], "lr": 1e-3})
            schedules = [torch.optim.lr_scheduler.StepLR(o, 2, 0.5) for o in (ours, theirs)]
        draw_gradients(params, draw)
        same_gradients(params, others)
        for optimizer, schedule in zip((ours, theirs), schedules, strict=True):
            optimizer.step()
            schedule.step()
    close(params, others, rtol=1e-6, atol=1e-7)


def test_a_closure_is_run_with_gradients():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = PagedAdamW([weight], lr=0.1, weight_decay=0.0)

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    torch.testing.assert_close(weight.detach(), torch.full((3,), 0.9))


def test_hostile_parameters_and_options():
    p = torch.nn.Parameter(torch.ones(4))
    for wrong in (
        dict(lr=-1.0), dict(lr=float("nan")), dict(eps=-1e-8), dict(weight_decay=float("inf")), dict(betas=(0.9, 1.0)),
        dict(betas=(-0.1, 0.9)), dict(betas=(0.9,)), dict(bits=16), dict(bucket_elements=0), dict(bucket_elements=300),
    ):  # fmt: skip
        with pytest.raises(InputError, match=next(iter(wrong))):
            PagedAdamW([p], **wrong)
    with pytest.raises(InputError, match="no parameters"):
        PagedAdamW(iter([]))
    with pytest.raises(InputError, match="one tensor"):
        PagedAdamW(p)
    with pytest.raises(InputError, match="complex64"):
        PagedAdamW([torch.nn.Parameter(torch.ones(4, dtype=torch.complex64))])
    with pytest.raises(InputError, match="meta"):
        PagedAdamW([torch.nn.Parameter(torch.ones(4, device="meta"))])
    optimizer = PagedAdamW([p])
    with pytest.raises(InputError, match="lr is -1"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "lr": -1.0})
    assert len(optimizer.param_groups) == 1

    table = torch.nn.Embedding(10, 4, sparse=True)
    optimizer = PagedAdamW([p, table.weight])
    table(torch.tensor([1])).sum().backward()
    p.grad = torch.ones(4)
    with pytest.raises(InputError, match=r"\(10, 4\) has a sparse gradient"):
        optimizer.step()
    assert torch.equal(p, torch.ones(4))
    assert len(optimizer.state) == 0


@pytest.mark.parametrize("bits", [32, 8])
def test_a_gradient_that_is_not_finite_shows(bits):
    p = torch.nn.Parameter(torch.ones(5000))
    p.grad = torch.ones(5000)
    p.grad[7] = float("nan")
    PagedAdamW([p], bits=bits).step()
    assert p.isnan().nonzero().tolist() == [[7]]


def test_the_choice_on_the_cpu():
    p = torch.nn.Parameter(torch.ones(5000))
    options = dict(lr=1e-3, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.2)
    for name, bits in (("paged_adamw", 32), ("paged_adamw_8bit", 8)):
        for backend, reason in (("auto", "not every parameter is on CUDA"), ("own", "as asked")):
            optimizer, line = paged_optimizer(name, [p], **options, backend=backend)
            assert isinstance(optimizer, PagedAdamW)
            assert optimizer.defaults == {**options, "bits": bits}
            assert line == f"{name}: own states in host memory, {'since ' if backend == 'auto' else ''}{reason}"
    with pytest.raises(InputError, match="not every parameter is on CUDA: choose"):
        paged_optimizer("paged_adamw", [p], lr=1e-3, backend="bitsandbytes")
    with pytest.raises(InputError, match=r"unknown paged optimizer 'adamw'.*paged_adamw_8bit"):
        paged_optimizer("adamw", [p], lr=1e-3)
    with pytest.raises(InputError, match="unknown backend 'bnb'"):
        paged_optimizer("paged_adamw", [p], lr=1e-3, backend="bnb")


class OnCuda(torch.nn.Parameter):
    """A parameter that says it is on CUDA."""

    is_cuda = True


def test_the_choice_of_bitsandbytes(monkeypatch):
    p = OnCuda(torch.ones(8000))
    made = {}

    class Recorded:
        def __init__(self, params, **options):
            made.update(params=params, options=options)

    def install(compiled=True):
        optim = types.ModuleType("bitsandbytes.optim")
        optim.PagedAdamW32bit = type("PagedAdamW32bit", (Recorded,), {})
        optim.PagedAdamW8bit = type("PagedAdamW8bit", (Recorded,), {})
        extension = types.ModuleType("bitsandbytes.cextension")
        extension.lib = types.SimpleNamespace(compiled_with_cuda=compiled)
        monkeypatch.setitem(sys.modules, "bitsandbytes", types.ModuleType("bitsandbytes"))
        monkeypatch.setitem(sys.modules, "bitsandbytes.optim", optim)
        monkeypatch.setitem(sys.modules, "bitsandbytes.cextension", extension)

    install()
    for name, need in (("paged_adamw", 64_000), ("paged_adamw_8bit", 2 * (32 * 256 + 4 * 32))):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=need: (free, 10**9))
        optimizer, line = paged_optimizer(name, [{"params": [p], "lr": 0.5}], lr=1e-3, weight_decay=0.3)
        cls = "PagedAdamW8bit" if "8bit" in name else "PagedAdamW32bit"
        assert type(optimizer).__name__ == cls
        assert line == f"{name}: bitsandbytes' {cls}, states of {need:,} bytes, {need:,} free on cpu"
        assert made["options"] == dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.3)
        assert made["params"][0]["params"] == [p]
        assert made["params"][0]["lr"] == 0.5
        assert "bits" not in made["params"][0]

        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=need - 1: (free, 10**9))
        optimizer, line = paged_optimizer(name, [p], lr=1e-3)
        assert isinstance(optimizer, PagedAdamW)
        assert f"would not fit (states of {need:,} bytes, {need - 1:,} free" in line
        with pytest.raises(InputError, match="would not fit"):
            paged_optimizer(name, [p], lr=1e-3, backend="bitsandbytes")

    install(compiled=False)
    assert "CUDA library does not load" in paged_optimizer("paged_adamw", [p], lr=1e-3)[1]
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.delitem(sys.modules, "bitsandbytes.optim")
    optimizer, line = paged_optimizer("paged_adamw", [p], lr=1e-3)
    assert isinstance(optimizer, PagedAdamW)
    assert "bitsandbytes is not installed" in line


def test_pinned_memory_is_asked_for_in_powers_of_two(monkeypatch):
    from deltaw.quant import paged

    asked = []
    plain = torch.zeros

    def zeros(room, *, dtype, pin_memory):
        asked.append(room)
        assert pin_memory
        return plain(room, dtype=dtype)

    monkeypatch.setattr(torch, "zeros", zeros)
    monkeypatch.setattr(paged, "ARENA_BYTES", 4 * 1024)
    sizes = [700, 700, 100, 0, 5000, 1, 300, 300]
    flats = paged._host_zeros(sizes, torch.float32, True)
    assert [len(flat) for flat in flats] == sizes
    assert all(room & (room - 1) == 0 for room in asked)
    assert asked == [1024, 1024, 8192]
    places = [(flat.untyped_storage().data_ptr(), flat.storage_offset(), len(flat)) for flat in flats if len(flat)]
    ends: dict[int, int] = {}
    for storage, offset, length in places:
        assert offset >= ends.get(storage, 0)
        ends[storage] = offset + length

    def refuse(*args, **kwargs):
        raise RuntimeError("CUDA error: out of memory\nmore lines")

    monkeypatch.setattr(torch, "zeros", refuse)
    with pytest.raises(paged.RunError, match=r"4,096 bytes of pinned host memory .*\(CUDA error: out of memory\)"):
        paged._host_zeros([1024], torch.float32, True)


# On a device ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("bucket_elements", [256, 8192, 4 * 2**20])
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_as_the_cpu(dtype, bits, bucket_elements):
    draw = generator(0, "cuda")
    shapes = [(70, 67), (3, 5), (65, 64), (2, 256), (64, 64), (4097,)]
    params = parameters(draw, shapes, dtype, "cuda")
    others = [torch.nn.Parameter(p.detach().cpu()) for p in params]
    ours = PagedAdamW(params, **OPTIONS, bits=bits, bucket_elements=bucket_elements)
    theirs = PagedAdamW(others, **OPTIONS, bits=bits)
    for step in range(6):
        draw_gradients(others, draw)
        if step == 2:
            others[0].grad = None
        for p, other in zip(params, others, strict=True):
            p.grad = None if other.grad is None else other.grad.cuda()
        # Both start from the same state: in 8 bits a last bit's difference may change a code.
        if step:
            theirs.load_state_dict(ours.state_dict())
            with torch.no_grad():
                for p, other in zip(params, others, strict=True):
                    other.copy_(p)
        ours.step()
        theirs.step()
        tolerance = dict(rtol=2e-6, atol=1e-6) if dtype == torch.float32 else dict(rtol=2**-7, atol=1e-6)
        close([p.cpu() for p in params], others, **tolerance)
        for p, other in zip(params, others, strict=True):
            for key, value in theirs.state[other].items():
                mine = ours.state[p][key]
                if key == "step":
                    assert mine == value
                    continue
                assert mine.device.type == "cpu"
                assert mine.is_pinned()
                if value.dtype == torch.uint8:
                    gap = (mine.int() - value.int()).abs()
                    assert gap.max() <= 1
                    assert (gap != 0).float().mean() < 1e-3
                else:
                    largest = value.abs().max().item() if value.numel() else 0.0
                    torch.testing.assert_close(mine, value, rtol=2e-6, atol=1e-6 * largest)


@pytest.mark.gpu
def test_cuda_as_torch():
    draw = generator(0, "cuda as torch")
    params = parameters(draw, [(1000, 300), (7,), (512, 513)], device="cuda")
    others = twins(params)
    ours = PagedAdamW(params, **OPTIONS, bucket_elements=65536)
    theirs = torch.optim.AdamW(others, **OPTIONS)
    for _ in range(20):
        draw_gradients(params, draw)
        same_gradients(params, others)
        ours.step()
        theirs.step()
    close(params, others, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [32, 8])
def test_cuda_keeps_no_state_on_the_device(bits, tmp_path):
    draw = generator(0, "device memory")
    params = parameters(draw, [(2048, 2048), (1024, 4096), (1000,)], device="cuda")
    optimizer = PagedAdamW(params, **OPTIONS, bits=bits, bucket_elements=2**18)
    for code in (True, False):
        dynamic_code(code, params[0].device)
    draw_gradients(params, draw)
    torch.cuda.synchronize()
    for _ in range(3):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        optimizer.step()
        assert torch.cuda.memory_allocated() == before
        assert torch.cuda.max_memory_allocated() - before <= 48 * 2**18
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    others = twins(params)
    resumed = PagedAdamW(others, **OPTIONS, bits=bits)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", map_location="cpu", weights_only=True))
    assert torch.cuda.max_memory_allocated() == before
    assert resumed.state[others[0]]["exp_avg"].is_pinned()
    for _ in range(2):
        draw_gradients(params, draw)
        same_gradients(params, others)
        optimizer.step()
        resumed.step()
    close(params, others, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["paged_adamw", "paged_adamw_8bit"])
def test_cuda_choice(name):
    pytest.importorskip("bitsandbytes")
    draw = generator(0, "choice")
    params = parameters(draw, [(512, 512), (16,)], device="cuda")
    others = twins(params)
    theirs, line = paged_optimizer(name, params, **OPTIONS)
    assert "bitsandbytes' PagedAdamW" in line
    ours, _ = paged_optimizer(name, others, **OPTIONS, backend="own")
    assert isinstance(ours, PagedAdamW)
    begun = twins(params)
    for _ in range(10):
        for p in params:
            p.grad = torch.randn(p.shape, generator=draw).cuda()
        same_gradients(params, others)
        theirs.step()
        ours.step()
    # bitsandbytes decays after the update, by lr weight_decay = 1e-3 of it.
    for p, other, start in zip(params, others, begun, strict=True):
        assert (other - p).norm() < (0.005 if name == "paged_adamw" else 0.05) * (p - start).norm()
