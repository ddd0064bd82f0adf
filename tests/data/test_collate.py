"""Batches: padding, packing, and masks that depend on seed, epoch and tokens alone."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.core.errors import InputError
from deltaw.data import Collator, TextRow, encode, pack

IDS = [[5, 6, 7], [8, 9, 10, 11, 12]]
EXAMPLES = [{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in IDS]


def equal(got, expected):
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, bool):
            assert got[key] is value
        else:
            assert got[key].dtype == torch.int64
            assert got[key].tolist() == value


@pytest.mark.parametrize("task", ["causal-lm", "instruct", "token-classification"])
def test_padding(task):
    expected = {
        "input_ids": [[5, 6, 7, 0, 0], [8, 9, 10, 11, 12]],
        "attention_mask": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]],
        "labels": [[-100, 6, 7, -100, -100], [-100, 9, 10, 11, 12]],
    }
    equal(Collator(task, 0)(EXAMPLES), expected)
    wide = Collator(task, 0, pad_to_multiple_of=8)(EXAMPLES)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    equal(wide, {key: [row + [fill[key]] * 3 for row in rows] for key, rows in expected.items()})


def test_classes():
    batch = Collator("sequence-classification", 1)(
        [{"input_ids": [5, 6], "labels": [2]}, {"input_ids": [7], "labels": [0]}]
    )
    equal(batch, {"input_ids": [[5, 6], [7, 1]], "attention_mask": [[1, 1], [1, 0]], "labels": [2, 0]})


def test_packed():
    batch = Collator("instruct", 1, packed=True)([*pack(EXAMPLES, 8), *pack(EXAMPLES[:1], 8)])
    expected = {
        "input_ids": [[5, 6, 7, 8, 9, 10, 11, 12], [5, 6, 7, 1, 1, 1, 1, 1]],
        "position_ids": [[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 0, 0, 0, 0, 0]],
        "use_cache": False,
        "labels": [[-100, 6, 7, -100, 9, 10, 11, 12], [-100, 6, 7, -100, -100, -100, -100, -100]],
    }
    equal(batch, expected)


def masker(**options):
    return Collator(
        "masked-lm", 0, **{"mask_token_id": 4, "vocab_size": 100, "special_ids": [1, 2, 3, 99], "seed": 7, **options}
    )


def texts(count, length, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [{"input_ids": [2, *torch.randint(5, 99, (length,), generator=draw).tolist(), 3]} for _ in range(count)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=30), min_size=1, max_size=4), st.integers(0, 3))
def test_masks_invariants(rows, epoch):
    collator = masker()
    collator.set_epoch(epoch)
    batch = collator([{"input_ids": ids} for ids in rows])
    special = {0, 1, 2, 3, 4, 99}
    for row, ids in enumerate(rows):
        got, labels = batch["input_ids"][row].tolist(), batch["labels"][row].tolist()
        assert set(labels[len(ids) :]) <= {-100} and set(got[len(ids) :]) <= {0}
        for before, after, label in zip(ids, got, labels, strict=False):
            if label == -100:
                assert after == before
            else:
                assert label == before and before not in special
                assert after == 4 or after not in special
        assert any(label != -100 for label in labels) == any(i not in special for i in ids)


def test_mask_shares():
    """15 % chosen; of those 80 % masked, 10 % random, 10 % kept: within five standard deviations of 200 000 tokens."""
    rows = texts(400, 500)
    batch = masker()(rows)
    before = torch.tensor([row["input_ids"] for row in rows])
    chosen = batch["labels"] != -100
    total, picked = 400 * 500, int(chosen.sum())
    assert abs(picked - 0.15 * total) < 5 * math.sqrt(total * 0.15 * 0.85)
    assert torch.equal(batch["labels"][chosen], before[chosen])
    kept = (batch["input_ids"] == before) & chosen
    masked = (batch["input_ids"] == 4) & chosen
    for share, count in ((0.8, masked), (0.1 + 0.1 / 94, kept), (0.1 - 0.1 / 94, chosen & ~kept & ~masked)):
        assert abs(int(count.sum()) - share * picked) < 5 * math.sqrt(picked * share * (1 - share))


def test_masks_do_not_depend_on_the_batch_or_on_what_came_before():
    rows = texts(6, 40)
    whole = masker()(rows)
    used = masker()
    used(texts(3, 10, seed=1))
    state = torch.get_rng_state()
    for order in ([3, 1], [5], [0, 2, 4]):
        part = used([rows[i] for i in order])
        for key in ("input_ids", "labels"):
            assert torch.equal(part[key], whole[key][order])
    assert torch.equal(torch.get_rng_state(), state)


def test_masks_differ_by_epoch_and_seed():
    rows = texts(4, 40)
    first = masker()(rows)["labels"]
    later = masker()
    later.set_epoch(1)
    assert not torch.equal(later(rows)["labels"], first)
    assert not torch.equal(masker(seed=8)(rows)["labels"], first)
    later.set_epoch(0)
    assert torch.equal(later(rows)["labels"], first)


def test_masks_of_encoded_text(wordpiece):
    encoded = encode(
        [TextRow("The Borrower shall repay the Loan to Union Bank")], wordpiece, "masked-lm", max_length=60
    )
    collator = Collator(
        "masked-lm",
        wordpiece.pad_token_id,
        mask_token_id=wordpiece.mask_token_id,
        vocab_size=len(wordpiece),
        special_ids=wordpiece.all_special_ids,
        mask_share=0.9,
    )
    batch = collator(encoded.examples)
    ids = torch.tensor([encoded.examples[0]["input_ids"]])
    assert (batch["input_ids"][0, [0, -1]] == ids[0, [0, -1]]).all()
    chosen = batch["labels"] != -100
    assert torch.equal(torch.where(chosen, batch["labels"], batch["input_ids"]), ids)


@pytest.mark.parametrize(
    "arguments,options,expected",
    [
        (("causal", 0), {}, "unknown task 'causal'"),
        (("causal-lm", None), {}, "has no padding token"),
        (("masked-lm", 0), {}, "needs mask_token_id"),
        (("masked-lm", 0), {"mask_token_id": 4, "vocab_size": 9, "mask_share": 1.5}, "mask_share is 1.5"),
        (("masked-lm", 0), {"packed": True}, "cannot be packed"),
    ],
)
def test_refusals(arguments, options, expected):
    with pytest.raises(InputError, match=expected):
        Collator(*arguments, **options)
