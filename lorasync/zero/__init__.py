"""Everything that knows DeepSpeed's and FSDP2's attributes: the guard, and `gathered` for sharded parameters."""

from lorasync.zero.gather import full_shape, gathered, is_sharded

__all__ = ["full_shape", "gathered", "is_sharded"]
