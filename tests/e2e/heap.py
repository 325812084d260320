"""What a trainer, its engine core and its worker have allocated and not freed, counted by their allocators.

The pages that a process holds say less: an allocator returns and takes them in steps of a whole tensor.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from typing import Any

from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from tests.e2e.growth import ALLOCATED

MEASURED = {
    "worker_extension_cls": f"{__name__}.Worker",
    "distributed_executor_backend": f"{__name__}.Executor",
}
"""Settings of a `vllm.LLM` that `live_in` can ask."""


class _Mallinfo2(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def live() -> dict[str, float]:
    """KB that malloc has given out in this process, and Python's objects of at most 512 bytes, which lie elsewhere."""
    gc.collect()
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Mallinfo2
    found = mallinfo2()
    return dict(
        zip(ALLOCATED, ((found.uordblks + found.hblkhd) / 1024, sys.getallocatedblocks()), strict=True)
    )


class Worker:
    """Mixed into vLLM's worker."""

    def live(self) -> dict[str, float]:
        return live()

    def leak(self, size: int) -> None:
        leak(size)


class Executor(MultiprocExecutor):
    """Lives in the engine core, and answers for it."""

    def collective_rpc(
        self, method: Any, timeout: float | None = None, args: Any = (), *rest: Any, **more: Any
    ) -> Any:
        answers = super().collective_rpc(method, timeout, args, *rest, **more)
        if method == "leak":
            leak(*args)
        return [live(), *answers] if method == "live" else answers


_leaked: list[Any] = []


def leak(size: int) -> None:
    """Keep so many bytes for good, and four small objects."""
    _leaked.append((bytearray(size), [object(), object()]))


def leak_in(llm: Any, size: int) -> None:
    """In each of the three processes."""
    leak(size)
    llm.collective_rpc("leak", args=(size,))


def live_in(llm: Any) -> dict[str, float]:
    """What each of the three processes holds; the worker is the only one."""
    core, worker = llm.collective_rpc("live")
    processes = {"trainer": live(), "core": core, "worker": worker}
    return {f"{name}: {what}": n for name, held in processes.items() for what, n in held.items()}
