"""The entry point that vLLM calls in every process: it makes the ``"lorasync"`` backend known.

It runs in every vLLM of the environment, whether or not that vLLM uses lorasync: so it imports nothing
heavy, does next to nothing and never raises.
"""

from __future__ import annotations

import logging
from typing import Any

BACKEND = "lorasync"
ATTACH = "lorasync_attach"
"""The name under which `lorasync.push.attach` calls a worker that was started without the backend."""


def register() -> None:
    """Add the worker engine ``"lorasync"`` to vLLM's factory, and to its workers a method to take it later."""
    try:
        from vllm.distributed.weight_transfer import WeightTransferEngineFactory
        from vllm.v1.worker.worker_base import WorkerWrapperBase

        setattr(WorkerWrapperBase, ATTACH, _attach)
        WeightTransferEngineFactory.register_engine(BACKEND, "lorasync.receive", "WorkerEngine")
    except ValueError:
        pass  # registered already: vLLM may load its plugins more than once in a process
    except Exception as error:
        logging.getLogger("lorasync").warning(
            "this vLLM can't take weights from lorasync (%s: %s); it is otherwise unaffected",
            type(error).__name__,
            error,
        )


def _attach(wrapper: Any) -> dict[str, Any]:
    """Runs in a worker; what it needs is imported only there."""
    from lorasync.vllm_seam.attach import attach_worker

    return attach_worker(wrapper)
