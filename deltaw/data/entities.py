"""Entity data written as questions ("what is the entity type of 'Lender' ...") turned into words and BIO tags."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from deltaw.core.errors import InputError
from deltaw.data.rows import PromptRow, RowSet, TagRow

# Greedy, so that an apostrophe inside the name ('Moody's') stays in it.
_QUOTED = re.compile(r"(?:^|(?<=\s))(['\"])(.+)\1(?=[\s.,;:?!]|$)")
_INPUT = re.compile(r"^[ \t]*Input:[ \t]*(.*?)(?:\n[ \t]*Answer:?\s*)?\Z", re.DOTALL | re.MULTILINE)


@dataclass
class _Sentence:
    line: int
    types: dict[tuple[str, ...], Counter[str]] = field(default_factory=lambda: defaultdict(Counter))


def derive_tags(rowset: RowSet) -> RowSet:
    """Turns entity prompts into one `TagRow` a text.

    A prompt quotes the entity in its instruction and gives the text after `Input:`; the completion is the entity's
    type. Words are what whitespace separates. Prompts with the same text are merged, and every occurrence of each
    entity's words is tagged; where names overlap the longer one wins, then the one that starts first. Where prompts
    disagree on a type, the commoner type wins, ties going to the first in the file, and the others are counted in
    `counts.conflicts`. Prompts whose entity is not in the text are counted in `counts.unmatched`.

    Rows that are tagged already are returned as they are. Split after this, never before: prompts that share a text
    would otherwise end up on both sides.

    Raises:
        InputError: rows of another layout, a prompt without a quoted entity or without `Input:` (with its line), or
            no entity found at all.
    """
    if rowset.layout == "tags":
        return rowset
    sentences: dict[tuple[str, ...], _Sentence] = {}
    unmatched = conflicts = 0
    for index, row in enumerate(rowset):
        if not isinstance(row, PromptRow):
            raise InputError(f"{rowset.source}: layout {rowset.layout} has no entities: expected tags, or prompts")
        words, entity = _parse(row.prompt, rowset.where(index))
        if not _spans(words, entity):
            unmatched += 1
            continue
        line = rowset.lines[index] if rowset.lines else index + 1
        sentences.setdefault(words, _Sentence(line)).types[entity][row.completion.strip()] += 1
    if not sentences:
        raise InputError(f"{rowset.source}: none of the {len(rowset)} quoted entities occurs in its text")

    rows = []
    for words, sentence in sentences.items():
        # A Counter keeps insertion order and most_common sorts stably, so a tie goes to the first in the file.
        chosen = {entity: counter.most_common(1)[0] for entity, counter in sentence.types.items()}
        conflicts += sum(c.total() for c in sentence.types.values()) - sum(count for _, count in chosen.values())
        rows.append(TagRow(words, _tag(words, {entity: kind for entity, (kind, _) in chosen.items()})))
    counts = replace(rowset.counts, rows=len(rows), unmatched=unmatched, conflicts=conflicts)
    return replace(rowset, rows=rows, layout="tags", lines=[s.line for s in sentences.values()], counts=counts)


def _parse(prompt: str, where: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    text = _INPUT.search(prompt)
    if text is None:
        raise InputError(f"{where}: the prompt has no line 'Input: ...' to find the entity in")
    instruction = prompt[: text.start()].split("\nOptions:")[0]
    quoted = _QUOTED.search(instruction)
    if quoted is None:
        raise InputError(f"{where}: the prompt's instruction quotes no entity: expected ... entity type of 'NAME'")
    return tuple(text[1].split()), tuple(quoted[2].split())


def _spans(words: Sequence[str], entity: Sequence[str]) -> list[int]:
    size = len(entity)
    return [i for i in range(len(words) - size + 1) if size and tuple(words[i : i + size]) == tuple(entity)]


def _tag(words: Sequence[str], types: dict[tuple[str, ...], str]) -> list[str]:
    tags = ["O"] * len(words)
    for entity, kind in sorted(types.items(), key=lambda item: -len(item[0])):
        for start in _spans(words, entity):
            end = start + len(entity)
            if all(tag == "O" for tag in tags[start:end]):
                tags[start:end] = [f"B-{kind}"] + [f"I-{kind}"] * (len(entity) - 1)
    return tags
