"""From a file to batches: rows, splits, templates, tokens, packing."""

from deltaw.data.collate import Collator
from deltaw.data.encode import TASKS, Encoded, encode
from deltaw.data.entities import derive_tags
from deltaw.data.formats import read_rows
from deltaw.data.packing import check_packing, pack
from deltaw.data.rows import (
    LAYOUTS,
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
from deltaw.data.split import split_rows
from deltaw.data.templates import LABEL_PROMPT, Renderer, Template, clip_prompt, completion_ids, prompt_ids

__all__ = [
    "LABEL_PROMPT",
    "LAYOUTS",
    "TASKS",
    "ChatRow",
    "Collator",
    "Counts",
    "Encoded",
    "LabelRow",
    "PromptRow",
    "Renderer",
    "Row",
    "RowSet",
    "TagRow",
    "Template",
    "TextRow",
    "check_packing",
    "clip_prompt",
    "completion_ids",
    "derive_tags",
    "encode",
    "label_set",
    "layout_of",
    "pack",
    "prompt_ids",
    "read_rows",
    "split_rows",
]
