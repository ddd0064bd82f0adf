"""The family table: which module of an architecture plays which role in a transformer block.

Roles are query, key, value, output (attention) and up, gate, down (MLP). A fused projection plays several roles at
once (GPT-2's `c_attn` is query, key and value). Entries are path suffixes, longest match first, since BERT calls both
the attention's output and the MLP's `output.dense`.
"""

from __future__ import annotations

ATTENTION = ("query", "key", "value", "output")
MLP = ("up", "gate", "down")
ROLES = (*ATTENTION, *MLP)

#: Named groups of roles that `target_modules` accepts.
GROUPS: dict[str, tuple[str, ...]] = {"attention": ATTENTION, "mlp": MLP, "qv": ("query", "value")}

Names = dict[str, tuple[str, ...]]

_LLAMA: Names = {
    "q_proj": ("query",),
    "k_proj": ("key",),
    "v_proj": ("value",),
    "o_proj": ("output",),
    "up_proj": ("up",),
    "gate_proj": ("gate",),
    "down_proj": ("down",),
}
_BERT: Names = {
    "attention.self.query": ("query",),
    "attention.self.key": ("key",),
    "attention.self.value": ("value",),
    "crossattention.self.query": ("query",),
    "crossattention.self.key": ("key",),
    "crossattention.self.value": ("value",),
    "attention.output.dense": ("output",),
    "crossattention.output.dense": ("output",),
    "intermediate.dense": ("up",),
    "output.dense": ("down",),
}
_FUSED_QKV: Names = {
    "query_key_value": ("query", "key", "value"),
    "attention.dense": ("output",),
    "self_attention.dense": ("output",),
    "mlp.dense_h_to_4h": ("up",),
    "mlp.dense_4h_to_h": ("down",),
}
_GPT2: Names = {
    "attn.c_attn": ("query", "key", "value"),
    "attn.c_proj": ("output",),
    "crossattention.q_attn": ("query",),
    "crossattention.c_attn": ("key", "value"),
    "crossattention.c_proj": ("output",),
    "mlp.c_fc": ("up",),
    "mlp.c_proj": ("down",),
}
_PHI: Names = {
    "q_proj": ("query",),
    "k_proj": ("key",),
    "v_proj": ("value",),
    "self_attn.dense": ("output",),
    "mlp.fc1": ("up",),
    "mlp.fc2": ("down",),
}
_PHI3: Names = {
    "qkv_proj": ("query", "key", "value"),
    "o_proj": ("output",),
    "gate_up_proj": ("up", "gate"),
    "down_proj": ("down",),
}
_T5: Names = {
    "SelfAttention.q": ("query",),
    "SelfAttention.k": ("key",),
    "SelfAttention.v": ("value",),
    "SelfAttention.o": ("output",),
    "EncDecAttention.q": ("query",),
    "EncDecAttention.k": ("key",),
    "EncDecAttention.v": ("value",),
    "EncDecAttention.o": ("output",),
    "DenseReluDense.wi": ("up",),
    "DenseReluDense.wi_0": ("gate",),
    "DenseReluDense.wi_1": ("up",),
    "DenseReluDense.wo": ("down",),
}
_DISTILBERT: Names = {
    "attention.q_lin": ("query",),
    "attention.k_lin": ("key",),
    "attention.v_lin": ("value",),
    "attention.out_lin": ("output",),
    "ffn.lin1": ("up",),
    "ffn.lin2": ("down",),
}
_OPT: Names = {
    "q_proj": ("query",),
    "k_proj": ("key",),
    "v_proj": ("value",),
    "out_proj": ("output",),
    "fc1": ("up",),
    "fc2": ("down",),
}
_GPTJ: Names = {
    "q_proj": ("query",),
    "k_proj": ("key",),
    "v_proj": ("value",),
    "out_proj": ("output",),
    "fc_in": ("up",),
    "fc_out": ("down",),
}
_MODERNBERT: Names = {
    "attn.Wqkv": ("query", "key", "value"),
    "attn.Wo": ("output",),
    "mlp.Wi": ("up", "gate"),
    "mlp.Wo": ("down",),
}
_MPT: Names = {
    "attn.Wqkv": ("query", "key", "value"),
    "attn.out_proj": ("output",),
    "ffn.up_proj": ("up",),
    "ffn.down_proj": ("down",),
}
_DEBERTA: Names = {
    "query_proj": ("query",),
    "key_proj": ("key",),
    "value_proj": ("value",),
    "in_proj": ("query", "key", "value"),
    "attention.output.dense": ("output",),
    "intermediate.dense": ("up",),
    "output.dense": ("down",),
}

#: transformers' `config.model_type` to path suffixes and the roles they play.
FAMILIES: dict[str, Names] = {
    **dict.fromkeys(
        (
            "llama",
            "mistral",
            "mixtral",
            "qwen2",
            "qwen2_moe",
            "qwen3",
            "qwen3_moe",
            "smollm3",
            "gemma",
            "gemma2",
            "gemma3",
            "gemma3_text",
            "cohere",
            "cohere2",
            "granite",
            "olmo",
            "olmo2",
            "olmo3",
            "stablelm",
            "starcoder2",
            "deepseek_v3",
            "gpt_oss",
            "ministral",
            "ministral3",
        ),
        _LLAMA,
    ),
    **dict.fromkeys(
        ("bert", "roberta", "xlm-roberta", "camembert", "electra", "ernie", "mpnet", "layoutlm", "albert"), _BERT
    ),
    **dict.fromkeys(("falcon", "gpt_neox", "bloom"), _FUSED_QKV),
    **dict.fromkeys(("deberta", "deberta-v2"), _DEBERTA),
    **dict.fromkeys(("t5", "mt5", "umt5", "longt5", "switch_transformers"), _T5),
    **dict.fromkeys(("opt", "bart", "mbart", "pegasus", "whisper"), _OPT),
    "phi3": _PHI3,
    "phi": _PHI,
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gptj": _GPTJ,
    "codegen": {**_GPTJ, "qkv_proj": ("query", "key", "value")},
    "distilbert": _DISTILBERT,
    "modernbert": _MODERNBERT,
    "mpt": _MPT,
}
FAMILIES["glm"] = FAMILIES["glm4"] = {**_LLAMA, "gate_up_proj": ("up", "gate")}
FAMILIES["starcoder2"] = {**_LLAMA, "mlp.c_fc": ("up",), "mlp.c_proj": ("down",)}
FAMILIES["mpnet"] = {
    "attention.attn.q": ("query",),
    "attention.attn.k": ("key",),
    "attention.attn.v": ("value",),
    "attention.attn.o": ("output",),
    "intermediate.dense": ("up",),
    "output.dense": ("down",),
}
FAMILIES["albert"] = {
    "attention.query": ("query",),
    "attention.key": ("key",),
    "attention.value": ("value",),
    "attention.dense": ("output",),
    "ffn": ("up",),
    "ffn_output": ("down",),
}


def _union() -> Names:
    """Every name of the table; where families disagree (fused or not), the roles of the first win."""
    names: Names = {}
    for family in (_LLAMA, _GPT2, _BERT, _FUSED_QKV, _PHI3, _PHI, _OPT, _GPTJ, _T5, _DISTILBERT, _MODERNBERT, _DEBERTA):
        for suffix, roles in family.items():
            names.setdefault(suffix, roles)
    return names


_ANY = _union()


def names_of(model_type: str | None) -> tuple[Names, bool]:
    """The suffix table for an architecture, and whether the family is known (False: every known name is tried)."""
    if model_type in FAMILIES:
        return FAMILIES[model_type], True
    return _ANY, False


def roles_of(path: str, names: Names) -> tuple[str, ...]:
    """The roles that the module at `path` plays, by its longest matching suffix; () where none matches."""
    best: tuple[str, ...] = ()
    length = 0
    for suffix, roles in names.items():
        if len(suffix) > length and (path == suffix or path.endswith("." + suffix)):
            best, length = roles, len(suffix)
    return best
