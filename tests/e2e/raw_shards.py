"""One rank of a DeepSpeed ZeRO-3 run whose user pushes what `named_parameters` gives: ``python raw_shards.py MODEL OUT``.

Rank 0 holds the engine and writes what happened to OUT/outcome.json.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch


def main(model_path: str, out: Path) -> None:
    import deepspeed
    from transformers import AutoModelForCausalLM

    import lorasync as ls
    from lorasync.verify import model_digest
    from tests import models
    from tests.e2e.engines import running_llm

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo")
    policy = models.with_adapter(AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=policy, config=config)
    shards = {ls.checkpoint_name(n): p.data for n, p in policy.named_parameters() if "lora_" not in n}
    assert all(shard.numel() == 0 for shard in shards.values())
    before = model_digest(engine)
    if int(os.environ["RANK"]) == 0:
        with running_llm(model_path, dtype="float32") as llm:
            outcome = _push(engine, shards, llm)
        (out / "outcome.json").write_text(json.dumps(outcome))
    else:
        _push(engine, shards, None)
    assert model_digest(engine) == before, "the training model changed"


def _push(engine: Any, shards: dict[str, torch.Tensor], llm: Any) -> dict[str, Any]:
    """First the shards, which must be refused; then the same policy, gathered."""
    import lorasync as ls
    from lorasync.errors import LorasyncError
    from lorasync.push import connect
    from tests.e2e.engines import greedy
    from tests.e2e.faults import Fixed, shared_memory

    found: dict[str, Any] = {"base": greedy(llm)} if llm is not None else {}
    began = time.monotonic()
    try:
        connect(Fixed(shards), llm, timeout=60)
    except LorasyncError as error:
        found |= {"error": type(error).__name__, "message": str(error), "seconds": time.monotonic() - began}
    if llm is not None:
        found |= {"after": greedy(llm), "left": [str(path) for path in shared_memory()]}
    with connect(ls.MergedSource(engine), llm, timeout=60) as sync:
        sync.send_weights()
        if llm is not None:
            found["recovered"] = greedy(llm)
    return found


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
