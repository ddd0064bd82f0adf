"""Aggregation rules. A new one is a class in one of the files here, or a file of its own, and one line below."""

from __future__ import annotations

import dataclasses
from typing import Any

from deltaw.core.errors import InputError, unknown_name
from deltaw.core.registry import Registry
from deltaw.federated.rules.averages import FFA, FedAvgAB, RoLoRA
from deltaw.federated.rules.contract import Outcome, Rule
from deltaw.federated.rules.products import FedEx, Product, folded
from deltaw.federated.rules.robust import Median, MultiKrum, NormBound, TrimmedMean
from deltaw.federated.rules.sketch import Sketch

RULES: Registry[Any] = Registry("rule")
for _rule in (FedAvgAB, Product, FedEx, FFA, RoLoRA, Sketch, TrimmedMean, Median, NormBound, MultiKrum):
    RULES.register(_rule.name, _rule)


def make_rule(name: str, **options: Any) -> Rule:
    """The rule of a name with its options.

    Raises:
        InputError: an unknown rule or option, or an option's value that is none.
    """
    kind = RULES[name]
    known = [field.name for field in dataclasses.fields(kind)]
    for option in options:
        if not known:
            raise InputError(f"rule {name} has no options, and was given {option}: leave it out")
        if option not in known:
            raise unknown_name(f"option of rule {name}", option, known)
    rule: Rule = kind(**options)
    return rule


__all__ = ["RULES", "Outcome", "Rule", "folded", "make_rule"]
