"""Sorting inside a step: the same rows in every step as without it, less padding."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from deltaw.core.generators import generator
from deltaw.train.order import StepOrder


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 16), st.integers(0, 5))
def test_every_step_has_the_rows_of_the_permutation_longest_first(lengths, step_rows, epoch):
    order = StepOrder(lengths, step_rows=step_rows, seed=7)
    order.epoch = epoch
    drawn = torch.randperm(len(lengths), generator=generator(7, "order", epoch)).tolist()
    found = list(order)
    assert len(order) == len(found) == len(lengths)
    for start in range(0, len(lengths), step_rows):
        rows = found[start : start + step_rows]
        assert sorted(rows) == sorted(drawn[start : start + step_rows])
        assert [lengths[row] for row in rows] == sorted((lengths[row] for row in rows), reverse=True)


def test_epochs_and_seeds_differ_and_repeat():
    orders = {}
    for seed in (0, 1):
        for epoch in (0, 1):
            order = StepOrder(range(1, 33), step_rows=4, seed=seed)
            order.epoch = epoch
            orders[seed, epoch] = list(order)
            assert list(order) == orders[seed, epoch]
    assert len({tuple(order) for order in orders.values()}) == 4
