"""What a data file's line becomes: one frozen row type a layout, and the set of rows with its counts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class TextRow:
    """Plain text, for causal and masked language modelling."""

    text: str


@dataclass(frozen=True)
class PromptRow:
    """A prompt and the answer to learn."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class ChatRow:
    """A conversation: messages of `role` (one of `ROLES`) and `content`."""

    messages: Sequence[Mapping[str, str]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "messages", tuple(dict(message) for message in self.messages))


@dataclass(frozen=True)
class LabelRow:
    """A text and its class."""

    text: str
    label: str


@dataclass(frozen=True)
class TagRow:
    """Words and one BIO tag for each ("O", "B-person", "I-person")."""

    tokens: Sequence[str]
    tags: Sequence[str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", tuple(self.tokens))
        object.__setattr__(self, "tags", tuple(self.tags))


Row = TextRow | PromptRow | ChatRow | LabelRow | TagRow


@dataclass(frozen=True)
class Layout:
    """A layout's row type and the fields that a file must have for it, in the row type's order."""

    row: type[Row]
    fields: tuple[str, ...]


LAYOUTS: dict[str, Layout] = {
    "text": Layout(TextRow, ("text",)),
    "prompt": Layout(PromptRow, ("prompt", "completion")),
    "chat": Layout(ChatRow, ("messages",)),
    "label": Layout(LabelRow, ("text", "label")),
    "tags": Layout(TagRow, ("tokens", "tags")),
}


@dataclass(frozen=True)
class Counts:
    """What became of the rows of a source.

    Attributes:
        rows: rows kept.
        bad: malformed rows that were skipped on request.
        empty: rows without text or without an answer.
        truncated: rows cut to the length limit, among `rows`.
        dropped: rows left out because their answer alone is longer than the limit.
        tokens: tokens of the rows kept, special ones included.
        loss_tokens: tokens that carry loss; 0 for masked language modelling, where the collator chooses them.
        unmatched: prompts whose quoted entity does not occur in their text.
        conflicts: prompts overruled by others that give the same entity in the same text another type.
    """

    rows: int = 0
    bad: int = 0
    empty: int = 0
    truncated: int = 0
    dropped: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    unmatched: int = 0
    conflicts: int = 0

    def as_dict(self) -> dict[str, int]:
        """All counts by name, as they stand in `run.json`."""
        return asdict(self)


@dataclass(frozen=True)
class RowSet:
    """The rows of one source, all of one type.

    Attributes:
        rows: the rows in the source's order.
        layout: a key of `LAYOUTS`.
        source: the file's path or the hub data set's name, as given.
        sha256: of a local file; None for a hub data set.
        counts: what was kept, skipped and dropped while reading.
        lines: for each row its 1-based line (JSONL, CSV) or row (Parquet, hub) in the source; may be empty.
        groups: for each row whom it is of, where that was asked for; else empty.
    """

    rows: Sequence[Row]
    layout: str
    source: str
    sha256: str | None = None
    counts: Counts = field(default_factory=Counts)
    lines: Sequence[int] = ()
    groups: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def where(self, index: int) -> str:
        """How an error names row `index`: the source and the line."""
        return f"{self.source}:{self.lines[index]}" if self.lines else f"{self.source}: row {index + 1}"


def layout_of(row: Row) -> str:
    """The layout whose row type this is."""
    return next(name for name, layout in LAYOUTS.items() if type(row) is layout.row)


def row_input(row: Row) -> str:
    """The part of a row that a model is shown, as a canonical string: two rows with the same one leak if split apart.

    The text, the prompt, the words; of a conversation all that precedes its last answer.
    """
    if isinstance(row, PromptRow):
        return row.prompt
    if isinstance(row, TagRow):
        return json.dumps(row.tokens)
    if isinstance(row, ChatRow):
        last = max((i for i, m in enumerate(row.messages) if m["role"] == "assistant"), default=len(row.messages))
        return json.dumps(row.messages[:last], sort_keys=True)
    return row.text


def label_set(rows: Sequence[Row] | RowSet, *, max_labels: int = 20) -> list[str] | None:
    """The closed set of answers of these rows, sorted; None where there is none.

    `LabelRow`: every label. `TagRow`: "O" and, for every entity type seen, its B- and I- tags, so that a tag that only
    the held-out rows have is not unknown. `PromptRow`: the completions (stripped), when there are at most `max_labels`
    of them and each is used twice on average. `TextRow` and `ChatRow`: None.
    """
    rows = list(rows)
    if not rows:
        return None
    if all(isinstance(row, TagRow) for row in rows):
        types = {tag[2:] for row in rows if isinstance(row, TagRow) for tag in row.tags if tag != "O"}
        return sorted({"O", *(f"{part}-{kind}" for kind in types for part in "BI")})
    if all(isinstance(row, LabelRow) for row in rows):
        return sorted({row.label for row in rows if isinstance(row, LabelRow)})
    if all(isinstance(row, PromptRow) for row in rows):
        labels = {row.completion.strip() for row in rows if isinstance(row, PromptRow)}
        return sorted(labels) if len(labels) <= max_labels and 2 * len(labels) <= len(rows) else None
    return None
