"""Mutated messages into the real receiver of a live engine.

``python -m tests.e2e.fuzz_receiver STRATEGY FIRST_SEED COUNT BASE OUT``

Every message is refused with an error of ours, and then nothing of it is kept; or it was what had been announced.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import lorasync as ls
from lorasync import base_check, wire
from lorasync.errors import LorasyncError
from lorasync.push import MergeInWorker, connect
from lorasync.push.answers import raise_failed
from lorasync.push.strategies import apply_message
from lorasync.receive.staging import parsed
from lorasync.source import FactorSpec
from tests import fuzz, models
from tests.e2e.engines import greedy, running_llm
from tests.e2e.growth import held_by

KINDS = {"inline": 50, "file": 15, "update": 15, "control": 10, "text": 10, "hello": 0.1}
"""How often each is sent; a handshake is dear, as the worker builds its model once more on the meta device."""


@dataclass
class Receiver:
    """The worker's own engine, and the messages that a push of the policy would bring."""

    llm: Any
    source: Any
    sync: Any
    folder: Path
    refused: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)
    foreign: dict[str, int] = field(default_factory=dict)
    slowest: tuple[float, float, int] = (0.0, 0.0, -1)

    def __post_init__(self) -> None:
        core = self.llm.llm_engine.engine_core.engine_core
        self.engine = core.model_executor.driver_worker.worker.weight_transfer_engine
        self.announced = {m.name: (m.dtype, tuple(m.shape)) for m in self.source.metadata()}
        self.good = wire.pack(dict(_small(self.source)))
        self.update = {
            "op": "bucket", "session": self.engine._session, "version": 2, "call": 0, "payload": b"", "path": "",
            "digest": wire.digest(wire.unpack(self.good)),
        }  # fmt: skip
        self.control = {
            "op": "stage", "protocol": wire.PROTOCOL, "lorasync": "0", "session": self.engine._session, "call": 0,
            "mailbox": "", "bucket": self.update | {"payload": self.good}, "in_flight": [1], "expected": 1,
        }  # fmt: skip
        self.handshake = self.control | {
            "op": "hello", "mailbox": str(self.folder), "bucket": None,
            "apply": apply_message(self.sync.apply, self.source),
            "manifest": wire.manifest_as_text((n, *how) for n, how in self.announced.items()),
        }  # fmt: skip
        self.texts = self._texts()

    def _texts(self) -> dict[str, tuple[str, Callable[[str], Any]]]:
        texts: dict[str, Any] = {"manifest": (self.handshake["manifest"], wire.manifest_from_text)}
        if isinstance(self.source, ls.FactorSource):
            samples = base_check.to_json(ls.source.base_samples(self.source))
            texts["spec"] = (self.source.spec().to_json(), FactorSpec.from_json)
            texts["samples"] = (samples, base_check.from_json)
        return texts

    def payload(self, chance: random.Random, *, in_file: bool) -> None:
        bad = fuzz.mutated(self.good, chance)
        message = {**self.update, "digest": self._digest(bad, chance)}
        if in_file:
            (self.folder / "x.safetensors").write_bytes(bad)
            message["path"] = "x.safetensors"
        else:
            message["payload"] = bad
        self.update_message(message)

    def _digest(self, bad: bytes, chance: random.Random) -> str:
        """A digest that fits, so that the digest is not what refuses; but live weights must not be changed by it."""
        with contextlib.suppress(LorasyncError):
            tensors = wire.unpack(bad)
            as_announced = all(self.announced.get(n) == (t.dtype, tuple(t.shape)) for n, t in tensors.items())
            if chance.random() < 0.8 and not (as_announced and isinstance(self.source, ls.MergedSource)):
                return wire.digest(tensors)
        return str(self.update["digest"])

    def update_message(self, message: Any) -> None:
        self.engine.receive_weights(self.engine.parse_update_info(message))
        self._raise_refused()

    def _raise_refused(self) -> None:
        """A refusal is an answer in the trainer's folder, under the number of the call."""
        box = self.sync._engines.sessions[0]._mailbox
        for call in list(box._replies):
            raise_failed(box.collect(call))

    def control_message(self, message: Any) -> None:
        control = self.engine.parse_init_info(message)
        if control.op not in ("hello", "commit", "rollback", "goodbye"):
            self.engine.init_transfer_engine(control)
            self._raise_refused()

    def hello(self, chance: random.Random) -> None:
        """A handshake that says something else; one that is taken is followed by the good one."""
        part = chance.choice(("apply", "manifest"))
        good = str(self.handshake[part])
        bad = _changed_inside(good, chance) if part == "apply" else fuzz.changed_text(good, chance)
        self.engine.init_transfer_engine(self.engine.parse_init_info(self.handshake | {part: bad}))
        self._raise_refused()
        self.engine.init_transfer_engine(self.engine.parse_init_info(self.handshake))

    def one(self, seed: int) -> None:
        chance = random.Random(seed)
        kind = chance.choices(tuple(KINDS), tuple(KINDS.values()))[0]
        good_update = self.update | {"payload": self.good}
        text, read = self.texts[chance.choice(sorted(self.texts))]
        calls: dict[str, Callable[[], Any]] = {
            "inline": lambda: self.payload(chance, in_file=False),
            "file": lambda: self.payload(chance, in_file=True),
            "update": lambda: self.update_message(fuzz.changed_message(good_update, chance)),
            "control": lambda: self.control_message(fuzz.changed_message(self.control, chance)),
            "text": lambda: parsed(read, {"x": fuzz.changed_text(text, chance)}, "x"),
            "hello": lambda: self.hello(chance),
        }
        began, working = time.perf_counter(), time.thread_time()
        try:
            calls[kind]()
        except Exception as error:
            if not isinstance(error, LorasyncError):
                self.foreign[f"{kind}: {type(error).__name__}: {error}"[:120]] = seed
            self.refused[f"{kind}: {type(error).__name__}: {_gist(str(error))}"] += 1
            self._check_nothing_kept(seed)
        else:
            self.accepted[kind] += 1
            self._check_as_announced(seed)
        self.slowest = max(self.slowest, (time.thread_time() - working, time.perf_counter() - began, seed))

    def _check_nothing_kept(self, seed: int) -> None:
        staging = getattr(self.engine._applier, "_staging", None)
        assert staging is None or not staging.received, f"seed {seed}: refused, and kept"
        assert not self.engine.closed, f"seed {seed}: {self.engine.closed}"

    def _check_as_announced(self, seed: int) -> None:
        applier = self.engine._applier
        staging = getattr(applier, "_staging", None)
        found = staging.received if staging is not None else {}
        assert all(self.announced[n] == (t.dtype, tuple(t.shape)) for n, t in found.items()), f"seed {seed}"
        applier.undo()  # or the next message would be refused for its names, which have come already


def _changed_inside(apply: str, chance: random.Random) -> str:
    """Half of the time not the message itself but a JSON text that it carries."""
    parts = json.loads(apply)
    inner = [key for key in ("spec", "samples") if key in parts]
    if not inner or chance.random() < 0.5:
        return fuzz.changed_text(apply, chance)
    key = chance.choice(inner)
    return json.dumps(parts | {key: fuzz.changed_text(parts[key], chance)})


def _small(source: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """One layer's small tensors: enough to parse, and a million of them can be hashed."""
    for name, tensor in source:
        if "layers.0" in name and wire.nbytes({name: tensor}) <= 32 << 10:
            yield name, tensor


def _gist(text: str) -> str:
    """Which check it was: the message without what is different each time."""
    for words in (
        "differs from", "not safetensors bytes", "not a readable safetensors", "none of it was applied", "session:",
        "unknown fields", "missing", "expected a file name", "malformed", "dtype", "got", "gave up",
    ):  # fmt: skip
        if words in text:
            return words
    return "other"


def main(strategy: str, first: int, count: int, base: str, out: Path) -> None:
    from tests.models import tiny

    policy = tiny(base, r=2, target_modules=["q_proj", "v_proj"])
    factors = strategy == "factors"
    source = ls.FactorSource(policy) if factors else ls.MergedSource(policy)
    apply = MergeInWorker(base="device") if factors else None
    with running_llm(base, in_process=True, dtype="float32") as llm, connect(source, llm, apply) as sync:
        sync.send_weights()
        before = greedy(llm)
        folder = Path(sync._engines.sessions[0]._mailbox.folder)
        receiver = Receiver(llm, source, sync, folder)
        held, began = held_by({"receiver": os.getpid()}), time.perf_counter()
        for seed in range(first, first + count):
            receiver.one(seed)
        seconds = time.perf_counter() - began
        held_after = held_by({"receiver": os.getpid()})
        assert greedy(llm) == before, "something was applied"
        models.move(policy, seed=1)
        sync.send_weights()
        assert greedy(llm) != before
        models.move(policy, seed=0)
        sync.send_weights()
        assert greedy(llm) == before
    found = {
        "strategy": strategy, "messages": count, "seconds": round(seconds, 1),
        "slowest": dict(zip(("cpu_seconds", "seconds", "seed"), receiver.slowest, strict=True)),
        "accepted": dict(receiver.accepted), "refused": dict(receiver.refused.most_common()),
        "not_ours": receiver.foreign, "held_before": held, "held_after": held_after,
    }  # fmt: skip
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], Path(sys.argv[5]))
