"""Tasks, one file per dataset: where its rows come from, how a row becomes a conversation, how an answer is graded.

Your own task file needs only what is imported here.
"""

from chatdata.tasks.task import Option, ScoredSet, Scoring, Task, call_task, load_tasks

__all__ = ["Option", "ScoredSet", "Scoring", "Task", "call_task", "load_tasks"]
