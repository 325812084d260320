"""Which engines a trainer rank pushes to: those in its own process; rank 0 also to those that are reached from outside."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field

from lorasync.errors import EngineNotReadyError, Mismatch, MismatchError
from lorasync.push.answers import read_answers
from lorasync.push.engines import Engines, naming
from lorasync.push.trainer_ranks import agreed_by_all_ranks, rank, texts_of_all_ranks
from lorasync.targets.kinds import is_engine, is_engine_here, target_of
from lorasync.wire import Status


def named_engines(target: object) -> dict[str, object]:
    """One engine, or several: a list (then called ``engine 0``, ``engine 1``, …) or a dict with names; none for None.

    Raises:
        MismatchError: if a list or dict is empty, or one engine or one name is there twice.
    """
    if target is None:
        return {}
    if isinstance(target, dict):
        pairs = [(str(name), engine) for name, engine in target.items()]
    elif isinstance(target, list | tuple | set | frozenset):
        pairs = [(f"engine {i}", engine) for i, engine in enumerate(target)]
    else:
        pairs = [("engine", target)]
    names, engines = {name for name, _ in pairs}, {id(engine) for _, engine in pairs}
    if not pairs or len(names) < len(pairs) or len(engines) < len(pairs):
        got = ", ".join(name for name, _ in pairs) or "none"
        fix = "Pass the engines in a list or dict."
        raise MismatchError(
            "connect() needs engines.", [Mismatch("target", got, "at least one engine, each once", fix)]
        )
    return dict(pairs)


@dataclass(frozen=True)
class Belonging:
    """Which engines belong to whom.

    Attributes:
        mine: those that this trainer rank pushes to, by name.
        names: of all ranks' engines.
        ranks: how many trainer ranks have engines.
        passed_on: engines that this rank has passed, and rank 0 talks to, by name.
    """

    mine: dict[str, object]
    names: tuple[str, ...]
    ranks: int
    passed_on: dict[str, object] = field(default_factory=dict)


def engines_of_this_rank(target: object) -> Belonging:
    """Find out which trainer rank pushes to which engine; a collective.

    An engine's name says of which rank it is, if several ranks have some.

    Raises:
        EngineNotReadyError: if no rank has an engine, or one is no engine.
        MismatchError: if a rank has an engine that is reached from outside, and rank 0, which would talk to it, has not.
    """
    with agreed_by_all_ranks():
        given = named_engines(target)
        for name, engine in given.items():
            if not is_engine(engine) or isinstance(engine, type):
                with naming(name if len(given) > 1 else ""):
                    target_of(engine, timeout=1.0)  # says what is wrong
        here = {name: engine for name, engine in given.items() if is_engine_here(engine)}
        outside = {name: engine for name, engine in given.items() if name not in here}
    told = [json.loads(text) for text in texts_of_all_ranks(json.dumps([list(here), list(outside)]))]
    with agreed_by_all_ranks():
        _check_told(told)
    mine, passed_on = ({**here, **outside}, {}) if rank() == 0 else (here, outside)
    pushes_to = {n: own + (others if n == 0 else []) for n, (own, others) in enumerate(told)}
    ranks = sum(map(bool, pushes_to.values()))
    if ranks == 1:
        (names,) = filter(None, pushes_to.values())
        return Belonging(mine, tuple(names), ranks, passed_on)
    all_names = tuple(_of_rank(n, name) for n, names in pushes_to.items() for name in names)
    own = {_of_rank(rank(), name): engine for name, engine in mine.items()}
    return Belonging(own, all_names, ranks, passed_on)


def check_passed_on(belonging: Belonging, engines: Engines, *, timeout: float) -> None:
    """Refuse an engine from outside that is another one than rank 0's of that name: nobody would talk to it; a collective.

    Each rank asks its object whether its workers take rank 0's pushes.

    Raises:
        MismatchError: naming the engines and the rank.
        LorasyncError: if such an object does not answer.
    """
    mine = {session.name: session.token for session in engines.sessions} if rank() == 0 else {}
    tokens: dict[str, str] = json.loads(texts_of_all_ranks(json.dumps(mine))[0])
    with agreed_by_all_ranks():
        wrong = []
        for name, engine in belonging.passed_on.items():
            token = tokens.get(name) or tokens.get(_of_rank(0, name), "")
            found = target_of(engine, timeout=timeout).call(Status(session=token, call=0).to_dict(), b"")
            if not all(answer.ours for answer in read_answers(found, expected=0).values()):
                expected = f"the engine that rank 0 passes as {name}"
                fix = "Pass every engine that is reached from outside on rank 0, and None on the other ranks."
                wrong.append(
                    Mismatch(f"target of trainer rank {rank()}, {name}", "another engine", expected, fix)
                )
        if wrong:
            raise MismatchError("Nobody would talk to some engines; nothing was pushed.", wrong)


def check_whole(engines: Engines) -> None:
    """Refuse an engine of which some workers belong to nobody here: they would go on with old weights; a collective.

    Raises:
        MismatchError: naming the workers that are missing.
    """
    mine = [[s.workers, list(s.worker_ranks)] for s in engines.sessions if s.target.spread]
    found: dict[int, Counter[int]] = {}
    for text in texts_of_all_ranks(json.dumps(mine)):
        for workers, ranks in json.loads(text):
            found.setdefault(workers, Counter()).update(ranks)
    wrong = []
    for workers, counts in found.items():
        engines_of_this_size = max(counts.values())
        missing = [number for number in range(workers) if counts[number] < engines_of_this_size]
        if missing:
            wrong.append(
                Mismatch(
                    "target",
                    f"an engine of {workers} workers, of which {missing} belong to no trainer rank that has passed it",
                    "all of them",
                    "connect(source, llm) on every trainer rank, with the LLM of that rank.",
                )
            )
    if wrong:
        raise MismatchError("A push would reach a part of this engine only; nothing was touched.", wrong)


def _check_told(told: list[list[list[str]]]) -> None:
    if not any(own or others for own, others in told):
        raise EngineNotReadyError(
            "target: got None, expected an engine on at least one trainer rank. Rank 0 is the one that talks to engines "
            "which are reached from outside: pass them there; a rank passes the LLM or AsyncLLM of its own process."
        )
    wrong = [
        Mismatch(
            f"target of trainer rank {number}",
            f"{name}, which is reached from outside",
            "one that rank 0 passes too: it is the one that talks to such engines",
            "Pass it on rank 0.",
        )
        for number, (_, others) in enumerate(told)
        for name in others
        if number and name not in told[0][1]
    ]
    if wrong:
        raise MismatchError("Nobody would talk to some engines; nothing was touched.", wrong)


def _of_rank(number: int, name: str) -> str:
    return f"rank {number}'s {name}"
