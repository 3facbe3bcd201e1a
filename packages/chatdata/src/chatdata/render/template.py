"""A model's own chat template: the text it makes of a conversation, and which of its tokens the model would produce."""

import json
import re
from collections.abc import Callable
from contextlib import suppress
from datetime import date
from typing import Any, NamedTuple

import numpy as np

from chatdata.errors import ConversationError, TokenizerError
from chatdata.render.messages import Messages, Tools
from chatdata.tokenizer.folder import FolderTokenizer

Template = Callable[[Messages, bool, Tools], str]  # (messages, add_generation_prompt, tools) → text
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

    Today's date is 26 Jul 2024 for it, so that a build stays the same: what Llama 3's writes when it is told none.
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

    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    jinja.filters["tojson"] = to_json
    jinja.globals |= {"raise_exception": refuse, "strftime_now": date(2024, 7, 26).strftime}
    # {% generation %} marks what others train on; it writes nothing
    source = re.sub(r"(\{%[-+]?\s*)generation\b", r"\1if true", tokenizer.chat_template)
    source = re.sub(r"(\{%[-+]?\s*)endgeneration\b", r"\1endif", source)
    try:
        template = jinja.from_string(source)
    except TemplateError as error:
        raise TokenizerError(f"{tokenizer.name}: its chat template does not compile: {error}") from None
    constants = {"documents": None, **tokenizer.special_tokens}

    def render(messages: Messages, add_generation_prompt: bool, tools: Tools) -> str:
        # gpt-oss' template has its own word for reasoning
        given = [{"thinking": m["reasoning_content"], **m} if "reasoning_content" in m else m for m in messages]
        return template.render(messages=given, add_generation_prompt=add_generation_prompt, tools=tools, **constants)

    return render


def generation_prompt(template: Template) -> str:
    """What the template adds after a user message for the model to answer; "" where that cannot be told.

    Raises TokenizerError if it adds nothing, but writes something in front of an answer: that would be supervised.
    """
    asked: Messages = [{"role": "user", "content": "x"}]
    before = after = whole = ""
    with suppress(Exception):
        before, after = template(asked, False, None), template(asked, True, None)
        whole = template([*asked, {"role": "assistant", "content": "answer"}], False, None)
    if before and before == after and whole.startswith(after) and not whole[len(after) :].lstrip().startswith("answer"):
        raise TokenizerError(
            f"the chat template writes {whole[len(after) :].partition('answer')[0]!r} in front of an answer, but not "
            "for add_generation_prompt, so its mask cannot be told; use a template that does"
        )
    return after[len(before) :] if after.startswith(before) else ""


def lay_by_template(
    tokenizer: FolderTokenizer, template: Template, prompt: str, messages: Messages, tools: Tools
) -> Layout:
    """What the template adds for an assistant message after the generation prompt, the model would produce, up to the
    last control token.

    prompt: as `generation_prompt`, which saves a rendering per user message. Raises ConversationError where the tokens
    of a message cannot be told.
    """
    whole = template(messages, False, tools)
    encoded = tokenizer.raw.encode(whole, add_special_tokens=False)
    first, last = np.array(encoded.offsets, dtype=np.int64).reshape(-1, 2).T
    owner, sampled = np.full(len(first), -1), np.zeros(len(first), dtype=bool)
    at, head = 0, ""  # at: everything before is some message's; head: up to the answer that comes next
    for number, message in enumerate(messages):
        here, before = f"message {number}: ", head
        follower = messages[number + 1]["role"] if number + 1 < len(messages) else ""
        head = template(messages[: number + 1], True, tools) if follower == "assistant" else ""
        if message["role"] == "system" and follower == "user":  # templates need not write it on its own
            continue
        if not follower:
            tail = whole
        elif head and message["role"] != "assistant":
            tail = head.removesuffix(prompt)
        else:
            tail = template(messages[: number + 1], False, tools)
        if not whole.startswith(tail):
            raise ConversationError(here + TWO_WAYS)
        if message["role"] == "user" and message["content"].strip() not in tail[at:]:
            raise ConversationError(here + "the chat template does not write it as it is")
        begin = len(before) if message["role"] == "assistant" else at
        start, stop = int(np.searchsorted(first, begin)), int(np.searchsorted(last, len(tail), side="right"))
        owner[start:stop] = number
        if message["role"] == "assistant":
            if not before or not tail.startswith(before):
                raise ConversationError(here + TWO_WAYS)
            if (last[:start] > begin).any() or (first[stop:] < len(tail)).any():
                raise ConversationError(here + "in the chat template a token lies across its edge")
            end = next((i for i in reversed(range(start, stop)) if encoded.ids[i] in tokenizer.control_ids), None)
            if end is None or tail[last[end] :].strip():
                raise ConversationError(here + "the chat template does not end it with a special token")
            sampled[start : end + 1] = True
        at = len(tail)
    return Layout(encoded.ids, owner, sampled)
