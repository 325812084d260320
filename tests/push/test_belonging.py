"""Which engines a trainer rank pushes to, and what they are called; two real ranks: test_trainer_ranks.py."""

from __future__ import annotations

from typing import Any

import pytest

from lorasync.errors import EngineNotReadyError, MismatchError
from lorasync.push.belonging import Belonging, check_whole, engines_of_this_rank, named_engines
from lorasync.push.engines import Engines
from lorasync.wire import manifest_as_text
from tests.stub_engine import Client, StubLLM


def test_engines_have_names():
    a, b = object(), object()
    assert named_engines(a) == {"engine": a}
    assert named_engines([a, b]) == named_engines((a, b)) == {"engine 0": a, "engine 1": b}
    assert named_engines({"left": a, 2: b}) == {"left": a, "2": b}
    assert set(named_engines({a, b}).values()) == {a, b}


@pytest.mark.parametrize("target", [[], {}, ()])
def test_no_engine_is_refused(target):
    with pytest.raises(MismatchError, match="at least one"):
        named_engines(target)


@pytest.mark.parametrize(
    "twice", [lambda e: [e, e], lambda e: {"left": e, "right": e}, lambda e: {1: e, "1": Client(e)}]
)
def test_an_engine_or_a_name_that_comes_twice_is_refused(twice):
    with pytest.raises(MismatchError, match="at least one engine, each once"):
        named_engines(twice(StubLLM()))


@pytest.mark.parametrize("kind", [lambda llm: llm, Client])
def test_the_only_rank_talks_to_all_engines_that_it_is_given(kind):
    left, right = kind(StubLLM()), Client(StubLLM())
    assert engines_of_this_rank(left) == Belonging({"engine": left}, ("engine",), 1)
    two = engines_of_this_rank([left, right])
    assert two == Belonging({"engine 0": left, "engine 1": right}, ("engine 0", "engine 1"), 1)


def test_without_an_engine_on_any_rank_there_is_nobody_to_push_to():
    with pytest.raises(
        EngineNotReadyError, match="got None, expected an engine on at least one trainer rank"
    ):
        engines_of_this_rank(None)


@pytest.mark.parametrize("other", [5, "http://host:8000", StubLLM, object()])
def test_what_is_no_engine_is_called_by_its_name_if_there_are_several(other):
    with pytest.raises(EngineNotReadyError, match=r"^target: got"):
        engines_of_this_rank(other)
    with pytest.raises(EngineNotReadyError, match=r"^right: target: got"):
        engines_of_this_rank({"left": StubLLM(), "right": other})


def parts(*ranks: int, workers: int = 3) -> Engines:
    """Parts of an engine that vLLM's external_launcher has spread over trainer processes."""
    layout: dict[str, Any] = {"world_size": workers, "distributed_executor_backend": "external_launcher"}
    llms = {f"part {i}": StubLLM(first_rank=n, **layout) for i, n in enumerate(ranks)}
    engines = Engines(llms, timeout=10.0, pause="keep", changes_weights=True, names_each=True)
    engines.hello('{"kind": "merge"}', manifest_as_text([]))
    return engines


def test_all_workers_of_an_engine_that_is_spread_are_reached():
    engines = parts(2, 0, 1)
    check_whole(engines)
    engines.goodbye()


@pytest.mark.parametrize(("ranks", "missing"), [((1,), r"\[0, 2\]"), ((0, 1), r"\[2\]"), ((2, 1), r"\[0\]")])
def test_workers_that_nobody_reaches_are_named(ranks, missing):
    engines = parts(*ranks)
    with pytest.raises(MismatchError, match=rf"of 3 workers, of which {missing} belong to no trainer rank"):
        check_whole(engines)
    engines.goodbye()


def test_a_second_engine_of_the_same_size_does_not_stand_in_for_a_worker_of_the_first():
    """Under external_launcher with data parallelism each replica is an engine of its own, with the same worker ranks."""
    engines = parts(0, 1, 2, 0, 1)
    with pytest.raises(MismatchError, match=r"of 3 workers, of which \[2\] belong to no trainer rank"):
        check_whole(engines)
    engines.goodbye()
    engines = parts(0, 1, 2, 0, 1, 2)
    check_whole(engines)
    engines.goodbye()


def test_an_engine_that_one_rank_drives_is_whole():
    engines = Engines({"engine": StubLLM(workers=2)}, timeout=10.0, pause="keep", changes_weights=True)
    engines.hello('{"kind": "merge"}', manifest_as_text([]))
    check_whole(engines)
    engines.goodbye()
