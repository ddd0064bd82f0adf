"""The family table against expected module names written by hand, on tiny models of each architecture."""

import re

import pytest
import tiny
from torch import nn

from deltaw.models.families import FAMILIES, GROUPS, ROLES, names_of, roles_of
from deltaw.models.targets import resolve_targets

SELF = "self_attn."
LLAMA = dict(
    attention=[SELF + "q_proj", SELF + "k_proj", SELF + "v_proj", SELF + "o_proj"],
    mlp=["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
    qv=[SELF + "q_proj", SELF + "v_proj"],
)
LLAMA_LAYERS = r"model\.layers\.\d"
BERT = dict(
    attention=["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"],
    mlp=["intermediate.dense", "output.dense"],
    qv=["attention.self.query", "attention.self.value"],
)
GPT2 = dict(attention=["attn.c_attn", "attn.c_proj"], mlp=["mlp.c_fc", "mlp.c_proj"], qv=["attn.c_attn"])


def fused(attention):
    return dict(
        attention=[f"{attention}.query_key_value", f"{attention}.dense"],
        mlp=["mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
        qv=[f"{attention}.query_key_value"],
    )


def opt(attention, block, out="out_proj", up="fc1", down="fc2"):
    return dict(
        attention=[f"{attention}.{name}" for name in ("q_proj", "k_proj", "v_proj", out)],
        mlp=[f"{block}{up}", f"{block}{down}"],
        qv=[f"{attention}.q_proj", f"{attention}.v_proj"],
    )


def t5(inner):
    return dict(
        attention=[f"{kind}Attention.{role}" for kind in ("Self", "EncDec") for role in "qkvo"],
        mlp=[f"DenseReluDense.{name}" for name in inner],
        qv=[f"{kind}Attention.{role}" for kind in ("Self", "EncDec") for role in "qv"],
    )


#: Model of `tiny`: (regular expression of what stands before, names by group, other linears inside).
EXPECTED = {
    "llama": (LLAMA_LAYERS, LLAMA, []),
    "llama-seq": (LLAMA_LAYERS, LLAMA, []),
    "mistral": (LLAMA_LAYERS, LLAMA, []),
    "qwen2": (LLAMA_LAYERS, LLAMA, []),
    "qwen3": (LLAMA_LAYERS, LLAMA, []),
    "gemma": (LLAMA_LAYERS, LLAMA, []),
    "gemma3": (LLAMA_LAYERS, LLAMA, []),
    "glm4": (LLAMA_LAYERS, LLAMA | {"mlp": ["mlp.gate_up_proj", "mlp.down_proj"]}, []),
    "starcoder2": (LLAMA_LAYERS, LLAMA | {"mlp": ["mlp.c_fc", "mlp.c_proj"]}, []),
    "phi": (LLAMA_LAYERS, opt("self_attn", "mlp.", out="dense"), []),
    "phi3": (
        LLAMA_LAYERS,
        dict(
            attention=["self_attn.qkv_proj", "self_attn.o_proj"],
            mlp=["mlp.gate_up_proj", "mlp.down_proj"],
            qv=["self_attn.qkv_proj"],
        ),
        [],
    ),
    "falcon": (r"transformer\.h\.\d", fused("self_attention"), []),
    "bloom": (r"transformer\.h\.\d", fused("self_attention"), []),
    "gpt_neox": (r"gpt_neox\.layers\.\d", fused("attention"), []),
    "opt": (r"model\.decoder\.layers\.\d", opt("self_attn", ""), []),
    "gptj": (r"transformer\.h\.\d", opt("attn", "mlp.", up="fc_in", down="fc_out"), []),
    "codegen": (
        r"transformer\.h\.\d",
        dict(attention=["attn.qkv_proj", "attn.out_proj"], mlp=["mlp.fc_in", "mlp.fc_out"], qv=["attn.qkv_proj"]),
        [],
    ),
    "mpt": (
        r"transformer\.blocks\.\d",
        dict(attention=["attn.Wqkv", "attn.out_proj"], mlp=["ffn.up_proj", "ffn.down_proj"], qv=["attn.Wqkv"]),
        [],
    ),
    "gpt2": (r"transformer\.h\.\d", GPT2, []),
    "gpt_bigcode": (r"transformer\.h\.\d", GPT2, []),
    "bert-seq": (r"bert\.encoder\.layer\.\d", BERT, ["bert.pooler.dense"]),
    "bert-tok": (r"bert\.encoder\.layer\.\d", BERT, []),
    "bert-mlm": (r"bert\.encoder\.layer\.\d", BERT, ["cls.predictions.transform.dense"]),
    "roberta-seq": (r"roberta\.encoder\.layer\.\d", BERT, []),
    "electra": (r"electra\.encoder\.layer\.\d", BERT, []),
    "mpnet": (
        r"mpnet\.encoder\.layer\.\d",
        dict(
            attention=[f"attention.attn.{role}" for role in "qkvo"],
            mlp=["intermediate.dense", "output.dense"],
            qv=["attention.attn.q", "attention.attn.v"],
        ),
        [],
    ),
    "deberta-v2": (
        r"deberta\.encoder\.layer\.\d",
        dict(
            attention=[
                *(f"attention.self.{role}_proj" for role in ("query", "key", "value")),
                "attention.output.dense",
            ],
            mlp=["intermediate.dense", "output.dense"],
            qv=["attention.self.query_proj", "attention.self.value_proj"],
        ),
        ["pooler.dense"],
    ),
    "albert": (
        r"albert\.encoder\.albert_layer_groups\.0\.albert_layers\.0",
        dict(
            attention=[f"attention.{name}" for name in ("query", "key", "value", "dense")],
            mlp=["ffn", "ffn_output"],
            qv=["attention.query", "attention.value"],
        ),
        ["albert.encoder.embedding_hidden_mapping_in", "albert.pooler"],
    ),
    "distilbert-seq": (
        r"distilbert\.transformer\.layer\.\d",
        dict(
            attention=[f"attention.{name}_lin" for name in ("q", "k", "v", "out")],
            mlp=["ffn.lin1", "ffn.lin2"],
            qv=["attention.q_lin", "attention.v_lin"],
        ),
        [],
    ),
    "modernbert": (
        r"model\.layers\.\d",
        dict(attention=["attn.Wqkv", "attn.Wo"], mlp=["mlp.Wi", "mlp.Wo"], qv=["attn.Wqkv"]),
        ["head.dense"],
    ),
    "t5": (r"(?:en|de)coder\.block\.\d\.layer\.\d", t5(["wi", "wo"]), []),
    "t5-gated": (r"(?:en|de)coder\.block\.\d\.layer\.\d", t5(["wi_0", "wi_1", "wo"]), []),
    "bart-seq": (
        r"model\.(?:en|de)coder\.layers\.\d",
        {
            group: [*names, *(n.replace("self_attn", "encoder_attn") for n in names if "attn" in n)]
            for group, names in opt("self_attn", "").items()
        },
        [],
    ),
}
#: Layers that have a name: two layers of each, unless it says otherwise.
COUNTS = {"albert": lambda name: 1, "t5": None, "t5-gated": None, "bart-seq": None}


def found(name, group):
    return [site.name for site in resolve_targets(tiny.tiny(name), group)]


@pytest.mark.parametrize("name", EXPECTED)
def test_groups_give_exactly_the_modules_of_the_architecture(name):
    before, groups, others = EXPECTED[name]
    modules = dict(tiny.tiny(name).named_modules())
    union = set(others)
    for group in ("attention", "mlp", "qv"):
        expected = {
            path
            for path in modules
            if any(re.fullmatch(rf"{before}\.{re.escape(suffix)}", path) for suffix in groups[group])
        }
        # Every name of the list stands in the model, in each of its layers where nothing else is known.
        for suffix in groups[group]:
            count = sum(path.endswith("." + suffix) and path in expected for path in expected)
            assert count == 2 or (name in COUNTS and count), (suffix, count)
        assert set(found(name, group)) == expected, group
        union |= expected
    assert set(found(name, "all-linear")) == union


def test_every_model_of_the_zoo_has_an_expectation():
    assert set(tiny.MODELS) - {"llama-tied", "llama-bias"} == set(EXPECTED)


def test_sites_come_in_the_models_order_with_their_shapes():
    sites = resolve_targets(tiny.tiny("gpt2"), "all-linear")
    assert [site.name for site in sites[:4]] == [
        f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    assert [(site.kind, site.shape) for site in sites[:3]] == [
        ("conv1d", (48, 16)), ("conv1d", (16, 16)), ("conv1d", (64, 16)),
    ]  # fmt: skip


def test_table_is_of_known_roles():
    for family, names in FAMILIES.items():
        roles = [role for found in names.values() for role in found]
        assert set(roles) <= set(ROLES) and {"query", "value", "output", "down"} <= set(roles), family
    assert {role for roles in GROUPS.values() for role in roles} == set(ROLES)


def test_the_longest_suffix_wins():
    names, known = names_of("bert")
    assert known
    assert roles_of("bert.encoder.layer.0.attention.output.dense", names) == ("output",)
    assert roles_of("bert.encoder.layer.0.output.dense", names) == ("down",)
    assert roles_of("bert.pooler.dense", names) == ()
    # A name must be whole: `fc1` is no ending of `myfc1`.
    assert roles_of("layers.0.myfc1", names_of("opt")[0]) == ()


class Block(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.attn = nn.ModuleDict({"to_q": nn.Linear(4, 4), "to_out": nn.Linear(4, 4)})
        self.ffn = nn.ModuleDict({"w1": nn.Linear(4, inner), "w2": nn.Linear(inner, 4)})
        self.norm = nn.LayerNorm(4)


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.blocks = nn.ModuleList([Block(6), Block(6)])
        self.head = nn.Linear(4, 8)


def test_an_unknown_architecture_is_inspected_by_its_names():
    model = Custom()
    names = lambda target: [site.name for site in resolve_targets(model, target)]  # noqa: E731
    assert names("attention") == [f"blocks.{i}.attn.{n}" for i in range(2) for n in ("to_q", "to_out")]
    assert names("mlp") == [f"blocks.{i}.ffn.{n}" for i in range(2) for n in ("w1", "w2")]
    assert len(names("all-linear")) == 9


def test_an_unknown_model_type_with_known_names_is_found():
    model = tiny.tiny("llama")
    model.config.model_type = "llama_from_the_future"
    assert [site.name for site in resolve_targets(model, "qv")] == [
        f"model.layers.{i}.self_attn.{n}" for i in range(2) for n in ("q_proj", "v_proj")
    ]
