import pytest

from deltaw.core.errors import DeltawError, InputError, MissingExtraError, RunError, near, unknown_name
from deltaw.core.registry import Registry


def test_exit_codes_and_builtin_bases():
    assert (InputError("x").exit_code, RunError("x").exit_code, MissingExtraError("x").exit_code) == (2, 1, 2)
    assert issubclass(InputError, ValueError) and issubclass(RunError, RuntimeError)
    assert all(issubclass(kind, DeltawError) for kind in (InputError, RunError, MissingExtraError))


def test_near_puts_the_best_first_and_leaves_out_what_is_far():
    assert near("q_prj", ["v_proj", "q_proj", "zebra"])[0] == "q_proj"
    assert near("q_prj", ["zebra"]) == []
    assert len(near("aaaa", ["aaab", "aaac", "aaad", "aaae"], count=2)) == 2


def test_unknown_name_lists_near_ones_then_all_in_one_line():
    error = unknown_name("method", "lroa", ["lora", "full"])
    assert isinstance(error, InputError)
    assert str(error) == "unknown method 'lroa': did you mean 'lora'? known: full, lora"


def test_unknown_name_cuts_a_long_list():
    text = str(unknown_name("key", "zzz", [f"name{i:03}" for i in range(100)]))
    assert text.endswith("name039, ...") and "\n" not in text


def test_registry():
    registry: Registry[int] = Registry("method")
    assert registry.register("lora", 1) == 1
    assert registry["lora"] == 1 and "lora" in registry and list(registry) == ["lora"] and len(registry) == 1
    with pytest.raises(ValueError, match="method 'lora' is registered twice"):
        registry.register("lora", 2)
    assert registry["lora"] == 1
    with pytest.raises(InputError, match="unknown method 'lora2': did you mean 'lora'"):
        registry["lora2"]
