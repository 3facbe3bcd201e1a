"""SmolTalk, the conversations made for small models.

https://huggingface.co/datasets/HuggingFaceTB/smol-smoltalk (Apache-2.0). A row:

    {"messages": [{"role": "user", "content": "Give me a two-word name for a bakery."},
                  {"role": "assistant", "content": "Golden Crumb"}],
     "source": "smol-magpie-ultra-short"}
"""

from dataclasses import replace

from chatdata.tasks import conversations

TASK = replace(
    conversations.TASK,
    name="smoltalk",
    summary="general conversations for small models",
    licence="Apache-2.0",
    hub="HuggingFaceTB/smol-smoltalk",
    splits={"": {"train": 460_341, "test": 24_229}},
    permuted=True,
)
