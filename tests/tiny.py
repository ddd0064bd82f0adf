"""Tiny random models of real architectures, the same values every time, and a few helpers to compare with."""

import copy
import functools

import torch

from deltaw.core.generators import generator

VOCAB = 48
_LLAMA = dict(
    vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    tie_word_embeddings=False, attention_dropout=0.0,
)  # fmt: skip
_BERT = dict(
    vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3,
    pad_token_id=0, type_vocab_size=2,
)  # fmt: skip
_GPT2 = dict(
    vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=64, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
    bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
_T5 = dict(
    vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0.0, pad_token_id=0,
    eos_token_id=1, decoder_start_token_id=0,
)  # fmt: skip
_DISTILBERT = dict(
    vocab_size=VOCAB, dim=16, hidden_dim=24, n_layers=2, n_heads=2, max_position_embeddings=64, dropout=0.0,
    attention_dropout=0.0, seq_classif_dropout=0.0, num_labels=3, pad_token_id=0,
)  # fmt: skip
_BART = dict(
    vocab_size=VOCAB, d_model=16, encoder_ffn_dim=24, decoder_ffn_dim=24, encoder_layers=2, decoder_layers=2,
    encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=64, dropout=0.0, num_labels=3,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
)  # fmt: skip

_MODERN = dict(attention_dropout=0.0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)

#: Name: transformers' configuration class before `Config`, model class after the same prefix, options.
MODELS = {
    "llama": ("Llama", "ForCausalLM", _LLAMA),
    "llama-tied": ("Llama", "ForCausalLM", _LLAMA | {"tie_word_embeddings": True}),
    "llama-bias": ("Llama", "ForCausalLM", _LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "llama-seq": ("Llama", "ForSequenceClassification", _LLAMA | {"num_labels": 3}),
    "mistral": ("Mistral", "ForCausalLM", _LLAMA),
    "qwen2": ("Qwen2", "ForCausalLM", _LLAMA),
    "qwen3": ("Qwen3", "ForCausalLM", _LLAMA | {"tie_word_embeddings": True}),
    "gemma": ("Gemma", "ForCausalLM", _LLAMA | {"tie_word_embeddings": True}),
    "gemma3": ("Gemma3", "ForCausalLM", _LLAMA | {"tie_word_embeddings": True}),
    "phi": ("Phi", "ForCausalLM", _LLAMA | {"num_key_value_heads": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "phi3": ("Phi3", "ForCausalLM", _LLAMA | {"resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "glm4": ("Glm4", "ForCausalLM", _LLAMA),
    "starcoder2": ("Starcoder2", "ForCausalLM", _LLAMA | {"embedding_dropout": 0.0, "residual_dropout": 0.0}),
    "falcon": ("Falcon", "ForCausalLM", {k: v for k, v in _LLAMA.items() if k != "head_dim"}),
    "gpt_neox": ("GPTNeoX", "ForCausalLM", {k: v for k, v in _LLAMA.items() if k != "head_dim"}),
    "bloom": ("Bloom", "ForCausalLM", dict(vocab_size=VOCAB, hidden_size=16, n_layer=2, n_head=2)),
    "opt": ("OPT", "ForCausalLM", _LLAMA | {"ffn_dim": 24, "word_embed_proj_dim": 16, "dropout": 0.0}),
    "mpt": ("Mpt", "ForCausalLM", dict(vocab_size=VOCAB, d_model=16, n_layers=2, n_heads=2, max_seq_len=64)),
    "gptj": ("GPTJ", "ForCausalLM", _GPT2 | {"rotary_dim": 4}),
    "codegen": ("CodeGen", "ForCausalLM", _GPT2 | {"rotary_dim": 2, "n_head": 4}),
    "gpt_bigcode": ("GPTBigCode", "ForCausalLM", _GPT2),
    "gpt2": ("GPT2", "LMHeadModel", _GPT2),
    "bert-seq": ("Bert", "ForSequenceClassification", _BERT),
    "bert-tok": ("Bert", "ForTokenClassification", _BERT),
    "bert-mlm": ("Bert", "ForMaskedLM", _BERT),
    "roberta-seq": ("Roberta", "ForSequenceClassification", _BERT),
    "electra": ("Electra", "ForTokenClassification", _BERT | {"embedding_size": 16}),
    "albert": ("Albert", "ForSequenceClassification", _BERT | {"embedding_size": 16, "classifier_dropout_prob": 0.0}),
    "mpnet": ("MPNet", "ForSequenceClassification", _BERT),
    "deberta-v2": ("DebertaV2", "ForSequenceClassification", _BERT | {"pooler_hidden_size": 16, "pooler_dropout": 0.0}),
    "distilbert-seq": ("DistilBert", "ForSequenceClassification", _DISTILBERT),
    "modernbert": ("ModernBert", "ForMaskedLM", _BERT | _MODERN),
    "t5": ("T5", "ForConditionalGeneration", _T5),
    "t5-gated": ("T5", "ForConditionalGeneration", _T5 | {"feed_forward_proj": "gated-gelu"}),
    "bart-seq": ("Bart", "ForSequenceClassification", _BART),
}  # fmt: skip


@functools.cache
def _pristine(name):
    import transformers

    prefix, suffix, options = MODELS[name]
    prefix_of_config = "Gemma3Text" if prefix == "Gemma3" else prefix
    config = getattr(transformers, f"{prefix_of_config}Config")(**options)
    with torch.random.fork_rng(devices=[]):
        model = getattr(transformers, f"{prefix}{suffix}")(config)
    draw(model, 0, name)
    return model.eval()


def draw(model, seed, *names, std=0.3):
    """Fills every parameter with normal values, norms' around what they were; the same for a seed and names."""
    generated = generator(seed, *names)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generated).to(parameter.dtype)
            parameter.copy_(std * noise if parameter.dim() > 1 else parameter + 0.1 * noise)


def tiny(name, dtype=torch.float32):
    """A model of its own, in eval mode; the same values every time."""
    return copy.deepcopy(_pristine(name)).to(dtype)


def inputs(name, batch=2, length=7):
    """Keyword arguments for a forward pass, without labels."""
    ids = torch.randint(3, VOCAB, (batch, length), generator=generator(0, "inputs"))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name.startswith("t5"):
        given["decoder_input_ids"] = ids.flip(1)
    if name == "bart-seq":
        given["input_ids"][:, -1] = 2
    return given


def labels(name, given):
    """Labels that fit the model's loss."""
    ids = given["input_ids"]
    if name.endswith("-seq"):
        return torch.arange(len(ids)) % 3
    return ids % 3 if name.endswith("-tok") else ids


def logits(model, name, **changes):
    """The logits of `inputs(name)`."""
    with torch.no_grad():
        return model(**inputs(name) | changes).logits


def randomise(model, adapter="default", std=0.2, seed=1):
    """Fills an adapter's parameters with normal values, so that nothing is zero and nothing is tiny."""
    import deltaw as dw

    for key, parameter in dw.adapter_parameters(model, adapter).items():
        noise = torch.randn(parameter.shape, generator=generator(seed, adapter, key))
        with torch.no_grad():
            parameter.add_((std * noise).to(parameter.dtype))
    return model


def base_state(model):
    """A copy of the base's own tensors by name, adapters' left out; tied ones under every name."""
    return {k: v.clone() for k, v in model.state_dict().items() if "adapted" not in k.split(".")}


def assert_same(first, second):
    """Two dicts of tensors: the same keys, dtypes and bits."""
    assert first.keys() == second.keys()
    for key in first:
        assert first[key].dtype == second[key].dtype, key
        assert torch.equal(first[key], second[key]), key


def relative(got, expected):
    """|got - expected| / |expected|, in float64."""
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm())
