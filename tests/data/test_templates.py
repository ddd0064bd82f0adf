"""Prompts, answers and conversations as tokens: the boundary, the spans of loss, agreement with transformers."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from deltaw.core.errors import InputError
from deltaw.data import (
    ChatRow,
    LabelRow,
    PromptRow,
    Renderer,
    Template,
    TextRow,
    clip_prompt,
    completion_ids,
    prompt_ids,
)
from deltaw.data.templates import chat_spans, join, special_affixes

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Writes thoughts into the last turn only, as Qwen3's does.
CHANGING = CHATML.replace(
    "{{ m['content'] }}", "{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}{{ m['content'] }}"
)
REFUSING = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)

TALK = ChatRow(
    [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello there"},
        {"role": "assistant", "content": "Hi!"},
        {"role": "user", "content": "The capital of France?"},
        {"role": "assistant", "content": "Paris, of course"},
    ]
)


def test_join():
    assert join("Answer:", "person") == ("Answer:", " person")
    assert join("Answer: ", "person") == ("Answer:", " person")
    assert join("Answer:  ", "person") == ("Answer: ", " person")
    assert join("Answer: ", " person") == ("Answer:", "  person")
    assert join("Answer:", " person") == ("Answer:", " person")
    assert join("Answer:\n", "person") == ("Answer:\n", "person")
    assert join("", "person") == ("", "person")


@pytest.mark.parametrize("prompt", ["Label:", "Label: ", "Label:\n", "The shares rose"])
@pytest.mark.parametrize("completion", ["positive", "negative", "Hi! Hello"])
@pytest.mark.parametrize("name", ["byte_level", "sentencepiece"])
def test_plain_is_the_natural_tokenisation(name, prompt, completion, request):
    """Prompt and answer by themselves give the tokens that the whole text has."""
    tokenizer = request.getfixturevalue(name)
    row = PromptRow(prompt, completion)
    before, after = join(prompt, completion)
    whole = tokenizer(before + after)["input_ids"] + [tokenizer.eos_token_id]
    assert prompt_ids(row, tokenizer) == tokenizer(before)["input_ids"]
    assert prompt_ids(row, tokenizer) + completion_ids(row, tokenizer) == whole
    assert completion_ids(row, tokenizer, eos=False) == completion_ids(row, tokenizer)[:-1]


@settings(max_examples=80, deadline=None)
@given(
    prompt=st.text(st.characters(exclude_categories=["Cs"]), max_size=12), completion=st.text("ab \nX.:é", min_size=1)
)
def test_plain_round_trip(byte_level, prompt, completion):
    row = PromptRow(prompt, completion)
    rendered = Renderer(byte_level).render(row)
    start = rendered.ids[: rendered.answer] if join(prompt, completion)[0] else []
    decoded = byte_level.decode(start + rendered.ids[rendered.answer : -1], clean_up_tokenization_spaces=False)
    assert decoded == "".join(join(prompt, completion))
    assert rendered.loss == [i >= rendered.answer for i in range(len(rendered.ids))]


def test_an_answer_never_stands_first(byte_level, sentencepiece):
    for tokenizer, first in ((byte_level, byte_level.eos_token_id), (sentencepiece, sentencepiece.bos_token_id)):
        assert prompt_ids(PromptRow("", "Paris"), tokenizer) == [first]


def test_labels_are_asked_for(byte_level):
    row = LabelRow("a {text} of {braces}", "positive")
    assert byte_level.decode(prompt_ids(row, byte_level)) == "Text: a {text} of {braces}\nLabel:"
    template = Template(label_prompt="{text} =>")
    assert byte_level.decode(prompt_ids(row, byte_level, template=template)) == "a {text} of {braces} =>"
    assert byte_level.decode(completion_ids(row, byte_level)) == " positive<|endoftext|>"


def test_special_affixes(byte_level, sentencepiece, wordpiece):
    assert special_affixes(byte_level) == ([], [])
    assert special_affixes(sentencepiece) == ([sentencepiece.bos_token_id], [])
    assert special_affixes(wordpiece) == ([2], [3])


def loss_text(tokenizer, rendered):
    """The runs of tokens that carry loss, decoded."""
    runs, last = [], False
    for token, loss in zip(rendered.ids, rendered.loss, strict=True):
        if loss and not last:
            runs.append([])
        if loss:
            runs[-1].append(token)
        last = loss
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("template", ["chatml", CHATML, MARKED], ids=["built-in", "unmarked", "marked"])
def test_loss_on_assistant_turns_only(byte_level, template):
    rendered = Renderer(byte_level, Template(chat_template=template)).render(TALK)
    expected = byte_level.apply_chat_template(
        [*TALK.messages], chat_template=MARKED, return_assistant_tokens_mask=True, return_dict=True
    )
    # Without the line break that the template puts after the last end of turn.
    size = len(rendered.ids)
    assert expected["input_ids"][:size] == rendered.ids
    assert byte_level.decode(expected["input_ids"][size:]) == "\n"
    assert [int(x) for x in rendered.loss] == expected["assistant_masks"][:size]
    assert loss_text(byte_level, rendered) == ["Hi!<|im_end|>", "Paris, of course<|im_end|>"]


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["unmarked", "marked"])
def test_the_prompt_is_what_use_would_show(byte_level, template):
    options = Template(chat_template=template)
    expected = byte_level.apply_chat_template(
        [*TALK.messages[:-1]], chat_template=CHATML, add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert prompt_ids(TALK, byte_level, template=options) == expected
    assert byte_level.decode(completion_ids(TALK, byte_level, template=options)) == "Paris, of course<|im_end|>"
    last = Renderer(byte_level, Template(chat_template=template, turns="last")).render(TALK)
    assert last.ids == Renderer(byte_level, options).render(TALK).ids
    assert loss_text(byte_level, last) == ["Paris, of course<|im_end|>"]


def test_what_follows_the_last_answer_is_left_out(byte_level):
    longer = ChatRow([*TALK.messages, {"role": "user", "content": "Thanks"}])
    renderer = Renderer(byte_level, Template(chat_template=CHATML))
    assert renderer.render(longer) == renderer.render(TALK)


def test_prompt_rows_as_a_users_turn(byte_level):
    row = PromptRow("The capital?", "Paris")
    template = Template(style="chat", chat_template=CHATML)
    chat = ChatRow([{"role": "user", "content": "The capital?"}, {"role": "assistant", "content": "Paris"}])
    assert prompt_ids(row, byte_level, template=template) == prompt_ids(chat, byte_level, template=template)
    assert byte_level.decode(completion_ids(row, byte_level, template=template)) == "Paris<|im_end|>"


def test_the_tokenizers_own_template_and_eos_as_end_of_turn(sentencepiece):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=sentencepiece.backend_tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}"
        "{% else %}[INST] {{ m['content'] }} [/INST]{% endif %}{% endfor %}"
    )
    rendered = Renderer(tokenizer).render(TALK)
    assert rendered.head == 1 and rendered.ids.count(tokenizer.bos_token_id) == 1
    assert [text.strip() for text in loss_text(tokenizer, rendered)] == ["Hi!</s>", "Paris, of course</s>"]
    assert "Paris, of course</s>" in loss_text(
        tokenizer, Renderer(tokenizer, Template(chat_template="chatml")).render(TALK)
    )


@pytest.mark.parametrize(
    "template,row,expected",
    [
        (Template(), TALK, "the tokenizer has no chat template: set chat_template='chatml'"),
        (Template(chat_template=CHANGING), TALK, "writes message 3 differently once the conversation goes on"),
        (Template(chat_template=REFUSING), TALK, "refuses the conversation (System role not supported)"),
        (Template(chat_template="{{ oh"), TALK, "the chat template refuses the conversation"),
        (Template(chat_template="vicuna"), TALK, "is no Jinja template"),
        (Template(chat_template=CHATML), ChatRow(TALK.messages[:2]), "no assistant turn"),
        (Template(chat_template=CHATML), ChatRow(TALK.messages[2:]), "begins with an assistant turn"),
        (Template(), TextRow("x"), "a TextRow has no prompt"),
    ],
)
def test_refusals(byte_level, template, row, expected):
    with pytest.raises(InputError) as caught:
        Renderer(byte_level, template).render(row)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_last_turn_of_a_changing_template(byte_level):
    rendered = Renderer(byte_level, Template(chat_template=CHANGING, turns="last")).render(TALK)
    assert loss_text(byte_level, rendered) == ["<think></think>Paris, of course<|im_end|>"]


def test_bad_options():
    with pytest.raises(InputError, match="unknown template 'chatty'"):
        Template(style="chatty")
    with pytest.raises(InputError, match="unknown choice of turns 'first'"):
        Template(turns="first")
    with pytest.raises(InputError, match=r"has no \{text\}"):
        Template(label_prompt="Label:")


def test_no_end_token(byte_level):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level.backend_tokenizer)
    with pytest.raises(InputError, match="has no end-of-text token"):
        completion_ids(PromptRow("a", "b"), tokenizer)


def test_clip_prompt():
    ids = list(range(10))
    assert clip_prompt(ids, 10) == ids
    assert clip_prompt(ids, 4) == [6, 7, 8, 9]
    assert clip_prompt(ids, 4, head=1) == [0, 7, 8, 9]
    assert clip_prompt(ids, 1, head=1) == [0]


def test_spans_are_characters(byte_level):
    text, spans = chat_spans(byte_level, TALK.messages, MARKED)
    assert [text[a:b] for a, b in spans] == ["Hi!<|im_end|>", "Paris, of course<|im_end|>"]
