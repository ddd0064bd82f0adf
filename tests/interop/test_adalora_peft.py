"""PEFT as oracle for AdaLoRA's files, both ways: sites, tensors, ranks and logits."""

import json

import peft
import pytest
import tiny
import torch
from safetensors.torch import load_file

import deltaw as dw
from deltaw.core.errors import InputError
from deltaw.core.generators import generator
from deltaw.methods.adalora_peft import from_peft
from deltaw.methods.host import book_of, parts_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to.*"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`.*"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in.*"),
    # PEFT's LoRA does not know what PEFT's AdaLoRA writes.
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match any targeted module"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'.*LoRA tensor.*have invalid shape"),
]

LINEARS = ["q_proj", "v_proj", "down_proj"]
RANKS = (3, 0, 4, 1, 2)

#: Name: (model of `tiny`, PEFT's fields).
FIELDS = {
    "llama": ("llama", dict(target_modules=LINEARS)),
    "regex": ("llama", dict(target_modules=r".*\.layers\.1\..*(q|down)_proj", lora_alpha=5)),
    "layers": ("llama", dict(target_modules=LINEARS, layers_to_transform=[1], layers_pattern="layers")),
    "excluded": ("llama", dict(target_modules=LINEARS, exclude_modules=["0.self_attn.q_proj"])),
    "gpt2": ("gpt2", dict(target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True, lora_dropout=0.1)),
    "gpt2-biases": ("gpt2", dict(target_modules=["c_attn"], fan_in_fan_out=True, bias="lora_only")),
    "classifier": ("bert-seq", dict(target_modules=["query", "value"], task_type="SEQ_CLS", bias="all")),
    "saved-modules": ("llama", dict(target_modules=["q_proj"], modules_to_save=["lm_head", "norm"])),
    "tokens": ("llama", dict(target_modules=LINEARS, trainable_token_indices=[36, 10, 21])),
    "schedule": ("llama", dict(target_modules=LINEARS, tinit=3, tfinal=4, deltaT=2, total_step=20, beta1=0.7)),
    "unread-fields": ("llama", dict(target_modules=LINEARS, use_rslora=True, alpha_pattern={"q_proj": 3})),
    "target-above-init": ("llama", dict(target_modules=LINEARS, init_r=2, target_r=2)),
    "one": ("llama", dict(target_modules=LINEARS, init_r=1, target_r=8)),
}


def theirs(name, **changes):
    """PEFT's adapter of a case, its factors random."""
    base, fields = FIELDS[name]
    given = {"init_r": 4, "target_r": 2, "total_step": 10} | fields | changes
    model = peft.get_peft_model(tiny.tiny(base), peft.AdaLoraConfig(**given)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator(4, key)))
    return model


def allocate(model, ranks):
    """Masks PEFT's singular values as its own allocator would, to these ranks in turn."""
    config = model.peft_config["default"]
    pattern = {}
    values = [(key, p) for key, p in model.base_model.model.named_parameters() if "lora_E" in key]
    for number, (key, p) in enumerate(values):
        r = min(ranks[number % len(ranks)], len(p))
        kept = (torch.randperm(len(p), generator=generator(5, key)) < r).tolist()
        pattern[key] = kept
        with torch.no_grad():
            p.masked_fill_(~torch.tensor(kept).view(-1, 1), 0.0)
    config.rank_pattern = pattern


@pytest.mark.parametrize("pruned", [False, True], ids=["whole", "pruned"])
@pytest.mark.parametrize("name", FIELDS)
def test_pefts_files_here_and_back(name, pruned, tmp_path):
    base = FIELDS[name][0]
    model = theirs(name)
    if pruned:
        allocate(model, RANKS)
    expected = tiny.logits(model, base)
    model.save_pretrained(tmp_path / "theirs")
    ours = dw.load_adapter(tiny.tiny(base), tmp_path / "theirs", name="default")
    torch.testing.assert_close(tiny.logits(ours, base), expected, rtol=1e-5, atol=1e-5)
    dw.save_adapter(ours, tmp_path / "ours")
    tensors, own = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours"))
    if name == "saved-modules" or name == "classifier":
        assert own.keys() >= {key for key in tensors if "lora_" in key}
    tiny.assert_same({key: tensors[key] for key in own}, own)
    fields, written = (json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("theirs", "ours"))
    for key in ("init_r", "lora_alpha", "lora_dropout", "tinit", "tfinal", "deltaT", "beta1", "beta2", "total_step"):
        assert written[key] == fields[key], key
    if pruned:
        got, wanted = written["rank_pattern"], fields["rank_pattern"]
        assert {k: (sum(v), len(v)) for k, v in got.items()} == {k: (sum(v), len(v)) for k, v in wanted.items()}
        assert 0 in map(sum, got.values()) or len(got) < 2
    again = peft.PeftModel.from_pretrained(tiny.tiny(base), tmp_path / "ours").eval()
    assert torch.equal(tiny.logits(again, base), tiny.logits(reload_theirs(tmp_path, base), base))


def reload_theirs(folder, base):
    return peft.PeftModel.from_pretrained(tiny.tiny(base), folder / "theirs").eval()


OURS = {
    "linear": ("llama", {"alpha": 6.5}),
    "ranks": ("llama", {"rank_pattern": {"q_proj": 2, "layers.0.mlp.up_proj": 0}}),
    "conv1d": ("gpt2", {"bias": "all", "dropout": 0.1}),
    "encoder": ("bert-seq", {"modules_to_save": ["classifier"], "target_modules": "attention"}),
    "tokens": ("llama", {"trainable_tokens": [4, 9], "layers_to_transform": [0]}),
}


@pytest.mark.parametrize("pruned", [False, True], ids=["whole", "pruned"])
@pytest.mark.parametrize("name", OURS)
def test_our_files_there(name, pruned, tmp_path):
    base, options = OURS[name]
    model = tiny.randomise(dw.adapt(tiny.tiny(base), dw.AdaLoRA(**{"init_r": 4, "target_r": 2} | options)))
    parts = {path: part for path, _, part in parts_of(model, "default") if part.low_rank() is not None}
    if pruned:
        for number, part in enumerate(parts.values()):
            part.prune(torch.arange(len(part.lora_E)) >= number % 5)
    dw.save_adapter(model, tmp_path / "a")
    loaded = peft.PeftModel.from_pretrained(tiny.tiny(base), tmp_path / "a").eval()
    torch.testing.assert_close(tiny.logits(loaded, base), tiny.logits(model, base), rtol=1e-5, atol=1e-5)
    layers = {p: m for p, m in loaded.base_model.model.named_modules() if hasattr(m, "lora_E")}
    assert layers.keys() == parts.keys()
    for path, part in parts.items():
        for factor in ("lora_A", "lora_B", "lora_E"):
            assert torch.equal(getattr(layers[path], factor)["default"], getattr(part, factor)), (path, factor)
    loaded.save_pretrained(tmp_path / "again")
    mine, back = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("a", "again"))
    tiny.assert_same({key: back[key] for key in mine}, mine)


def test_the_schedule_of_a_training_is_written(tmp_path):
    from deltaw.methods.adalora_budget import control

    model = dw.adapt(tiny.tiny("llama"), dw.AdaLoRA(init_r=4, target_r=2))
    control(model, "default", 40)
    dw.save_adapter(model, tmp_path / "a")
    config = peft.PeftConfig.from_pretrained(tmp_path / "a")
    assert (config.tinit, config.tfinal, config.deltaT, config.total_step) == (5, 20, 1, 40)
    loaded = dw.load_adapter(tiny.tiny("llama"), tmp_path / "a", name="x")
    assert book_of(loaded).configs["x"].total_steps == 40


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rank_pattern": {"a.lora_E": 3}}, "damaged: rank_pattern has 'a.lora_E'"),
        ({"rank_pattern": {"q_proj": [True]}}, "damaged: rank_pattern has 'q_proj'"),
        ({"rank_pattern": [True]}, "damaged: rank_pattern"),
        ({"use_dora": True}, "use_dora with AdaLoRA"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"init_r": "4"}, "init_r is '4'"),
        ({"beta1": 2}, "beta1 is 2"),
        ({"target_modules": None}, "names no target_modules"),
    ],
)
def test_what_cannot_be_honoured(changes, says):
    with pytest.raises(InputError, match=says):
        from_peft({"peft_type": "ADALORA", "target_modules": ["q_proj"]} | changes)
