"""A model's own chat template: the text it makes of a conversation, and which of its tokens the model would produce."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from chatdata.errors import ConversationError, TokenizerError
from chatdata.render.messages import Messages
from chatdata.tokenizer.folder import FolderTokenizer

Template = Callable[[Messages, bool], str]  # (messages, add_generation_prompt) → text
TWO_WAYS = (
    "the chat template writes it in one way inside a conversation and in another at its end, so its tokens cannot be "
    "told; use a template made for training, or name the chat format"
)


class Layout(NamedTuple):
    """A rendered conversation, all [num_tokens]: ids, the number of each token's message (-1 for none), and whether
    the model would produce it, which only counts in messages of the assistant."""

    ids: list[int]
    message: np.ndarray
    sampled: np.ndarray


def compile_template(tokenizer: FolderTokenizer) -> Template:
    """The folder's chat template as `apply_chat_template` renders it.

    Today's date is not given to it: templates that can do without write a fixed one, so that a build stays the same.
    Raises TokenizerError if the folder has none or it does not compile.
    """
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if tokenizer.chat_template is None:
        raise TokenizerError(f"{tokenizer.name}: no chat template in this folder (chat_template.jinja)")

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)  # Jinja's own escapes < and >

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    # {% generation %} marks what others train on; it writes nothing
    source = re.sub(r"(\{%[-+]?\s*)generation\b", r"\1if true", tokenizer.chat_template)
    source = re.sub(r"(\{%[-+]?\s*)endgeneration\b", r"\1endif", source)
    try:
        template = environment.from_string(source)
    except TemplateError as error:
        raise TokenizerError(f"{tokenizer.name}: its chat template does not compile: {error}") from None
    constants = {"tools": None, "documents": None, **tokenizer.special_tokens}

    def render(messages: Messages, add_generation_prompt: bool) -> str:
        # gpt-oss' template has its own word for reasoning
        given = [{"thinking": m["reasoning_content"], **m} if "reasoning_content" in m else m for m in messages]
        return template.render(messages=given, add_generation_prompt=add_generation_prompt, **constants)

    return render


def lay_by_template(tokenizer: FolderTokenizer, template: Template, messages: Messages) -> Layout:
    """What the template adds for an assistant message after the generation prompt, the model would produce, up to the
    last control token.

    Raises ConversationError where that cannot be told.
    """
    whole = template(messages, False)
    encoded = tokenizer.raw.encode(whole, add_special_tokens=False)
    first, last = np.array(encoded.offsets, dtype=np.int64).reshape(-1, 2).T
    owner, sampled = np.full(len(first), -1), np.zeros(len(first), dtype=bool)
    at = 0  # everything before is some message's
    for number, message in enumerate(messages):
        here = f"message {number}: "
        follower = messages[number + 1]["role"] if number + 1 < len(messages) else ""
        if message["role"] == "system" and follower == "user":  # templates need not write it on its own
            continue
        tail = whole if not follower else template(messages[: number + 1], False)
        if not whole.startswith(tail):
            raise ConversationError(here + TWO_WAYS)
        head = template(messages[:number], True) if message["role"] == "assistant" else whole[:at]
        own = (first >= len(head)) & (last <= len(tail))
        owner[own] = number
        if message["role"] == "user" and message["content"].strip() not in tail[at:]:
            raise ConversationError(here + "the chat template does not write it as it is")
        if message["role"] == "assistant":
            if not tail.startswith(head):
                raise ConversationError(here + TWO_WAYS)
            if any(((first < edge) & (last > edge)).any() for edge in (len(head), len(tail))):
                raise ConversationError(here + "in the chat template a token lies across its edge")
            controls = [i for i in np.flatnonzero(own).tolist() if encoded.ids[i] in tokenizer.control_ids]
            if not controls or tail[last[controls[-1]] :].strip():
                raise ConversationError(here + "the chat template does not end it with a special token")
            sampled[own & (np.arange(len(own)) <= controls[-1])] = True
        at = len(tail)
    return Layout(encoded.ids, owner, sampled)
