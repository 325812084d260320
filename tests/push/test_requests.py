"""A request that names a version of an adapter: alive, gone, led elsewhere, copied; never the end of an engine."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from typing import Any

import pytest
from vllm.lora.request import LoRARequest

import lorasync as ls
from lorasync.errors import SyncError, VersionGoneError
from lorasync.push import MergeInWorker, ServeAdapter, connect
from lorasync.wire import ADAPTER_IDS
from tests import models
from tests.stub_engine import StubLLM, raising

ROOM = {"only for one": 1, "for one and another's": 2, "for many": 5}


@pytest.fixture(scope="module")
def policy() -> Any:
    return models.with_adapter(models.tiny_llama())


@pytest.fixture(params=ROOM)
def llm(request) -> StubLLM:
    return StubLLM(capacity=ROOM[request.param])


def connected(policy: Any, target: Any, **settings: Any) -> Any:
    return connect(ls.FactorSource(policy), target, ServeAdapter("policy"), timeout=20, **settings)


def pushed(sync: Any) -> dict[str, Any]:
    sync.request() if sync.version else None
    sync.send_weights()
    return sync.request()


def answered_by(llm: StubLLM, request: dict[str, Any]) -> int | None:
    """The version that a request is answered by, None if it is refused; one that ends the engine fails here."""
    try:
        return llm.generate(**request)
    except VersionGoneError:
        return None


def test_a_kept_request_is_answered_by_its_own_version_or_refused_and_ends_no_engine(policy, llm):
    with connected(policy, llm) as sync:
        kept = [pushed(sync) for _ in range(5)]
        found = [answered_by(llm, request) for request in kept]
        assert found[:3] == [None] * 3
        assert found[3] == (4 if llm.capacity > 2 else None)  # one place is left for a user's own adapter
        assert found[4] == 5
        with pytest.raises(VersionGoneError, match=r"policy@1: .*sync\.request\(\).*on_gone='newest'"):
            llm.generate(**kept[0])
        assert len(llm.workers[0].held) <= max(llm.capacity - 1, 1)


def test_a_kept_request_is_answered_by_the_newest_version_if_that_was_chosen(policy, llm):
    with connected(policy, llm, on_gone="newest") as sync:
        kept = [pushed(sync)]
        for version in range(2, 6):
            kept.append(pushed(sync))
            led = [answered_by(llm, request) for request in kept]
            stays = version - 1 if llm.capacity > 2 else version
            assert led == [version] * (version - 2) + [stays, version]
        request = kept[0]["lora_request"]
        assert (request.lora_name, request.lora_int_id, request.lora_path) == (
            "policy@5", ADAPTER_IDS + 5, "lorasync://policy/5",
        )  # fmt: skip
        sync.rollback()
        assert {answered_by(llm, request) for request in kept} == {4}
        assert answered_by(llm, pushed(sync)) == 6
        assert answered_by(llm, kept[0]) == 6


@pytest.mark.parametrize("on_gone", ["refuse", "newest"])
@pytest.mark.parametrize(
    "copied",
    [
        copy.copy,
        copy.deepcopy,
        lambda request: pickle.loads(pickle.dumps(request)),
        lambda request: copy.deepcopy({"deep": [request]})["deep"][0],
    ],
)
def test_a_copy_of_a_request_is_the_request(policy, llm, on_gone, copied):
    with connected(policy, llm, on_gone=on_gone) as sync:
        first = pushed(sync)["lora_request"]
        late = pickle.dumps(first)
        twin = copied(first)
        pushed(sync)
        pushed(sync)
        for request in (twin, pickle.loads(late)):
            assert answered_by(llm, {"lora_request": request}) == (None if on_gone == "refuse" else 3)


def test_a_request_in_another_process_is_vllm_s_own(policy, llm, monkeypatch):
    with connected(policy, llm) as sync:
        sent = pickle.dumps(pushed(sync)["lora_request"])
        monkeypatch.setattr("lorasync.push.issued._by_token", {})
        found = pickle.loads(sent)
        assert type(found) is LoRARequest
        assert (found.lora_name, found.lora_int_id) == ("policy@1", ADAPTER_IDS + 1)


@pytest.mark.parametrize("on_gone", ["refuse", "newest"])
@pytest.mark.parametrize(
    "end", ["shutdown", "shutdown of another one", "taken over", "taken over by weights", "closed"]
)
def test_however_a_version_goes_away_a_kept_request_ends_no_engine(policy, llm, on_gone, end):
    sync = connected(policy, llm, on_gone=on_gone)
    kept = [pushed(sync) for _ in range(3)]
    others: list[Any] = []
    if end == "shutdown":
        sync.shutdown()
    elif end == "shutdown of another one":
        with connected(policy, llm):
            pass
    elif end == "taken over":
        others.append(connected(policy, llm))
        alive = {answered_by(llm, request) for request in kept}
        assert 3 in alive  # until the other one pushes
        pushed(others[0])
    elif end == "taken over by weights":
        others.append(connect(ls.MergedSource(policy), llm, timeout=20))
    else:
        llm.on["commit"] = raising(RuntimeError("no"))
        llm.on["status"] = raising(RuntimeError("nor a word"))
        with pytest.raises(SyncError):
            sync.send_weights()
        llm.on.clear()
    assert [answered_by(llm, request) for request in kept] == [None] * 3
    with pytest.raises(SyncError):
        sync.request()
    for one in (*others, sync):
        one.shutdown()


@pytest.mark.parametrize("on_gone", ["refuse", "newest"])
def test_rolled_back_a_kept_request_is_refused_or_answered_by_what_is_served(policy, llm, on_gone):
    with connected(policy, llm, on_gone=on_gone) as sync:
        pushed(sync)
        kept = pushed(sync)
        llm.on["rollback"] = raising(RuntimeError("no"))
        with pytest.raises(SyncError):
            sync.rollback()
        assert answered_by(llm, kept) == answered_by(llm, sync.request()) == 2
        llm.on.clear()
        sync.rollback()
        assert answered_by(llm, kept) == (None if on_gone == "refuse" else 1)
        assert answered_by(llm, sync.request()) == 1


def test_a_rollback_that_fails_before_an_engine_is_asked_changes_no_request(policy, llm):
    with connected(policy, llm) as sync:
        pushed(sync)
        pushed(sync)
        sync._engines.settle = raising(ConnectionError("gone"))
        with pytest.raises(ConnectionError):
            sync.rollback()
        del sync._engines.settle
        assert sync.version == 2
        assert answered_by(llm, sync.request()) == 2
        sync.rollback()
        assert answered_by(llm, sync.request()) == 1


@pytest.mark.parametrize("on_gone", ["refuse", "newest"])
def test_a_version_that_a_commit_has_brought_nobody_was_told_of(policy, llm, on_gone):
    """The push fails: requests for the version before are answered by it, as ever."""
    with connected(policy, llm, on_gone=on_gone) as sync:
        kept = pushed(sync)
        llm.on["commit in the worker"] = raising(RuntimeError("no"))
        with pytest.raises(SyncError):
            sync.send_weights()
        llm.on.clear()
        assert answered_by(llm, kept) == answered_by(llm, sync.request()) == 1
        assert answered_by(llm, pushed(sync)) == 3  # a number is never used twice: caches are named by it


def test_what_fails_between_the_last_bucket_and_the_commit_leaves_nothing_behind(policy):
    pair = {"left": StubLLM(), "right": StubLLM()}
    with connected(policy, pair) as sync:
        kept = pushed(sync)
        engines = sync._engines
        engines.settle = raising(ConnectionError("gone"))
        with pytest.raises(ConnectionError):
            sync.send_weights()
        del engines.settle
        assert {answered_by(llm, kept) for llm in pair.values()} == {1}
        assert {answered_by(llm, pushed(sync)) for llm in pair.values()} == {3, 4}


def test_an_engine_that_is_left_out_keeps_what_its_requests_name(policy):
    left, right = StubLLM(), StubLLM()
    with connected(policy, {"left": left, "right": right}) as sync:
        kept = [pushed(sync), pushed(sync)]
        sync.leave_out("right")
        assert [answered_by(right, request) for request in kept] == [1, 2]
        pushed(sync)
        assert answered_by(left, sync.request()) == 3


def test_a_version_in_flight_on_one_engine_is_held_by_all(policy):
    pair = {"left": StubLLM(capacity=5), "right": StubLLM(capacity=5)}
    with connected(policy, pair) as sync:
        first = pushed(sync)
        pair["left"].in_flight["slow"] = first["lora_request"]
        first["lora_request"].served_as = first["lora_request"].lora_name
        for _ in range(3):
            pushed(sync)
        assert {answered_by(llm, first) for llm in pair.values()} == {1}
        pair["left"].in_flight.clear()
        pushed(sync)
        assert {answered_by(llm, first) for llm in pair.values()} == {None}
        assert all(set(llm.workers[0].held) == {4, 5} for llm in pair.values())


@pytest.mark.parametrize("on_gone", ["refuse", "newest"])
def test_a_request_that_comes_while_a_version_goes_is_in_flight_or_refused(policy, on_gone):
    """Between the question what is in flight and the commit: the front end has taken it, so its version stays."""
    llm = StubLLM(capacity=5)
    with connected(policy, llm, on_gone=on_gone) as sync:
        first = pushed(sync)["lora_request"]
        pushed(sync)
        first.served_as = first.lora_name

        def arrives() -> None:
            llm.in_flight["late"] = first  # named and registered in one step of the loop, which was under way

        sync._engines.settle = arrives
        pushed(sync)
        assert 1 in llm.workers[0].held
        assert set(llm.workers[0].held) == {1, 2, 3}


def test_requests_are_one_object_a_version_and_keep_neither_model_nor_engine_alive(policy):
    mine, llm = models.with_adapter(models.tiny_llama()), StubLLM()
    sync = connected(mine, llm)
    request = pushed(sync)["lora_request"]
    assert sync.request()["lora_request"] is request
    gone = [weakref.ref(mine), weakref.ref(llm)]
    sync.shutdown()
    del mine, llm, sync
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
    with pytest.raises(VersionGoneError, match=r"shut down: connect\(\) again"):
        request.lora_name  # noqa: B018


def test_asking_from_many_threads_while_pushes_go_on_never_names_what_is_gone(policy):
    llm, failed, stop = StubLLM(capacity=3), [], threading.Event()
    with connected(policy, llm) as sync:
        pushed(sync)

        def ask() -> None:
            while not stop.is_set():
                try:
                    sync.request()["lora_request"].lora_name  # noqa: B018
                except VersionGoneError:
                    pass  # between the two: refused alone
                except BaseException as error:
                    failed.append(error)

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(10):
            pushed(sync)
        stop.set()
        for thread in threads:
            thread.join()
    assert not failed


@pytest.mark.parametrize(
    ("capacity", "others", "said"), [(1, 0, False), (1, 1, True), (2, 1, False), (5, 3, False)]
)
def test_no_room_for_a_user_s_own_adapters_is_said_at_connect(
    policy, capacity, others, said, recwarn, caplog
):
    llm = StubLLM(capacity=capacity)
    llm.others = others
    with connected(policy, llm):
        found = [str(one.message) for one in recwarn if "max_cpu_loras" in str(one.message)]
    assert bool(found) == said
    assert all(f"at least {others + 3}" in text for text in found)
    assert ("max_cpu_loras" in caplog.text) == (capacity == 1 and not others)


def test_weights_need_no_request_whatever_goes(policy):
    llm = StubLLM()
    with connect(
        ls.FactorSource(policy), llm, MergeInWorker(base="device"), timeout=20, on_gone="newest"
    ) as sync:
        sync.send_weights()
        sync.send_weights()
        assert sync.request() == {}
