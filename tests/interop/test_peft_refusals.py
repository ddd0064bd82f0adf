"""Every field of PEFT's `LoraConfig` is supported, without effect, or refused by name."""

import dataclasses
import json

import pytest
import tiny

import deltaw as dw
from deltaw.core.errors import InputError
from deltaw.methods import METHODS
from deltaw.methods.lora_peft import _INERT, _SAME

#: Field: a value that changes what the adapter computes, and that is not supported.
REFUSED = {
    "use_qalora": True,
    "target_parameters": ["experts.gate_up_proj"],
    "layer_replication": [[0, 1], [0, 2]],
    "alora_invocation_tokens": [3, 4],
    "ensure_weight_tying": True,
    "megatron_config": {"x": 1},
    "velora_config": {"num_groups": 2},
    "monteclora_config": {"num_samples": 4},
    "kasa_config": {"beta": 1.0},
    "arrow_config": {"top_k": 3},
    "use_bdlora": {"nblocks": 2},
}
INITS = ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "mica", "something new"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter") / "a"
    dw.save_adapter(tiny.randomise(dw.adapt(tiny.tiny("llama"), dw.LoRA(r=4, target_modules="qv"))), path)
    return path


def changed(folder, tmp_path, **fields):
    """A copy of the folder with other fields in its configuration."""
    target = tmp_path / "changed"
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((target / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps(config | fields))
    return target


def refusal(model, path):
    with pytest.raises(InputError) as caught:
        dw.load_adapter(model, path)
    assert "\n" not in str(caught.value)
    assert dw.adapter_names(model) == []
    return str(caught.value)


def test_every_field_of_lora_config_is_accounted_for():
    from peft import LoraConfig

    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert fields <= {*_SAME, *_INERT, *REFUSED, "init_lora_weights", "use_dora"}
    assert set(_SAME).isdisjoint(_INERT) and set(REFUSED).isdisjoint({*_SAME, *_INERT})


@pytest.mark.parametrize("field", REFUSED)
def test_what_is_not_supported_is_named(field, folder, tmp_path):
    message = refusal(tiny.tiny("llama"), changed(folder, tmp_path, **{field: REFUSED[field]}))
    assert f"asks for what deltaw does not have: {field}=" in message


@pytest.mark.parametrize("init", INITS)
def test_initialisations_that_change_the_base_are_named(init, folder, tmp_path):
    message = refusal(tiny.tiny("llama"), changed(folder, tmp_path, init_lora_weights=init))
    assert f"init_lora_weights={init!r}" in message and "path_initial_model_for_weight_conversion" in message


def test_several_refusals_come_in_one_line(folder, tmp_path):
    message = refusal(tiny.tiny("llama"), changed(folder, tmp_path, use_qalora=True, from_the_future="yes"))
    assert "use_qalora=True; from_the_future='yes'" in message


@pytest.mark.parametrize("value", [None, False, [], {}, ""])
def test_an_unknown_field_that_is_off_passes(value, folder, tmp_path):
    dw.load_adapter(tiny.tiny("llama"), changed(folder, tmp_path, from_the_future=value))


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal"])
def test_initialisations_that_leave_the_base_pass(init, folder, tmp_path):
    dw.load_adapter(tiny.tiny("llama"), changed(folder, tmp_path, init_lora_weights=init))


@pytest.mark.parametrize("field", sorted(_INERT - {"peft_type"}))
def test_fields_without_effect_pass(field, folder, tmp_path):
    model = dw.load_adapter(tiny.tiny("llama"), changed(folder, tmp_path, **{field: "whatever"}))
    assert len(dw.summary(model).sites) == 4


@pytest.mark.parametrize("kind", ["LOHA", "IA3", "BONE", None, 3, ["LORA"]])
def test_another_method_is_named(kind, folder, tmp_path):
    message = refusal(tiny.tiny("llama"), changed(folder, tmp_path, peft_type=kind))
    assert f"peft_type {kind!r} is not supported: expected one of " in message and "LORA" in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("target_modules", 5), ("target_modules", ["q_proj", 5]), ("target_modules", None), ("target_modules", []),
        ("exclude_modules", {"a": 1}), ("modules_to_save", 3), ("layers_to_transform", "1"), ("layers_pattern", 7),
        ("trainable_token_indices", "3"), ("trainable_token_indices", {"embed_tokens": 3}), ("r", "8"), ("r", 0),
        ("r", 2.5), ("r", True), ("lora_alpha", "16"), ("lora_alpha", 0), ("lora_alpha", [1]), ("lora_dropout", 1.5),
        ("lora_dropout", "0"), ("bias", "some"), ("use_rslora", "yes"), ("lora_bias", 1), ("rank_pattern", ["q"]),
        ("rank_pattern", {"q_proj": "4"}), ("rank_pattern", {"(": 4}), ("alpha_pattern", {"q_proj": -1}),
        ("alpha_pattern", 3),
    ],
)  # fmt: skip
def test_values_that_peft_never_writes_are_refused(field, value, folder, tmp_path):
    message = refusal(tiny.tiny("llama"), changed(folder, tmp_path, **{field: value}))
    assert field.removeprefix("lora_").removeprefix("use_") in message


def test_the_registered_methods_of_peft_are_told_apart_by_type():
    kinds = [METHODS[name].peft_type for name in METHODS if METHODS[name].peft_type]
    assert len(kinds) == len(set(kinds)) and "LORA" in kinds
    for name in METHODS:
        method = METHODS[name]
        assert (method.to_peft is None) == (method.from_peft is None) == method.trains_base
        # DoRA's files are of the type LORA, and LoRA's reader tells them apart.
        assert (method.peft_type is None) == (method.trains_base or name == "dora")
