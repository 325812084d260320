"""One of two trainer ranks, each with a `vllm.LLM` in its own process: `python own_engines.py TRAINER TP MODEL OUT`.

TRAINER is ``ddp``, or the ZeRO stage; with TP=2 both LLMs together are one tensor-parallel engine. Each strategy pushes
twice; then the engine of rank 1 refuses, and all are asked what they serve.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import pytest
import torch
import torch.distributed as dist


def main(trainer: str, tp: int, path: str, out: Path) -> None:
    import lorasync as ls
    from lorasync.errors import MismatchError
    from lorasync.push import MergeInWorker, ServeAdapter, connect
    from tests.e2e.engines import ADAPTER_SLOTS, greedy, running_llm

    rank = int(os.environ["RANK"])
    model, policy, train = trained_by(trainer, path, rank)
    launcher = {"distributed_executor_backend": "external_launcher", "tensor_parallel_size": tp}
    found: dict[str, Any] = {}
    with running_llm(path, in_process=True, dtype="float32", **ADAPTER_SLOTS, **launcher) as llm:
        found["base"] = greedy(llm)
        if tp == 2:
            with pytest.raises(
                MismatchError, match=r"of 2 workers, of which \[1\] belong to no trainer rank"
            ):
                connect(ls.MergedSource(model), llm if rank == 0 else None)
        for name, source, apply in (
            ("adapter", ls.FactorSource(model), ServeAdapter("policy")),
            ("factors", ls.FactorSource(model), MergeInWorker(base="device")),
            ("merged", ls.MergedSource(model), None),
        ):
            with connect(source, llm, apply) as sync:
                sync.send_weights()
                if name == "adapter":  # what was trained between two pushes is what all others push
                    train()
                    save(policy, out / "trained.pt", rank)
                report = sync.send_weights()
                assert report.transport == "in_process"
                found[name] = greedy(llm, **sync.request())
                if trainer != "3":  # there each weight is put together from the shards of all ranks
                    found[f"{name} apart"] = trained_apart(sync, policy, rank)
                    assert greedy(llm, **sync.request()) == found[name]
                found[f"{name} refused"], before = refused_by_rank_1(sync, llm, rank), sync.version
                if apply is not None:
                    assert greedy(llm, **sync.request()) == found[name]
                else:
                    assert sync.closed
                assert sync.send_weights().version == sync.version > before
                assert not sync.closed
                assert greedy(llm, **sync.request()) == found[name]
                if apply is not None:
                    sync.rollback()
                    assert greedy(llm, **sync.request()) == found[name]
        (out / f"outcome{rank}.json").write_text(json.dumps(found))
        dist.barrier()


def trained_by(trainer: str, path: str, rank: int) -> tuple[Any, torch.nn.Module, Any]:
    """What a source reads, the policy itself, and a step of training on this rank's own data."""
    from transformers import AutoModelForCausalLM

    import lorasync as ls
    from tests import models

    torch.set_num_threads(1)
    ids = torch.randint(0, 512, (1, 16), generator=torch.Generator().manual_seed(rank))
    if trainer == "ddp":
        dist.init_process_group("gloo")
        policy = models.with_adapter(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))
        model: Any = torch.nn.parallel.DistributedDataParallel(policy)
        optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=5e-2)

        def step() -> None:
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()

        return model.module, policy, step
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo")
    policy = models.with_adapter(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": int(trainer)},
        "optimizer": {"type": "AdamW", "params": {"lr": 5e-2, "torch_adam": True}},
        "zero_allow_untested_optimizer": True,
    }
    ls.check_zero(policy, config)
    engine, *_ = deepspeed.initialize(model=policy, config=config)

    def zero_step() -> None:
        engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
        engine.step()

    return engine, policy, zero_step


def refused_by_rank_1(sync: Any, llm: Any, rank: int) -> list[Any]:
    """The worker of rank 1 fails at the commit of the next version; what every rank is told of it."""
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    applier = worker.weight_transfer_engine.conversation._applier
    commit = applier.commit

    def fails(*_: Any) -> None:
        raise MemoryError("no room in this worker")

    if rank == 1:
        applier.commit = fails
    try:
        return told_by(sync)
    finally:
        applier.commit = commit


def trained_apart(sync: Any, policy: torch.nn.Module, rank: int) -> list[Any]:
    """Rank 1 has stepped alone; what every rank is told of it."""
    param = next(p for n, p in policy.named_parameters() if "lora_B" in n)
    good = param.detach().clone()
    if rank == 1:
        param.data.view(-1)[-1] += 1e-3
    try:
        return told_by(sync)
    finally:
        param.data.copy_(good)


def told_by(sync: Any) -> list[Any]:
    began = time.monotonic()
    try:
        sync.send_weights()
    except Exception as error:
        return [type(error).__name__, str(error), time.monotonic() - began]
    return ["nothing", "", 0.0]


def save(policy: torch.nn.Module, file: Path, rank: int) -> None:
    import lorasync as ls

    with ls.gathered(p for p in policy.parameters() if p.requires_grad):
        if rank == 0:
            state = {n: p.detach().clone() for n, p in policy.named_parameters() if p.requires_grad}
            torch.save(state, file)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
