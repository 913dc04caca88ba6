"""Real images as task streams over sites, offline.

`stream` turns task names into train, validation and test examples; `partition` divides examples
over sites.
"""

from gose.data import partition
from gose.data.sources import DataError, Examples, load
from gose.data.stream import Task, TaskSpec, batches, class_incremental, split, stream

__all__ = [
    "DataError",
    "Examples",
    "Task",
    "TaskSpec",
    "batches",
    "class_incremental",
    "load",
    "partition",
    "split",
    "stream",
]
