"""Two trainer ranks and engines that do what they are told: `python stub_ranks.py OUT` with RANK, … set."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch
import torch.distributed as dist

import lorasync as ls
from lorasync.errors import EngineNotReadyError, LorasyncError, MismatchError, NonFiniteError, SyncError
from lorasync.push import ServeAdapter, connect
from lorasync.push.trainer_ranks import agreed_by_all_ranks, texts_of_all_ranks
from tests import models
from tests.stub_engine import Client, StubLLM, raising

RANK = int(os.environ["RANK"])
HERE, OTHER = f"rank {RANK}", f"rank {1 - RANK}"


def only(rank: int, value: Any, otherwise: Any = None) -> Any:
    return value if rank == RANK else otherwise


def texts() -> None:
    assert texts_of_all_ranks(only(1, "", "a")) == ["a", ""]
    assert texts_of_all_ranks("ü" * (RANK + 1)) == ["ü", "üü"]
    assert [len(t) for t in texts_of_all_ranks("x" * 10**6)] == [20_000] * 2
    assert [len(t) for t in texts_of_all_ranks("ü" * 10**6)] == [10_000] * 2


def fail_on_rank_1(kind: type[BaseException]) -> None:
    with agreed_by_all_ranks():
        if RANK == 1:
            raise kind("the reason")


def errors_are_told(kind: type[BaseException]) -> None:
    with pytest.raises(only(1, kind, SyncError)) as caught:
        fail_on_rank_1(kind)
    if RANK == 0:
        assert "rank 1" in str(caught.value)
        assert f"{kind.__name__}: the reason" in str(caught.value)
    with pytest.raises(ValueError, match=HERE), agreed_by_all_ranks():
        raise ValueError(HERE)


def engines_of_other_ranks(source: Any) -> None:
    for wrap in (lambda e: e, lambda e: [e], lambda e: {"mine": e}, lambda e: (None, e)):
        llm = StubLLM(distributed_executor_backend="external_launcher")
        with pytest.raises(only(1, MismatchError, SyncError)) as caught:
            connect(source, only(0, llm, wrap(llm)))
        message = str(caught.value)
        assert "trainer rank 1" in message
        assert "StubLLM" in message
        assert "connect(source, None)" in message
        assert not llm.calls
    spread = StubLLM(world_size=2, distributed_executor_backend="external_launcher")
    with pytest.raises(only(0, MismatchError, SyncError), match="external_launcher"):
        connect(source, only(0, spread))
    assert not spread.calls


def what_works(source: Any) -> None:
    """None, or what reaches the same engine from outside."""
    llm = StubLLM(distributed_executor_backend="external_launcher")
    for target in (only(0, llm), only(0, llm, []), Client(llm)):
        with connect(source, target) as sync:
            assert sync.send_weights().version == sync.version
            assert sync.engines == only(0, ("engine",), ())
    with pytest.raises(only(0, EngineNotReadyError, SyncError), match=r"got None.*Rank 0"):
        connect(source, None)


def a_refusal_reaches_all_ranks(source: Any) -> None:
    with pytest.raises(only(0, EngineNotReadyError, SyncError), match=r"expected a vllm\.LLM"):
        connect(source, only(0, object()))
    with pytest.raises(only(1, MismatchError, SyncError), match="pause"):
        connect(source, only(0, StubLLM()), pause=only(0, "keep", "kepp"))
    llm = StubLLM()
    with connect(source, only(0, llm)) as sync:
        llm.on["commit"] = raising(RuntimeError("no memory in the worker"))
        with pytest.raises(SyncError, match="no memory in the worker") as caught:
            sync.send_weights()
        assert RANK == 0 or "rank 0" in str(caught.value)
        llm.on.clear()
        assert sync.send_weights().version == sync.version == 2


class Gathered:
    """A source whose tensors are put together from all ranks, as under ZeRO-3; it may fail on one after that."""

    def __init__(self, source: Any, *, fails_on: int = -1) -> None:
        self.source, self.fails_on = source, fails_on

    def metadata(self) -> Any:
        return self.source.metadata()

    def __iter__(self) -> Any:
        for name, tensor in self.source:
            shared = tensor.clone()
            dist.broadcast(shared, src=0)
            yield name, shared
        if self.fails_on == RANK:
            raise ConnectionError("after the last tensor")


def no_engine_commits_what_a_rank_could_not_read(source: Any) -> None:
    llm = StubLLM()
    with connect(Gathered(source), only(0, llm), bucket_bytes=10_000) as sync:
        assert sync.send_weights().version == 1
        for rank in (0, 1):
            sync.source = Gathered(source, fails_on=rank)
            with pytest.raises(only(rank, ConnectionError, SyncError), match="after the last tensor"):
                sync.send_weights()
            assert {worker.version for worker in llm.workers} == {only(0, 1, 0)}
            assert bool(sync.closed) == (RANK == 0)  # merged weights have come
        sync.source = Gathered(source)
        llm.in_flight = {"left over": None}
        with pytest.raises(
            SyncError, match="left over"
        ):  # at once, not when the others have read their sources
            sync.send_weights()
        llm.in_flight = {}
        assert sync.send_weights().version == 2
        assert not sync.closed


def adapters(policy: Any) -> None:
    llm = StubLLM()
    sync = connect(ls.FactorSource(policy), only(0, llm), ServeAdapter("policy"))
    assert not sync.send_weights().warnings
    for asks in (0, 1):
        kept = sync.request() if asks == RANK else None
        assert not sync.send_weights().warnings, "one rank has asked"
    with pytest.warns(UserWarning, match="request"):
        assert sync.send_weights().warnings
    if kept is not None:
        with pytest.raises(SyncError, match=r"policy@2"):
            kept["lora_request"].lora_name  # noqa: B018
    sync.rollback()
    assert sync.version == 3
    assert sync.request()["lora_request"].lora_int_id == 1_000_003
    with pytest.raises(SyncError, match="no version before"):
        sync.rollback()
    asked: list[Any] = []

    def check_fits(dtype: torch.dtype, *, slots: bool) -> None:
        asked.append((dtype, slots))
        raise NonFiniteError("out of range")

    sync.source.check_fits = check_fits
    sync.request()
    with pytest.raises(LorasyncError, match="out of range"):
        sync.send_weights()
    assert asked == [(torch.float32, True)]  # on every rank: factors may have to be gathered
    sync.shutdown()
    for verb in (
        sync.send_weights,
        sync.rollback,
        sync.request,
        sync.digests,
        lambda: sync.leave_out("engine"),
    ):
        with pytest.raises(SyncError, match=r"shut down: connect\(\) again"):
            verb()


def main() -> None:
    dist.init_process_group("gloo")
    policy = models.with_adapter(models.tiny_llama())
    texts()
    for kind in (ValueError, KeyboardInterrupt, NonFiniteError):
        errors_are_told(kind)
    engines_of_other_ranks(ls.MergedSource(policy))
    what_works(ls.MergedSource(policy))
    a_refusal_reaches_all_ranks(ls.MergedSource(policy))
    no_engine_commits_what_a_rank_could_not_read(ls.MergedSource(policy))
    adapters(policy)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
