"""All that knows DeepSpeed's and FSDP2's attributes: the guard, and `gathered` for sharded parameters."""

from lorasync.zero.facts import ZeroPlan
from lorasync.zero.gather import can_be_sharded, full_shape, gathered, is_sharded
from lorasync.zero.guard import check_zero, inspect_path, inspect_zero
from lorasync.zero.report import Finding, Versions, ZeroReport
from lorasync.zero.settings import Fsdp2, ZeroSettings, read_settings

__all__ = [
    "Finding",
    "Fsdp2",
    "Versions",
    "ZeroPlan",
    "ZeroReport",
    "ZeroSettings",
    "can_be_sharded",
    "check_zero",
    "full_shape",
    "gathered",
    "inspect_path",
    "inspect_zero",
    "is_sharded",
    "read_settings",
]
