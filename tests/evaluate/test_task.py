"""The evaluator of every task against plain passes, one row and one label at a time."""

from __future__ import annotations

import math

import pytest
import small_runs
import torch
import torch.nn.functional as F

from deltaw.checkpoint import load_model, load_tokenizer
from deltaw.core.errors import InputError
from deltaw.data import ChatRow, LabelRow, PromptRow, RowSet, TagRow, Template, TextRow, encode, layout_of
from deltaw.evaluate.metrics import classification_metrics
from deltaw.evaluate.task import AnswerCollator, TaskEvaluator, split_answers

LABELS = ["bad", "excellent", "so-so"]
CHAT = Template(style="chat", chat_template="chatml")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    for family in ("llama", "bert", "t5"):
        small_runs.make_model(folder / family, family, std=0.3)
    return folder


@pytest.fixture(scope="module")
def llama(place):
    return load_model(str(place / "llama"), task="causal-lm", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def byte_tokenizer(place):
    return load_tokenizer(str(place / "llama"))


@pytest.fixture(scope="module")
def word_tokenizer(place):
    return load_tokenizer(str(place / "bert"))


def rowset(*rows):
    return RowSet(list(rows), layout_of(rows[0]), "rows")


def labelled(count=9):
    texts = [text for text, _ in small_runs.labelled_texts(count, words=7)]
    return [LabelRow(text, LABELS[i % 3]) for i, text in enumerate(texts)]


def answer_start(example):
    return next(i for i, label in enumerate(example["labels"]) if label != -100)


def log_probabilities(model, ids, start):
    """Of each token from `start` on, given those before it."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    return logits[start - 1 : -1].log_softmax(-1).gather(-1, torch.tensor(ids[start:])[:, None])[:, 0]


@pytest.mark.parametrize("template", [Template(), CHAT], ids=["plain", "chat"])
@pytest.mark.parametrize("normalize", [True, False])
def test_label_likelihoods_are_plain_passes(llama, byte_tokenizer, template, normalize):
    rows = labelled()
    evaluator = TaskEvaluator(
        "instruct", rowset(*rows), byte_tokenizer, labels=LABELS, template=template, batch_size=4, normalize=normalize
    )
    scores = torch.empty(len(rows), 3, dtype=torch.float64)
    nats, tokens = 0.0, 0
    for i, row in enumerate(rows):
        for j, label in enumerate(LABELS):
            whole = encode([LabelRow(row.text, label)], byte_tokenizer, "instruct", max_length=256, template=template)
            ids, start = whole.examples[0]["input_ids"], answer_start(whole.examples[0])
            if template.style == "plain":
                assert ids[-1] == byte_tokenizer.eos_token_id
                ids = ids[:-1]
            found = log_probabilities(llama, ids, start)
            scores[i, j] = found.mean() if normalize else found.sum()
            if label == row.label:
                nats, tokens = nats - float(found.sum()), tokens + len(found)
    best = scores.argmax(1)
    truth = torch.tensor([LABELS.index(row.label) for row in rows])
    found = evaluator(llama)
    assert found.answers == [LABELS[i] for i in best]
    assert found.metrics["accuracy"] == pytest.approx(float((best == truth).double().mean()))
    assert found.metrics["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert found.metrics["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    confusion = torch.zeros(3, 3, dtype=torch.long)
    confusion.index_put_((truth, best), torch.ones(len(rows), dtype=torch.long), accumulate=True)
    assert found.confusion == confusion.tolist()
    # The areas depend on every score, also where one label wins everywhere.
    areas = classification_metrics(scores, truth.tolist(), LABELS)["macro_auroc"]
    assert found.metrics["macro_auroc"] == pytest.approx(areas) and 0 < areas < 1


PROMPTS = [
    PromptRow("aa bb ->", " good"),
    PromptRow("aa xx -> ", "bad"),
    PromptRow("Is it so?\n", "good"),
    PromptRow("cc:", "\ngood"),
    PromptRow("dd =>", " bad\n"),
]


@pytest.mark.parametrize("template", [Template(), CHAT], ids=["plain", "chat"])
def test_prompts_and_answers_are_those_of_training(byte_tokenizer, template):
    rows = [*PROMPTS, PromptRow("yy", "good"), PromptRow("ee", "bad")]
    trained = encode(rowset(*rows), byte_tokenizer, "instruct", max_length=256, template=template).examples
    evaluator = TaskEvaluator(
        "instruct", rowset(*rows), byte_tokenizer, labels=["bad", "good"], template=template, max_length=256
    )
    ends = 1 if template.style == "plain" else 0
    groups = {index: labels for labels, members in evaluator.groups.items() for index in members}
    for index, (row, example) in enumerate(zip(rows, trained, strict=True)):
        start = answer_start(example)
        assert evaluator.prompts[index] == example["input_ids"][:start]
        own = groups[index][["bad", "good"].index(row.completion.strip())]
        answer = example["input_ids"][start:]
        assert list(own) == answer[: len(answer) - ends]


def test_clipped_prompts(llama, byte_tokenizer):
    """Cut from the left, the same for every label, and never longer than in training."""
    rows = [LabelRow("aa " * 30, "bad"), LabelRow("xx " * 30, "excellent"), LabelRow("cc", "so-so")]
    trained = encode(rowset(*rows), byte_tokenizer, "instruct", max_length=40, labels=LABELS).examples
    evaluator = TaskEvaluator("instruct", rowset(*rows), byte_tokenizer, labels=LABELS, max_length=40)
    assert evaluator.prompts[1] == trained[1]["input_ids"][: answer_start(trained[1])]
    shown = trained[0]["input_ids"][: answer_start(trained[0])]
    assert evaluator.prompts[0] == shown[-len(evaluator.prompts[0]) :] and len(evaluator.prompts[0]) == 40 - 11
    assert evaluator.prompts[2] == trained[2]["input_ids"][: answer_start(trained[2])]
    assert evaluator(llama).metrics["accuracy"] in (0.0, 1 / 3, 2 / 3, 1.0)
    with pytest.raises(InputError, match="no room for a prompt beside the labels"):
        TaskEvaluator("instruct", rowset(LabelRow("aa", "bad")), byte_tokenizer, labels=LABELS, max_length=11)


def test_a_label_outside_the_set_names_its_row(byte_tokenizer, word_tokenizer):
    rows = rowset(LabelRow("aa", "bad"), LabelRow("bb", "excelent"))
    for task in ("instruct", "sequence-classification"):
        tokenizer = byte_tokenizer if task == "instruct" else word_tokenizer
        with pytest.raises(InputError, match=r"row 2: label 'excelent' is not one of .* did you mean 'excellent'"):
            TaskEvaluator(task, rows, tokenizer, labels=LABELS)
    with pytest.raises(InputError, match="'B-ORG' is not one of"):
        TaskEvaluator(
            "token-classification", rowset(TagRow(["aa"], ["B-ORG"])), word_tokenizer, labels=["O", "B-PER", "I-PER"]
        )


@pytest.mark.parametrize("task", ["causal-lm", "instruct"])
def test_free_text_loss_is_the_mean_over_tokens(llama, byte_tokenizer, task):
    texts = [text for text, _ in small_runs.labelled_texts(7)]
    rows = [
        TextRow(text) if task == "causal-lm" else PromptRow(text[:4], text[4:] + "!" * i)
        for i, text in enumerate(texts)
    ]
    found = TaskEvaluator(task, rowset(*rows), byte_tokenizer, batch_size=3)(llama)
    every = []
    for example in encode(rowset(*rows), byte_tokenizer, task, max_length=512).examples:
        start = 1 if task == "causal-lm" else answer_start(example)
        every.append(log_probabilities(llama, example["input_ids"], start))
    assert found.metrics["loss"] == pytest.approx(-float(torch.cat(every).mean()), rel=1e-5)
    assert found.metrics["perplexity"] == pytest.approx(math.exp(found.metrics["loss"]))
    assert found.metrics["tokens"] == len(torch.cat(every))


def test_exact_match_of_generated_answers(llama, byte_tokenizer):
    """Rows whose reference is what the model says, beside rows whose is not."""
    prompts = ["aa", "bb cc dd", "ee xx yy aa", "aa aa"]
    said = []
    for prompt in prompts:
        ids = byte_tokenizer(prompt)["input_ids"]
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(llama(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == byte_tokenizer.eos_token_id:
                break
        said.append(byte_tokenizer.decode(ids[len(byte_tokenizer(prompt)["input_ids"]) :], skip_special_tokens=True))
    references = [said[0], "something else", said[2], "another"]
    rows = [PromptRow(prompt, reference) for prompt, reference in zip(prompts, references, strict=True)]
    evaluator = TaskEvaluator("instruct", rowset(*rows), byte_tokenizer, max_new_tokens=6)
    evaluator.prompts = [list(byte_tokenizer(prompt)["input_ids"]) for prompt in prompts]
    found = evaluator(llama)
    assert found.answers == said
    assert found.metrics["exact_match"] == 0.5
    assert {"loss", "perplexity"} < found.metrics.keys()


@pytest.mark.parametrize("rows", [PROMPTS[:1], [PromptRow("aa " * 90, "bad")]], ids=["short", "long"])
@pytest.mark.parametrize("task", ["instruct", "causal-lm"])
def test_long_prompts_leave_room_for_the_answer(llama, byte_tokenizer, task, rows):
    """The model has 256 positions: a prompt of 256 tokens is cut, not an error."""
    if task == "causal-lm":
        rows = [TextRow(rows[0].prompt * 2)]
    evaluator = TaskEvaluator(task, rowset(*rows), byte_tokenizer, max_length=256)
    answers = evaluator.example_answers(llama, evaluator(llama))
    assert len(answers) == 1 and all(isinstance(answer, str) for answer in answers)
    lines = evaluator.example_rows(None, answers)
    assert lines[0].keys() == {"prompt", "reference", "after"}


def test_shown_rows(llama, byte_tokenizer):
    rows = [LabelRow(f"aa {i}", LABELS[i // 10]) for i in range(30)]
    evaluator = TaskEvaluator("instruct", rowset(*rows), byte_tokenizer, labels=LABELS)
    assert evaluator.shown() == list(range(0, 30, 3))
    found = evaluator(llama)
    answers = evaluator.example_answers(llama, found)
    assert answers == [found.answers[i] for i in range(0, 30, 3)]
    lines = evaluator.example_rows(["?"] * 10, answers)
    assert [line["reference"] for line in lines] == [rows[i].label for i in range(0, 30, 3)]
    assert lines[3] == {"prompt": "aa 9", "reference": "bad", "before": "?", "after": answers[3]}
    short = TaskEvaluator("instruct", rowset(*rows[:4]), byte_tokenizer, labels=LABELS)
    assert short.shown() == [0, 1, 2, 3]


def test_conversations_are_shown_with_their_last_answer(llama, byte_tokenizer):
    messages = [
        {"role": role, "content": text}
        for role, text in [("user", "hi"), ("assistant", "a"), ("user", "so?"), ("assistant", "b")]
    ]
    evaluator = TaskEvaluator(
        "instruct",
        rowset(ChatRow(messages)),
        byte_tokenizer,
        template=Template(chat_template="chatml"),
        max_new_tokens=3,
    )
    found = evaluator(llama)
    line = evaluator.example_rows(None, evaluator.example_answers(llama, found))[0]
    assert line["prompt"] == "user: hi\nassistant: a\nuser: so?" and line["reference"] == "b"
    # Both answers carry loss; the last one is asked for.
    shown = byte_tokenizer.decode(evaluator.prompts[0])
    assert shown.endswith("<|im_start|>assistant\n") and "so?" in shown and not shown.endswith("b")


def test_classes_and_tags(place, word_tokenizer):
    rows = [LabelRow(text, label) for text, label in small_runs.labelled_texts(12)]
    model = load_model(
        str(place / "bert"), task="sequence-classification", labels=["bad", "good"], dtype="float32", device="cpu"
    )
    with torch.no_grad():
        model.classifier.weight.normal_(generator=torch.Generator().manual_seed(0))
    found = TaskEvaluator(
        "sequence-classification", rowset(*rows), word_tokenizer, labels=["bad", "good"], batch_size=5
    )(model)
    logits = torch.cat([model(**word_tokenizer(row.text, return_tensors="pt")).logits for row in rows]).detach()
    truth = torch.tensor([int(row.label == "good") for row in rows])
    assert found.metrics["loss"] == pytest.approx(float(F.cross_entropy(logits, truth)), rel=1e-4)
    assert found.metrics["accuracy"] == pytest.approx(float((logits.argmax(1) == truth).float().mean()))
    assert "perplexity" not in found.metrics

    names = ["B-LOC", "B-PER", "I-LOC", "I-PER", "O"]
    model = load_model(str(place / "bert"), task="token-classification", labels=names, dtype="float32", device="cpu")
    tags = [TagRow(["Ann", "went", "to", "Rome"], ["B-PER", "O", "O", "B-LOC"]), TagRow(["aa", "Bob"], ["O", "B-PER"])]
    evaluator = TaskEvaluator("token-classification", rowset(*tags), word_tokenizer, labels=names)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0]))
    found = evaluator(model)
    assert found.metrics == {"precision": 0.0, "recall": 0.0, "f1": 0.0} and found.answers == ["none", "none"]
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0]))
    found = evaluator(model)
    # Six persons of one word are found, two of them right; there are three entities.
    assert found.metrics["precision"] == pytest.approx(2 / 6) and found.metrics["recall"] == pytest.approx(2 / 3)
    assert found.answers[1] == "aa (PER); Bob (PER)"
    assert evaluator.references() == ["Ann (PER); Rome (LOC)", "Bob (PER)"]


def test_masks_are_the_same_every_time(place, word_tokenizer):
    model = load_model(str(place / "bert"), task="masked-lm", dtype="float32", device="cpu")
    rows = rowset(*(TextRow(text) for text, _ in small_runs.labelled_texts(9)))
    first, again = (TaskEvaluator("masked-lm", rows, word_tokenizer, seed=3) for _ in range(2))
    assert first.examples == again.examples
    assert first.examples != TaskEvaluator("masked-lm", rows, word_tokenizer, seed=4).examples
    found = first(model)
    total, count = 0.0, 0
    for example in first.examples:
        with torch.no_grad():
            logits = model(torch.tensor([example["input_ids"]])).logits[0]
        labels = torch.tensor(example["labels"])
        total += float(F.cross_entropy(logits, labels, reduction="sum"))
        count += int((labels != -100).sum())
    assert found.metrics["loss"] == pytest.approx(total / count, rel=1e-5)
    assert first.example_answers(model, found) is None


def test_baselines(byte_tokenizer, word_tokenizer):
    train = rowset(*(LabelRow(text, label) for text, label in small_runs.labelled_texts(40)))
    test = rowset(*(LabelRow(text, label) for text, label in small_runs.labelled_texts(12, seed=1)))
    found = TaskEvaluator("instruct", test, byte_tokenizer, labels=["bad", "good"]).baselines(train, seed=0)
    share = sum(row.label == "good" for row in test) / len(test)
    assert found["majority"]["accuracy"] == pytest.approx(share)
    assert found["tfidf_logreg"]["accuracy"] == 1.0 and "confusion" not in found["tfidf_logreg"]
    tags = rowset(*(TagRow(row["tokens"], row["tags"]) for row in small_runs.rows_of("tags", 12)))
    names = ["B-LOC", "B-PER", "I-LOC", "I-PER", "O"]
    evaluator = TaskEvaluator("token-classification", tags, word_tokenizer, labels=names)
    assert evaluator.baselines(tags, seed=0) == {"tag_dictionary": {"precision": 1.0, "recall": 1.0, "f1": 1.0}}
    free = TaskEvaluator("instruct", rowset(*PROMPTS), byte_tokenizer)
    assert free.baselines(rowset(*PROMPTS), seed=0) == {}


def test_an_encoder_decoder_reads_the_prompt_and_writes_the_answer(place):
    tokenizer = load_tokenizer(str(place / "t5"))
    model = load_model(str(place / "t5"), task="instruct", dtype="float32", device="cpu")
    rows = [PromptRow(f"{text} Label :", f" {label}") for text, label in small_runs.labelled_texts(6)]
    encoded = encode(rowset(*rows), tokenizer, "instruct", max_length=64).examples
    apart = split_answers(encoded, tokenizer)
    end = tokenizer.eos_token_id
    for row, example in zip(rows, apart, strict=True):
        assert example["input_ids"] == tokenizer(row.prompt)["input_ids"] and example["input_ids"][-1] == end
        assert example["labels"] == tokenizer(row.completion.strip())["input_ids"]
    batch = AnswerCollator(tokenizer.pad_token_id)(apart)
    assert batch["labels"].shape == (6, 2) and (batch["labels"] != -100).all()
    assert torch.equal(batch["attention_mask"].sum(1), torch.tensor([len(example["input_ids"]) for example in apart]))

    evaluator = TaskEvaluator("instruct", rowset(*rows), tokenizer, labels=["bad", "good"], encoder_decoder=True)
    assert evaluator.prompts == [example["input_ids"] for example in apart]
    found = evaluator(model)
    scores = torch.empty(6, 2)
    for i, example in enumerate(apart):
        for j, label in enumerate(["bad", "good"]):
            target = torch.tensor([tokenizer(label, add_special_tokens=False)["input_ids"]])
            with torch.no_grad():
                scores[i, j] = -model(input_ids=torch.tensor([example["input_ids"]]), labels=target).loss
    truth = torch.tensor([int(row.completion == " good") for row in rows])
    assert found.metrics["loss"] == pytest.approx(-float(scores.gather(1, truth[:, None]).mean()), rel=1e-5)
    assert found.answers == [["bad", "good"][i] for i in scores.argmax(1)]
    free = TaskEvaluator("instruct", rowset(*rows), tokenizer, max_new_tokens=3, encoder_decoder=True)
    assert free(model).metrics["tokens"] == 12
