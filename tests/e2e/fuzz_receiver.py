"""Mutated messages into the real receiver of a live engine.

``python -m tests.e2e.fuzz_receiver STRATEGY FIRST_SEED COUNT BASE OUT``

Every message is answered: refused with an error of ours, and then nothing of it is kept; or it was what had been announced.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import lorasync as ls
from lorasync import base_check, errors, wire
from lorasync.bucket import Bucket
from lorasync.errors import LorasyncError
from lorasync.push import MergeInWorker, connect
from lorasync.push.answers import read_answers
from lorasync.receive.staging import parsed
from lorasync.source import FactorSpec
from lorasync.transport import shared_memory
from tests import fuzz, models
from tests.e2e.engines import greedy, running_llm
from tests.e2e.growth import held_by

KINDS = {"inline": 50, "file": 15, "bucket": 15, "control": 10, "text": 10, "hello": 0.1}
"""How often each is sent; a handshake is dear, as the worker builds its model once more on the meta device."""


class Outside:
    """The engine as somebody else reaches it: tensors are not handed over, though it is in this process."""

    def __init__(self, llm: Any) -> None:
        self.collective_rpc, self.reset_prefix_cache = llm.collective_rpc, llm.reset_prefix_cache


@dataclass
class Receiver:
    """The worker's own engine, and the messages that a push of the policy would bring."""

    llm: Any
    source: Any
    sync: Any
    refused: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)
    foreign: dict[str, int] = field(default_factory=dict)
    slowest: tuple[float, float, int] = (0.0, 0.0, -1)

    def __post_init__(self) -> None:
        core = self.llm.llm_engine.engine_core.engine_core
        self.engine = core.model_executor.driver_worker.worker.weight_transfer_engine
        self.conversation = self.engine.conversation
        self.announced = {m.name: (m.dtype, tuple(m.shape)) for m in self.source.metadata()}
        small = dict(_small(self.source))
        self.good, self.digest = wire.pack(small), wire.digest(small)
        self._messages(small)
        self.texts = self._texts()

    def _messages(self, small: dict[str, torch.Tensor]) -> None:
        session, post = self.conversation.session, self.sync._engines.post
        self.offers = post.offers(hands_over=False)
        self.folder = Path(self.offers["shared_memory"]["folder"])
        self.parcel = post._senders["shared_memory"].put(Bucket(small))
        self.file = (self.folder / self.parcel.fields["file"]).read_bytes()
        self.bucket = wire.BucketMessage(
            session=session, version=2, kind="bucket", transport="inline", digest=self.digest
        ).to_dict()
        self.controls = [
            message.to_dict()
            for message in (
                wire.Collect(session=session),
                wire.Abort(session=session),
                wire.Status(session=session),
                wire.Commit(session=session, version=2, expected=99, digest=self.digest, in_flight=(1,)),
                wire.Rollback(session=session, version=0, expected=99, in_flight=(1,)),
            )
        ]
        self.handshake = wire.Hello(
            session=session,
            strategy=self.sync._strategy.handshake(self.source),
            manifest=wire.manifest_as_text((n, *how) for n, how in self.announced.items()),
            offers=self.offers,
        ).to_dict()

    def _texts(self) -> dict[str, tuple[str, Callable[[str], Any]]]:
        texts: dict[str, Any] = {"manifest": (self.handshake["manifest"], wire.manifest_from_text)}
        if isinstance(self.source, ls.FactorSource):
            samples = base_check.to_json(ls.source.base_samples(self.source))
            texts["spec"] = (self.source.spec().to_json(), FactorSpec.from_json)
            texts["samples"] = (samples, base_check.from_json)
        return texts

    def inline(self, chance: random.Random) -> None:
        bad = fuzz.mutated(self.good, chance)
        self.ask({**self.bucket, "digest": self._digest(lambda: wire.unpack(bad), chance)}, bad)

    def in_file(self, chance: random.Random) -> None:
        """A file with other bytes than were written, or another layout of it."""
        fields = dict(self.parcel.fields)
        if chance.random() < 0.4:
            fields["file"] = "x.bucket"
            (self.folder / "x.bucket").write_bytes(fuzz.mutated_bytes(self.file, chance))
        elif chance.random() < 0.8:
            fields["layout"] = fuzz.changed_text(fields["layout"], chance)
        else:
            fields = fuzz.changed_message(fields, chance)
        message = {**self.bucket, "transport": "shared_memory", "fields": fields}
        self.ask({**message, "digest": self._digest(lambda: self._read(fields), chance)})

    def _read(self, fields: Any) -> Mapping[str, Any]:
        """What a worker would read that looks at no digest."""
        reader = shared_memory.Receiver()
        reader.refuses(self.offers["shared_memory"])
        with fuzz.any_digest():
            return reader.take(fields, b"", "")

    def _digest(self, read: Callable[[], Mapping[str, Any]], chance: random.Random) -> str:
        """A digest that fits, so that the digest is not what refuses; but live weights must not be changed by it."""
        with contextlib.suppress(LorasyncError, AttributeError, TypeError):  # fields of other types, too
            tensors = read()
            as_announced = all(self.announced.get(n) == (t.dtype, tuple(t.shape)) for n, t in tensors.items())
            if chance.random() < 0.8 and not (as_announced and isinstance(self.source, ls.MergedSource)):
                return wire.digest(tensors)
        return self.digest

    def ask(self, message: Any, payload: Any = b"") -> None:
        """Send a message; what is staged in the background is waited for."""
        answer = self.engine(message, payload)
        while answer["pending"]:
            answer = self.engine(self.controls[0])
        if answer["error"] is not None:
            kind = getattr(errors, answer["error"]["type"], None)
            if not (isinstance(kind, type) and issubclass(kind, LorasyncError)):
                raise RuntimeError(f"{answer['error']['type']}: {answer['error']['message']}")
        read_answers([json.loads(json.dumps(answer))], expected=1)

    def control(self, chance: random.Random) -> None:
        """What would be taken as it is asks for something that is not to be had: nothing is to change."""
        message = fuzz.changed_message(chance.choice(self.controls), chance)
        if isinstance(message, dict) and "expected" in message:
            message["expected"] = 99
        self.ask(message)

    def hello(self, chance: random.Random) -> None:
        """A handshake that says something else; one that is taken is followed by the good one."""
        part = chance.choice(("strategy", "manifest", "offers"))
        good = self.handshake[part]
        changes: dict[str, Callable[[Any, random.Random], Any]] = {
            "strategy": _changed_inside, "manifest": fuzz.changed_text, "offers": fuzz.changed_message,
        }  # fmt: skip
        self.ask({**self.handshake, part: changes[part](good, chance)}, wire.PROBE)
        self.ask(self.handshake, wire.PROBE)

    def one(self, seed: int) -> None:
        chance = random.Random(seed)
        kind = chance.choices(tuple(KINDS), tuple(KINDS.values()))[0]
        text, read = self.texts[chance.choice(sorted(self.texts))]
        calls: dict[str, Callable[[], Any]] = {
            "inline": lambda: self.inline(chance),
            "file": lambda: self.in_file(chance),
            "bucket": lambda: self.ask(fuzz.changed_message(self.bucket, chance), self.good),
            "control": lambda: self.control(chance),
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
        staging = getattr(self.conversation._applier, "_staging", None)
        assert staging is None or not staging.received, f"seed {seed}: refused, and kept"
        assert not self.conversation.closed, f"seed {seed}: {self.conversation.closed}"
        assert not self.conversation._digests, f"seed {seed}: refused, and its digest kept"

    def _check_as_announced(self, seed: int) -> None:
        applier = self.conversation._applier
        staging = getattr(applier, "_staging", None)
        found = staging.received if staging is not None else {}
        assert all(self.announced[n] == (t.dtype, tuple(t.shape)) for n, t in found.items()), f"seed {seed}"
        applier.undo()  # or the next message would be refused for its names, which have come already
        self.conversation._digests = []


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
        "digest differs", "not safetensors bytes", "none of it was applied", "session:", "transport:", "can't be read",
        "of its layout", "can't be", "unknown fields", "missing", "expected a file name", "malformed", "dtype", "got",
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
    with running_llm(base, in_process=True, dtype="float32") as llm:
        with connect(source, Outside(llm), apply) as sync:
            sync.send_weights()
            before = greedy(llm)
            receiver = Receiver(llm, source, sync)
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
        held_ended = held_by({"receiver": os.getpid()})
    found = {
        "strategy": strategy, "messages": count, "seconds": round(seconds, 1),
        "slowest": dict(zip(("cpu_seconds", "seconds", "seed"), receiver.slowest, strict=True)),
        "accepted": dict(receiver.accepted), "refused": dict(receiver.refused.most_common()),
        "not_ours": receiver.foreign, "held_before": held, "held_after": held_after,
        "held_ended": held_ended,
    }  # fmt: skip
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], Path(sys.argv[5]))
