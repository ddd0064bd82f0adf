"""Tiny random models of every shape that scoring has to get right, and a tokenizer for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from deltaw.core.generators import generator

VOCABULARY = 48
PAD = 0
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = COMMON | {"num_key_value_heads": 2, "head_dim": 8}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_positions": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOWED = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.3,
    "pad_token_id": PAD,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", GROUPED),
    "llama-eager": ("Llama", GROUPED | {"attn_implementation": "eager"}),
    "gpt2": ("GPT2", GPT2),
    "gemma2": ("Gemma2", GROUPED | WINDOWED | {"final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3", GROUPED | WINDOWED),
    "mistral": ("Mistral", GROUPED | {"sliding_window": 4}),
    "qwen3": ("Qwen3", GROUPED),
    "gpt-neox": ("GPTNeoX", COMMON),
    "phi": ("Phi", COMMON),
    "falcon-alibi": ("Falcon", COMMON | {"alibi": True, "new_decoder_architecture": False}),
    "opt": ("OPT", COMMON | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    # No cache that could be continued: no position ids, offset positions, recurrent states.
    "bloom": ("Bloom", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4, "pad_token_id": PAD}),
    "roberta": ("Roberta", COMMON | {"is_decoder": True, "pad_token_id": 1}),
    "mamba": (
        "Mamba",
        {"vocab_size": VOCABULARY, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "pad_token_id": PAD},
    ),
}
SEQ2SEQ = {"t5": ("T5", T5), "bart": ("Bart", BART)}
HEADED = {
    "llama": ("Llama", GROUPED),
    "gpt2": ("GPT2", GPT2),
    "qwen3": ("Qwen3", GROUPED),
    "bert": ("Bert", COMMON),
    "t5": ("T5", T5),
}
CONFIGS = {"Gemma3": "Gemma3TextConfig"}


def fill(model: torch.nn.Module, name: str) -> torch.nn.Module:
    """Weights big enough that attending to a wrong column changes the logits; norms near one, biases near zero."""
    drawn = generator(7, name)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=drawn)
            if key.endswith("bias"):
                parameter.copy_(0.02 * noise)
            else:
                parameter.copy_(1 + 0.1 * noise if parameter.ndim == 1 else 0.3 * noise)
    return model


def build(family: str, settings: dict[str, Any], head: str, **more: Any) -> Any:
    settings = dict(settings | more)
    config = getattr(transformers, CONFIGS.get(family, f"{family}Config"))(**settings)
    return fill(getattr(transformers, f"{family}{head}")(config), f"{family}{head}").eval()


@pytest.fixture
def causal():
    def make(name: str, **more: Any) -> Any:
        family, settings = CAUSAL[name]
        return build(family, settings, "LMHeadModel" if family == "GPT2" else "ForCausalLM", **more)

    return make


@pytest.fixture
def seq2seq():
    return lambda name: build(*SEQ2SEQ[name], "ForConditionalGeneration")


@pytest.fixture
def headed():
    return lambda name, head, **more: build(*HEADED[name], head, **more)


@pytest.fixture(scope="session")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(4, VOCABULARY))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture
def rows():
    """Token rows of the given lengths, none of them a special token, after a common prefix."""

    def make(lengths: list[int], *, prefix: int = 0, name: str = "rows") -> list[list[int]]:
        drawn = generator(3, name)

        def draw(count: int) -> list[int]:
            return torch.randint(4, VOCABULARY, (count,), generator=drawn).tolist()

        start = draw(prefix)
        return [start + draw(length) for length in lengths]

    return make
