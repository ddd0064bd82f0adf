"""What a task measures: rows and a model in, metrics, predictions and answers out. One evaluator serves a whole run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deltaw.core.errors import InputError
from deltaw.data import Collator, LabelRow, PromptRow, RowSet, TagRow, Template, clip_prompt, encode
from deltaw.data.encode import IGNORED
from deltaw.data.rows import ChatRow, Row, row_input
from deltaw.data.templates import Renderer, special_affixes
from deltaw.evaluate.baselines import majority, tag_dictionary, tfidf_logreg
from deltaw.evaluate.generate import generate_answers
from deltaw.evaluate.heads import predict_sequence_classes, predict_token_classes
from deltaw.evaluate.likelihood import label_log_likelihood, perplexity
from deltaw.evaluate.metrics import (
    classification_metrics,
    entity_metrics,
    entity_spans,
    exact_match,
    labelled_tags,
    normalize_answer,
)

#: Answers of this many tokens are generated for the examples of a report, where none were asked for.
_EXAMPLE_TOKENS = 48


@dataclass(frozen=True)
class Evaluation:
    """What one look at a model gave.

    Attributes:
        metrics: numbers by name.
        confusion: rows true, columns predicted, in the order of the labels; None where there are no labels.
        answers: the model's answer to each row; None where rows ask for none.
        main: the metric that `shares` is of.
        shares: each row's (numerator, denominator) of it: the metric is the sum of the first over that of the second.
    """

    metrics: dict[str, float]
    confusion: list[list[int]] | None = None
    answers: list[str] | None = None
    main: str = "loss"
    shares: list[tuple[float, float]] | None = None


class TaskEvaluator:
    """Encodes held-out rows once, then measures any number of models (or states of one) on them.

    Args:
        task: a key of `deltaw.data.TASKS`.
        rows: the held-out rows.
        tokenizer: the model's.
        labels: names of the classes (classification), or the closed set of answers (`instruct`); None for free text.
        template: how prompts are written out; as in training.
        max_length: tokens a sequence; as in training.
        batch_size: rows a forward pass.
        max_new_tokens: above 0, free answers are generated and compared with the reference (`exact_match`).
        seed: of the masks of masked language modelling.
        normalize: label likelihoods a token, so that long labels are not at a disadvantage.
        encoder_decoder: the models read the prompt with an encoder and write the answer with a decoder.
    """

    def __init__(
        self,
        task: str,
        rows: RowSet,
        tokenizer: Any,
        *,
        labels: Sequence[str] | None = None,
        template: Template | None = None,
        max_length: int = 512,
        batch_size: int = 16,
        max_new_tokens: int = 0,
        seed: int = 0,
        normalize: bool = True,
        encoder_decoder: bool = False,
    ) -> None:
        self.task = task
        self.tokenizer = tokenizer
        self.pad: int = tokenizer.pad_token_id
        self.template = template or Template()
        self.labels = list(labels) if labels is not None else None
        self.max_length = max_length
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
        self.normalize = normalize
        encoded = encode(rows, tokenizer, task, max_length=max_length, labels=labels, template=self.template)
        self.counts = encoded.counts
        self.rows: list[Row] = [rows.rows[index] for index in encoded.kept]
        self.source = rows
        self.examples: list[dict[str, list[int]]] = encoded.examples
        if task == "masked-lm":
            self.examples = _masked(encoded.examples, masking_collator(tokenizer, seed))
        self.encoder_end = special_affixes(tokenizer)[1] if encoder_decoder else []
        if encoder_decoder and task == "instruct":
            self.examples = split_answers(encoded.examples, tokenizer)
        self.prompts: list[list[int]] = []
        self.heads: list[int] = []
        self.groups: dict[tuple[tuple[int, ...], ...], list[int]] = {}
        if task == "instruct":
            self._render()

    @property
    def closed(self) -> bool:
        """Whether the answers are a closed set of labels."""
        return self.labels is not None

    def __call__(self, model: Any) -> Evaluation:
        """Measures the model as it is."""
        if self.task == "sequence-classification":
            return self._classes(model)
        if self.task == "token-classification":
            return self._tags(model)
        if self.task == "instruct" and self.closed:
            found = self._likelihoods(model)
        else:
            shares: list[tuple[float, float]] = []
            measured = perplexity(
                model, self.examples, batch_size=self.batch_size, pad_token_id=self.pad, shares=shares
            )
            found = Evaluation(dict(measured), shares=shares)
        if not self.max_new_tokens or self.task != "instruct":
            return found
        answers = self._generated(model, self.prompts, self.heads, self.max_new_tokens)
        matches = {k: float(v) for k, v in exact_match(answers, self.references()).items() if k != "n"}
        found = replace(found, metrics=found.metrics | matches, answers=answers)
        if self.closed:
            return found
        pairs = zip(answers, self.references(), strict=True)
        right = [(float(normalize_answer(answer) == normalize_answer(wanted)), 1.0) for answer, wanted in pairs]
        return replace(found, main="exact_match", shares=right)

    # Closed answers.

    def _render(self) -> None:
        """Prompts, and for a closed set the tokens of every label as they would follow each prompt.

        A prompt is cut as in training where the longest label is the answer: which one it is must not show.
        """
        renderer = Renderer(self.tokenizer, self.template)
        end = int(self.template.style == "plain")
        for index, row in enumerate(self.rows):
            rendered = renderer.render(row)
            self.prompts.append(rendered.ids[: rendered.answer] + self.encoder_end)
            self.heads.append(rendered.head)
            if self.labels is None:
                continue
            key = []
            for label in self.labels:
                with_label = renderer.render(_answered(row, label), eos=False)
                key.append(tuple(with_label.ids[with_label.answer :]))
            self.groups.setdefault(tuple(key), []).append(index)
        for labels, members in self.groups.items():
            room = self.max_length - max(len(label) for label in labels) - end
            for index in members:
                if room <= self.heads[index]:
                    raise InputError(
                        f"max_length {self.max_length} has no room for a prompt beside the labels: raise it"
                    )
                self.prompts[index] = clip_prompt(self.prompts[index], room, head=self.heads[index])

    def _likelihoods(self, model: Any) -> Evaluation:
        assert self.labels is not None
        scores = torch.empty(len(self.rows), len(self.labels))
        nats, tokens = 0.0, 0
        truth = [self.labels.index(label) for label in self.references()]
        for key, members in self.groups.items():
            per_token = label_log_likelihood(
                model,
                [self.prompts[index] for index in members],
                [list(label) for label in key],
                batch_size=self.batch_size,
                pad_token_id=self.pad,
                normalize=True,
            )
            lengths = torch.tensor([len(label) for label in key])
            scores[members] = per_token if self.normalize else per_token * lengths
            for place, index in enumerate(members):
                nats -= float(per_token[place, truth[index]]) * int(lengths[truth[index]])
                tokens += int(lengths[truth[index]])
        found = self._labelled(scores, truth, nats / tokens)
        return replace(found, metrics=found.metrics | {"perplexity": math.exp(nats / tokens)})

    def _labelled(self, scores: Tensor, truth: list[int], loss: float) -> Evaluation:
        assert self.labels is not None
        found: dict[str, Any] = classification_metrics(scores, truth, self.labels)
        confusion = found.pop("confusion")
        metrics = {"loss": loss, **{k: float(v) for k, v in found.items() if isinstance(v, (int, float)) and k != "n"}}
        best = scores.argmax(1).tolist()
        right = [(float(guess == true), 1.0) for guess, true in zip(best, truth, strict=True)]
        return Evaluation(metrics, confusion, [self.labels[i] for i in best], "accuracy", right)

    # Heads.

    def _classes(self, model: Any) -> Evaluation:
        scores = predict_sequence_classes(model, self.examples, batch_size=self.batch_size, pad_token_id=self.pad)
        truth = [example["labels"][0] for example in self.examples]
        loss = float(torch.nn.functional.cross_entropy(scores, torch.tensor(truth)))
        return self._labelled(scores, truth, loss)

    def _tags(self, model: Any) -> Evaluation:
        assert self.labels is not None
        predicted = predict_token_classes(model, self.examples, batch_size=self.batch_size, pad_token_id=self.pad)
        true, guess = labelled_tags(predicted, [e["labels"] for e in self.examples], self.labels)
        found: dict[str, Any] = entity_metrics(true, guess)
        answers = [
            _entities(row.tokens, tags) for row, tags in zip(self.rows, guess, strict=True) if isinstance(row, TagRow)
        ]
        metrics = {name: float(found[name]) for name in ("precision", "recall", "f1")}
        spans = [(entity_spans(gold), entity_spans(tags)) for gold, tags in zip(true, guess, strict=True)]
        shares = [(2.0 * len(gold & own), float(len(gold) + len(own))) for gold, own in spans]
        return Evaluation(metrics, answers=answers, main="f1", shares=shares)

    # What a report shows.

    def references(self) -> list[str]:
        """The right answer of each row."""
        return [_reference(row) for row in self.rows]

    def shown(self, count: int = 10) -> list[int]:
        """Which rows a report shows: every n-th, so that a file in the order of its labels shows several."""
        step = max(1, len(self.rows) // count)
        return list(range(0, len(self.rows), step))[:count]

    def example_answers(self, model: Any, evaluation: Evaluation) -> list[str] | None:
        """The model's answers to the shown rows: those measured, else short greedy ones."""
        if evaluation.answers is not None:
            return [evaluation.answers[index] for index in self.shown()]
        if self.task == "masked-lm":
            return None
        shown = self.shown()
        if self.task == "instruct":
            prompts, heads = [self.prompts[i] for i in shown], [self.heads[i] for i in shown]
        else:
            prompts, heads = [_first_half(self.examples[i]["input_ids"]) for i in shown], [0] * len(shown)
        return self._generated(model, prompts, heads, _EXAMPLE_TOKENS)

    def _generated(self, model: Any, prompts: Sequence[list[int]], heads: Sequence[int], new_tokens: int) -> list[str]:
        """Greedy answers, after as much of the end of each prompt as leaves the model room to answer."""
        room = self.max_length
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if isinstance(limit, int) and limit > 0 and not model.config.is_encoder_decoder:
            new_tokens = min(new_tokens, limit - 1)
            room = min(room, limit - new_tokens)
        cut = [clip_prompt(ids, room, head=head) for ids, head in zip(prompts, heads, strict=True)]
        return generate_answers(model, self.tokenizer, cut, max_new_tokens=new_tokens, batch_size=self.batch_size)

    def example_rows(self, before: list[str] | None, after: list[str] | None) -> list[dict[str, str]]:
        """Lines of `examples.jsonl`."""
        lines = []
        for place, index in enumerate(self.shown() if after is not None else []):
            row = self.rows[index]
            line = {"prompt": _prompt(row), "reference": _reference(row)}
            if self.task == "causal-lm":
                ids = self.examples[index]["input_ids"]
                half = _first_half(ids)
                line = {
                    "prompt": self.tokenizer.decode(half, skip_special_tokens=True),
                    "reference": self.tokenizer.decode(ids[len(half) :], skip_special_tokens=True),
                }
            if before is not None:
                line["before"] = before[place]
            if after is not None:
                line["after"] = after[place]
            lines.append(line)
        return lines

    def baselines(self, train: RowSet, *, seed: int) -> dict[str, dict[str, Any]]:
        """What needs no language model: the majority class and TF-IDF + logistic regression, or a tag dictionary."""
        if self.task == "token-classification":
            tagged = [row for row in train if isinstance(row, TagRow)]
            test = [row for row in self.rows if isinstance(row, TagRow)]
            found: dict[str, Any] = tag_dictionary(
                [row.tokens for row in tagged],
                [row.tags for row in tagged],
                [row.tokens for row in test],
                [row.tags for row in test],
            )
            return {"tag_dictionary": {name: found[name] for name in ("precision", "recall", "f1")}}
        if self.labels is None:
            return {}
        given = [_reference(row) for row in train]
        wanted = self.references()
        result = {"majority": majority(given, wanted, self.labels)}
        if len(set(given)) > 1:
            texts = [row_input(row) for row in train]
            own = [row_input(row) for row in self.rows]
            result["tfidf_logreg"] = tfidf_logreg(texts, given, own, wanted, self.labels, seed=seed)
        keep = ("accuracy", "macro_f1", "macro_auroc")
        return {name: {k: v for k, v in values.items() if k in keep} for name, values in result.items()}


def metric_function(evaluator: TaskEvaluator) -> Callable[[Any], dict[str, float]]:
    """The evaluator as training wants it: a model to numbers by name."""
    return lambda model: evaluator(model).metrics


def _answered(row: Row, label: str) -> Row:
    if isinstance(row, LabelRow):
        return replace(row, label=label)
    if isinstance(row, PromptRow):
        # White space around the answer is part of what training shows.
        before, _, after = row.completion.partition(row.completion.strip() or row.completion)
        return replace(row, completion=f"{before}{label}{after}")
    raise InputError("label likelihoods need rows of prompt and completion, or of text and label")


def _reference(row: Row) -> str:
    if isinstance(row, LabelRow):
        return row.label
    if isinstance(row, PromptRow):
        return row.completion.strip()
    if isinstance(row, TagRow):
        return _entities(row.tokens, row.tags)
    if isinstance(row, ChatRow):
        return next((str(m["content"]) for m in reversed(row.messages) if m["role"] == "assistant"), "")
    return ""


def _prompt(row: Row) -> str:
    if isinstance(row, ChatRow):
        last = max((i for i, m in enumerate(row.messages) if m["role"] == "assistant"), default=len(row.messages))
        return "\n".join(f"{m['role']}: {m['content']}" for m in row.messages[:last])
    return " ".join(row.tokens) if isinstance(row, TagRow) else row_input(row)


def _entities(tokens: Sequence[str], tags: Sequence[str]) -> str:
    found: list[tuple[str, list[str]]] = []
    for token, tag in zip(tokens, tags, strict=False):
        prefix, _, kind = tag.partition("-")
        if prefix == "B" or (prefix == "I" and (not found or found[-1][0] != kind)):
            found.append((kind, [token]))
        elif prefix == "I":
            found[-1][1].append(token)
        else:
            found.append(("", []))
    return "; ".join(f"{' '.join(words)} ({kind})" for kind, words in found if kind) or "none"


def _first_half(ids: list[int]) -> list[int]:
    return ids[: max(1, len(ids) // 2)]


def _masked(examples: Sequence[Mapping[str, list[int]]], collator: Collator) -> list[dict[str, list[int]]]:
    batches = (collator([dict(example)]) for example in examples)
    return [{key: batch[key][0].tolist() for key in ("input_ids", "labels")} for batch in batches]


def split_answers(examples: Sequence[Mapping[str, list[int]]], tokenizer: Any) -> list[dict[str, list[int]]]:
    """Prompt and answer of encoded `instruct` rows apart, for an encoder and a decoder; the last answer is learnt."""
    end = special_affixes(tokenizer)[1]
    made = []
    for example in examples:
        ids, labels = example["input_ids"], example["labels"]
        start = max(i for i in range(1, len(ids)) if labels[i] != IGNORED and labels[i - 1] == IGNORED)
        made.append({"input_ids": ids[:start] + end, "labels": labels[start:]})
    return made


class AnswerCollator(Collator):
    """Batches of prompts for an encoder and answers for a decoder, each padded to its own longest."""

    def __init__(self, pad_token_id: int | None) -> None:
        super().__init__("instruct", pad_token_id)

    def __call__(self, examples: Sequence[dict[str, list[int]]]) -> dict[str, Any]:
        """The batch; `labels` are (batch, answer tokens)."""
        prompts = [{"input_ids": e["input_ids"], "labels": [IGNORED] * len(e["input_ids"])} for e in examples]
        longest = max(len(example["labels"]) for example in examples)
        padded = [e["labels"] + [IGNORED] * (longest - len(e["labels"])) for e in examples]
        return super().__call__(prompts) | {"labels": torch.tensor(padded)}


def masking_collator(tokenizer: Any, seed: int) -> Collator:
    """The collator of masked language modelling for a tokenizer."""
    return Collator(
        "masked-lm",
        tokenizer.pad_token_id,
        mask_token_id=tokenizer.mask_token_id,
        vocab_size=len(tokenizer),
        special_ids=tokenizer.all_special_ids,
        seed=seed,
    )
