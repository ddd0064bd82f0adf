"""Human-rated sentences of four domains, from a pinned source distribution of a package index (MIT licence).

C. J. Hutto and E. Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text",
ICWSM 2014: each text was rated by twenty people from -4 (extremely negative) to 4 (extremely positive).
"""

from __future__ import annotations

import html
import io
import json
import os
import re
import tarfile
import unicodedata
from pathlib import Path
from typing import Literal, TypedDict

from deltaw.core.errors import InputError, RunError, unknown_name
from deltaw.core.files import write_text
from deltaw.models.packages import PinnedFile, Progress, fetch

VADER = PinnedFile(
    "vaderSentiment",
    "3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    2_466_783,
)
_INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_LIMIT_BYTES = 64 << 20
DOMAINS = {
    "tweets": "tweets",
    "amazon": "amazonReviewSnippets",
    "editorials": "nytEditorialSnippets",
    "movies": "movieReviewSnippets",
}
"""A domain's name to the stem of its file in the archive."""

THRESHOLDS = {2: 1.0, 3: 0.5}
"""Number of classes to the mean rating from which a text counts as positive or (negated) negative."""


class ExampleRow(TypedDict):
    """One text, its label and the mean of its human ratings (-4 to 4)."""

    text: str
    label: str
    rating: float


def vader_rows(
    domain: str = "tweets",
    *,
    classes: Literal[2, 3] = 2,
    cache: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> list[ExampleRow]:
    """The labelled texts of one domain, in the order of the published file.

    With two classes the label is "positive" for a mean rating of at least 1 and "negative" for at most -1, and the
    texts between, on which raters disagree or see no sentiment, are left out. With three, texts between -0.5 and 0.5
    are "neutral" and none is left out. Character references are resolved, runs of white space (left where dashes were
    taken out) become one space, doubled apostrophes become quotation marks. Texts without a letter or digit, and those
    that repeat an earlier one but for case and punctuation, are dropped, so that no held-out row has been trained on.

    Args:
        domain: "tweets", "amazon" (product reviews), "editorials" or "movies" (film reviews).
        classes: 2 or 3.
        cache: the cache's root; `deltaw.models.packages.cache_folder()` when None.
        progress: told of the download.

    Raises:
        InputError: an unknown domain, or a number of classes other than 2 and 3.
        RunError: the data cannot be fetched, or is not the pinned one.
    """
    if domain not in DOMAINS:
        raise unknown_name("domain", domain, DOMAINS)
    if classes not in THRESHOLDS:
        raise InputError(f"classes is {classes!r}: expected 2 or 3")
    threshold = THRESHOLDS[classes]
    rows: list[ExampleRow] = []
    seen: set[str] = set()
    for text, rating in _rated(fetch(VADER, cache=cache, progress=progress), domain):
        key = " ".join(re.findall(r"[^\W_]+", text.casefold()))
        if not key or key in seen:
            continue
        seen.add(key)
        label = "positive" if rating >= threshold else "negative" if rating <= -threshold else "neutral"
        if classes == 3 or label != "neutral":
            rows.append(ExampleRow(text=text, label=label, rating=rating))
    return rows


def write_example(
    path: str | os.PathLike[str],
    domain: str = "tweets",
    *,
    classes: Literal[2, 3] = 2,
    cache: str | os.PathLike[str] | None = None,
) -> int:
    """Writes a domain as JSON lines with `text` and `label`; returns the number of rows.

    Raises:
        InputError, RunError: as `vader_rows`, or one line for a place that cannot be written to.
    """
    rows = vader_rows(domain, classes=classes, cache=cache)
    lines = [json.dumps({"text": row["text"], "label": row["label"]}, ensure_ascii=False) for row in rows]
    write_text(path, "\n".join(lines) + "\n")
    return len(rows)


def clean_text(text: str) -> str:
    """Resolves character references (some are escaped twice), composes accents, mends quotation marks and spaces."""
    while (plain := html.unescape(text)) != text:
        text = plain
    text = unicodedata.normalize("NFC", text).replace("''", '"')
    return " ".join(text.split())


def _rated(path: Path, domain: str) -> list[tuple[str, float]]:
    """(cleaned text, mean rating) of each line; the archives are read in memory, nothing is unpacked."""
    name = f"hutto_ICWSM_2014/{DOMAINS[domain]}_GroundTruth.txt"
    try:
        with tarfile.open(path, "r:gz") as outer:
            inner = _member(outer, _INNER)
        with tarfile.open(fileobj=io.BytesIO(inner), mode="r:gz") as archive:
            text = _member(archive, name).decode("utf-8")
        rated = []
        for line in filter(None, text.split("\r\n")):
            _, rating, sentence = line.split("\t")
            rated.append((clean_text(sentence), float(rating)))
    except (tarfile.TarError, KeyError, ValueError, EOFError, OSError) as error:
        raise RunError(f"{path} cannot be read as {VADER.filename}: {error}; delete it and try again") from error
    return rated


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    info = archive.getmember(name)
    file = archive.extractfile(info) if info.isfile() and info.size <= _LIMIT_BYTES else None
    if file is None:
        raise ValueError(f"{name} is not a plain file of at most {_LIMIT_BYTES} bytes")
    return file.read()
