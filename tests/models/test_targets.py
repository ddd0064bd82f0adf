"""Names, regular expressions, layers and what is left out; and the way back to names for other programs."""

import pytest
import tiny
import torch
from torch import nn

from deltaw.core.errors import InputError
from deltaw.models.sites import base_modules, kind_of, output_head, site_of, task_heads
from deltaw.models.targets import pattern_value, peft_targets, resolve_targets, shortest_names

Q = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
V = [f"model.layers.{i}.self_attn.v_proj" for i in range(2)]


@pytest.fixture(scope="module")
def llama():
    return tiny.tiny("llama")


@pytest.fixture(scope="module")
def bert():
    return tiny.tiny("bert-seq")


def names(model, target, **options):
    return [site.name for site in resolve_targets(model, target, **options)]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("q_proj", Q),
        (["v_proj", "q_proj"], [Q[0], V[0], Q[1], V[1]]),
        (("self_attn.q_proj",), Q),
        (Q[1], [Q[1]]),
        (r".*\.self_attn\.(q|v)_proj", [Q[0], V[0], Q[1], V[1]]),
        (r"model\.layers\.1\.self_attn\.q_proj", [Q[1]]),
        (["qv", "lm_head"], [Q[0], V[0], Q[1], V[1], "lm_head"]),
        ("embed_tokens", ["model.embed_tokens"]),
        (r".*embed.*", ["model.embed_tokens"]),
        (["q_proj", "q_proj", Q[0]], Q),
    ],
)
def test_names_and_regular_expressions(llama, target, expected):
    assert names(llama, target) == expected


def test_the_same_last_name_is_told_apart_by_path(bert):
    layers = [f"bert.encoder.layer.{i}" for i in range(2)]
    assert names(bert, "attention.output.dense") == [f"{layer}.attention.output.dense" for layer in layers]
    assert len(names(bert, "output.dense")) == 4
    assert len(names(bert, "dense")) == 7


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("q_prj", "target 'q_prj' matches no module of LlamaForCausalLM: near names are q_proj"),
        ("atention", "near names are attention"),
        (["q_proj", "wrong_name_"], "target 'wrong_name_' matches no module"),
        (r".*\.nothing", "matches no module"),
        ("(", "matches no module"),
        (
            "self_attn",
            "it is a LlamaAttention, not a linear, Conv1D or embedding; name one of its parts instead: q_proj",
        ),
        ("input_layernorm", "is a LlamaRMSNorm, not a linear"),
        ([], "expected groups, names or regular expressions"),
        ("", "expected groups, names or regular expressions"),
        ([1], "expected groups, names or regular expressions"),
    ],
)
def test_what_matches_nothing_is_an_error_of_one_line(llama, target, message):
    with pytest.raises(InputError) as caught:
        resolve_targets(llama, target)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_exclusions(llama):
    assert names(llama, "qv", exclude_modules="v_proj") == Q
    assert names(llama, "qv", exclude_modules=["v_proj", Q[0]]) == [Q[1]]
    assert names(llama, "qv", exclude_modules=r".*layers\.0.*") == [Q[1], V[1]]
    # A name that stands elsewhere in the model is no mistake.
    assert names(llama, "qv", exclude_modules="lm_head") == [Q[0], V[0], Q[1], V[1]]
    with pytest.raises(
        InputError, match="unknown module of LlamaForCausalLM to exclude 'v_prj': did you mean 'v_proj'"
    ):
        names(llama, "qv", exclude_modules="v_prj")
    with pytest.raises(InputError, match="leaves no module after exclude_modules"):
        names(llama, "q_proj", exclude_modules="q_proj")


def test_layers(llama):
    assert names(llama, "q_proj", layers_to_transform=1) == [Q[1]]
    assert names(llama, "q_proj", layers_to_transform=[0, 1]) == Q
    assert names(llama, "q_proj", layers_to_transform=[0], layers_pattern="layers") == [Q[0]]
    assert names(llama, ["q_proj", "lm_head"], layers_to_transform=[0], layers_pattern=["h", "layers"]) == [Q[0]]
    for layers in (2, [0, 2], -1):
        with pytest.raises(InputError, match=r"layers_to_transform -?\d: the layers that hold a target are \[0, 1\]"):
            names(llama, "q_proj", layers_to_transform=layers)
    with pytest.raises(InputError, match="layers_to_transform"):
        names(llama, "q_proj", layers_to_transform=[0], layers_pattern="h")


def test_the_first_number_of_a_path_is_the_layer():
    def layer(experts):
        inner = [nn.ModuleDict({"up": nn.Linear(2, 2)}) for _ in range(experts)]
        return nn.ModuleDict({"experts": nn.ModuleList(inner)})

    model = nn.ModuleDict({"layers": nn.ModuleList([layer(1), layer(2)])})
    assert names(model, "up", layers_to_transform=1) == ["layers.1.experts.0.up", "layers.1.experts.1.up"]
    assert names(model, "up", layers_to_transform=1, layers_pattern="experts") == ["layers.1.experts.1.up"]


def test_reserved_modules_are_left_out(bert):
    inside = names(bert, "all-linear", reserved=["bert.pooler"])
    assert "bert.pooler.dense" not in inside and len(inside) == 12
    assert len(names(bert, "all-linear", reserved=["bert.pool"])) == 13
    with pytest.raises(InputError, match="modules_to_save"):
        names(bert, "query", reserved=["bert"])


def test_heads():
    assert task_heads(tiny.tiny("distilbert-seq")) == ["pre_classifier", "classifier"]
    assert task_heads(tiny.tiny("llama-seq")) == ["score"]
    assert task_heads(tiny.tiny("bart-seq")) == ["classification_head"]
    assert task_heads(tiny.tiny("llama")) == task_heads(tiny.tiny("bert-mlm")) == []
    model = tiny.tiny("bert-mlm")
    assert output_head(model) is model.cls.predictions.decoder
    assert output_head(tiny.tiny("bert-seq")) is None and output_head(nn.Linear(2, 2)) is None
    # By name the head can be adapted all the same.
    assert names(tiny.tiny("llama-seq"), "score") == ["score"]


def test_what_cannot_be_adapted():
    attention = nn.ModuleDict({"mha": nn.MultiheadAttention(4, 2), "up": nn.Linear(4, 4)})
    assert names(attention, "all-linear") == ["up"]
    assert kind_of(attention["mha"].out_proj) is None
    for module, why in [
        (nn.Embedding(4, 4, max_norm=1.0), "max_norm"),
        (nn.Embedding(4, 4, sparse=True), "sparse"),
        (nn.Conv1d(2, 2, 1), "is a Conv1d"),
    ]:
        with pytest.raises(InputError, match=why):
            site_of("x", module)
    quantised = nn.Linear(4, 4)
    quantised.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(InputError, match="not of a floating type"):
        site_of("x", quantised)


@pytest.mark.parametrize("name", ["bert-seq", "llama", "gpt2", "t5", "distilbert-seq", "bart-seq"])
@pytest.mark.parametrize("group", ["attention", "mlp", "qv", "all-linear"])
@pytest.mark.parametrize("layers", [None, [1]])
def test_shortest_names_mean_exactly_the_sites(name, group, layers):
    model = tiny.tiny(name)
    sites = names(model, group, layers_to_transform=layers)
    short = shortest_names(model, sites)
    ends = {p for p, _ in base_modules(model) for s in short if p == s or p.endswith("." + s)}
    assert ends == set(sites)
    assert names(model, short) == sites == peft_targets(model, short)


def test_shortest_names_are_short(llama, bert):
    assert shortest_names(llama, names(llama, "qv")) == ["q_proj", "v_proj"]
    assert shortest_names(llama, [Q[1]]) == ["1.self_attn.q_proj"]
    attention = shortest_names(bert, names(bert, "attention"))
    assert attention == ["attention.output.dense", "key", "query", "value"]


@pytest.mark.parametrize("target", ["q_proj", r".*\.q_proj", ["q_proj", "nothing"], Q])
def test_peft_reads_a_string_as_an_expression_and_passes_over_names_that_are_not_there(llama, target):
    if target == "q_proj":
        with pytest.raises(InputError, match="match no module"):
            peft_targets(llama, target)
    else:
        assert peft_targets(llama, target) == Q


def test_peft_lets_a_whole_path_override_the_layers(llama):
    assert peft_targets(llama, ["q_proj"], layers_to_transform=[1]) == [Q[1]]
    assert peft_targets(llama, ["q_proj", Q[0]], layers_to_transform=[1]) == Q
    assert peft_targets(llama, ["q_proj"], exclude_modules=["layers.0.self_attn.q_proj"]) == [Q[1]]


def test_patterns_match_ends_and_the_first_wins():
    patterns = {"layers.1.q": 1, "q": 2, r"layers\.\d\..*": 3}
    values = [pattern_value(patterns, f"model.layers.{name}", 9) for name in ("1.q", "0.q", "0.v")]
    assert values == [1, 2, 3]
    assert pattern_value(patterns, "model.other", 9) == 9
    assert pattern_value({"q": 1}, "model.xq", 9) == 9
