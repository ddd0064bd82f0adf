"""A federation's keys: one flat YAML file, unknown ones with near names, contradictions that name both keys."""

import pytest
import yaml
from federated_fakes import NAMES

from deltaw.core.errors import InputError
from deltaw.federated.config import FederationConfig, make_federation_config, read_federation_config

CLIENTS = {name: {"data": f"{name}.jsonl"} for name in NAMES}


def made(**keys):
    return make_federation_config({"clients": CLIENTS, **keys})


def test_flat_keys_go_to_the_federation_and_to_the_training(tmp_path):
    file = tmp_path / "banks.yaml"
    keys = {"clients": CLIENTS, "rounds": 5, "local_steps": 10, "r": 4, "lora_alpha": 8, "model": "minilm", "lr": 2e-3}
    file.write_text(yaml.safe_dump(keys) + "max_update_norm: 1e1\n")
    config = read_federation_config(file, {"rounds": 7, "sample": None})
    assert (config.rounds, config.local_steps, config.local_epochs) == (7, 10, None)
    assert config.max_update_norm == 10.0 and config.train.learning_rate == 2e-3
    assert (config.train.model, config.train.method_config.r, config.train.method_config.alpha) == ("minilm", 4, 8)
    assert config.clients["bank-a"] == {"data": "bank-a.jsonl"}


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"rule": "product", "rule_options": {"truncate": 4}, "merge_every": 3, "weighting": "equal", "sample": 0.7},
        {"method": "qlora", "secure": True, "threshold": 2, "local_epochs": 2.0, "deadline_s": 30},
        {"server_optimizer": "adam", "server_learning_rate": 0.1, "compression": "topk", "compression_share": 0.1},
        {"clients": list(NAMES)},
    ],
)
def test_what_is_written_reads_back_the_same(keys):
    config = make_federation_config({"clients": CLIENTS, **keys})
    again = make_federation_config(yaml.safe_load(yaml.safe_dump(config.plain())))
    assert again == config and isinstance(again, FederationConfig)


@pytest.mark.parametrize(
    ("names", "keys", "least"),
    [
        ("abc", {}, 2),
        ("a", {}, 1),
        ("ab", {}, 2),
        ("abcdefgh", {}, 4),
        ("abcdefgh", {"sample": 0.5}, 2),
        ("abcdefghij", {"sample": 1}, 1),
        ("abcdefg", {"rule": "multi-krum", "rule_options": {"f": 2}}, 7),
    ],
)
def test_rounds_need_half_of_the_sampled_clients_where_nothing_is_said(names, keys, least):
    assert make_federation_config({"clients": list(names), **keys}).least == least


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"clients": {}}, ["no clients"]),
        ({"clients": {"../a": {}}}, ["'../a'", "letters"]),
        ({"clients": {"a": {"date": "x"}}}, ["'date'", "'data'"]),
        ({"clients": {"a": "x.jsonl"}}, ["client a", "{data: FILE}"]),
        ({"roundss": 3}, ["'roundss'", "'rounds'"]),
        ({"lora_aplha": 3}, ["'lora_aplha'", "'lora_alpha'"]),
        ({"data": "x"}, ["data is no key of a federation", "clients:"]),
        ({"epochs": 3}, ["epochs", "local_epochs"]),
        ({"max_steps": 3}, ["max_steps", "local_steps"]),
        ({"local_steps": 3, "local_epochs": 1}, ["local_steps", "local_epochs"]),
        ({"rounds": 0}, ["rounds is 0"]),
        ({"rounds": 2.5}, ["rounds is 2.5"]),
        ({"local_epochs": -1}, ["local_epochs is -1"]),
        ({"sample": 1.5}, ["sample is 1.5"]),
        ({"sample": 4}, ["sample is 4", "3 clients"]),
        ({"min_clients": 3, "sample": 2}, ["min_clients is 3", "sample 2"]),
        ({"secure": "yes"}, ["secure is 'yes'"]),
        ({"rule": "fedavg"}, ["fedavg", "fedavg-ab"]),
        ({"rule_options": {"truncate": 2}}, ["truncate", "fedavg-ab"]),
        ({"compression": "zip"}, ["zip", "int8"]),
        ({"weighting": "size"}, ["size", "examples"]),
        ({"secure": True, "rule": "product"}, ["rule product", "secure", "each client's update"]),
        ({"secure": True, "rule": "median"}, ["rule median", "secure"]),
        ({"secure": True, "compression": "int8"}, ["compression int8", "secure"]),
        ({"secure": True, "sample": 2}, ["secure with 2 clients"]),
        ({"threshold": 2}, ["threshold", "secure is false"]),
        ({"secure": True, "threshold": 4}, ["threshold is 4", "3 clients"]),
        ({"merge_every": 2}, ["merge_every", "rule fedavg-ab"]),
        ({"merge_every": 2, "rule": "product", "quantize": "nf4"}, ["merge_every", "quantize nf4"]),
        ({"server_optimizer": "adam", "rule": "sketch"}, ["server_optimizer adam", "rule sketch"]),
        ({"server_learning_rate": 0.5}, ["server_learning_rate", "server_optimizer"]),
        ({"compression_share": 0.5}, ["compression_share", "compression is none"]),
        ({"rule": "multi-krum", "rule_options": {"f": 1}, "min_clients": 3}, ["multi-krum", "5"]),
        ({"sharding": "fsdp2"}, ["sharding fsdp2"]),
        ({"max_update_norm": float("inf")}, ["max_update_norm is inf"]),
    ],
)
def test_contradictions_name_their_keys(keys, words):
    with pytest.raises(InputError) as error:
        made(**keys)
    said = str(error.value)
    assert all(word in said for word in words) and "\n" not in said, said
