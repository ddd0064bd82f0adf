"""The registered methods. A new method is one file here beside it and one line below."""

from __future__ import annotations

from typing import Any

from deltaw.core.errors import InputError
from deltaw.core.registry import Registry
from deltaw.methods.adalora_peft import ADALORA
from deltaw.methods.bitfit import BITFIT
from deltaw.methods.bottleneck import BOTTLENECK
from deltaw.methods.contract import Method
from deltaw.methods.full import FULL
from deltaw.methods.lora_peft import DORA, LORA
from deltaw.methods.neftune import NEFTUNE
from deltaw.methods.prefix import PREFIX

METHODS: Registry[Method] = Registry("method")
for _method in (LORA, DORA, ADALORA, FULL, BITFIT, BOTTLENECK, PREFIX):
    METHODS.register(_method.name, _method)

#: What trains nothing and so is no method to train with, only one to put beside another.
BESIDE = (NEFTUNE,)


def method_of(config: Any) -> Method:
    """The method that a configuration object belongs to.

    Raises:
        InputError: it belongs to none.
    """
    methods = [*(METHODS[name] for name in METHODS), *BESIDE]
    for method in methods:
        if type(config) is method.config:
            return method
    known = ", ".join(f"dw.{method.config.__name__}" for method in methods)
    raise InputError(f"{type(config).__name__} is no method's configuration: expected one of {known}")
