"""What a consortium study is of: each example's organisations, its rows, and the settings it is run with."""

from __future__ import annotations

import json
import os
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltaw.core.errors import InputError, unknown_name
from deltaw.core.files import write_text
from deltaw.core.generators import derived_seed
from deltaw.data import credit, fraud

#: Rows of one label that a node gets by a Dirichlet draw are drawn again until every node has this many in all.
_LEAST_ROWS = 10
_DRAWS = 1000

_LORA = {"method": "lora", "r": 8, "alpha": 16, "target_modules": "all-linear", "schedule": "cosine"}


@dataclass(frozen=True, kw_only=True)
class Example:
    """Organisations with rows of their own and test rows that they share.

    Attributes:
        name: of the example.
        title: of its page.
        organisations: whose rows there are.
        labels: every label; None: those of all rows.
        write: writes an organisation's rows, or under "test" the shared test rows, into a folder, by a seed and knobs.
        knobs: of the rows.
        rounds: of the whole study.
        keys: of every training.
        private: what private trainings have in place of those.
    """

    name: str
    title: str
    organisations: tuple[str, ...]
    labels: tuple[str, ...] | None
    write: Callable[..., Mapping[str, Path]]
    knobs: Mapping[str, Any] = field(default_factory=dict)
    rounds: int = 15
    keys: Mapping[str, Any] = field(default_factory=dict)
    private: Mapping[str, Any] = field(default_factory=dict)


# At 2e-3, with which all rows in one place do well, a bank alone falls back to answering the most frequent label.
_ENCODER: dict[str, Any] = {
    **_LORA,
    "model": "minilm",
    "task": "sequence-classification",
    "max_length": 128,
    "learning_rate": 1e-3,
    "batch_size": 16,
    "micro_batch_size": 16,
    "eval_batch_size": 64,
}
# A step's noise is the same whatever the batch: few steps, of large ones, at a large rate. Chosen on seeds from 100 on.
_PRIVATE: dict[str, Any] = {
    "rule": "fedavg-ab",
    "batch_size": 256,
    "micro_batch_size": 64,
    "max_grad_norm": 1.0,
    "learning_rate": 1e-2,
    "schedule": "constant",
}

EXAMPLES = {
    "fraud": Example(
        name="fraud",
        title="Three banks learn to tell kinds of fraud",
        organisations=fraud.BANKS,
        labels=fraud.LABELS,
        write=fraud.write_fraud,
        keys=_ENCODER,
        private=_PRIVATE,
    ),
    "credit": Example(
        name="credit",
        title="Three departments of one bank learn to tell bad credits",
        organisations=tuple(credit.DEPARTMENTS),
        labels=credit.LABELS,
        write=credit.write_credit,
        keys={**_ENCODER, "max_length": 192},
        private={**_PRIVATE, "batch_size": 64},
    ),
}


def example(name: str) -> Example:
    """The example of a name.

    Raises:
        InputError: there is none.
    """
    if name not in EXAMPLES:
        raise unknown_name("example", name, EXAMPLES)
    return EXAMPLES[name]


def skewed(train: str | Path, test: str | Path, *, nodes: int = 4, concentration: float = 0.3) -> Example:
    """A file of labelled rows as an example: its rows spread over nodes with skewed labels.

    Args:
        train: JSON Lines with `label`, or `prompt` and `completion`.
        test: the shared test rows, in the same form.
        nodes: how many.
        concentration: of the Dirichlet draws; the smaller, the more a node's labels are of one kind.
    """
    names = tuple(f"node-{number}" for number in range(1, nodes + 1))

    def write(folder: str | os.PathLike[str], *, seed: int, **knobs: Any) -> Mapping[str, Path]:
        return write_skewed(folder, train=train, test=test, nodes=names, seed=seed, **knobs)

    keys = {name: value for name, value in _ENCODER.items() if name != "task"}
    return Example(
        name=Path(train).resolve().parent.name,
        title=f"{nodes} nodes with skewed labels",
        organisations=names,
        labels=None,
        write=write,
        knobs={"concentration": concentration},
        keys={**keys, "max_length": 256},
        private={**_PRIVATE, "batch_size": 64},
    )


def write_skewed(
    folder: str | os.PathLike[str],
    *,
    train: str | Path,
    test: str | Path,
    nodes: tuple[str, ...],
    seed: int,
    concentration: float,
) -> dict[str, Path]:
    """Spreads a file's rows over nodes: of each label every node gets a share from one Dirichlet draw.

    Hsu, Qi and Brown, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification",
    arXiv 1909.06335. Draws that leave a node fewer than 10 rows are made again.

    Returns:
        A node's name, or "test", to its file.

    Raises:
        InputError: a file that cannot be read or has no labels, a concentration that no draw suits.
    """
    if not concentration > 0:
        raise InputError(f"concentration is {concentration!r}: expected a number above 0")
    lines = _labelled(train)
    rng = random.Random(derived_seed(seed, "skewed"))
    by_label: dict[str, list[str]] = defaultdict(list)
    for line, label in lines:
        by_label[label].append(line)
    for _ in range(_DRAWS):
        parts = _drawn(by_label, nodes, concentration, rng)
        if min(len(part) for part in parts.values()) >= _LEAST_ROWS:
            break
    else:
        raise InputError(
            f"{len(lines)} rows over {len(nodes)} nodes leave one with fewer than {_LEAST_ROWS} at concentration "
            f"{concentration:g}: choose a larger one, or fewer nodes"
        )
    parts["test"] = [line for line, _ in _labelled(test)]
    paths = {}
    for name, part in parts.items():
        paths[name] = Path(folder) / f"{name}.jsonl"
        write_text(paths[name], "".join(line + "\n" for line in part))
    return paths


def _drawn(
    by_label: Mapping[str, list[str]], nodes: tuple[str, ...], concentration: float, rng: random.Random
) -> dict[str, list[str]]:
    parts: dict[str, list[str]] = {node: [] for node in nodes}
    for label in sorted(by_label):
        lines = list(by_label[label])
        rng.shuffle(lines)
        weights = [rng.gammavariate(concentration, 1.0) for _ in nodes]
        whole, begin, reached = sum(weights) or 1.0, 0, 0.0
        for node, weight in zip(nodes, weights, strict=True):
            reached += weight
            end = len(lines) if node == nodes[-1] else round(len(lines) * reached / whole)
            parts[node] += lines[begin:end]
            begin = end
    for part in parts.values():
        rng.shuffle(part)
    return parts


def _labelled(file: str | Path) -> list[tuple[str, str]]:
    """A file's lines as they are, each with its label."""
    try:
        lines = [line for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the rows {file}: {error}") from None
    found = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            found.append((line, str(row["label"] if "label" in row else row["completion"].strip())))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{file}, line {number}: expected an object with label, or completion") from None
    if not found:
        raise InputError(f"{file} has no rows")
    return found


def label_counts(file: str | Path) -> dict[str, int]:
    """How many of a file's rows have each label, by the label's name."""
    return dict(sorted(Counter(label for _, label in _labelled(file)).items()))
