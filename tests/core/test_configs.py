import copy
import dataclasses

import pytest

from deltaw.core.configs import accepts, aliases_of, spelling, to_plain
from deltaw.core.errors import InputError


@accepts(lora_alpha="alpha", lora_r="r")
@dataclasses.dataclass(frozen=True)
class Config:
    r: int = 8
    alpha: float = 1.0
    names: tuple[str, ...] = ("a", "b")
    table: dict[str, list[int]] = dataclasses.field(default_factory=dict)


def test_aliases_build_the_same_and_are_remembered():
    config = Config(lora_alpha=3.0, r=4)
    assert config == Config(alpha=3.0, r=4)
    assert (spelling(config, "alpha"), spelling(config, "r"), spelling(config, "names")) == ("lora_alpha", "r", "names")
    assert aliases_of(Config) == {"lora_alpha": "alpha", "lora_r": "r"}
    assert aliases_of(int) == {}


def test_both_spellings_at_once_and_unknown_names_are_refused():
    with pytest.raises(InputError, match="both alpha and lora_alpha"):
        Config(alpha=1.0, lora_alpha=1.0)
    with pytest.raises(InputError, match="unknown Config option 'alhpa': did you mean 'alpha'"):
        Config(alhpa=1.0)


def test_a_config_stays_frozen_copies_and_replaces():
    config = Config(lora_alpha=3.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.r = 2
    assert copy.deepcopy(config) == config and spelling(copy.deepcopy(config), "alpha") == "lora_alpha"
    assert dataclasses.replace(config, r=2) == Config(alpha=3.0, r=2)


def test_to_plain_gives_what_json_has():
    plain = to_plain(Config(table={"x": [1, 2]}, names=("c",)))
    assert plain == {"r": 8, "alpha": 1.0, "names": ["c"], "table": {"x": [1, 2]}}
    assert type(plain["names"]) is list
