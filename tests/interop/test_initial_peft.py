"""PEFT as oracle of starts, conversions, learning rates: what it does to the base we do beside it."""

import copy
import json

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import nn

import deltaw as dw
from deltaw.core.generators import generator
from deltaw.methods.host import parts_of
from deltaw.quant import NF4, quantize_model, quantized_sites

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings=True.*"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to.*"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in.*"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:(PiSSA|OLoRA) changes the base weights of the model"),
    pytest.mark.filterwarnings("ignore:lora with eva initialization used with low_cpu_mem_usage=False"),
]

TARGETS = {"llama": ["q_proj", "v_proj", "up_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}
PREFIX = "base_model.model."


def theirs(name, init, **options):
    from peft import LoraConfig, get_peft_model

    fields = dict(r=4, lora_alpha=6, target_modules=TARGETS[name], fan_in_fan_out=name == "gpt2") | options
    return get_peft_model(tiny.tiny(name), LoraConfig(init_lora_weights=init, **fields))


def ours(name, init, *, model=None, **options):
    options = {{"lora_alpha": "alpha", "use_rslora": "rslora"}.get(k, k): v for k, v in options.items()}
    fields = dict(r=4, alpha=6, target_modules=TARGETS[name]) | options
    return dw.adapt(model if model is not None else tiny.tiny(name), dw.LoRA(init=init, **fields))


def their_factors(model):
    from peft.tuners.lora import LoraLayer

    return {
        path.removeprefix(PREFIX): (module.lora_A["default"].weight.detach(), module.lora_B["default"].weight.detach())
        for path, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def signs(first, second):
    """Of each column of two matrices that agree up to them."""
    return (first * second).sum(0).sign()


# PEFT decomposes a Conv1D by OLoRA as it is stored, and then fails.
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(("init", "name"), [("pissa", "llama"), ("pissa", "gpt2"), ("olora", "llama")])
def test_factors_are_pefts_up_to_sign(init, name, rslora):
    expected = their_factors(theirs(name, init, use_rslora=rslora))
    parts = {path: part for path, _, part in parts_of(ours(name, init, rslora=rslora), "default")}
    assert parts.keys() == expected.keys()
    for path, (A, B) in expected.items():
        sign = signs(parts[path].start_B, B)
        torch.testing.assert_close(parts[path].start_A * sign[:, None], A, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(parts[path].start_B * sign, B, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (16, 16)])
@pytest.mark.parametrize("rounds", [1, 4])
def test_iterated_factors_are_those_of_torchs_own_iteration(shape, rounds):
    """Which PEFT calls, and which draws from the global generator: from the same random directions."""
    model = nn.ModuleDict({"m": nn.Linear(shape[1], shape[0], bias=False)}).double()
    dw.adapt(model, dw.LoRA(r=3, alpha=6, init=f"pissa_niter_{rounds}", target_modules=["m"]), dtype=torch.float64)
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(generator(0, "init", "m").get_state())
        U, S, V = torch.svd_lowrank(model.m.weight.detach(), q=3, niter=rounds)
    (part,) = (part for _, _, part in parts_of(model, "default"))
    sign, root = signs(part.start_B, U), (S / 2).sqrt()
    torch.testing.assert_close(part.start_B * sign, U * root)
    torch.testing.assert_close(part.start_A * sign[:, None], root[:, None] * V.t())


@pytest.mark.parametrize(
    ("init", "name", "options"),
    [
        ("pissa", "llama", {}),
        ("pissa", "gpt2", {}),
        ("pissa", "llama", {"use_rslora": True}),
        ("pissa", "llama", {"rank_pattern": {"q_proj": 2, "1.mlp.up_proj": 5}, "alpha_pattern": {"v_proj": 3}}),
        ("olora", "llama", {}),
        ("olora", "llama", {"use_rslora": True}),
    ],
)
def test_what_is_saved_is_pefts_conversion_to_a_plain_lora(init, name, options, tmp_path):
    """Both trained to the same factors: equal updates of doubled rank, in files that each reads."""
    from peft import PeftModel

    peft = theirs(name, init, **options)
    model = ours(name, init, **options)
    peft.peft_config["default"].init_lora_weights = True
    peft.save_pretrained(tmp_path / "start")
    peft.peft_config["default"].init_lora_weights = init
    layers = {p.removeprefix(PREFIX): m for p, m in peft.named_modules() if hasattr(m, "lora_A")}
    for path, _, part in parts_of(model, "default"):
        A, B = layers[path].lora_A["default"].weight, layers[path].lora_B["default"].weight
        sign = signs(part.start_B, B.detach())
        moves = [0.2 * torch.randn(t.shape, generator=generator(1, path, i)) for i, t in enumerate((A, B))]
        with torch.no_grad():
            A.add_(moves[0])
            B.add_(moves[1])
            part.lora_A.copy_(moves[0] * sign[:, None])
            part.lora_B.copy_(moves[1] * sign)
    trained = peft(**tiny.inputs(name)).logits.detach()
    peft.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    dw.save_adapter(model, tmp_path / "ours")
    files = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours")]
    assert {k: v.shape for k, v in files[0].items()} == {k: v.shape for k, v in files[1].items()}
    products = [
        {k: f[k.replace("lora_A", "lora_B")] @ A for k, A in f.items() if "lora_A" in k} for f in map(dict, files)
    ]
    for key, update in products[0].items():
        torch.testing.assert_close(products[1][key], update, rtol=1e-4, atol=1e-4, msg=key)
    fields = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("theirs", "ours")]
    assert fields[1]["init_lora_weights"] is True and fields[0]["init_lora_weights"] is True
    for field in ("r", "lora_alpha", "use_rslora"):
        assert fields[1][field] == pytest.approx(fields[0][field]), field
    before = tiny.logits(model, name)
    assert tiny.relative(before, trained) < 1e-4
    for who in ("theirs", "ours"):
        read = PeftModel.from_pretrained(tiny.tiny(name), tmp_path / who)
        assert tiny.relative(tiny.logits(read, name), before) < 1e-4
        again = dw.load_adapter(tiny.tiny(name), tmp_path / who)
        assert tiny.relative(tiny.logits(again, name), before) < 1e-4


@pytest.mark.parametrize("init", ["pissa", "olora", "eva"])
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_reads_what_was_trained_on_4_bits(init, rslora, tmp_path):
    from peft import PeftModel

    model = quantize_model(tiny.tiny("llama"), NF4())
    plain = copy.deepcopy(model)
    for _, module, weight in list(quantized_sites(plain)):
        module.weight = nn.Parameter(weight.dequantize().contiguous(), requires_grad=False)
    start = {"batches": batches()} if init == "eva" else {}
    dw.adapt(model, dw.LoRA(r=3, init=init, rslora=rslora), **start)
    tiny.randomise(model)
    dw.save_adapter(model, tmp_path / "a")
    read = PeftModel.from_pretrained(plain, tmp_path / "a")
    assert tiny.relative(tiny.logits(read, "llama"), tiny.logits(model, "llama")) < 1e-5
    merged = dw.merge(model, into="float32")
    assert tiny.relative(tiny.logits(merged, "llama"), tiny.logits(read, "llama")) < 1e-5


def test_loftq_is_pefts_decomposition_of_the_same_residual():
    """At scale 1: PEFT leaves the scale out, and so starts at scale times what was lost."""
    from peft.utils.loftq_utils import _low_rank_decomposition

    plain, model = tiny.tiny("llama"), quantize_model(tiny.tiny("llama"), NF4())
    dw.adapt(model, dw.LoRA(r=5, alpha=5, init="loftq"), original=lambda path: plain.get_submodule(path).weight)
    checked = 0
    for path, module, part in parts_of(model, "default"):
        lost = plain.get_submodule(path).weight.detach() - module.weight.packed.dequantize()
        found = _low_rank_decomposition(lost, reduced_rank=5)
        sign = signs(part.lora_B.detach(), found["L"])
        torch.testing.assert_close(part.lora_B.detach() * sign, found["L"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(part.lora_A.detach() * sign[:, None], found["R"], rtol=1e-4, atol=1e-5)
        checked += 1
    assert checked == 14


def batches(count=1, rows=24, length=12):
    made = []
    for number in range(count):
        ids = torch.randint(3, tiny.VOCAB, (rows, length), generator=generator(number, "rows"))
        sizes = torch.randint(6, length + 1, (rows, 1), generator=generator(number, "sizes"))
        made.append({"input_ids": ids, "attention_mask": (torch.arange(length) < sizes).long()})
    return made


@pytest.mark.parametrize("rho", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", TARGETS)
def test_eva_gives_pefts_ranks_scales_and_directions(name, rho, rslora):
    from peft import EvaConfig, initialize_lora_eva_weights

    peft = theirs(name, "eva", use_rslora=rslora, eva_config=EvaConfig(rho=rho, tau=0.999))
    given = batches()
    initialize_lora_eva_weights(peft, given, show_progress_bar=False)
    model = tiny.tiny(name)
    config = dw.LoRA(r=4, alpha=6, init="eva", eva_rho=rho, rslora=rslora, target_modules=TARGETS[name])
    dw.adapt(model, config, batches=given)
    parts = {path: part for path, _, part in parts_of(model, "default")}
    expected = their_factors(peft)
    assert {p: len(A) for p, (A, _) in expected.items()} == {p: len(part.lora_A) for p, part in parts.items()}
    for path, (A, B) in expected.items():
        assert not B.any() and not parts[path].lora_B.any()
        assert parts[path].scale == pytest.approx(peft.base_model.model.get_submodule(path).scaling["default"])
        # PEFT goes on until its increments hardly turn the directions: their span agrees to that, not to a rounding.
        got = parts[path].lora_A.detach()
        overlap = torch.linalg.svdvals(got @ A.t())
        assert overlap.min() > 0.99, (path, overlap)


@pytest.mark.parametrize("target", ["llama-bias", "llama"])
def test_loraplus_groups_are_pefts(target):
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer

    bias = target == "llama-bias"
    fields = dict(r=2, target_modules=["q_proj", "up_proj"], lora_bias=bias)
    peft = get_peft_model(tiny.tiny(target), LoraConfig(**fields))
    optimizer = create_loraplus_optimizer(peft, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8.0)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    expected = {
        name.removeprefix(PREFIX).replace(".default", "").replace("lora_B.bias", "lora_bias").replace(".weight", ""):
        rates[id(p)] for name, p in peft.named_parameters() if p.requires_grad
    }  # fmt: skip
    model = dw.adapt(tiny.tiny(target), dw.LoRA(loraplus_lr_ratio=8.0, **fields))
    got = {}
    for path, _, part in parts_of(model, "default"):
        ratios = part.rate_ratios()
        got |= {f"{path}.{name}": 1e-3 * ratios.get(name, 1) for name, _ in part.named_parameters()}
    assert got == expected and set(got.values()) == {1e-3, 8e-3}
