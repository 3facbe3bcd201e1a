"""Your own conversations: JSONL or Parquet, or any Hub dataset in a known chat form (`repo`).

conversation.py has the accepted forms. Three lines, one of each:

    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]}
"""

from typing import Any

from chatdata.tasks.task import Task


def to_conversation(row: Any) -> Any:
    return row


TASK = Task(
    name="conversations",
    summary="your own conversations: path (JSONL, Parquet) or repo (a Hub dataset)",
    licence="yours",
    to_conversation=to_conversation,
    rows_are_conversations=True,
)
