"""A chat completion request, from its bytes to a prompt with sampling. Whatever is wrong with it is an ApiError.

Parameters: https://platform.openai.com/docs/api-reference/chat/create. A null is as good as no key.
"""

import re
import secrets
from functools import partial
from itertools import cycle
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, field

from chatdata.conversation import Reading
from chatdata.disk import convert, decode, shown
from chatdata.errors import ChatdataError
from chatdata.render.specification import render_conversation
from chateval.ask.generate import Prompt, Sampling
from chateval.ask.subject import Subject
from chateval.serve.answer import ApiError

LABELS = ("user", "metadata", "safety_identifier", "prompt_cache_key", "service_tier")  # change no answer
# what is not there: only the value that asks for nothing
NEUTRAL: dict[str, Any] = {"n": 1, "frequency_penalty": 0, "presence_penalty": 0, "logprobs": False, "top_logprobs": 0}
NEUTRAL |= {"logit_bias": {}, "tool_choice": "auto", "parallel_tool_calls": True, "response_format": {"type": "text"}}
NEUTRAL |= {"functions": [], "function_call": "auto", "modalities": ["text"], "store": False}
CALL_AND_RESULT = re.compile(r"(?:^|\n)```python\n(.*?)\n```\n```output\n(.*?)\n```(?:\n|$)", re.DOTALL)
Count = Annotated[int, Meta(ge=1)]
Text = Annotated[str, Meta(min_length=1, description="a text")]
Texts = Annotated[list[Text], Meta(max_length=4, description="a list of at most 4 texts")]


class ChatRequest(Struct, forbid_unknown_fields=True):
    model: str
    messages: Annotated[list[dict[str, Any]], Meta(min_length=1, description="a list of messages")]
    tools: list[Any] = []
    stream: bool = False
    stream_options: dict[Literal["include_usage", "include_obfuscation"], bool] = {}  # nothing is obfuscated
    temperature: Annotated[float, Meta(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Meta(ge=0, le=1)] = 1.0
    max_tokens: Count = 2**31
    max_completion_tokens: Count = 2**31
    stop: Text | Texts = []
    seed: int = field(default_factory=partial(secrets.randbits, 63))


def read_request(body: bytes, subject: Subject, model: str) -> tuple[ChatRequest, Prompt]:
    """A request for `model`, the only one there is, and its prompt. Raises ApiError."""
    given = decode(body, dict[str, Any], "the request", _refusal)
    fields = {key: value for key, value in given.items() if value is not None and key not in LABELS}
    for key, neutral in NEUTRAL.items():
        if (value := fields.pop(key, neutral)) != neutral:
            raise _refusal(f'the request, key "{key}": can only be {shown(neutral)} here, not {shown(value)}')
    request = convert(fields, ChatRequest, "the request", _refusal)
    if request.model != model:
        raise ApiError(404, f"no model {shown(request.model)}; this server has {model}", "model", "model_not_found")
    most = min(request.max_tokens, request.max_completion_tokens, subject.num_positions)
    sampling = Sampling(request.temperature, None, most, request.seed, request.top_p)
    return request, Prompt(_prompt_tokens(request, subject), sampling=sampling)


def _refusal(message: str) -> ApiError:
    key = re.search(r'key "(\w+)', message)
    return ApiError(400, message, key and key[1])


def _prompt_tokens(request: ChatRequest, subject: Subject) -> list[int]:
    """The conversation up to where the assistant continues: after assistant_start, or after the result of a tool."""
    if request.messages[-1].get("role") not in ("user", "tool", "function"):
        raise _refusal('the request, key "messages": the last one must be of role user or tool')
    # an empty answer adds assistant_start, if the last message is the user's, and assistant_end
    row = {
        "messages": [*map(_in_parts, request.messages), {"role": "assistant", "content": ""}],
        "tools": request.tools,
    }
    try:  # as in OpenAI's API, one role may speak twice
        document = render_conversation(subject.tokenizer, row, Reading(consecutive="merge"))
    except ChatdataError as error:
        raise _refusal(str(error)) from None
    prompt: list[int] = document.tokens[:-1].tolist()
    if (room := subject.num_positions) <= len(prompt):
        raise ApiError(400, f"{len(prompt)} tokens fill the context of {room}", "messages", "context_length_exceeded")
    return prompt


def _in_parts(message: dict[str, Any]) -> dict[str, Any]:
    """An answer that comes back: a call with its result is what it was to the model, not the text of fenced blocks."""
    content = message.get("content")
    texts = CALL_AND_RESULT.split(content) if message.get("role") == "assistant" and isinstance(content, str) else []
    if len(texts) < 2:
        return message
    parts = zip(cycle(("text", "python", "python_output")), texts, strict=False)
    return {**message, "content": [{"type": kind, "text": text} for kind, text in parts if text or kind != "text"]}
