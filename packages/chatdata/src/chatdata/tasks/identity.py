"""Who the assistant is: a JSONL file of conversations, given with `--identity FILE` or `path` in the recipe.

Same forms as the task `conversations`; `chatdata identity PERSONA --out FILE` makes such a file. A line:

    [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I am Pebble, a tiny chat model."}]
"""

from dataclasses import replace

from chatdata.tasks import conversations

TASK = replace(conversations.TASK, name="identity", summary="who the assistant is: --identity FILE or path")
