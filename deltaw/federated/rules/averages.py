"""Means of the trained tensors, and the two ways of training that make them exact.

Every rule here takes theta <- theta + sum_k w_k (theta_k - theta) for each trained tensor theta, and is right from sums
alone. Up and down, a client and round: 4 bytes a trained value (r (in + out) a site with both factors, about half of
it with one); the server's sums take 2 K flops a value. `product_error`, where single uploads are there, costs
O((K r)^2 (in + out)) flops a site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from deltaw.core.errors import InputError
from deltaw.federated.rules.contract import (
    Outcome,
    Rule,
    as_it_is,
    check_averaged,
    check_lora,
    check_uploads,
    differences,
    every_key,
    mean,
    moved,
    product_error,
)
from deltaw.federated.state import GlobalState, Layout


def averaged(
    rule: Rule,
    phase: int,
    start: GlobalState,
    uploads: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    layout: Layout,
    broadcast: Mapping[str, Tensor],
) -> Outcome:
    """`Rule.combine`: the state plus the weighted mean of differences."""
    check_uploads(rule, uploads, weights)
    tensors = moved(start, mean(uploads, weights, list(uploads[0])))
    facts = product_error(start, uploads, weights, tensors, layout)
    return Outcome(state=GlobalState(tensors, start.carried), facts=facts)


@dataclass(frozen=True, kw_only=True)
class FedAvgAB:
    """Weighted means of A and B, each by itself.

    McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", arXiv 1602.05629,
    algorithm 1, applied to the factors (as DP-LoRA does, Liu et al., arXiv 2312.17493):

        A = sum_k w_k A_k,  B = sum_k w_k B_k        A_k (r, in), B_k (out, r)

    Limits: inexact, since the mean of products is not the product of means,

        sum_k w_k B_k A_k = B A + sum_k w_k (B_k - B)(A_k - A),

    and what is missing grows with the clients' distance from each other: `product_error` says by how much. With starts
    taken from the base (PiSSA, OLoRA) the identity holds for the distances from the start, of the same residual. DoRA's
    A, B and m are averaged likewise. A lying client can move the mean anywhere.
    """

    name = "fedavg-ab"
    secure = True
    phases = 1
    additive = True
    least_uploads = 1

    check = check_averaged
    trained = every_key
    begin = as_it_is
    upload = differences
    combine = averaged


def _check_frozen(rule: Rule, layout: Layout) -> None:
    check_lora(rule, layout)
    for path, key_A, key_B, _ in layout.sites():
        if len({key_A, key_B} & layout.frozen) != 1:
            raise InputError(
                f"rule {rule.name} needs a frozen A at every site, and {path} trains both factors: set freeze_a true"
            )


@dataclass(frozen=True, kw_only=True)
class FFA:
    """Means of B alone; A is frozen, and shared since all clients draw it from the run's seed.

    Sun et al., "Improving LoRA in Privacy-preserving Federated Learning", arXiv 2403.12313:

        B = sum_k w_k B_k,  so that  s B A = sum_k w_k s B_k A  exactly        A (r, in) the same for all

    Of an embedding's site B is the random factor, which `freeze_a` freezes, and A is averaged: as exact. Bytes: half of
    `fedavg-ab`'s on square matrices. Limits: updates stay in the row space of the A that was drawn, so that a rank that
    suffices with both factors may not here; under noise its error grows linearly, not as the product of two errors.
    """

    name = "ffa"
    secure = True
    phases = 1
    additive = True
    least_uploads = 1

    check = _check_frozen
    trained = every_key
    begin = as_it_is
    upload = differences
    combine = averaged


def _check_both(rule: Rule, layout: Layout) -> None:
    check_lora(rule, layout)
    for path, key_A, key_B, _ in layout.sites():
        if frozen := {key_A, key_B} & layout.frozen:
            raise InputError(
                f"rule {rule.name} trains A and B in turns, and {min(frozen)} of {path} is frozen: set freeze_a false, "
                "or use rule ffa"
            )


def _in_turns(rule: Rule, round_: int, layout: Layout) -> frozenset[str]:
    resting = {(key_B if round_ % 2 else key_A) for _, key_A, key_B, _ in layout.sites()}
    return every_key(rule, round_, layout) - resting


@dataclass(frozen=True, kw_only=True)
class RoLoRA:
    """B is trained and averaged in even rounds, A in odd ones; tensors of no site in all.

    Chen et al., "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA", arXiv 2409.02346:

        even: B = sum_k w_k B_k, s B A = sum_k w_k s B_k A        odd: A = sum_k w_k A_k, s B A = sum_k w_k s B A_k

    Exact in every round, since one factor is the same for all clients. It begins with B, because B = 0 at first makes
    the gradient of A zero. Bytes: half of `fedavg-ab`'s, by turns. Limits: each factor sees every second round, so
    that at least two are needed; an embedding's site, which starts with A = 0 instead, moves from the second one on.
    """

    name = "rolora"
    secure = True
    phases = 1
    additive = True
    least_uploads = 1

    check = _check_both
    trained = _in_turns
    begin = as_it_is
    upload = differences
    combine = averaged
