"""Giving a vLLM worker that runs already the worker engine that it was not started with."""

from __future__ import annotations

from typing import Any

BACKEND = "lorasync"


def attach_worker(wrapper: Any) -> dict[str, Any]:
    """Let a worker keep our engine as its weight-transfer engine; runs in the worker.

    Args:
        wrapper: vLLM's `WorkerWrapperBase`.

    Returns:
        ``backend``: the class of the engine that the worker keeps now; ``attached``: whether that is ours, made now or
        before.
    """
    from vllm.config import WeightTransferConfig, set_current_vllm_config
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    worker = wrapper.worker
    kept = worker.weight_transfer_engine
    if kept is None:
        config = WeightTransferConfig(backend=BACKEND)
        with set_current_vllm_config(worker.vllm_config):
            kept = WeightTransferEngineFactory.create_engine(
                config, worker.vllm_config, worker.device, worker.get_model()
            )
        kept.served.ran_before()
        worker.vllm_config.weight_transfer_config = config
        worker.weight_transfer_engine = kept
    return {"backend": type(kept).__name__, "attached": hasattr(kept, "served")}


def know_the_config(vllm_config: Any) -> None:
    """Write into a front end's config what its workers have now."""
    from vllm.config import WeightTransferConfig

    vllm_config.weight_transfer_config = WeightTransferConfig(backend=BACKEND)
