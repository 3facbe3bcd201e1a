"""Records as files have them: which of their keys are the messages, or what makes up for messages."""

import json
from numbers import Number
from typing import Any

from chatdata.errors import ConversationError, kind_of
from chatdata.tool_calls import parsed, tools_of

# Keys next to the messages. Empty ones are nothing; numbers, booleans and these are metadata, which is not rendered.
# docs/conversations.md shows the list.
_METADATA = """
    id uuid hash conversation_id conversation_hash chat_id prompt_id question_id session_id user_id source
    dataset dataset_name data_source subset split config origin url file filename version license licence author
    model model_name generator provider meta metadata info category categories subcategory topic full_topic
    subject domain task task_name task_type type tags keywords language lang locale country state timestamp
    created_at updated_at date title difficulty quality score scores rating ratings turn num_turns redacted
    toxic toxicity moderation openai_moderation detoxify_moderation prompt letters
"""
METADATA_KEYS = frozenset(_METADATA.split())
# refused whatever the recipe says: without them the conversation means something else
_MEDIA = "belongs to the messages, but only text is trained on"
_PREFERENCE = "compares answers, but every answer here is trained on"
REFUSED_KEYS = {
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _MEDIA),
    **dict.fromkeys(("chosen", "rejected", "kto_tag", "label"), _PREFERENCE),
    "chat_template_kwargs": "changes how a template renders the messages, but there is no template here",
}
MESSAGE_KEYS = ("messages", "conversations", "conversation")
EMPTY: tuple[Any, ...] = (None, "", [], {})
# records without messages: the key of the question, and the keys that its answer may have
_ANSWERS = {
    "instruction": ("output", "response"),
    "prompt": ("completion", "response"),
    "question": ("answer", "response", "answers"),
    "query": ("answer", "response", "answers"),
}
_OTHERS = ("input", "context", "history", "system", "system_prompt", "tools", "functions")
# which the recipe key `columns` may give to a record's keys
COLUMN_KEYS = (*MESSAGE_KEYS, *_ANSWERS, *dict.fromkeys(sum(_ANSWERS.values(), ())), *_OTHERS)
_TREE = "a tree of replies; write the path from its root to one leaf as messages"
_NO_CHATS = {  # what no key of makes a conversation
    **dict.fromkeys(("replies", "parent_id", "message_tree_id"), _TREE),
    "chat": "one string with a whole conversation; take the ShareGPT version of the dataset",
}


def messages_of(record: Any, columns: tuple[tuple[str, str], ...] = ()) -> tuple[list[Any], str, list[dict[str, Any]]]:
    """The messages of a record as they are, the system text next to them, and its tools.

    `columns`: (our name of a key, the record's). Raises ConversationError.
    """
    if isinstance(record, list):
        record = {"messages": record}
    if not isinstance(record, dict):
        raise ConversationError(
            f"a conversation is a list of messages or an object with messages, not {kind_of(record)}"
        )
    if columns:
        ours = {theirs: our for our, theirs in columns}
        renamed = {ours.get(key, key): value for key, value in record.items()}
        if len(renamed) < len(record):
            twice = next(our for our, theirs in columns if our in record and theirs in record)
            raise ConversationError(f'key "{twice}": columns reads another key as "{twice}"; set ignore = ["{twice}"]')
        record = renamed
    given = [key for key in record if record[key] not in EMPTY]
    for key in given:
        if key in REFUSED_KEYS and not (key == "chat_template_kwargs" and _only_flags(record[key])):
            raise ConversationError(f'key "{key}" next to the messages: {REFUSED_KEYS[key]}')
    used = next((key for key in MESSAGE_KEYS if key in given), None)
    if used is not None:
        messages, keys = record[used], {used}
        if not isinstance(messages, list):
            _refuse_chatml(messages, used)
            raise ConversationError(f'"{used}" must be a list of messages, not {kind_of(messages)}')
    else:
        messages, keys = _from_texts(record, given)
    if len(given) == 1:
        return messages, "", []
    given = [key for key in given if not isinstance(record[key], Number)]
    system = [key for key in ("system", "system_prompt") if key in given]
    tools = [key for key in ("tools", "functions") if key in given]
    keys |= {*system[:1], *tools[:1], "chat_template_kwargs"}
    for key in given:
        if key not in keys and key not in METADATA_KEYS:
            left_out = f"key {json.dumps(key)} next to the messages would be left out"
            raise ConversationError(f"{left_out}; if that is right, set ignore = [{json.dumps(key)}] in the recipe")
    return messages, _text(record, system[0]) if system else "", tools_of(record[tools[0]]) if tools else []


def _only_flags(kwargs: Any) -> bool:
    return isinstance(kwargs, dict) and all(value in EMPTY or isinstance(value, bool) for value in kwargs.values())


def _from_texts(record: dict[str, Any], given: list[str]) -> tuple[list[Any], set[str]]:
    """The messages of a record that has a question and an answer, and the keys that they come from."""
    for asked, names in _ANSWERS.items():
        answer = next((name for name in names if record.get(name) is not None), None)
        if record.get(asked) is not None and answer is not None:
            break
    else:
        for key in given:
            if key in _NO_CHATS:
                raise ConversationError(f'key "{key}": {_NO_CHATS[key]}')
            _refuse_chatml(record[key], key)
        if empty := next((key for key in MESSAGE_KEYS if record.get(key) is not None), None):
            raise ConversationError(f'"{empty}" is empty: a conversation needs at least one user message')
        ways = '"messages" (or ShareGPT\'s "conversations"), or "prompt" and "completion"'
        raise ConversationError(f"no messages: expected the key {ways}; columns in the recipe takes other names")
    messages: list[Any] = []
    history = record.get("history") or []
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ConversationError('key "history": must be a list of pairs of a question and its answer')
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    more = next((key for key in ("input", "context") if asked == "instruction" and key in given), None)
    if asked == "prompt" and isinstance(record[asked], list):
        messages += record[asked]
    else:
        texts = [_text(record, key) for key in (asked, more) if key]
        messages.append({"role": "user", "content": "\n\n".join(filter(None, texts))})
    value = record[answer]
    if answer == "answers" and isinstance(value, str) and "".join(value[:99].split())[:2] in ("[{", "[]"):
        value = parsed(value, 'key "answers"')
    if not isinstance(value, list):
        messages.append({"role": "assistant", "content": _text(record, answer)})
    elif answer == "answers":  # xLAM's are calls
        is_text = len(value) == 1 and isinstance(value[0], str)
        key, value = ("content", value[0]) if is_text else ("tool_calls", value or [None])
        messages.append({"role": "assistant", key: value})
    else:
        messages += value
    return messages, {asked, answer, "history", more or asked}


def _text(record: dict[str, Any], key: str) -> str:
    value = record[key]
    if not isinstance(value, str):
        raise ConversationError(f'key "{key}": must be a string, not {kind_of(value)}')
    _refuse_chatml(value, key)
    return value


def _refuse_chatml(value: Any, key: str) -> None:
    if isinstance(value, str) and value.lstrip().startswith("<|im_start|>"):
        raise ConversationError(f'key "{key}": a conversation that a template has already rendered; give its messages')
