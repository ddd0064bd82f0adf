"""How a row becomes tokens: plain prompt + answer, or the tokenizer's chat template; training and evaluation share it.

A sequence is rendered as text, cut into pieces where the loss starts and ends, and each piece is tokenised by itself.
So the tokens before an answer are those that a prompt alone gives, which is what a model is shown when it is used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deltaw.core.errors import InputError, unknown_name
from deltaw.data.rows import ChatRow, LabelRow, PromptRow, Row

LABEL_PROMPT = "Text: {text}\nLabel:"

_CHATML = (
    "{{% for message in messages %}}<|im_start|>{{{{ message['role'] }}}}\n{{{{ message['content'] }}}}{end}\n"
    "{{% endfor %}}{{% if add_generation_prompt %}}<|im_start|>assistant\n{{% endif %}}"
)
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# A piece is tokenised behind one of these and their tokens are taken off again: SentencePiece tokenizers, and
# byte-level ones with add_prefix_space, would otherwise put a space before it as if it began a text.
_ANCHORS = ("\n", ":", "a")


@dataclass(frozen=True)
class Template:
    """How rows are written out for instruction tuning.

    Attributes:
        style: "plain" for prompt + answer + end of text; "chat" shows the prompt as a user's turn. Conversations always
            take the chat template.
        chat_template: Jinja text to use instead of the tokenizer's own, or "chatml" for the one built in here.
        label_prompt: what a text with a label is asked with; must hold `{text}`.
        turns: "all" for loss on every assistant turn, "last" for the last one only.
    """

    style: str = "plain"
    chat_template: str | None = None
    label_prompt: str = LABEL_PROMPT
    turns: str = "all"

    def __post_init__(self) -> None:
        for what, value, known in (
            ("template", self.style, ("plain", "chat")),
            ("choice of turns", self.turns, ("all", "last")),
        ):
            if value not in known:
                raise unknown_name(what, value, known)
        if "{text}" not in self.label_prompt:
            raise InputError(f"label_prompt {self.label_prompt!r} has no {{text}}: expected such as {LABEL_PROMPT!r}")


@dataclass(frozen=True)
class Rendered:
    """One row as tokens.

    Attributes:
        ids: the sequence, which ends with the last answer.
        loss: for each token whether it carries loss.
        answer: where the last answer starts: `ids[:answer]` is the prompt.
        head: how many leading tokens (a beginning-of-text token) stay when the prompt is cut from the left.
    """

    ids: list[int]
    loss: list[bool]
    answer: int
    head: int


class Renderer:
    """Writes rows out as tokens with one tokenizer and one template.

    Args:
        tokenizer: a transformers tokenizer, fast or slow.
        template: a `Template`, or its style.

    Raises:
        InputError: on rendering, for a row that this template cannot write; without a place, which the caller knows.
    """

    def __init__(self, tokenizer: Any, template: Template | str = "plain") -> None:
        self.tokenizer = tokenizer
        self.template = Template(style=template) if isinstance(template, str) else template
        self.prefix, self.suffix = special_affixes(tokenizer)
        self._anchors = [(anchor, self._tokens(anchor)) for anchor in _ANCHORS]
        self._specials = sorted(_special_strings(tokenizer), key=len, reverse=True)

    def render(self, row: Row, *, eos: bool = True) -> Rendered:
        """The tokens of a `PromptRow`, `LabelRow` or `ChatRow`; `eos` only concerns the plain style."""
        if isinstance(row, LabelRow):
            row = PromptRow(self.template.label_prompt.replace("{text}", row.text), row.label)
        if isinstance(row, ChatRow):
            return self._chat(row.messages)
        if not isinstance(row, PromptRow):
            raise InputError(f"a {type(row).__name__} has no prompt: expected a prompt, a conversation or a label row")
        if self.template.style == "chat":
            return self._chat(
                [{"role": "user", "content": row.prompt}, {"role": "assistant", "content": row.completion}]
            )
        prompt, completion = join(row.prompt, row.completion)
        start = self.prefix + self._tokens(prompt)
        if not start:
            # Without any token before it the answer's first token could not be predicted.
            start = [i for i in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id) if i is not None][:1]
        end = self._piece(completion) + ([end_token(self.tokenizer)] if eos else [])
        return Rendered(start + end, [False] * len(start) + [True] * len(end), len(start), len(self.prefix))

    def _chat(self, messages: Sequence[Mapping[str, str]]) -> Rendered:
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            raise InputError("the conversation has no assistant turn: expected one to learn")
        messages = messages[: answers[-1] + 1]
        text, spans = chat_spans(self.tokenizer, messages, self.template.chat_template, self.template.turns)
        ids: list[int] = []
        loss: list[bool] = []
        at = answer = 0
        for start, end in spans:
            end = self._without_trailing_space(text, start, end)
            answer = len(ids) + self._extend(ids, loss, text[at:start], False)
            self._extend(ids, loss, text[start:end], True)
            at = end
        head = int(bool(ids) and ids[0] == self.tokenizer.bos_token_id)
        return Rendered(ids, loss, answer, head)

    def _extend(self, ids: list[int], loss: list[bool], text: str, carries_loss: bool) -> int:
        more = self._piece(text) if ids else self._tokens(text)
        ids += more
        loss += [carries_loss] * len(more)
        return len(more)

    def _without_trailing_space(self, text: str, start: int, end: int) -> int:
        """Templates put a line break after the end-of-turn token, which no model gets to write: it carries no loss."""
        stripped = text[start:end].rstrip()
        return start + len(stripped) if any(stripped.endswith(special) for special in self._specials) else end

    def _tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _piece(self, text: str) -> list[int]:
        """The tokens of a text that follows another one."""
        if not text:
            return []
        for anchor, ids in self._anchors:
            both = self._tokens(anchor + text)
            if len(both) > len(ids) and both[: len(ids)] == ids:
                return both[len(ids) :]
        return self._tokens(text)


def prompt_ids(row: Row, tokenizer: Any, *, template: Template | str = "plain") -> list[int]:
    """The tokens before the row's (last) answer, exactly as training shows them; for many rows keep a `Renderer`."""
    rendered = Renderer(tokenizer, template).render(row)
    return rendered.ids[: rendered.answer]


def completion_ids(row: Row, tokenizer: Any, *, template: Template | str = "plain", eos: bool = True) -> list[int]:
    """The tokens of the row's (last) answer, with what ends it: the end-of-text token, or the chat template's own."""
    rendered = Renderer(tokenizer, template).render(row, eos=eos)
    return rendered.ids[rendered.answer :]


def clip_prompt(ids: Sequence[int], room: int, *, head: int = 0) -> list[int]:
    """The prompt's last tokens that fit into `room`, its first `head` tokens (beginning of text) kept in front."""
    if len(ids) <= room:
        return list(ids)
    return list(ids[:head]) + list(ids[len(ids) - (room - head) :]) if room > head else list(ids[:room])


def join(prompt: str, completion: str) -> tuple[str, str]:
    """Prompt and completion such that the boundary falls where tokenizers put it: before a space, never after one.

    A prompt that ends with a space gives that one space to the completion (" person" is one token to a BPE tokenizer;
    " " and "person" are two that the model never saw together); a prompt that ends without white space before a
    completion that begins without gets one added.
    """
    if prompt.endswith(" "):
        return prompt[:-1], " " + completion
    if prompt and not prompt[-1].isspace() and not completion[:1].isspace():
        return prompt, " " + completion
    return prompt, completion


def special_affixes(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text, such as ([CLS], [SEP]), (BOS, nothing)."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a")["input_ids"])
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    raise InputError(f"cannot tell what {type(tokenizer).__name__} puts around a text: choose another tokenizer")


def end_token(tokenizer: Any) -> int:
    """The end-of-text token's id; an error without one, since the model would never learn to stop."""
    if tokenizer.eos_token_id is None:
        raise InputError(f"the {type(tokenizer).__name__} has no end-of-text token: set tokenizer.eos_token")
    return int(tokenizer.eos_token_id)


def chat_spans(
    tokenizer: Any, messages: Sequence[Mapping[str, str]], chat_template: str | None = None, turns: str = "all"
) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as the template writes it, and where in it the assistant's turns stand (characters).

    By the template's own `{% generation %}` marks where it has them; else each turn is what the rendering of the
    conversation up to it adds to the prompt before it, and both must be true beginnings of the whole.

    Raises:
        InputError: no chat template, one that refuses this conversation, or one whose turns cannot be told apart.
    """
    source = _chat_template(tokenizer, chat_template)
    if _GENERATION.search(source):
        text, spans = _render(tokenizer, source, messages, marks=True)
        if not spans:
            raise InputError(
                "the chat template's {% generation %} marks enclose no assistant turn of this conversation"
            )
        return text, spans if turns == "all" else spans[-1:]
    text, _ = _render(tokenizer, source, messages)
    spans = []
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for i in answers if turns == "all" else answers[-1:]:
        before, _ = _render(tokenizer, source, messages[:i], prompt=True)
        after, _ = _render(tokenizer, source, messages[: i + 1])
        if not text.startswith(before) or not text.startswith(after) or len(after) <= len(before):
            raise InputError(
                f"the chat template writes message {i + 1} differently once the conversation goes on, so its loss "
                "cannot be placed: use turns='last', or a chat_template with {% generation %} marks"
            )
        spans.append((len(before), len(after)))
    return text, spans


def _chat_template(tokenizer: Any, chosen: str | None) -> str:
    if chosen == "chatml":
        known = "<|im_end|>" in _special_strings(tokenizer)
        end = "<|im_end|>" if known else tokenizer.convert_ids_to_tokens(end_token(tokenizer))
        return _CHATML.format(end=end)
    if chosen is not None:
        if "{" not in chosen:
            raise InputError(f"chat_template {chosen!r} is no Jinja template: expected one, or 'chatml'")
        return chosen
    try:
        return str(tokenizer.get_chat_template())
    except ValueError:
        raise InputError(
            "the tokenizer has no chat template: set chat_template='chatml', give a Jinja template, "
            "or choose the instruction-tuned variant of the model"
        ) from None


def _render(
    tokenizer: Any, source: str, messages: Sequence[Mapping[str, str]], *, prompt: bool = False, marks: bool = False
) -> tuple[str, list[tuple[int, int]]]:
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    if not messages:
        # Templates may look at messages[0]; a conversation that opens with the assistant has nothing before it
        # but what the template itself begins with.
        raise InputError("the conversation begins with an assistant turn: expected a user's or a system's first")
    try:
        rendered: Any = render_jinja_template(
            [[dict(message) for message in messages]],
            chat_template=source,
            add_generation_prompt=prompt,
            return_assistant_tokens_mask=marks,
            **tokenizer.special_tokens_map,
        )
    except (TemplateError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"the chat template refuses the conversation ({reason}): change the row or the template"
        ) from (error)
    texts, indices = rendered
    return texts[0], [(start, end) for start, end in indices[0]] if marks else []


def _special_strings(tokenizer: Any) -> set[str]:
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return {text for text in (*tokenizer.all_special_tokens, *added) if text}
