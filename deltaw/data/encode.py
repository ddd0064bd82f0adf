"""Rows to token ids and labels, for every task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from deltaw.core.errors import InputError, near, unknown_name
from deltaw.data.rows import (
    ChatRow,
    Counts,
    LabelRow,
    PromptRow,
    Row,
    RowSet,
    TagRow,
    TextRow,
    label_set,
    layout_of,
)
from deltaw.data.templates import Renderer, Template, clip_prompt, end_token, special_affixes

Example = dict[str, list[int]]
IGNORED = -100

TASKS: dict[str, tuple[type[Row], ...]] = {
    "causal-lm": (TextRow,),
    "instruct": (PromptRow, ChatRow, LabelRow),
    "sequence-classification": (LabelRow, PromptRow),
    "token-classification": (TagRow,),
    "masked-lm": (TextRow,),
}
_ADVICE = {
    "causal-lm": "read it with layout='text', or choose the task instruct",
    "instruct": "choose another task, or name the columns with columns",
    "sequence-classification": "give a text and a label in every row",
    "token-classification": "give tokens and tags, or turn entity prompts into them with derive_tags",
    "masked-lm": "read it with layout='text'",
}


@dataclass(frozen=True)
class Encoded:
    """Encoded rows.

    Attributes:
        task: a key of `TASKS`.
        examples: one dict a row kept. `input_ids`: (tokens,). `labels`: (tokens,) with -100 where there is no loss;
            (1,) for sequence-classification; absent for masked-lm, whose collator chooses the positions.
        counts: of the source and of the encoding together.
        labels: the label names in the order of their ids, for the two classification tasks.
        kept: for each example the index of its row.
    """

    task: str
    examples: list[Example]
    counts: Counts
    labels: list[str] | None = None
    kept: Sequence[int] = ()


def encode(
    rows: RowSet | Sequence[Row],
    tokenizer: Any,
    task: str,
    *,
    max_length: int,
    labels: Sequence[str] | None = None,
    template: Template | str = "plain",
    model_max_length: int | None = None,
) -> Encoded:
    """Tokenises rows for a task.

    Texts longer than `max_length` tokens are cut at their end. For `instruct` the prompt is cut at its beginning
    instead, and a row whose answer does not fit together with one token of its prompt is dropped. `counts` says how
    many were cut and dropped. Labels stand at their own token, as transformers expects (the model shifts them).

    Args:
        rows: what `read_rows` gave, or rows of one type.
        tokenizer: a transformers tokenizer; token-classification needs a fast one.
        task: a key of `TASKS`.
        max_length: tokens a sequence, special ones included.
        labels: the label names in the order of their ids; the rows' own set, sorted, when None. For `instruct` the
            answers are checked against them when given.
        template: how `instruct` writes rows out.
        model_max_length: the positions the model has, when it is limited.

    Raises:
        InputError: rows that do not suit the task, a label outside `labels` (with the row's line), a limit longer than
            the model, a tokenizer without what the task needs, or nothing left.
    """
    if task not in TASKS:
        raise unknown_name("task", task, TASKS)
    if max_length < 2:
        raise InputError(f"max_length is {max_length}: expected at least 2 tokens")
    if model_max_length is not None and max_length > model_max_length:
        raise InputError(
            f"max_length {max_length} is longer than the model's {model_max_length} positions: "
            f"choose at most {model_max_length}"
        )
    rowset = rows if isinstance(rows, RowSet) else _as_rowset(rows)
    for row in rowset:
        if not isinstance(row, TASKS[task]):
            raise InputError(f"{rowset.source}: layout {layout_of(row)} does not suit the task {task}: {_ADVICE[task]}")
    encoder = _Encoder(rowset, tokenizer, task, max_length, _labels(rowset, task, labels), template)
    for index, row in enumerate(rowset):
        encoder.add(index, row)
    return encoder.done()


def _as_rowset(rows: Sequence[Row]) -> RowSet:
    if not rows:
        raise InputError("no rows to encode: expected at least one")
    return RowSet(rows, layout_of(rows[0]), "rows", counts=Counts(rows=len(rows)))


def _labels(rowset: RowSet, task: str, labels: Sequence[str] | None) -> list[str] | None:
    if labels is not None:
        twice = sorted({label for label in labels if list(labels).count(label) > 1})
        if twice or not labels:
            raise InputError(f"labels {list(labels)}: expected at least one, each once")
        return list(labels)
    if task not in ("sequence-classification", "token-classification"):
        return None
    found = label_set(rowset)
    if found is None:
        raise InputError(f"{rowset.source}: the completions are no small closed set of labels: name them with labels")
    return found


class _Encoder:
    """One pass over the rows, counting."""

    def __init__(
        self,
        rowset: RowSet,
        tokenizer: Any,
        task: str,
        max_length: int,
        labels: list[str] | None,
        template: Template | str,
    ) -> None:
        self.rowset = rowset
        self.tokenizer = tokenizer
        self.task = task
        self.max_length = max_length
        self.labels = labels
        self.ids = {label: i for i, label in enumerate(labels or ())}
        self.prefix, self.suffix = special_affixes(tokenizer)
        self.room = max_length - len(self.prefix) - len(self.suffix)
        if self.room < 1:
            raise InputError(f"max_length {max_length} leaves no room beside the tokenizer's special tokens: raise it")
        if task == "instruct":
            self.renderer = Renderer(tokenizer, template)
        if task == "causal-lm":
            self.end = end_token(tokenizer)
        if task == "token-classification" and not tokenizer.is_fast:
            raise InputError(
                f"token-classification needs a fast tokenizer, got {type(tokenizer).__name__}: "
                "load it with use_fast=True, or choose a model that has one"
            )
        self.examples: list[Example] = []
        self.kept: list[int] = []
        self.truncated = self.dropped = self.empty = self.tokens = self.loss_tokens = 0

    def add(self, index: int, row: Row) -> None:
        """Encodes one row and keeps it, or counts why not."""
        if self.task == "instruct":
            example = self._answer(index, row)
        elif self.task == "sequence-classification":
            example = self._classified(index, row)
        elif self.task == "token-classification":
            example = self._tagged(index, row)
        else:
            example = self._text(row)
        if example is None:
            return
        self.examples.append(example)
        self.kept.append(index)
        self.tokens += len(example["input_ids"])
        labels = example.get("labels", [])
        # Shifted: a causal model predicts no first token.
        counted = labels[1:] if self.task == "causal-lm" else labels
        self.loss_tokens += sum(label != IGNORED for label in counted)

    def done(self) -> Encoded:
        """The examples and their counts."""
        if not self.examples:
            raise InputError(
                f"{self.rowset.source}: no row is left after encoding ({self.dropped} answers longer than max_length "
                f"{self.max_length}, {self.empty} without a token to learn): raise max_length or check the rows"
            )
        counts = replace(
            self.rowset.counts,
            rows=len(self.examples),
            empty=self.rowset.counts.empty + self.empty,
            truncated=self.truncated,
            dropped=self.dropped,
            tokens=self.tokens,
            loss_tokens=self.loss_tokens,
        )
        closed = self.labels if self.task.endswith("-classification") else None
        return Encoded(self.task, self.examples, counts, closed, self.kept)

    def _body(self, text: str) -> list[int]:
        """A text's tokens between the special ones, cut to the room there is."""
        ids = list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        self.truncated += len(ids) > self.room
        return ids[: self.room]

    def _text(self, row: Row) -> Example | None:
        assert isinstance(row, TextRow)
        if self.task == "masked-lm":
            return self._unless_empty(self._body(row.text), {})
        body = list(self.tokenizer(row.text, add_special_tokens=False, verbose=False)["input_ids"])
        if not body:
            self.empty += 1
            return None
        whole = self.prefix + body + [self.end]
        self.truncated += len(whole) > self.max_length
        ids = whole[: self.max_length]
        return {"input_ids": ids, "labels": list(ids)}

    def _classified(self, index: int, row: Row) -> Example | None:
        assert isinstance(row, LabelRow | PromptRow)
        text, label = (row.text, row.label) if isinstance(row, LabelRow) else (row.prompt.strip(), row.completion)
        return self._unless_empty(self._body(text), {"labels": [self._label_id(index, label.strip())]})

    def _unless_empty(self, body: list[int], rest: Example) -> Example | None:
        if not body:
            self.empty += 1
            return None
        return {"input_ids": self.prefix + body + self.suffix, **rest}

    def _answer(self, index: int, row: Row) -> Example | None:
        if self.labels is not None and isinstance(row, LabelRow | PromptRow):
            self._label_id(index, (row.label if isinstance(row, LabelRow) else row.completion).strip())
        try:
            rendered = self.renderer.render(row)
        except InputError as error:
            raise InputError(f"{self.rowset.where(index)}: {error}") from None
        ids = rendered.ids
        if len(ids) - rendered.answer + max(1, rendered.head) > self.max_length:
            self.dropped += 1
            return None
        labels = [i if loss else IGNORED for i, loss in zip(ids, rendered.loss, strict=True)]
        if len(ids) > self.max_length:
            self.truncated += 1
            ids = clip_prompt(ids, self.max_length, head=rendered.head)
            labels = clip_prompt(labels, self.max_length, head=rendered.head)
        # Nothing precedes the first token, so nothing can predict it.
        labels[0] = IGNORED
        return {"input_ids": ids, "labels": labels}

    def _tagged(self, index: int, row: Row) -> Example | None:
        """Tags at the first sub-token of each word; found by offsets in the joined text, as the model reads it."""
        assert isinstance(row, TagRow)
        tags = [self._label_id(index, tag) for tag in row.tags]
        text = " ".join(row.tokens)
        word_at = [-1] * len(text)
        start = 0
        for number, token in enumerate(row.tokens):
            word_at[start : start + len(token)] = [number] * len(token)
            start += len(token) + 1
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = list(encoded["input_ids"])
        self.truncated += len(ids) > self.room
        labels = []
        seen = -1
        for start, end in encoded["offset_mapping"][: self.room]:
            # The last character, since a byte-level token may begin with the space before its word.
            word = word_at[end - 1] if end > start else -1
            labels.append(tags[word] if word > seen else IGNORED)
            seen = max(seen, word)
        around = [IGNORED] * len(self.prefix), [IGNORED] * len(self.suffix)
        return self._unless_empty(ids[: self.room], {"labels": around[0] + labels + around[1]})

    def _label_id(self, index: int, label: str) -> int:
        if label not in self.ids:
            close = near(label, self.ids)
            hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "add it to labels or correct the row"
            known = ", ".join(self.ids) if len(self.ids) <= 40 else f"{len(self.ids)} known labels"
            raise InputError(f"{self.rowset.where(index)}: label {label!r} is not one of {known}; {hint}")
        return self.ids[label]
