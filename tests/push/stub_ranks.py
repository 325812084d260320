"""Two trainer ranks and engines that do what they are told: `python stub_ranks.py OUT` with RANK, … set."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pytest
import torch
import torch.distributed as dist

import lorasync as ls
from lorasync.errors import (
    EngineNotReadyError,
    LorasyncError,
    Mismatch,
    MismatchError,
    NonFiniteError,
    SyncError,
)
from lorasync.push import MergeInWorker, ServeAdapter, connect
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
    assert [len(t) for t in texts_of_all_ranks("ü" * 10**5)] == [10**5] * 2
    with pytest.raises(SyncError, match="expected at most"):
        texts_of_all_ranks(only(1, "x" * 10**7, "short"))
    assert texts_of_all_ranks(only(1, "a", "b")) == ["b", "a"]


def fail_on_rank_1(kind: type[BaseException]) -> None:
    with agreed_by_all_ranks():
        if RANK == 1:
            raise kind("the reason")


def errors_are_told(kind: type[BaseException]) -> None:
    told = kind if issubclass(kind, LorasyncError) else SyncError
    with pytest.raises(only(1, kind, told)) as caught:
        fail_on_rank_1(kind)
    if RANK == 0:
        name = "" if told is kind else f"{kind.__name__}: "
        assert str(caught.value) == f"trainer rank 1: {name}the reason"
    with pytest.raises(ValueError, match=HERE), agreed_by_all_ranks():
        raise ValueError(HERE)


def raises_on_rank_1(error: BaseException) -> None:
    with agreed_by_all_ranks():
        if RANK == 1:
            raise error


def long_errors_are_told() -> None:
    wrong = [Mismatch(f"layer.{n}.weight", "x" * 100, "y" * 100, "z") for n in range(1000)]
    with pytest.raises(MismatchError, match="all differ") as caught:
        raises_on_rank_1(MismatchError("all differ", wrong))
    assert len(caught.value.mismatches) == 1000 if RANK == 1 else 10 < len(caught.value.mismatches) < 100
    with pytest.raises(SyncError, match="x" * 1000):
        raises_on_rank_1(SyncError("x" * 10**6))


class OfRank0(Client):
    """Reaches rank 0's engine from any rank, as a URL does: rank 1 asks for the status only, by what rank 0 was told."""

    def collective_rpc(
        self, method: str, timeout: Any = None, args: Any = (), kwargs: Any = None
    ) -> list[Any]:
        if RANK == 1:
            assert args[0]["op"] == "status"
            return [
                {**answer, "ours": True} for answer in super().collective_rpc(method, timeout, args, kwargs)
            ]
        return super().collective_rpc(method, timeout, args, kwargs)


def who_talks_to_whom(source: Any) -> None:
    """A rank pushes to the engine of its own process; rank 0 also to those that are reached from outside."""
    for ranks in ((0,), (1,), (0, 1)):
        mine, other = StubLLM(), StubLLM()
        with connect(source, mine if RANK in ranks else None) as sync:
            assert sync.send_weights().version == 1
            assert sync.send_weights().ranks == int(RANK in ranks)
            names = ("engine",) if len(ranks) == 1 else (f"rank {RANK}'s engine",)
            assert sync.engines == (names if RANK in ranks else ())
            assert set(sync.digests()) == set(sync.engines)
        assert mine.workers[0].version == (2 if RANK in ranks else 0)
        assert not other.calls
    client = Client(StubLLM())
    with pytest.raises(MismatchError, match=r"trainer rank 1, engine: got another engine"):
        connect(source, client)  # each process has a stub of its own: another engine under the same name
    assert "bucket" not in client.llm.calls
    with connect(source, only(0, client)) as sync:
        assert sync.send_weights().version == sync.version
    assert bool(client.llm.workers[0].version) == (RANK == 0)
    deaf = OfRank0(client.llm)
    if RANK == 1:
        deaf.collective_rpc = lambda *_, **__: []  # nobody says that it is another engine
    with pytest.raises(EngineNotReadyError, match=r"got 0 of worker ranks"):
        connect(source, deaf)
    client = OfRank0(client.llm)
    for target in (client, {"far": client}):
        with connect(source, target) as sync:
            assert sync.send_weights().version == sync.version
    near = StubLLM()
    with connect(source, {"far": client, "near": near}) as sync:
        assert sync.engines == only(0, ("rank 0's near", "rank 0's far"), ("rank 1's near",))
        assert sync.send_weights().version == near.workers[0].version
        with pytest.raises(
            SyncError, match="got 'far', expected one of rank 0's near, rank 0's far, rank 1's near"
        ):
            sync.leave_out("far")
        sync.leave_out("rank 1's near")
        assert sync.engines == only(0, ("rank 0's near", "rank 0's far"), ())
        assert sync.send_weights().ranks == only(0, 2, 0)


def who_can_t_be_talked_to(source: Any) -> None:
    with pytest.raises(EngineNotReadyError, match=r"got None.*at least one trainer rank"):
        connect(source, None)
    client = Client(StubLLM())
    with pytest.raises(
        MismatchError,
        match=r"target of trainer rank 1.*engine, which is reached from outside.*Pass it on rank 0",
    ):
        connect(source, only(1, client))
    with pytest.raises(
        EngineNotReadyError,
        match=r"trainer rank 1: .*expected a vllm\.LLM" if RANK == 0 else "expected a vllm",
    ):
        connect(source, only(1, object(), StubLLM()))
    assert not client.llm.calls


def parts_of_one_engine(source: Any, policy: Any) -> None:
    """Two ranks drive a tensor-parallel engine of two workers; one that is missing is named."""
    layout = {"world_size": 2, "distributed_executor_backend": "external_launcher"}
    llm = StubLLM(first_rank=RANK, **layout)
    with connect(source, llm) as sync:
        assert sync.send_weights().version == 1
        for _ in range(2):  # also the rank that does not drive it refuses, and forgets nothing
            with pytest.raises(SyncError, match="spread over trainer ranks"):
                sync.leave_out("rank 1's engine")
    assert llm.workers[0].version == 1
    for ranks in ((0,), (1,)):
        llm = StubLLM(first_rank=RANK, **layout)
        with pytest.raises(
            MismatchError, match=rf"2 workers, of which \[{1 - ranks[0]}\] belong to no trainer rank"
        ):
            connect(source, llm if RANK in ranks else None)
        assert not llm.workers[0].version
        assert "commit" not in llm.calls
    a, b = (StubLLM(first_rank=RANK, **layout) for _ in range(2))
    with pytest.raises(MismatchError, match=r"of which \[1\] belong"):
        connect(source, {"a": a, "b": b} if RANK == 0 else {"b": b})
    twice = StubLLM(first_rank=0, **layout)
    with pytest.raises(MismatchError, match=r"of which \[1\] belong"):
        connect(ls.FactorSource(policy), twice, ServeAdapter("policy"))


def ranks_that_have_trained_apart(policy: Any) -> None:
    """Engines would serve different policies under one version, and the parts of one engine a mixture."""
    llm, trained = StubLLM(), next(p for n, p in policy.named_parameters() if "lora_B" in n)
    good = trained.detach().clone()

    def move(value: float) -> None:
        trained.data.copy_(good)
        if RANK == 1:
            trained.data.view(-1)[-1] += value

    for source, apply in (
        (ls.MergedSource(policy), None),
        (ls.FactorSource(policy), MergeInWorker(base="device")),
    ):
        with connect(source, llm, apply) as sync:
            before = sync.send_weights().version
            move(1e-3)
            with pytest.raises(MismatchError, match=r"others on trainer ranks \[1\] than on rank 0"):
                sync.send_weights()
            assert llm.workers[0].version == sync.version == before
            assert not sync.closed
            move(0)
            assert sync.send_weights().version == before + 1
    move(1e-3)
    with connect(source, only(0, llm), apply) as sync:  # what a rank without engines holds does not matter
        sync.send_weights()
    move(0)


def ranks_that_say_different_things(policy: Any) -> None:
    """Each would be pushed, or waited for, in another way than the others believe."""
    llm, factors, merged = StubLLM(), ls.FactorSource(policy), ls.MergedSource(policy)
    for mine, other in (
        ((merged, None), (factors, MergeInWorker(base="device"))),
        ((factors, ServeAdapter("policy")), (factors, MergeInWorker(base="device"))),
        ((factors, ServeAdapter("policy")), (factors, ServeAdapter("other"))),
    ):
        with pytest.raises(MismatchError, match=r"apply of trainer rank 1"):
            connect(only(0, mine[0], other[0]), llm, only(0, mine[1], other[1]))
    assert not llm.calls
    norm = next(p for n, p in policy.named_parameters() if n.endswith("norm.weight"))
    good = norm.detach().clone()
    norm.data.mul_(RANK + 1)
    for source, apply in ((merged, None), (factors, MergeInWorker(base="device"))):
        with pytest.raises(
            MismatchError, match=r"the model: got others on trainer ranks \[1\] than on rank 0"
        ):
            connect(source, llm, apply)
    norm.data.copy_(good)
    layer = next(m for m in policy.modules() if isinstance(getattr(m, "scaling", None), dict))
    with connect(merged, llm) as sync:
        before, scaling = sync.send_weights().version, layer.scaling["default"]
        layer.scaling["default"] = scaling * (RANK + 1)
        with pytest.raises(MismatchError, match="trained parameters"):
            sync.send_weights()
        layer.scaling["default"] = scaling
        assert sync.send_weights().version == before + 1


def what_fails_after_the_commit_fails_on_all(source: Any) -> None:
    for point in ("reset_prefix_cache", "resume"):
        llm = StubLLM()
        with connect(source, llm) as sync:
            first = sync.send_weights().version
            target = sync._engines.sessions[0].target
            if RANK == 1 and point == "resume":
                target.resume = raising(SyncError("can't resume"))
            elif RANK == 1:
                llm.on[point] = raising(RuntimeError("no"))
            with pytest.raises(SyncError, match=r"resume|rank 1's engine"):
                sync.send_weights()
            assert bool(sync.closed) == (point != "resume")
            target.__dict__.pop("resume", None)
            llm.on.clear()
            assert sync.send_weights().version > first + 1
            assert not sync.closed


def all_engines_of_all_ranks_or_none(source: Any, policy: Any) -> None:
    factors = ls.FactorSource(policy)
    for who in (0, 1):
        for point in ("bucket", "commit", "commit in the worker", "hello"):
            for kind in ("merged", "factors", "adapter"):
                llm = StubLLM()
                applies = {
                    "merged": None,
                    "factors": MergeInWorker(base="device"),
                    "adapter": ServeAdapter("policy"),
                }
                if who == RANK:
                    llm.on[point] = raising(RuntimeError("no"))
                if point == "hello":
                    with pytest.raises(SyncError, match=f"rank {who}'s engine: .*no"):
                        connect(source if kind == "merged" else factors, llm, applies[kind])
                    assert "bucket" not in llm.calls
                    continue
                llm.on.clear()
                with connect(source if kind == "merged" else factors, llm, applies[kind]) as sync:
                    first = sync.send_weights().version
                    if who == RANK:
                        llm.on[point] = raising(RuntimeError("no"))
                    with pytest.raises(SyncError, match=f"rank {who}'s engine: .*no") as caught:
                        sync.send_weights()
                    assert str(caught.value).startswith(f"trainer rank {who}: ") == (who != RANK)
                    assert sync.version == first
                    if kind == "merged":
                        untouched = point == "bucket" and who == RANK  # its engine refused the first
                        assert bool(sync.closed) != untouched
                    else:
                        assert not sync.closed
                        assert llm.workers[0].version == first
                        assert (
                            who == RANK
                            or kind != "adapter"
                            or sync.request()["lora_request"].lora_name == f"policy@{first}"
                        )
                    llm.on.clear()
                    version = sync.send_weights().version
                    assert llm.workers[0].version == version == sync.version
                    assert not sync.closed


def a_refusal_reaches_all_ranks(source: Any) -> None:
    with pytest.raises(EngineNotReadyError, match=r"expected a vllm\.LLM"):
        connect(source, only(0, object()))
    with pytest.raises(MismatchError, match="pause"):
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


def a_canary_that_fails_is_told_to_all_ranks(source: Any) -> None:
    def fails(request: Any) -> None:
        raise ConnectionError("no tokens")

    canary: Any = fails
    canary.limit = 1.0
    with connect(source, only(0, StubLLM()), canary=only(0, canary)) as sync:
        for version in (1, 2):
            with pytest.raises(only(0, ConnectionError, SyncError), match="no tokens"):
                sync.send_weights()
            assert sync.version == version  # it is served all the same


def a_model_that_one_rank_can_t_read_is_told_to_all_ranks(policy: Any) -> None:
    def fails() -> None:
        raise ConnectionError("no such adapter")

    source = ls.FactorSource(policy)
    with connect(source, only(0, StubLLM()), ServeAdapter("policy")) as sync:
        sync.send_weights()
        if RANK == 1:
            source.base_state = fails
        with pytest.raises(only(1, ConnectionError, SyncError), match="no such adapter"):
            sync.send_weights()
        source.__dict__.pop("base_state", None)
        assert sync.send_weights().version == sync.version == 2


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
    long_errors_are_told()
    source = ls.MergedSource(policy)
    who_talks_to_whom(source)
    who_can_t_be_talked_to(source)
    parts_of_one_engine(source, policy)
    ranks_that_have_trained_apart(policy)
    ranks_that_say_different_things(policy)
    what_fails_after_the_commit_fails_on_all(source)
    all_engines_of_all_ranks_or_none(source, policy)
    a_refusal_reaches_all_ranks(ls.MergedSource(policy))
    no_engine_commits_what_a_rank_could_not_read(ls.MergedSource(policy))
    a_canary_that_fails_is_told_to_all_ranks(source)
    a_model_that_one_rank_can_t_read_is_told_to_all_ranks(policy)
    adapters(policy)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
