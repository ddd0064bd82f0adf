from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from deltaw.core.errors import InputError
from deltaw.evaluate import majority, tag_dictionary, tfidf_logreg

NAMES = ["negative", "neutral", "positive"]
TWEETS = Path(__file__).parents[3] / "shared" / "data" / "tfns"


def test_majority_by_hand():
    got = majority(["neutral", "positive", "neutral"], ["neutral", "neutral", "positive", "negative"], NAMES)
    assert got["accuracy"] == 0.5
    assert got["macro_f1"] == pytest.approx((2 * 2 / 6) / 3)
    assert got["confusion"] == [[0, 1, 0], [0, 2, 0], [0, 1, 0]]
    assert "macro_auroc" not in got
    tie = majority([2, 0], [0], NAMES)
    assert tie["accuracy"] == 1.0
    with pytest.raises(InputError, match="no training labels"):
        majority([], ["neutral"], NAMES)


TRAIN = [
    "shares fall sharply",
    "prices fall",
    "shares rise",
    "prices rise sharply",
    "meeting on monday",
    "monday meeting",
]
GIVEN = ["negative", "negative", "positive", "positive", "neutral", "neutral"]


def test_tfidf_learns_words_and_is_the_same_every_time():
    test = ["they fall", "they rise", "a meeting"]
    got = tfidf_logreg(TRAIN, GIVEN, test, ["negative", "positive", "neutral"], NAMES, seed=0)
    assert got["accuracy"] == got["macro_f1"] == got["macro_auroc"] == 1.0
    assert got["confusion"] == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert tfidf_logreg(TRAIN, GIVEN, test, [0, 2, 1], NAMES, seed=0) == got


def test_tfidf_takes_word_pairs():
    train = ["not good", "not bad", "good", "bad"] * 3
    got = tfidf_logreg(train, [0, 2, 2, 0] * 3, train[:4], [0, 2, 2, 0], NAMES, seed=0)
    assert got["accuracy"] == 1.0


def test_a_label_that_training_lacks_is_scored_last():
    got = tfidf_logreg(TRAIN, GIVEN, ["they fall", "they soar"], ["negative", "other"], [*NAMES, "other"], seed=0)
    assert got["confusion"][3][3] == 0
    assert sum(got["confusion"][3]) == 1
    assert 0 <= got["macro_auroc"] <= 1


def test_tfidf_refuses_wrong_input():
    with pytest.raises(InputError, match="1 training texts and 2 labels"):
        tfidf_logreg(["a b"], [0, 1], ["a"], [0], NAMES, seed=0)
    with pytest.raises(InputError, match="0 test texts"):
        tfidf_logreg(["aa", "bb"], [0, 1], [], [], NAMES, seed=0)
    with pytest.raises(InputError, match="all 2 training rows have the label 'neutral'"):
        tfidf_logreg(["aa", "bb"], [1, 1], ["aa"], [1], NAMES, seed=0)
    with pytest.raises(InputError, match="hold no word"):
        tfidf_logreg(["a", "?"], [0, 1], ["a"], [1], NAMES, seed=0)


def test_tag_dictionary_by_hand():
    train = [["Ada", "met", "Bob"], ["Ada", "Bob"], ["Ada", "Bob", "sang", "well"]]
    tags = [["B-PER", "O", "B-PER"], ["B-PER", "O"], ["O", "B-PER", "O", "O"]]
    # Ada and Bob: B-PER twice, O once; Eve is unseen and gets O, the most frequent tag.
    got = tag_dictionary(
        train, tags, [["Ada", "met", "Eve"], ["Bob", "Ada"]], [["B-PER", "O", "B-PER"], ["O", "B-PER"]]
    )
    assert (got["correct"], got["predicted"], got["n"]) == (2, 3, 3)
    tie = tag_dictionary([["x", "x"]], [["O", "B-A"]], [["x"]], [["B-A"]])
    assert tie["correct"] == 1
    with pytest.raises(InputError, match="training sentence 0 has 1 tokens and 2 tags"):
        tag_dictionary([["x"]], [["O", "O"]], [["x"]], [["O"]])
    with pytest.raises(InputError, match="no training tokens"):
        tag_dictionary([], [], [["x"]], [["O"]])


@pytest.mark.skipif(not TWEETS.is_dir(), reason="the financial tweets are not here")
def test_financial_tweets_land_where_they_were_measured():
    texts, given = {}, {}
    for part in ("train", "test"):
        lines = (TWEETS / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
        table = [json.loads(line) for line in lines]
        texts[part] = [row["prompt"].split("Input: ", 1)[1].removesuffix("\nAnswer: ") for row in table]
        given[part] = [row["completion"] for row in table]
    assert (len(texts["train"]), len(texts["test"])) == (1800, 588)
    always = majority(given["train"], given["test"], NAMES)
    assert always["accuracy"] == 399 / 588
    assert always["macro_f1"] == pytest.approx(2 * 399 / (588 + 399) / 3)
    words = tfidf_logreg(texts["train"], given["train"], texts["test"], given["test"], NAMES, seed=0)
    assert 0.76 < words["accuracy"] < 0.82
    assert 0.63 < words["macro_f1"] < 0.72
    assert 0.85 < words["macro_auroc"] < 0.90


def test_importing_the_room_loads_no_heavy_library():
    code = (
        "import sys, deltaw.evaluate; print([n for n in ('sklearn', 'datasets', 'transformers') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
