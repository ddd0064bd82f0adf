"""PEFT as oracle, both ways: files, sites, logits and gradients of every field of `LoraConfig` that is supported."""

import copy
import json
import warnings

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import nn

import deltaw as dw
from deltaw.checkpoint.adapters import adapter_state
from deltaw.core.generators import generator
from deltaw.methods.host import parts_of

# What PEFT says of its own about tied weights, Conv1D, embeddings that it saves and models without a name.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings=True.*"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to.*"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`.*"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in.*"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'.*LoRA tensor.*have invalid shape.*lora_B.bias"),
    pytest.mark.filterwarnings("ignore:You have passed exclude_modules=.*but no modules were excluded"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match any targeted module"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer.*"),
]

LLAMA_ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = [36, 10, 21]
BERT_ATTENTION = ["query", "key", "value", "attention.output.dense"]

#: Name: (model of `tiny`, PEFT's fields).
FIELDS = {
    "list": ("llama", dict(target_modules=["q_proj", "v_proj"])),
    "regex": ("llama", dict(target_modules=r".*\.layers\.1\..*(q|down)_proj")),
    "all-linear": ("llama", dict(target_modules="all-linear")),
    "whole-paths": ("llama", dict(target_modules=["model.layers.0.self_attn.q_proj", "1.mlp.up_proj"])),
    "name-that-is-not-there": ("llama", dict(target_modules=["q_proj", "query_key_value"])),
    "r-alpha": ("llama", dict(r=3, lora_alpha=5, target_modules=LLAMA_ALL)),
    "exclude-list": ("llama", dict(target_modules=LLAMA_ALL, exclude_modules=["k_proj", "0.mlp.up_proj"])),
    "exclude-regex": ("llama", dict(target_modules=LLAMA_ALL, exclude_modules=r".*layers\.0.*")),
    "exclude-what-is-not-there": ("llama", dict(target_modules=["q_proj"], exclude_modules=["lm_haed"])),
    "rank-pattern": ("llama", dict(target_modules=LLAMA_ALL, rank_pattern={"q_proj": 2, r"layers\.0\.mlp\..*": 5})),
    "alpha-pattern": ("llama", dict(target_modules=LLAMA_ALL, alpha_pattern={"0.self_attn.q_proj": 3, "q_proj": 30})),
    "both-patterns": (
        "llama",
        dict(
            target_modules=LLAMA_ALL,
            rank_pattern={"q_proj": 2, "model.layers.1.mlp.up_proj": 7},
            alpha_pattern={"up_proj": 1, "q_proj": 2},
            use_rslora=True,
        ),
    ),
    "pattern-of-nothing": ("llama", dict(target_modules=["q_proj"], rank_pattern={"lm_head": 2})),
    "rslora": ("llama", dict(target_modules=["v_proj"], use_rslora=True)),
    "dropout": ("llama", dict(target_modules=LLAMA_ALL, lora_dropout=0.2)),
    "bias-all": ("llama-bias", dict(target_modules=["q_proj"], bias="all")),
    "bias-lora-only": ("llama-bias", dict(target_modules=["q_proj", "up_proj"], bias="lora_only")),
    "bias-where-there-is-none": ("llama", dict(target_modules=["q_proj"], bias="lora_only")),
    "modules-to-save": ("llama", dict(target_modules=["q_proj"], modules_to_save=["lm_head", "norm"])),
    "modules-to-save-tied": ("llama-tied", dict(target_modules=["q_proj"], modules_to_save=["lm_head"])),
    "modules-to-save-of-a-target": ("llama", dict(target_modules=["q_proj", "o_proj"], modules_to_save=["o_proj"])),
    "layers-int": ("llama", dict(target_modules=["q_proj", "v_proj"], layers_to_transform=1)),
    "layers-list": ("llama", dict(target_modules=["q_proj"], layers_to_transform=[0], layers_pattern="layers")),
    "layers-patterns": (
        "llama",
        dict(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern=["h", "layers"]),
    ),
    "layer-not-there": ("llama", dict(target_modules=["q_proj"], layers_to_transform=[1, 9])),
    "path-beside-layers": (
        "llama",
        dict(target_modules=["q_proj", "model.layers.1.self_attn.v_proj"], layers_to_transform=[0]),
    ),
    "tokens-list": ("llama", dict(target_modules=["q_proj"], trainable_token_indices=TOKENS)),
    "tokens-dict": ("llama", dict(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": TOKENS})),
    "tokens-of-head": ("llama", dict(target_modules=["q_proj"], trainable_token_indices={"lm_head": TOKENS})),
    "tokens-of-both": (
        "llama",
        dict(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [36], "lm_head": [10, 2]}),
    ),
    "tokens-tied": ("llama-tied", dict(target_modules=["q_proj"], trainable_token_indices=TOKENS)),
    "tokens-tied-alike": (
        "llama-tied",
        dict(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": TOKENS, "lm_head": TOKENS}),
    ),
    "tokens-tied-apart": (
        "llama-tied",
        dict(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [36], "lm_head": [10, 2]}),
    ),
    "tokens-tied-head-alone": (
        "llama-tied",
        dict(target_modules=["q_proj"], trainable_token_indices={"lm_head": TOKENS}),
    ),
    "lora-bias": ("llama-bias", dict(target_modules=["q_proj", "up_proj"], lora_bias=True)),
    "lora-bias-where-there-is-none": ("llama", dict(target_modules=["q_proj", "up_proj"], lora_bias=True)),
    "init-false": ("llama", dict(target_modules=["q_proj"], init_lora_weights=False)),
    "init-gaussian": ("llama", dict(target_modules=["q_proj"], init_lora_weights="gaussian")),
    "init-orthogonal": ("llama", dict(target_modules=["q_proj"], init_lora_weights="orthogonal")),
    "embedding": ("llama", dict(target_modules=["embed_tokens", "q_proj"])),
    "embedding-and-head": ("llama", dict(target_modules=["embed_tokens", "lm_head"])),
    "tied-embedding": ("llama-tied", dict(target_modules=["embed_tokens", "q_proj"])),
    "tied-head": ("llama-tied", dict(target_modules=["lm_head", "q_proj"])),
    "tied-both": ("llama-tied", dict(target_modules=["lm_head", "embed_tokens"])),
    "gpt2": ("gpt2", dict(target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)),
    "gpt2-unflagged": ("gpt2", dict(target_modules=["c_attn"], fan_in_fan_out=False)),
    "gpt2-all-linear": ("gpt2", dict(target_modules="all-linear", bias="all")),
    "gpt2-embedding": ("gpt2", dict(target_modules=["wte", "attn.c_proj"], fan_in_fan_out=True)),
    "gpt2-tokens": ("gpt2", dict(target_modules=["c_attn"], trainable_token_indices={"wte": TOKENS})),
    "gpt2-modules": ("gpt2", dict(target_modules=["c_attn"], modules_to_save=["ln_f"], bias="lora_only")),
    "gpt2-layers": ("gpt2", dict(target_modules=["c_attn"], layers_to_transform=[1], layers_pattern="h")),
    "qwen3": ("qwen3", dict(target_modules=LLAMA_ALL, use_rslora=True)),
    "qwen3-tokens": ("qwen3", dict(target_modules=["v_proj"], trainable_token_indices=TOKENS)),
    "gemma": ("gemma", dict(target_modules="all-linear")),
    "gemma-embedding": ("gemma", dict(target_modules=["embed_tokens", "q_proj"])),
    "gemma-tokens": ("gemma", dict(target_modules=["q_proj"], trainable_token_indices=TOKENS)),
    "gemma3": ("gemma3", dict(target_modules=["embed_tokens", *LLAMA_ALL])),
    "gemma3-tokens": ("gemma3", dict(target_modules=["q_proj"], trainable_token_indices=TOKENS)),
    "bert-sequences": ("bert-seq", dict(task_type="SEQ_CLS", target_modules=["query", "value"])),
    "bert-attention": ("bert-seq", dict(task_type="SEQ_CLS", target_modules=BERT_ATTENTION, bias="lora_only")),
    "bert-all": ("bert-seq", dict(task_type="SEQ_CLS", target_modules="all-linear", bias="all")),
    "bert-tokens": ("bert-tok", dict(task_type="TOKEN_CLS", target_modules=["query", "dense"])),
    "bert-saved-heads": ("bert-tok", dict(target_modules=["query"], modules_to_save=["classifier", "LayerNorm"])),
    "bert-mlm": ("bert-mlm", dict(target_modules=["query", "transform.dense"], bias="lora_only")),
    "bert-mlm-all-biases": ("bert-mlm", dict(target_modules=["query"], bias="all")),
    "bert-mlm-head": ("bert-mlm", dict(target_modules=["query"], modules_to_save=["cls"])),
    "roberta": ("roberta-seq", dict(task_type="SEQ_CLS", target_modules=["query", "value"])),
    "distilbert": ("distilbert-seq", dict(task_type="SEQ_CLS", target_modules=["q_lin", "v_lin"])),
    "llama-sequences": ("llama-seq", dict(task_type="SEQ_CLS", target_modules=["q_proj", "v_proj"])),
    "t5": ("t5", dict(task_type="SEQ_2_SEQ_LM", target_modules=["q", "v"])),
    "t5-all": ("t5-gated", dict(target_modules="all-linear", rank_pattern={"wi_0": 2})),
    "t5-tokens": ("t5", dict(target_modules=["q"], trainable_token_indices={"shared": TOKENS})),
    "t5-tokens-list": ("t5", dict(target_modules=["q"], trainable_token_indices=TOKENS)),
    "t5-head": ("t5", dict(target_modules=["q"], modules_to_save=["lm_head"])),
    "dora": ("llama", dict(target_modules=LLAMA_ALL, use_dora=True)),
    "dora-patterns": (
        "llama",
        dict(target_modules=LLAMA_ALL, use_dora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"up_proj": 9}),
    ),
    "rsdora": ("qwen3", dict(target_modules="all-linear", use_dora=True, use_rslora=True)),
    "dora-biased": ("llama-bias", dict(target_modules=["q_proj", "o_proj"], use_dora=True, bias="lora_only")),
    "dora-embedding": ("llama", dict(target_modules=["embed_tokens", "q_proj"], use_dora=True)),
    "dora-head": ("llama-tied", dict(target_modules=["lm_head", "v_proj"], use_dora=True)),
    "dora-scaled-embedding": ("gemma", dict(target_modules=["embed_tokens", "mlp.up_proj"], use_dora=True)),
    "dora-gpt2": ("gpt2", dict(target_modules=["c_attn", "c_proj", "c_fc"], use_dora=True, fan_in_fan_out=True)),
    "dora-bert": ("bert-seq", dict(task_type="SEQ_CLS", target_modules=BERT_ATTENTION, use_dora=True)),
    "dora-t5": ("t5", dict(target_modules=["q", "v", "wi", "wo"], use_dora=True)),
    "dora-tokens": ("llama", dict(target_modules=["q_proj"], use_dora=True, trainable_token_indices=TOKENS)),
    "much-at-once": (
        "bert-seq",
        dict(
            task_type="SEQ_CLS",
            target_modules=["query", "word_embeddings", "output.dense"],
            exclude_modules=["0.attention.output.dense"],
            rank_pattern={"query": 3},
            alpha_pattern={"1.output.dense": 9},
            use_rslora=True,
            bias="lora_only",
            modules_to_save=["pooler"],
            trainable_token_indices={"position_embeddings": [2, 0]},
        ),
    ),
}  # fmt: skip


def peft_model(name, fields, dtype=torch.float32):
    """PEFT's model with every trained parameter drawn at random."""
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]):
        model = get_peft_model(tiny.tiny(name, dtype), LoraConfig(**{"r": 4, "lora_alpha": 6} | fields)).eval()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator(4, key)).to(parameter.dtype)
            with torch.no_grad():
                parameter.add_(0.2 * noise)
    return model


def from_folder(name, folder, **options):
    """PEFT's reading of a folder; a key that it misses is an error here."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys.*")
        return PeftModel.from_pretrained(tiny.tiny(name), folder, **options).eval()


def loss_of(logits):
    return (torch.tanh(logits) * torch.randn(logits.shape, generator=generator(0, "loss"))).sum()


def peft_gradients(model, name):
    """Gradients in float64 under the keys of PEFT's file."""
    from peft import get_peft_model_state_dict

    model = copy.deepcopy(model).double()
    model.zero_grad(set_to_none=True)
    loss_of(model(**tiny.inputs(name)).logits).backward()
    grads = {key: p.grad for key, p in model.named_parameters(remove_duplicate=False) if p.grad is not None}
    grads = {key: value for key, value in grads.items() if model.get_parameter(key).requires_grad}
    return get_peft_model_state_dict(model, state_dict=grads, save_embedding_layers=False)


def own_gradients(model, name, adapter):
    """Ours under the same keys."""
    model = copy.deepcopy(model).double()
    model.zero_grad(set_to_none=True)
    loss_of(model(**tiny.inputs(name)).logits).backward()
    parameters = {p.data_ptr(): p for p in dw.adapter_parameters(model, adapter).values()}
    state = adapter_state(model, adapter)
    # The second name of a tensor that a trained copy shares is written from a copy, and has no gradient of its own.
    return {key: parameters[t.data_ptr()].grad for key, t in state.items() if t.data_ptr() in parameters}


def assert_close(got, expected):
    """1e-6 of each tensor (norms go through float32), or of a thousandth of all where one is zero (a key's bias)."""
    assert got.keys() <= expected.keys() and got
    whole = torch.cat([v.flatten() for v in expected.values()]).norm()
    for key, value in got.items():
        assert (value - expected[key]).norm() <= 1e-6 * max(expected[key].norm(), 1e-3 * whole), key


def is_copy_of_the_base(model, key, tensor):
    """Whether PEFT wrote a tensor of the base (embeddings that it targets, a head's original) beside the adapter."""
    path = key.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", ".")
    own = dict(model.named_parameters(remove_duplicate=False)).get(path)
    return own is not None and torch.equal(own, tensor)


def peft_sites(model):
    from peft.tuners.lora import LoraLayer

    return {
        name.removeprefix("base_model.model.").replace(".token_adapter.base_layer", "")
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def own_sites(model, adapter):
    return {path for path, _, part in parts_of(model, adapter) if part.low_rank() is not None}


def split_file(folder, name, model, adapter):
    """The file's tensors that are the adapter's; what else there is must be the base's own, or a bias' second name."""
    tensors, ours = load_file(folder / "adapter_model.safetensors"), adapter_state(model, adapter)
    plain = tiny.tiny(name)
    again = {"base_model.model.cls.predictions.bias": "base_model.model.cls.predictions.decoder.bias"}
    for key in tensors.keys() - ours.keys():
        first = again.get(key, key.replace(".modules_to_save.", "."))
        named_twice = first != key and first in tensors and torch.equal(tensors[key], tensors[first])
        assert named_twice or is_copy_of_the_base(plain, key, tensors[key]), key
    return {key: value for key, value in tensors.items() if key in ours}


@pytest.mark.parametrize("case", FIELDS)
def test_pefts_folder_here_and_back(case, tmp_path):
    name, fields = FIELDS[case]
    theirs = peft_model(name, fields)
    expected = tiny.logits(theirs, name)
    theirs.save_pretrained(tmp_path / "theirs")
    model = dw.load_adapter(tiny.tiny(name), tmp_path / "theirs", name="x", trainable=True)
    assert tiny.relative(expected, tiny.logits(tiny.tiny(name), name)) > 1e-2
    assert tiny.relative(tiny.logits(model, name), expected) < 1e-5
    assert own_sites(model, "x") == peft_sites(theirs)
    tiny.assert_same(adapter_state(model, "x"), split_file(tmp_path / "theirs", name, model, "x"))
    assert_close(own_gradients(model, name, "x"), peft_gradients(theirs, name))
    dw.save_adapter(model, tmp_path / "ours", name="x")
    tiny.assert_same(load_file(tmp_path / "ours" / "adapter_model.safetensors"), adapter_state(model, "x"))
    back = from_folder(name, tmp_path / "ours")
    assert peft_sites(back) == peft_sites(theirs)
    assert tiny.relative(tiny.logits(back, name), expected) < 1e-5


#: Name: (model of `tiny`, our fields).
OWN = {
    "attention-of-bert": ("bert-seq", dict(target_modules="attention")),
    "attention-and-classifier": ("bert-seq", dict(target_modules="attention", modules_to_save=["classifier"])),
    "mlp-of-bert": ("bert-tok", dict(target_modules="mlp", modules_to_save=["classifier"], bias="lora_only")),
    "qv-layers": ("llama", dict(target_modules="qv", layers_to_transform=[1])),
    "attention-excluding": ("bert-mlm", dict(target_modules="attention", exclude_modules=["0.attention.output.dense"])),
    "gpt2-attention": ("gpt2", dict(target_modules="attention", bias="all", rslora=True)),
    "gpt2-mlp-expression": ("gpt2", dict(target_modules=r".*1\.mlp.*")),
    "all-linear": ("qwen3", dict(rank_pattern={"q_proj": 2}, alpha_pattern={"1.mlp.*": 2.5})),
    "gemma": ("gemma3", dict(target_modules=["embed_tokens", "qv"], trainable_tokens=None)),
    "gemma-tokens": ("gemma", dict(target_modules="qv", trainable_tokens=tuple(TOKENS))),
    "tokens-out-of-order": ("llama", dict(target_modules="qv", trainable_tokens=[36, 3, 10])),
    "head": ("llama-tied", dict(target_modules=["lm_head", "mlp"])),
    "head-to-save": ("llama-tied", dict(target_modules="mlp", modules_to_save=["lm_head", "model.norm"])),
    "all-biases": ("bert-mlm", dict(target_modules="qv", bias="all")),
    "mlm-head-to-save": ("bert-mlm", dict(target_modules="qv", modules_to_save=["cls"])),
    "new-head": ("distilbert-seq", dict(target_modules="attention", modules_to_save=["pre_classifier", "classifier"])),
    "lora-bias": ("llama-bias", dict(target_modules="attention", lora_bias=True)),
    "t5": ("t5", dict(target_modules="attention", layers_to_transform=[0], layers_pattern="block")),
    "t5-tokens": ("t5", dict(target_modules="mlp", trainable_tokens=TOKENS)),
    "defaults": ("mistral", {}),
    "dora": ("mistral", dict(kind=dw.DoRA)),
    "dora-conv1d": ("gpt2", dict(kind=dw.DoRA, target_modules="attention", rslora=True, rank_pattern={"c_attn": 2})),
    "dora-embedding": ("gemma3", dict(kind=dw.DoRA, target_modules=["embed_tokens", "mlp"])),
    "dora-new-head": ("bert-seq", dict(kind=dw.DoRA, target_modules="qv", modules_to_save=["classifier"])),
}  # fmt: skip


@pytest.mark.parametrize("case", OWN)
def test_our_folder_in_peft(case, tmp_path):
    from peft import get_peft_model_state_dict

    name, fields = OWN[case]
    kind = {"kind": dw.LoRA} | fields
    model = tiny.randomise(dw.adapt(tiny.tiny(name), kind.pop("kind")(**{"r": 4} | kind)))
    expected = tiny.logits(model, name)
    dw.save_adapter(model, tmp_path / "a")
    written = load_file(tmp_path / "a" / "adapter_model.safetensors")
    tiny.assert_same(written, {k: v.detach() for k, v in adapter_state(model, "default").items()})
    theirs = from_folder(name, tmp_path / "a", is_trainable=True)
    assert peft_sites(theirs) == own_sites(model, "default")
    assert tiny.relative(tiny.logits(theirs, name), expected) < 1e-5
    assert_close(own_gradients(model, name, "default"), peft_gradients(theirs, name))
    read = get_peft_model_state_dict(theirs, save_embedding_layers=False)
    tiny.assert_same({key: read[key] for key in written}, written)
    theirs.save_pretrained(tmp_path / "theirs")
    tiny.assert_same(split_file(tmp_path / "theirs", name, model, "default"), written)
    again = dw.load_adapter(tiny.tiny(name), tmp_path / "theirs")
    assert torch.equal(tiny.logits(again, name), expected)


def test_our_configuration_in_pefts_terms(tmp_path):
    options = dict(target_modules="attention", modules_to_save=["classifier"], alpha_pattern={"query": 2.5, "key": 3.0})
    dw.save_adapter(dw.adapt(tiny.tiny("bert-seq"), dw.LoRA(r=4, **options)), tmp_path / "a", base_model="owner/model")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text()) == {
        "base_model_name_or_path": "owner/model",
        "task_type": "SEQ_CLS",
        "inference_mode": True,
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "target_modules": ["attention.output.dense", "key", "query", "value"],
        "exclude_modules": None,
        "rank_pattern": {},
        "alpha_pattern": {"query": 2.5, "key": 3},
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "layers_to_transform": None,
        "layers_pattern": None,
        "trainable_token_indices": None,
        "lora_bias": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": ["classifier"],
    }


@pytest.mark.parametrize(
    ("name", "saved", "task"),
    [
        ("llama", None, "CAUSAL_LM"), ("gpt2", None, "CAUSAL_LM"), ("t5", None, "SEQ_2_SEQ_LM"),
        ("bert-mlm", None, None),
        ("bert-seq", None, None), ("bert-seq", ["classifier"], "SEQ_CLS"), ("bert-tok", ["classifier"], "TOKEN_CLS"),
        ("llama-seq", ["score"], "SEQ_CLS"), ("bart-seq", ["classification_head"], "SEQ_CLS"),
    ],
)  # fmt: skip
def test_task_types(name, saved, task, tmp_path):
    dw.save_adapter(dw.adapt(tiny.tiny(name), dw.LoRA(r=2, modules_to_save=saved)), tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["task_type"] == task


def test_several_adapters_in_subfolders_both_ways(tmp_path):
    from peft import LoraConfig

    theirs = peft_model("llama", dict(target_modules=["q_proj"]))
    theirs.add_adapter("law", LoraConfig(r=2, target_modules=["v_proj"], use_rslora=True))
    theirs.add_adapter("med", LoraConfig(r=3, target_modules=LLAMA_ALL))
    expected = {}
    for adapter in ("default", "law", "med"):
        theirs.set_adapter(adapter)
        for key, parameter in theirs.named_parameters():
            if f".{adapter}." in key:
                with torch.no_grad():
                    parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator(0, key)))
        expected[adapter] = tiny.logits(theirs, "llama")
    theirs.save_pretrained(tmp_path / "theirs")
    assert sorted(p.name for p in (tmp_path / "theirs").iterdir() if p.is_dir()) == ["law", "med"]
    model = tiny.tiny("llama")
    assert dw.load_adapters(model, tmp_path / "theirs") == ["default", "law", "med"]
    assert tiny.relative(tiny.logits(model, "llama"), expected["default"]) < 1e-5
    for adapter, logits in expected.items():
        dw.set_adapter(model, adapter)
        assert tiny.relative(tiny.logits(model, "llama"), logits) < 1e-5
    # Two of them active are their sum, as in PEFT.
    theirs.base_model.set_adapter(["law", "med"])
    dw.set_adapter(model, ["law", "med"])
    assert tiny.relative(tiny.logits(model, "llama"), tiny.logits(theirs, "llama")) < 1e-5
    dw.save_adapters(model, tmp_path / "ours")
    back = from_folder("llama", tmp_path / "ours")
    for adapter in ("law", "med"):
        back.load_adapter(tmp_path / "ours" / adapter, adapter_name=adapter)
    for adapter, logits in expected.items():
        back.set_adapter(adapter)
        assert tiny.relative(tiny.logits(back, "llama"), logits) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_file_keeps_its_bits(dtype, tmp_path):
    theirs = peft_model("llama", dict(target_modules=["q_proj"])).to(dtype)
    theirs.save_pretrained(tmp_path / "a")
    model = dw.load_adapter(tiny.tiny("llama"), tmp_path / "a", name="x")
    tiny.assert_same(adapter_state(model, "x"), load_file(tmp_path / "a" / "adapter_model.safetensors"))
    trained = dw.load_adapter(tiny.tiny("llama"), tmp_path / "a", name="x", trainable=True)
    assert {p.dtype for p in dw.adapter_parameters(trained, "x").values()} == {torch.float32}
    assert torch.equal(tiny.logits(model, "llama"), tiny.logits(trained, "llama"))


def test_a_base_read_in_another_dtype_still_fits_pefts_copy_of_its_embeddings(tmp_path):
    theirs = peft_model("llama", dict(target_modules=["embed_tokens", "q_proj"]))
    theirs.save_pretrained(tmp_path / "a")
    assert "base_model.model.model.embed_tokens.base_layer.weight" in load_file(
        tmp_path / "a/adapter_model.safetensors"
    )
    model = dw.load_adapter(tiny.tiny("llama", torch.bfloat16), tmp_path / "a")
    assert tiny.relative(tiny.logits(model, "llama"), tiny.logits(theirs, "llama")) < 5e-2
    other = tiny.tiny("llama")
    with torch.no_grad():
        other.model.embed_tokens.weight[3, 3] += 1
    with pytest.raises(dw.InputError, match=r"carries its own .*embed_tokens.*and the model's differs"):
        dw.load_adapter(other, tmp_path / "a")
    assert dw.adapter_names(other) == [] and not any("forward" in m.__dict__ for m in other.modules())


def test_merged_weights_equal_pefts(tmp_path):
    for name, targets in [("gpt2", ["c_attn", "wpe"]), ("llama", ["embed_tokens", *LLAMA_ALL])]:
        fields = dict(target_modules=targets)
        theirs = peft_model(name, fields)
        theirs.save_pretrained(tmp_path / name)
        model = dw.merge(dw.load_adapter(tiny.tiny(name), tmp_path / name))
        merged = theirs.merge_and_unload().state_dict()
        ours = model.state_dict()
        assert ours.keys() == merged.keys()
        for key in merged:
            torch.testing.assert_close(ours[key], merged[key], rtol=1e-6, atol=1e-6)


def test_trained_tokens_keep_the_bias_of_a_tied_head(tmp_path):
    """PEFT's own forward loses the bias of a tied head with trained tokens; its merged model has it, and so have we."""
    fields = dict(target_modules=["query"], trainable_token_indices={"word_embeddings": TOKENS})
    theirs = peft_model("bert-mlm", fields)
    theirs.save_pretrained(tmp_path / "a")
    model = dw.load_adapter(tiny.tiny("bert-mlm"), tmp_path / "a")
    tiny.assert_same(adapter_state(model, "a"), split_file(tmp_path / "a", "bert-mlm", model, "a"))
    assert tiny.relative(tiny.logits(model, "bert-mlm"), tiny.logits(theirs.merge_and_unload(), "bert-mlm")) < 1e-5


def test_the_zoo_has_modules_of_every_kind_peft_is_tried_on():
    kinds = {type(m) for name, _ in FIELDS.values() for m in tiny.tiny(name).modules()}
    assert {"Linear", "Conv1D", "Embedding", "LayerNorm", "LlamaRMSNorm"} <= {kind.__name__ for kind in kinds}
    assert all(issubclass(kind, nn.Module) for kind in kinds)
