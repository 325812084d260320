"""Merge kernels: W + s·B·A from a plain, 4-bit or 8-bit base into live weights, in one pass."""

from lorasync.kernels.bases import Base, Int8Base, NestedAbsmax, PackedBase, PlainBase
from lorasync.kernels.grouped import GroupedMerge, merge_job
from lorasync.kernels.jobs import MergeJob, PendingMerge
from lorasync.kernels.peaks import Peaks, largest

__all__ = [
    "Base",
    "GroupedMerge",
    "Int8Base",
    "MergeJob",
    "NestedAbsmax",
    "PackedBase",
    "Peaks",
    "PendingMerge",
    "PlainBase",
    "largest",
    "merge_job",
]
