"""The entry point that vLLM calls in every process: it makes the ``"lorasync"`` backend known.

It runs in every vLLM of the environment, whether or not that vLLM uses lorasync: so it imports nothing
heavy, does next to nothing and never raises.
"""

from __future__ import annotations

import logging

BACKEND = "lorasync"


def register() -> None:
    """Add the worker engine ``"lorasync"`` to vLLM's factory; its module is imported only when used."""
    try:
        from vllm.distributed.weight_transfer import WeightTransferEngineFactory

        WeightTransferEngineFactory.register_engine(BACKEND, "lorasync.receive", "WorkerEngine")
    except ValueError:
        pass  # registered already: vLLM may load its plugins more than once in a process
    except Exception as error:
        logging.getLogger("lorasync").warning(
            "this vLLM can't take weights from lorasync (%s: %s); it is otherwise unaffected",
            type(error).__name__,
            error,
        )
