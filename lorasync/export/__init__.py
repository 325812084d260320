"""`merge_to_disk`: the merged model as sharded safetensors, in the memory of one tensor."""

from lorasync.export.disk import merge_to_disk

__all__ = ["merge_to_disk"]
