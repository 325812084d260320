"""`connect`, and what `Sync` promises whatever an engine does; with engines that do it on demand."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import lorasync as ls
from lorasync.errors import (
    EngineClosedError,
    EngineNotReadyError,
    MismatchError,
    PushInProgressError,
    SyncError,
    SyncTimeoutError,
)
from lorasync.push import MergeInWorker, ServeAdapter, Sync, connect
from tests import models
from tests.stub_engine import Client, StubLLM, raising

APPLIES = {"merged": None, "factors": MergeInWorker(base="device"), "adapter": ServeAdapter("policy")}


@pytest.fixture(scope="module")
def policy() -> Any:
    return models.with_adapter(models.tiny_llama())


@pytest.fixture(params=APPLIES)
def way(request) -> str:
    return request.param


def source_of(policy: Any, way: str) -> Any:
    return ls.MergedSource(policy) if way == "merged" else ls.FactorSource(policy)


def connected(policy: Any, target: Any, way: str, **settings: Any) -> Sync:
    return connect(source_of(policy, way), target, APPLIES[way], **{"timeout": 20, **settings})


def push(sync: Sync) -> Any:
    sync.request() if sync.version else None  # or it warns that nobody asks for the policy
    return sync.send_weights()


# --------------------------------------------------------------------------------------------- what connect takes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pause": "kepp"}, "pause.*'keep'"),
        ({"pause": None}, "pause"),
        ({"on_gone": "newset"}, "on_gone.*'newest'"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": -1.0}, "timeout"),
        ({"timeout": float("nan")}, "timeout"),
        ({"timeout": float("inf")}, "timeout"),
        ({"timeout": "600"}, "timeout"),
        ({"timeout": True}, "timeout"),
        ({"bucket_bytes": 0}, "bucket_bytes"),
        ({"bucket_bytes": -5}, "bucket_bytes"),
        ({"bucket_bytes": 1e6}, "bucket_bytes"),
        ({"measure_survival": 1}, "measure_survival"),
        ({"canary": "policy"}, "canary"),
        ({"canary": 3}, "canary"),
        ({"apply": ServeAdapter}, r"apply.*class ServeAdapter.*ServeAdapter\('policy'\)"),
        ({"apply": MergeInWorker}, r"apply.*class MergeInWorker.*MergeInWorker\(base='device'\)"),
        ({"apply": "adapter"}, "apply"),
    ],
)
def test_an_argument_that_can_not_be_meant_is_refused_by_name(policy, change, message):
    llm = StubLLM()
    arguments = {"apply": None, **change}
    with pytest.raises(MismatchError, match=f"(?s){message}"):
        connect(ls.MergedSource(policy), llm, **arguments)
    assert not llm.calls


def test_all_wrong_arguments_are_said_at_once(policy):
    with pytest.raises(MismatchError) as caught:
        connect(ls.MergedSource(policy), StubLLM(), pause="kepp", timeout=0, bucket_bytes=0)
    assert [m.name for m in caught.value.mismatches] == ["pause", "timeout", "bucket_bytes"]


def test_measuring_survival_where_nothing_is_rounded_is_refused(policy):
    with pytest.raises(MismatchError, match=r"measure_survival.*FactorSource.*MergedSource"):
        connect(ls.FactorSource(policy), StubLLM(), ServeAdapter("p"), measure_survival=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda p, s, e: (p, e), r"MergedSource\(model\)"),
        (lambda p, s, e: (e, s), r"Swap the two: connect\(source, engine\)"),
        (lambda p, s, e: (e, [s]), r"Swap the two"),
        (lambda p, s, e: (ls.MergedSource, e), r"the class MergedSource.*MergedSource\(model\)"),
        (lambda p, s, e: (None, e), "source.*NoneType"),
        (lambda p, s, e: (s, None), "got None.*Rank 0"),
        (lambda p, s, e: (s, StubLLM), "class StubLLM"),
        (lambda p, s, e: (s, "http://localhost:8000"), "http://localhost:8000"),
        (lambda p, s, e: (s, s), "expected a vllm.LLM.*This is a source"),
        (lambda p, s, e: (s, p), "expected a vllm.LLM"),
        (lambda p, s, e: (s, [e, None]), "engine 1: target: got None"),
        (lambda p, s, e: (s, []), "at least one engine"),
        (lambda p, s, e: (s, [e, e]), "each once"),
        (lambda p, s, e: (s, {1: e, "1": StubLLM()}), "each once"),
    ],
)
def test_what_is_no_source_or_no_engine_is_refused_with_the_fix_in_one_message(policy, arguments, message):
    llm = StubLLM()
    with pytest.raises((MismatchError, EngineNotReadyError), match=f"(?s){message}"):
        connect(*arguments(policy, ls.MergedSource(policy), llm))
    assert not llm.calls


def test_a_coroutine_is_no_engine(policy):
    async def engine() -> None:
        """Not awaited."""

    made = engine()
    with pytest.raises(EngineNotReadyError, match="Await it first"):
        connect(ls.MergedSource(policy), made)
    made.close()


REFUSED = {
    "pipeline": ({"pipeline_parallel_size": 2, "world_size": 2}, "pipeline_parallel_size: got 2, expected 1"),
    "nodes": ({"nnodes": 2}, "nnodes: got 2"),
    "experts": ({"world_size": 2, "enable_expert_parallel": True}, "enable_expert_parallel: got True"),
    "external": ({"data_parallel_size": 2, "data_parallel_external_lb": True}, "data_parallel_external_lb"),
    "hybrid": ({"data_parallel_size": 2, "data_parallel_hybrid_lb": True}, "data_parallel_hybrid_lb"),
}
PARTS = {
    "replicas": {"data_parallel_size": 2},
    "workers": {"world_size": 2, "distributed_executor_backend": "external_launcher"},
}


@pytest.mark.parametrize(("layout", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("reached", ["as an object", "through a client"])
def test_an_engine_of_which_a_push_would_reach_a_part_only_is_refused_by_its_setting(
    policy, way, layout, message, reached
):
    llm = StubLLM(**layout)
    with pytest.raises(MismatchError, match=message):
        connected(policy, llm if reached == "as an object" else Client(llm), way)
    assert llm.calls == ([] if reached == "as an object" else ["hello"])
    assert not llm.workers[0].live


@pytest.mark.parametrize("layout", PARTS.values(), ids=PARTS)
def test_a_part_of_an_engine_whose_others_nobody_has_passed_is_refused(policy, way, layout):
    """An `LLM` drives its own workers only: those of other ranks have to be passed there."""
    llm = StubLLM(**layout)
    with pytest.raises(
        MismatchError, match=r"an engine of 2 workers, of which \[1\] belong to no trainer rank"
    ):
        connected(policy, llm, way)
    assert llm.calls == ["hello", "goodbye"]
    llm = StubLLM(**layout)
    with pytest.raises(EngineNotReadyError, match=r"got 1 of worker ranks \[0\], expected 2"):
        connected(policy, Client(llm), way)
    assert llm.calls == ["hello", "goodbye"]
    assert not llm.workers[0].live


def test_an_engine_of_one_worker_in_a_trainer_s_process_is_served(policy, way):
    with connected(policy, StubLLM(distributed_executor_backend="external_launcher"), way) as sync:
        assert push(sync).ranks == 1


# ----------------------------------------------------------------------------------------- clients that can't answer


def without(name: str) -> Any:
    members = {n: c for n, c in vars(Client).items() if n != name}
    return type("Lacking", (), members)


def test_a_client_that_lacks_what_a_commit_needs_is_refused_before_anything_changes(policy, way):
    llm = StubLLM()
    client = without("reset_prefix_cache")(llm)
    if way == "adapter":  # changes no weights: what is cached stays good
        with connected(policy, client, way) as sync:
            sync.send_weights()
        return
    with pytest.raises(EngineNotReadyError, match=r"has no reset_prefix_cache\(\)"):
        connected(policy, client, way)
    client.reset_prefix_cache = "yes"
    with pytest.raises(EngineNotReadyError, match=r"has no reset_prefix_cache\(\)"):
        connected(policy, client, way)
    assert not llm.calls


def test_what_encoders_have_computed_with_old_weights_is_forgotten_after_each_commit(policy, way):
    llm = StubLLM()
    with connected(policy, llm, way) as sync:
        for pushes in (1, 2):
            push(sync)
            resets = [call for call in llm.calls if call in ("commit", "reset_encoder_cache")]
            assert (
                resets == ["commit"] * pushes
                if way == "adapter"
                else ["commit", "reset_encoder_cache"] * pushes
            )
        if way == "factors":
            sync.rollback()
            assert llm.calls[llm.calls.index("rollback") :].count("reset_encoder_cache") == 1


def test_a_client_of_a_multimodal_engine_has_to_reset_its_encoder_cache(policy, way):
    llm = StubLLM(multimodal=True)
    client = Client(llm)
    if way == "adapter":
        with connected(policy, client, way) as sync:
            sync.send_weights()
    else:
        with pytest.raises(EngineNotReadyError, match=r"has no reset_encoder_cache\(\)"):
            connected(policy, client, way)
        assert "commit" not in llm.calls
    client.reset_encoder_cache = llm.reset_encoder_cache
    with connected(policy, client, way) as sync:
        sync.send_weights()
    assert ("reset_encoder_cache" in llm.calls) == (way != "adapter")


@pytest.mark.parametrize("call", [None, "yes"])
def test_a_client_whose_call_is_none_is_refused(policy, way, call):
    llm = StubLLM()
    client = Client(llm)
    client.collective_rpc = call
    with pytest.raises(EngineNotReadyError, match=r"has no collective_rpc\(\)"):
        connected(policy, client, way)
    assert not llm.calls


def test_a_client_with_vllm_s_four_calls_for_weights_is_refused_as_they_return_nothing(policy, way):
    names = "init_weight_transfer_engine start_weight_update update_weights finish_weight_update reset_prefix_cache"
    calls = dict.fromkeys(names.split(), lambda *_: pytest.fail("nothing is to be called"))
    with pytest.raises(
        EngineNotReadyError, match=r"expected .*collective_rpc.*return nothing.*could not be known"
    ):
        connected(policy, type("FourCalls", (), calls)(), way)


def test_a_client_that_does_not_wait_for_the_engine_is_refused(policy, way):
    class Async(Client):
        async def collective_rpc(self, method: str, *_: Any, **__: Any) -> list[Any]:
            """Not awaited by anybody."""
            return []

    with pytest.raises(EngineNotReadyError, match="to be awaited"):
        connected(policy, Async(StubLLM()), way)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "returned NoneType, expected a list"),
        ([], r"got 0 of worker ranks \[\], expected 1"),
        ([None], "got None, expected one of lorasync's workers"),
    ],
    ids=str,
)
def test_a_client_whose_engine_never_answers_is_refused(policy, way, returned, message):
    class Lost(Client):
        def collective_rpc(self, method: str, *_: Any, **__: Any) -> Any:
            """Into the void."""
            return returned

    with pytest.raises(EngineNotReadyError, match=message):
        connected(policy, Lost(StubLLM()), way)


class Changing(Client):
    """What carries the calls changes them."""

    def __init__(self, llm: StubLLM, change: Callable[[Any], Any]) -> None:
        super().__init__(llm)
        self.change = change

    def collective_rpc(
        self, method: str, timeout: float | None = None, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> list[Any]:
        return super().collective_rpc(method, timeout, self.change(args), kwargs)


def on_another_host(args: Any) -> Any:
    message, payload = args
    if message["op"] != "hello":
        return args
    folder = {"folder": "/dev/shm/lorasync-of-another-host"}
    return {**message, "offers": {**message["offers"], "shared_memory": folder}}, payload


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_that_can_not_reach_the_trainer_s_folder_are_sent_the_bytes_in_the_call(
    policy, way, workers, monkeypatch
):
    monkeypatch.setattr("lorasync.transport.shared_memory.SMALL", 0)
    found = {}
    for name, change in {"here": lambda args: args, "elsewhere": on_another_host}.items():
        llm = StubLLM(workers=workers)
        with connected(policy, Changing(llm, change), way) as sync:
            found[name] = push(sync).transport
            assert served(llm) == {1}
            assert all(worker.live or worker.held[1] for worker in llm.workers)
    assert found == {"here": "shared_memory", "elsewhere": "inline"}


def test_one_worker_elsewhere_is_enough_for_the_bytes_to_ride_in_the_call(policy, way, monkeypatch):
    monkeypatch.setattr("lorasync.transport.shared_memory.SMALL", 0)
    llm = StubLLM(workers=2)
    far = llm.workers[1]
    llm.workers[1] = lambda message, payload: far(*on_another_host((message, payload)))
    with connected(policy, llm, way) as sync:
        assert push(sync).transport == "inline"
        assert (llm.workers[0].version, far.version) == (1, 1)


def test_a_client_that_can_not_carry_bytes_is_refused_in_the_handshake(policy, way):
    llm = StubLLM()
    with pytest.raises(EngineNotReadyError, match="can't carry bytes"):
        connected(policy, Changing(llm, lambda args: json.loads(json.dumps(args))), way)
    assert not llm.calls


def test_a_client_that_turns_bytes_into_text_is_refused_in_the_handshake(policy, way):
    llm = StubLLM()
    with pytest.raises(SyncError, match="got str beside the message, expected the bytes"):
        connected(policy, Changing(llm, lambda args: json.loads(json.dumps(args, default=str))), way)
    assert llm.calls == ["hello"]


# ---------------------------------------------------------------------------------------------- after the end

VERBS = {
    "send_weights": lambda sync: sync.send_weights(),
    "rollback": lambda sync: sync.rollback(),
    "request": lambda sync: sync.request(),
    "digests": lambda sync: sync.digests(),
    "leave_out": lambda sync: sync.leave_out("left"),
    "closed": lambda sync: sync.closed,
    "engines": lambda sync: sync.engines,
}


def test_the_verbs_are_all_that_there_are():
    public = {name for name in vars(Sync) if not name.startswith("_")}
    assert public - {"shutdown", "send_weights_async"} == set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_after_shutdown_every_verb_says_so(policy, way, verb):
    left, right = StubLLM(), StubLLM()
    with connected(policy, {"left": left, "right": right}, way) as sync:
        push(sync)
    before = list(left.calls)
    with pytest.raises(SyncError, match=r"shut down: connect\(\) again"):
        VERBS[verb](sync)
    assert left.calls == before
    sync.shutdown()  # a second time is fine
    assert left.calls == before


def test_send_weights_async_after_shutdown_says_so(policy):
    import asyncio

    with connected(policy, StubLLM(), "merged") as sync:
        pass
    with pytest.raises(SyncError, match="shut down"):
        asyncio.run(sync.send_weights_async())


@pytest.fixture
def in_the_middle(policy, way):
    """A connection in the middle of a push, and what lets it go on."""
    llm, inside, go_on = StubLLM(), threading.Event(), threading.Event()
    sync = connected(policy, llm, way)
    push(sync)
    push(sync)

    def wait() -> None:
        inside.set()
        assert go_on.wait(20)

    llm.on["commit"] = wait
    reports: list[Any] = []
    thread = threading.Thread(target=lambda: reports.append(push(sync)))
    thread.start()
    assert inside.wait(20)
    yield sync, llm, go_on, reports
    go_on.set()
    thread.join(20)


@pytest.mark.parametrize("verb", ["send_weights", "rollback", "digests", "leave_out"])
def test_in_the_middle_of_a_push_other_verbs_are_refused_and_it_is_unaffected(in_the_middle, verb):
    sync, llm, go_on, reports = in_the_middle
    before = list(llm.calls)
    with pytest.raises(PushInProgressError, match="unaffected"):
        VERBS[verb](sync)
    assert llm.calls == before
    go_on.set()
    while not reports:
        time.sleep(0.01)
    assert reports[0].version == sync.version == 3


def test_shutdown_waits_for_the_push_that_is_under_way(in_the_middle):
    sync, llm, go_on, reports = in_the_middle
    ending = threading.Thread(target=sync.shutdown)
    ending.start()
    time.sleep(0.2)
    assert ending.is_alive()
    assert "goodbye" not in llm.calls
    go_on.set()
    ending.join(20)
    assert not ending.is_alive()
    assert llm.calls[-1] == "goodbye"
    assert reports[0].version == 3


def test_shutdown_from_inside_of_a_push_is_refused_instead_of_waiting_for_itself(policy):
    llm = StubLLM()
    with connected(policy, llm, "merged") as sync:
        source = sync.source

        class Ending:
            def metadata(self) -> Any:
                return source.metadata()

            def __iter__(self) -> Any:
                sync.shutdown()
                yield from source

        sync.source = Ending()
        with pytest.raises(PushInProgressError, match="shutdown"):
            sync.send_weights()
        sync.source = source
        assert sync.send_weights().version == 1


# ------------------------------------------------------------------------------------- all engines, or none


def test_a_commit_that_never_arrives_leaves_nothing_for_the_next_push(policy, way):
    llm = StubLLM()
    with connected(policy, llm, way) as sync:
        push(sync)
        llm.on["commit"] = raising(ConnectionError("lost on its way"))
        with pytest.raises(SyncError, match="lost on its way"):
            push(sync)
        assert bool(sync.closed) == (way == "merged")  # its weights have come, and are not to be relied on
        llm.on.clear()
        assert (
            sync.send_weights().version == sync.version == 3
        )  # a number is never used twice: caches are named by it
        assert served(llm) == {3}


def served(llm: StubLLM) -> set[int]:
    return {worker.version for worker in llm.workers}


@pytest.mark.parametrize("way", ["factors", "adapter"])
@pytest.mark.parametrize("who", ["left", "right"])
@pytest.mark.parametrize("point", ["rollback", "rollback in the worker"])
def test_a_rollback_that_one_engine_refuses_is_done_by_none(policy, way, who, point):
    pair = {"left": StubLLM(workers=2), "right": StubLLM()}
    with connected(policy, pair, way) as sync:
        push(sync)
        push(sync)
        pair[who].on[point] = raising(RuntimeError("no"))
        with pytest.raises(SyncError, match=rf"^{who}: .*no"):
            sync.rollback()
        assert served(pair["left"]) == served(pair["right"]) == {2}
        assert sync.version == 2
        assert not sync.closed
        if way == "adapter":
            assert {llm.generate(**sync.request()) for llm in pair.values()} == {2}
        pair[who].on.clear()
        sync.rollback()
        assert served(pair["left"]) == served(pair["right"]) == {1}
        if way == "adapter":
            assert {llm.generate(**sync.request()) for llm in pair.values()} == {1}
        assert push(sync).version == 3


def test_an_engine_that_can_not_go_forward_again_is_closed(policy):
    pair = {"left": StubLLM(), "right": StubLLM()}
    with connected(policy, pair, "factors") as sync:
        push(sync)
        push(sync)
        pair["right"].on["rollback"] = raising(RuntimeError("no"))
        pair["left"].on["reset_prefix_cache"] = raising(RuntimeError("dead"))
        with pytest.raises(SyncError, match=r"^right"):
            sync.rollback()
        assert "left" in sync.closed
        with pytest.raises(EngineClosedError, match=r"send_weights\(\) again"):
            sync.request()
        for llm in pair.values():
            llm.on.clear()
        push_again = sync.send_weights()
        assert push_again.version == 3
        assert not sync.closed
        assert sync.request() == {}


@pytest.mark.parametrize("way", ["factors", "adapter"])
def test_a_second_rollback_is_refused_by_the_trainer_and_a_push_counts_on(policy, way):
    llm = StubLLM()
    with connected(policy, llm, way) as sync:
        with pytest.raises(SyncError, match="no version before"):
            sync.rollback()
        push(sync)
        with pytest.raises(SyncError, match="no version before"):
            sync.rollback()
        push(sync)
        sync.rollback()
        with pytest.raises(SyncError, match="no version before"):
            sync.rollback()
        assert (sync.version, served(llm)) == (1, {1})
        assert push(sync).version == 3
        sync.rollback()  # to what was served before, which is not the number below
        assert (sync.version, served(llm)) == (1, {1})
        if way == "adapter":
            assert llm.generate(**sync.request()) == 1


def no_answer(answers: list[Any]) -> list[Any]:
    raise ConnectionError("its answer was lost")


LOST = {"of all ranks": no_answer, "of rank 1": lambda answers: answers[:1]}


@pytest.mark.parametrize("lost", LOST.values(), ids=LOST)
@pytest.mark.parametrize("asked", [True, False], ids=["status answers", "status is lost too"])
def test_an_engine_whose_answer_to_the_commit_is_lost_is_not_left_on_another_version(policy, lost, asked):
    """It has taken the version, and the other one goes back."""
    pair = {"left": StubLLM(), "right": StubLLM(workers=2)}
    with connected(policy, pair, "factors", timeout=2) as sync:
        push(sync)
        right = pair["right"]
        call = right.collective_rpc

        def losing(
            method: str, timeout: float | None = None, args: Any = (), kwargs: Any = None
        ) -> list[Any]:
            answers = call(method, timeout, args, kwargs)
            return lost(answers) if args[0]["op"] == "commit" else answers

        right.collective_rpc = losing
        if not asked:
            right.on["status"] = raising(RuntimeError("no status either"))
        with pytest.raises(SyncError, match=r"^right: .*(lost|got 1 of worker ranks \[0\], expected 2)"):
            push(sync)
        assert served(pair["left"]) == {1}
        assert served(right) == ({1} if asked else {2})
        assert bool(sync.closed) != asked
        del right.collective_rpc
        right.on.clear()
        assert sync.send_weights().version == 3
        assert served(pair["left"]) == served(right) == {3}
        assert not sync.closed


@pytest.mark.parametrize("way", ["merged", "factors"])
@pytest.mark.parametrize(
    "outcome", [raising(RuntimeError("no")), lambda: False], ids=["raises", "returns False"]
)
def test_an_old_cache_closes_the_engine_until_a_push_completes(policy, way, outcome):
    llm = StubLLM()
    with connected(policy, llm, way) as sync:
        push(sync)
        llm.on["reset_prefix_cache"] = outcome
        with pytest.raises(SyncError):
            push(sync)
        for _ in range(2):
            with pytest.raises(EngineClosedError, match="cached"):
                sync.request()
            llm.on["hello"] = llm.on["bucket"] = raising(RuntimeError("no"))
            with pytest.raises(SyncError):  # a push that fails says nothing of the cache
                sync.send_weights()
        llm.on.clear()
        sync.send_weights()
        assert sync.request() == {}


def test_engines_at_different_versions_are_not_asked_for_one_adapter_of_both(policy):
    left, right = StubLLM(), StubLLM()
    with connected(policy, left, "adapter") as sync:
        push(sync)
        push(sync)
        with connected(policy, right, "adapter") as other:
            push(other)
            with connected(policy, [left, right], "adapter") as both:
                with pytest.raises(SyncError, match=r"send_weights\(\) first"):
                    both.request()
                both.send_weights()
                assert {llm.generate(**both.request()) for llm in (left, right)} == {3}


# ----------------------------------------------------------------------------------------------- time limits

HANGS = [
    "status",
    "bucket",
    "commit",
    "reset_prefix_cache",
    "reset_encoder_cache",
    "name",
    "rollback",
    "digest",
]


def _asks(way: str, point: str) -> bool:
    """Whether a push, or a rollback, of this strategy comes to this point."""
    weights = ["reset_prefix_cache", "reset_encoder_cache", "name"]
    never = {"merged": ["status", "rollback"], "factors": ["status"], "adapter": ["status", *weights]}
    return point not in never[way]


@pytest.mark.parametrize("point", HANGS)
def test_an_engine_that_hangs_costs_one_time_limit(policy, way, point):
    llm, go_on = StubLLM(), threading.Event()
    sync = connected(policy, llm, way, timeout=1.0)
    try:
        push(sync)
        push(sync)
        hung: list[str] = []

        def hang() -> None:
            hung.append(point)
            go_on.wait(30)

        llm.on[point] = hang
        began = time.monotonic()
        verb = {"rollback": sync.rollback, "digest": sync.digests}.get(point, sync.send_weights)
        with (
            contextlib.suppress(SyncError)
            if not _asks(way, point)
            else pytest.raises(SyncTimeoutError, match="did not answer")
        ):
            sync.request()
            verb()
        assert bool(hung) == _asks(way, point)
        assert len(hung) <= 2  # what hangs is asked once more, for a moment
        assert time.monotonic() - began < 15  # far from the 30 s that it hangs, also on a busy machine
    finally:
        go_on.set()
        llm.on.clear()
        sync.shutdown()


def test_a_handshake_that_hangs_costs_one_time_limit(policy, way):
    llm, go_on = StubLLM(), threading.Event()
    llm.on["hello"] = lambda: go_on.wait(30)
    began = time.monotonic()
    with pytest.raises(SyncTimeoutError, match=r"hello: .*did not answer within 1 s"):
        connected(policy, llm, way, timeout=1.0)
    assert time.monotonic() - began < 15
    go_on.set()


def test_an_engine_that_was_slow_once_is_pushed_to_again(policy, way):
    llm, go_on = StubLLM(), threading.Event()
    with connected(policy, llm, way, timeout=0.5) as sync:
        push(sync)
        llm.on["commit"] = lambda: go_on.wait(30)
        with pytest.raises(SyncTimeoutError):
            push(sync)
        go_on.set()
        llm.on.clear()
        time.sleep(0.2)
        sync.send_weights()
        assert served(llm) == {sync.version}


# --------------------------------------------------------------------------------------------------- reports


def test_leftover_requests_are_named_with_the_way_out(policy):
    llm = StubLLM()
    with connected(policy, llm, "merged") as sync:
        llm.in_flight = {"0-abc": None, "1-def": None}
        with pytest.raises(
            SyncError, match=r"(?s)0-abc, 1-def.*between generate.*abort_request.*Nothing was touched"
        ):
            sync.send_weights()
        assert "bucket" not in llm.calls


def test_a_push_warns_if_nobody_asked_for_the_request_since_the_one_before(policy):
    llm = StubLLM()
    with connected(policy, llm, "adapter") as sync:
        assert not sync.send_weights().warnings
        with pytest.warns(UserWarning, match=r"sync\.request\(\).*version 1.*base model"):
            report = sync.send_weights()
        assert any("sync.request()" in warning for warning in report.warnings)
        kept = sync.request()
        assert not sync.send_weights().warnings
        llm.generate(**kept)  # a request that is kept is used as well
        assert not sync.send_weights().warnings


@pytest.mark.parametrize("way", ["merged", "factors"])
def test_weights_answer_without_a_request(policy, way):
    with connected(policy, StubLLM(), way) as sync:
        sync.send_weights()
        assert not sync.send_weights().warnings


def test_what_a_worker_has_to_say_is_shown_once_at_connect_and_once_in_a_report(policy, way):
    llm = StubLLM(workers=2)
    llm.notes = ("model.mtp: keeps its old weights",)
    with pytest.warns(UserWarning, match="keeps its old weights") as caught:
        sync = connected(policy, llm, way)
    assert len(caught) == 1
    with sync:
        assert sync.send_weights().warnings == llm.notes
        sync.request()
        assert not sync.send_weights().warnings


def test_factors_are_checked_against_what_the_engines_serve_before_anything_is_sent(policy, way):
    llm, asked = StubLLM(dtype=torch.float16), []
    with connected(policy, llm, way) as sync:

        def check_fits(dtype: torch.dtype, *, slots: bool) -> None:
            asked.append((dtype, slots))
            raise ls.LorasyncError("out of range")

        sync.source.check_fits = check_fits
        before = list(llm.calls)
        if way == "merged":
            sync.send_weights()
            assert not asked
            return
        with pytest.raises(ls.LorasyncError, match="out of range"):
            sync.send_weights()
        assert asked == [(torch.float16, way == "adapter")]
        assert llm.calls == before


def test_no_folder_is_left_of_connections_that_were_refused_or_have_ended(policy, way, monkeypatch, tmp_path):
    monkeypatch.setattr("lorasync.transport.shared_memory.SMALL", 0)
    monkeypatch.setattr("lorasync.transport.folder.shared_memory_root", lambda: tmp_path)
    refusing = StubLLM()
    refusing.on["hello"] = raising(RuntimeError("no"))
    for llm in (
        StubLLM(data_parallel_size=2),
        StubLLM(nnodes=2),
        Client(StubLLM(nnodes=2)),
        Changing(StubLLM(), lambda args: json.loads(json.dumps(args, default=str))),
        without("collective_rpc")(StubLLM()),
        refusing,
    ):
        with pytest.raises((MismatchError, SyncError)):
            connected(policy, llm, way)
        assert not list(tmp_path.iterdir())
    with connected(policy, StubLLM(), way) as sync:
        assert push(sync).transport == "shared_memory"
        (folder,) = tmp_path.iterdir()
        assert list(folder.glob("*.bucket"))
    assert not list(tmp_path.iterdir())
