"""What runs inside a vLLM worker: the engine, the load plan, and the writing of live weights."""

from lorasync.receive.engine import WorkerEngine

__all__ = ["WorkerEngine"]
