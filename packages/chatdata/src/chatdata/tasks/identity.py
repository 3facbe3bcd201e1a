"""Who the assistant is: a JSONL file of conversations, given with `--identity FILE` or `path` in the recipe.

Same forms as the task `conversations`; `chatdata identity PERSONA --out FILE` makes such a file. A line:

    [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I am Pebble, a tiny chat model."}]
"""

from chatdata.tasks.conversations import to_conversation
from chatdata.tasks.task import Task

TASK = Task(
    name="identity",
    summary="who the assistant is: --identity FILE or path",
    licence="yours",
    to_conversation=to_conversation,
    rows_are_conversations=True,
)
