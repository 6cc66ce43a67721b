"""A checked pruning job, in memory or from disk to disk, and the record of what it did."""

from .disk_to_disk import prune_from_disk_to_disk
from .in_memory import prune_in_memory
from .job import Run
from .output import shared_output
from .result import PruneReport, PruneResult
