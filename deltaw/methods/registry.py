"""The registered methods. A new method is one file here beside it and one line below."""

from __future__ import annotations

from typing import Any

from deltaw.core.errors import InputError
from deltaw.core.registry import Registry
from deltaw.methods.contract import Method
from deltaw.methods.full import FULL
from deltaw.methods.lora_peft import DORA, LORA

METHODS: Registry[Method] = Registry("method")
for _method in (LORA, DORA, FULL):
    METHODS.register(_method.name, _method)


def method_of(config: Any) -> Method:
    """The method that a configuration object belongs to.

    Raises:
        InputError: it belongs to none.
    """
    for name in METHODS:
        if type(config) is METHODS[name].config:
            return METHODS[name]
    known = ", ".join(f"dw.{METHODS[name].config.__name__}" for name in METHODS)
    raise InputError(f"{type(config).__name__} is no method's configuration: expected one of {known}")
