"""What every registered method is tried with: a method without a line here fails the suite."""

from dataclasses import dataclass
from typing import Any

from deltaw.methods import AdaLoRA, BitFit, Bottleneck, DoRA, Full, LoRA, PrefixTuning


@dataclass(frozen=True)
class Case:
    """A configuration and a model of `tiny` to put it on.

    Attributes:
        model: name in `tiny.MODELS`.
        config: the method's configuration.
        counted: every trained parameter is of a site, so that `param_count` tells the sum.
        adds: several such adapters can be active at once (none trains a whole copy of a module).
        drawn: the seed decides what some trained parameter starts from.
        dense: the adapted model is the plain one with other weights, which a merge can write.
        recomputes: goes with gradient checkpointing.
    """

    model: str
    config: Any
    counted: bool = True
    adds: bool = True
    drawn: bool = True
    dense: bool = True
    recomputes: bool = True


def _lora(model: str, *, counted: bool = True, adds: bool = True, drawn: bool = True, **options: Any) -> Case:
    return Case(model, LoRA(**{"r": 4, "alpha": 6.0} | options), counted, adds, drawn)


def _dora(model: str, *, counted: bool = True, adds: bool = True, drawn: bool = True, **options: Any) -> Case:
    return Case(model, DoRA(**{"r": 4, "alpha": 6.0} | options), counted, adds, drawn)


def _adalora(model: str, *, counted: bool = True, adds: bool = True, **options: Any) -> Case:
    return Case(model, AdaLoRA(**{"init_r": 4, "target_r": 2, "alpha": 6.0} | options), counted, adds)


HEADS = ["q_proj", "embed_tokens", "lm_head"]
#: Tokens that `tiny.inputs` has, in no order.
TOKENS = [36, 10, 21]

CASES: dict[str, dict[str, Case]] = {
    "lora": {
        "linear": _lora("llama"),
        "rslora-gaussian": _lora("qwen3", rslora=True, init="gaussian", target_modules="attention"),
        "conv1d": _lora("gpt2"),
        "embedding-and-untied-head": _lora("llama", target_modules=HEADS),
        "embedding-and-tied-head": _lora("llama-tied", target_modules=HEADS),
        "scaled-embedding": _lora("gemma3", target_modules=["embed_tokens", "mlp"]),
        "patterns": _lora(
            "llama",
            counted=False,
            target_modules=["attention", r".*\.mlp\..*"],
            exclude_modules=["k_proj"],
            rank_pattern={"layers.0.self_attn.q_proj": 2, "down_proj": 7},
            alpha_pattern={r"layers\.\d+\.mlp\.up_proj": 3.0},
            layers_to_transform=[0],
        ),
        "lora-bias": _lora("llama-bias", lora_bias=True),
        "biases-of-sites": _lora("gpt2", counted=False, bias="lora_only", target_modules="attention"),
        "all-biases": _lora("bert-mlm", counted=False, bias="all", target_modules="qv"),
        "new-classifier": _lora("llama-seq", counted=False, adds=False, modules_to_save=["score", "norm"]),
        "tokens": _lora("llama", counted=False, trainable_tokens=[TOKENS[2], TOKENS[0], 4]),
        "tied-tokens": _lora("gpt2", counted=False, trainable_tokens={"wte": TOKENS[:2]}),
        "tied-tokens-of-an-encoder-decoder": _lora("t5", counted=False, trainable_tokens=TOKENS[:2]),
        "much-at-once": _lora(
            "bert-tok",
            counted=False,
            adds=False,
            target_modules=["attention", "word_embeddings", "bert.encoder.layer.1.output.dense"],
            bias="lora_only",
            modules_to_save=["classifier", "embeddings.LayerNorm"],
            trainable_tokens={"position_embeddings": [1, 0]},
            rank_pattern={"query": 3},
            rslora=True,
        ),
        "pissa": _lora("llama", init="pissa", drawn=False),
        "pissa-iterated": _lora("gpt2", init="pissa_niter_2", alpha=2, rslora=True, dropout=0.3, drawn=False),
        "pissa-embedding-and-tied-head": _lora("llama-tied", init="pissa", target_modules=HEADS, drawn=False),
        "olora": _lora("gpt2", init="olora", drawn=False),
        "olora-biased": _lora("llama-bias", init="olora", lora_bias=True, target_modules="mlp", drawn=False),
        "frozen-a": _lora("llama", freeze_a=True, target_modules=HEADS, drawn=False),
        "frozen-a-of-the-base": _lora("gpt2", freeze_a=True, init="pissa", drawn=False),
        "dropout": _lora("gpt2", dropout=0.3),
        "encoder": _lora("bert-seq", dropout=0.1, counted=False, adds=False, modules_to_save=["classifier"]),
    },
    "dora": {
        "linear": _dora("llama"),
        "rsdora-gaussian": _dora("qwen3", rslora=True, init="gaussian", target_modules="attention"),
        "conv1d": _dora("gpt2"),
        "embedding-and-untied-head": _dora("llama", target_modules=HEADS),
        "embedding-and-tied-head": _dora("llama-tied", target_modules=HEADS),
        "scaled-embedding": _dora("gemma3", target_modules=["embed_tokens", "mlp"]),
        "biased": _dora("llama-bias", rank_pattern={"q_proj": 2}, counted=False),
        "biases-of-sites": _dora("gpt2", counted=False, bias="lora_only", target_modules="attention"),
        "tokens": _dora("llama", counted=False, trainable_tokens=[TOKENS[2], TOKENS[0], 4]),
        "pissa": _dora("llama", init="pissa", drawn=False),
        "olora-frozen-a": _dora("gpt2", init="olora", freeze_a=True, counted=False, drawn=False),
        "encoder-with-dropout": _dora(
            "bert-seq", dropout=0.1, counted=False, adds=False, modules_to_save=["classifier"]
        ),
    },
    "adalora": {
        "linear": _adalora("llama"),
        "conv1d": _adalora("gpt2"),
        "ranks": _adalora("llama", counted=False, rank_pattern={"q_proj": 2, "layers.0.mlp.up_proj": 1}),
        "biases-of-sites": _adalora("gpt2", counted=False, bias="lora_only", target_modules="attention"),
        "tokens": _adalora("llama", counted=False, trainable_tokens=[TOKENS[2], TOKENS[0], 4]),
        "dropout": _adalora("gpt2", dropout=0.3),
        "encoder": _adalora("bert-seq", dropout=0.1, counted=False, adds=False, modules_to_save=["classifier"]),
    },
    "bitfit": {
        "linear": Case("llama-bias", BitFit(), counted=False, drawn=False),
        "conv1d": Case("gpt2", BitFit(), counted=False, drawn=False),
        "encoder": Case("bert-seq", BitFit(modules_to_save=["classifier"]), counted=False, adds=False, drawn=False),
        "new-biases": Case("llama", BitFit(add_missing=True), dense=False, drawn=False),
        "new-biases-of-some": Case(
            "qwen2",
            BitFit(add_missing=True, target_modules=["attention"], layers_to_transform=[1]),
            counted=False,
            dense=False,
            drawn=False,
        ),
    },
    "bottleneck": {
        "linear": Case("llama", Bottleneck(bottleneck_dim=4), dense=False),
        "conv1d": Case("gpt2", Bottleneck(reduction_factor=4, activation="tanh", dropout=0.3), dense=False),
        "encoder": Case(
            "bert-seq",
            Bottleneck(bottleneck_dim=4, modules_to_save=["classifier"], layers_to_transform=[1]),
            counted=False,
            adds=False,
            dense=False,
        ),
        "encoder-decoder": Case("t5", Bottleneck(bottleneck_dim=4, activation="relu"), dense=False),
        "named": Case("llama", Bottleneck(bottleneck_dim=4, target_modules=["q_proj", "mlp"]), dense=False),
    },
    "prefix": {
        "rotary": Case("llama", PrefixTuning(3), counted=False, dense=False, recomputes=False),
        "learned-positions": Case("gpt2", PrefixTuning(4), counted=False, dense=False, recomputes=False),
        "classifier": Case(
            "llama-seq",
            PrefixTuning(3, modules_to_save=["score"]),
            counted=False,
            adds=False,
            dense=False,
            recomputes=False,
        ),
    },
    "full": {"llama": Case("llama", Full(), counted=False), "gpt2": Case("gpt2", Full(), counted=False)},
}
