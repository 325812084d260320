"""Push a source to a live vLLM engine: `connect`, then `send_weights`."""

from lorasync.push.entry import connect
from lorasync.push.report import SyncReport
from lorasync.push.strategies import LoadMerged, MergeInWorker, ServeAdapter
from lorasync.push.sync import Sync
from lorasync.targets.attach import attach

__all__ = ["LoadMerged", "MergeInWorker", "ServeAdapter", "Sync", "SyncReport", "attach", "connect"]
