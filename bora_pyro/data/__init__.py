"""The data axis: what is a task, and what is a document? Tables of documents become tasks, and tasks become token batches."""

from bora_pyro.data.batch import Batch
from bora_pyro.data.options import DataOptions
from bora_pyro.data.split import split_by_group
from bora_pyro.data.splitters import AllTrain, AsGiven, ByColumn, ByGroup, ByRecord, ForNewTasks
from bora_pyro.data.tables import read_table, table
from bora_pyro.data.talk_of_norway import talk_of_norway
from bora_pyro.data.tasks import TaskData, load_tasks
from bora_pyro.data.token_split import TokenSplit

__all__ = [
    "AllTrain", "AsGiven", "Batch", "ByColumn", "ByGroup", "ByRecord", "DataOptions", "ForNewTasks", "TaskData", "TokenSplit",
    "load_tasks", "read_table", "split_by_group", "table", "talk_of_norway",
]  # fmt: skip
