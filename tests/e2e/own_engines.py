"""One of two trainer ranks, each with an engine in its own process: `python own_engines.py MODEL OUT` with RANK, … set."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import pytest
import torch
import torch.distributed as dist


def main(path: str, out: Path) -> None:
    import lorasync as ls
    from lorasync.errors import SyncError
    from lorasync.push import connect
    from tests.e2e.engines import greedy, running_llm
    from tests.models import tiny

    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    source = ls.MergedSource(tiny(path))
    launcher = {"distributed_executor_backend": "external_launcher"}
    with running_llm(path, in_process=True, dtype="float32", **launcher) as llm:
        before, began = greedy(llm), time.monotonic()
        with pytest.raises((ls.LorasyncError, SyncError)) as caught:
            connect(source, llm)
        seconds, after = time.monotonic() - began, greedy(llm)
        with connect(source, llm if rank == 0 else None) as sync:  # what works, as the message says
            sync.send_weights()
        found = {"error": type(caught.value).__name__, "message": str(caught.value), "seconds": seconds}
        found |= {"base": before, "after": after, "pushed": greedy(llm), "spread": _spread(source, llm, rank)}
        everything: list[Any] = [None, None]
        dist.all_gather_object(everything, found)
        if rank == 0:
            (out / "outcome.json").write_text(json.dumps(dict(enumerate(everything))))
        dist.barrier()


def _spread(source: Any, llm: Any, rank: int) -> str:
    """The same engine, as if its two workers were in the two ranks."""
    from lorasync.errors import LorasyncError
    from lorasync.push import connect

    parallel = {"world_size": 2, "distributed_executor_backend": "external_launcher"}
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(**parallel),
        weight_transfer_config=llm.llm_engine.vllm_config.weight_transfer_config,
    )
    spread = SimpleNamespace(
        llm_engine=SimpleNamespace(vllm_config=config, engine_core=llm.llm_engine.engine_core)
    )
    with pytest.raises(LorasyncError) as caught:
        connect(source, spread if rank == 0 else None)
    return str(caught.value)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
