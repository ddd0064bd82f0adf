"""Entity prompts become words and tags."""

from pathlib import Path

import pytest

from deltaw.core.errors import InputError
from deltaw.data import Counts, PromptRow, RowSet, TagRow, derive_tags, read_rows

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "ner" / "test.jsonl"


def ask(entity, text, kind, quote="'"):
    instruction = f"Instruction: State the entity type of {quote}{entity}{quote}.\nOptions: person, place"
    return PromptRow(f"{instruction}\nInput: {text}\nAnswer: ", kind)


def derived(*rows):
    return derive_tags(RowSet(rows, "prompt", "x.jsonl", None, Counts(rows=len(rows)), range(1, len(rows) + 1)))


def test_every_occurrence_and_merging():
    text = "Ann met Ann Lee in New York , said Ann Lee"
    got = derived(ask("Ann Lee", text, "person"), ask("New York", text, "place"), ask("Bob", "Bob ran", "person"))
    assert list(got.rows) == [
        TagRow(
            text.split(),
            ["O", "O", "B-person", "I-person", "O", "B-place", "I-place", "O", "O", "B-person", "I-person"],
        ),
        TagRow(["Bob", "ran"], ["B-person", "O"]),
    ]
    assert (got.layout, list(got.lines), got.counts) == ("tags", [1, 3], Counts(rows=2))


def test_longer_name_wins():
    text = "Bank of York and Bank"
    got = derived(ask("Bank", text, "person"), ask("Bank of York", text, "place"))
    assert list(got.rows[0].tags) == ["B-place", "I-place", "I-place", "O", "B-person"]


def test_disagreement_is_counted():
    rows = [ask("Ann", "Ann ran", kind) for kind in ("place", "person", "person")]
    got = derived(*rows)
    assert (list(got.rows[0].tags), got.counts.conflicts) == (["B-person", "O"], 1)
    tie = derived(*rows[:2])
    assert (list(tie.rows[0].tags), tie.counts.conflicts) == (["B-place", "O"], 1)


def test_missing_entities_are_counted():
    got = derived(ask("Ann", "Ann ran", "person"), ask("Bob", "Ann ran", "person"), ask("an", "Annan", "person"))
    assert (len(got), got.counts.unmatched) == (1, 2)
    with pytest.raises(InputError, match="none of the 1 quoted entities"):
        derived(ask("Bob", "Ann ran", "person"))


def test_quotes_and_lines():
    assert list(derived(ask("Moody's", "Moody's fell", "person")).rows[0].tags) == ["B-person", "O"]
    assert list(derived(ask("Moody's", "Moody's fell", "person", '"')).rows[0].tags) == ["B-person", "O"]
    assert list(derived(ask("b c", "a\nb c\n d", "place")).rows[0].tags) == ["O", "B-place", "I-place", "O"]


def test_other_prompts_are_refused():
    with pytest.raises(InputError, match=r"x.jsonl:2: the prompt has no line 'Input"):
        derived(ask("Ann", "Ann ran", "person"), PromptRow("Who is 'Ann'?", "person"))
    with pytest.raises(InputError, match=r"x.jsonl:1: the prompt's instruction quotes no entity"):
        derived(PromptRow("Which type?\nInput: Ann 's dog 'Rex' ran\nAnswer: ", "person"))


def test_tagged_rows_pass():
    rows = RowSet([TagRow(["a"], ["O"])], "tags", "x")
    assert derive_tags(rows) is rows


@pytest.mark.skipif(not REAL.exists(), reason="the development data is not here")
def test_real_prompts():
    rows = read_rows(REAL)
    got = derive_tags(rows)
    assert got.counts.unmatched == 0
    assert 0 < len(got) <= len(rows)
    for row in got:
        assert any(tag.startswith("B-") for tag in row.tags)
        for before, tag in zip(("O", *row.tags), row.tags, strict=False):
            assert not tag.startswith("I-") or before[2:] == tag[2:]
