"""Tasks: one file for each dataset. A task says where its rows come from, how a row becomes a conversation, and how an
answer to it is graded. A task file of your own needs only what is imported here."""

from chatdata.tasks.task import Option, ScoredSet, Scoring, Task, call_task, load_tasks

__all__ = ["Option", "ScoredSet", "Scoring", "Task", "call_task", "load_tasks"]
