"""The tasks: what `task.py` says that a task is, and a folder for each."""

from beit3_ds.tasks.build import build_task
from beit3_ds.tasks.task import Evaluator, RankShare, RankTask, Task, Term

__all__ = ["Evaluator", "RankShare", "RankTask", "Task", "Term", "build_task"]
