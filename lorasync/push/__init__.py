"""Push a source to a live vLLM engine: `connect`, then `send_weights`."""

from lorasync.push.entry import connect
from lorasync.push.report import SyncReport
from lorasync.push.strategies import MergeInWorker, ServeAdapter
from lorasync.push.sync import Sync

__all__ = ["MergeInWorker", "ServeAdapter", "Sync", "SyncReport", "connect"]
