"""Contains one folder per task of the trainer, such as pretraining; `task.py` defines the interface of a task."""

from beit3_ds.tasks.build import build_task
from beit3_ds.tasks.rank_task import Evaluator, Figures, RankShare, RankTask
from beit3_ds.tasks.results import SampleResults
from beit3_ds.tasks.task import Headline, Task, Term

__all__ = ["Evaluator", "Figures", "Headline", "RankShare", "RankTask", "SampleResults", "Task", "Term", "build_task"]
