"""One rank of a DeepSpeed run that pushes to vLLM: `python two_ranks.py STAGE MODEL OUT` with RANK, … set.

Rank 0 holds the engine. Every rank trains on other data, then all call `send_weights`, twice.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import pytest
import torch


def main(stage: int, model_path: str, out: Path) -> None:
    import deepspeed
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import lorasync as ls
    from lorasync.errors import SyncError, UngatheredError
    from lorasync.push import connect
    from lorasync.verify import Canary, token_logprobs
    from tests import models
    from tests.e2e.engines import PROMPTS, greedy, running_llm

    rank = int(os.environ["RANK"])
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo")
    policy = models.with_adapter(AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 5e-2, "torch_adam": True}},
        "zero_allow_untested_optimizer": True,
    }
    ls.check_zero(policy, config)
    engine, *_ = deepspeed.initialize(model=policy, config=config)

    def train() -> None:
        ids = torch.randint(0, 512, (1, 16), generator=torch.Generator().manual_seed(rank))
        engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
        engine.step()

    def push_twice(target: object) -> None:
        sync = connect(ls.MergedSource(engine), target, bucket_bytes=200_000)
        assert sync.send_weights().version == 1
        train()
        assert sync.send_weights().version == 2
        good, sync.source = sync.source, _Failing(sync.source, fails=rank == 0)
        with pytest.raises(ConnectionError if rank == 0 else SyncError):
            sync.send_weights()
        sync.source = good
        assert sync.send_weights().version == 3
        sync.shutdown()

    def compare(target: object, answers: list[tuple[tuple[int, ...], tuple[float, ...]]]) -> None:
        """The canary refuses a model that is sharded; what it says to do instead is done."""
        with pytest.raises(UngatheredError, match="token_logprobs"):
            Canary(engine, target, PROMPTS)
        tokenizer = AutoTokenizer.from_pretrained(model_path)
        pairs = [[(tokenizer(p).input_ids, list(a[0])) for p, a in zip(PROMPTS, answers, strict=False)]]
        torch.distributed.broadcast_object_list(pairs)
        ours = token_logprobs(engine, pairs[0])
        for (_, theirs), own in zip(answers, ours, strict=rank == 0):
            assert own.tolist() == pytest.approx(theirs, abs=1e-3)

    if rank == 0:
        with running_llm(model_path, dtype="float32") as llm:
            push_twice(llm)
            found = greedy(llm)
            if stage == 3:
                compare(llm, found)
    else:
        push_twice(None)
        if stage == 3:
            compare(None, [])
    with ls.gathered(p for p in policy.parameters() if p.requires_grad):
        if rank == 0:
            state = {n: p.detach().clone() for n, p in policy.named_parameters() if p.requires_grad}
            torch.save(state, out / "adapter.pt")
            (out / "answers.json").write_text(json.dumps(found))


class _Failing:
    """A source that fails on one rank only, after its collectives."""

    def __init__(self, source, *, fails: bool) -> None:
        self.source, self.fails = source, fails

    def metadata(self):
        return self.source.metadata()

    def __iter__(self):
        yield from self.source
        if self.fails:
            raise ConnectionError("rank 0 fails")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
