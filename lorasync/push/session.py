"""The conversation with one engine: handshake, buckets, commit; and what its workers answer."""

from __future__ import annotations

import contextlib
import secrets
import time
from typing import TYPE_CHECKING, Any, TypedDict

from lorasync.errors import (
    EngineNotReadyError,
    LorasyncError,
    StaleVersionError,
    SyncError,
    SyncTimeoutError,
)
from lorasync.push.answers import (
    Answers,
    any_has_agreed,
    check_digests,
    check_version,
    failure,
    read_answers,
    slowest,
)
from lorasync.push.takeover import Session, join, replace_others
from lorasync.transport.post import ways_taken
from lorasync.wire import (
    ADAPTER_IDS,
    PROBE,
    Abort,
    BucketMessage,
    Collect,
    Commit,
    Digest,
    Goodbye,
    Hello,
    Message,
    Rollback,
    Status,
    digest_of_parts,
)

if TYPE_CHECKING:
    from collections.abc import Collection

    from lorasync.targets.base import Target
    from lorasync.transport.base import Parcel
    from lorasync.transport.post import Post
    from lorasync.wire.messages import Kind


class _Numbered(TypedDict):
    session: str
    call: int


class EngineSession:
    """One engine, from the handshake to the goodbye.

    Attributes:
        name: what errors call the engine.
        target: how it is reached.
        ranks: how many workers answer every message.
        worker_ranks: which of the engine's workers these are.
        workers: how many workers the whole engine has: more, if others belong to other trainer ranks.
        took_over: digests of the sessions that its workers talked to before this one.
        version: what it serves, as far as the trainer knows.
        ways: the transports that every worker takes, the cheapest first.
        gpu: the GPU that all its workers are on; empty if there is no such one.
        capacity: how many adapters its workers hold at a time; 0 unless it serves adapters.
        others: how many adapters of the user's own its workers hold.
        holds_adapter: whether requests can name an adapter of the version.
        multimodal: whether it keeps outputs of encoders.
        dtypes: what its weights, and its LoRA slots, are in.
        notes: what its workers had to say in the handshake.
        replaced: whether another connection's versions are known to be served.
        unheard: whether it did not say what it serves after a failure.
        token: names this conversation in every message; who knows it may push.
    """

    def __init__(self, target: Target, *, name: str) -> None:
        self.name = name
        self.target = target
        self.ranks = self.workers = self.version = self.capacity = self.others = 0
        self.worker_ranks: tuple[int, ...] = ()
        self.took_over: set[str] = set()
        self.ways: tuple[str, ...] = ()
        self.gpu = self._torn = self._shut = ""
        self.holds_adapter = self.unheard = self.multimodal = self.replaced = False
        self.dtypes: dict[str, str] = {}
        self.notes: tuple[str, ...] = ()
        self.token = secrets.token_hex(16)
        self._calls = 0
        self._sent: list[str] = []  # the digests of the buckets of the version that is on its way
        self._greeted = False

    @property
    def closed(self) -> str:
        """Why it must not generate; empty if it may."""
        return self._shut or self._torn

    def shut(self, reason: str) -> None:
        """It must not generate until a push completes, whatever its workers say."""
        self._shut = reason

    def hello(self, strategy: str, manifest: str, post: Post) -> None:
        """Shake hands: everything is checked against the served model before anything is sent."""
        hello = Hello(
            **self._next(),
            strategy=strategy,
            manifest=manifest,
            offers=post.offers(hands_over=self.target.in_process),
            in_flight=self.in_flight(),
            limit=self._limit,
        )
        try:
            found = self._told(hello, PROBE)
        except SyncTimeoutError:
            self._greeted = True  # it may agree later, and is to be told goodbye
            raise
        self._greeted = any_has_agreed(found)  # a worker may, although another one refuses
        if self._greeted and self.target.engine is not None:
            join(self.target.engine, self)
        try:
            answers = read_answers(found, expected=self.target.workers)
        except LorasyncError:
            if self._greeted:
                self._replace_others()  # the workers that have agreed hold nothing of an earlier connection any more
            raise
        self._learn_engine(answers)
        self._learn(answers)
        if not self.capacity:
            self._replace_others()  # an adapter's versions of an earlier connection are gone

    def _learn_engine(self, answers: Answers) -> None:
        told = [a.introduction for a in answers.values() if a.introduction is not None]
        if len(told) != len(answers):
            raise EngineNotReadyError(
                "handshake: a worker has not introduced itself. Do both sides run the same lorasync?"
            )
        self.ranks, self.worker_ranks = len(answers), tuple(sorted(answers))
        self.workers = max(answer.workers for answer in answers.values())
        self.ways = ways_taken([worker.refused for worker in told])
        if not self.ways:
            why = "; ".join(f"{way}: {reason}" for way, reason in told[0].refused.items() if reason)
            text = f"transport: the workers take none of those that this trainer offers ({why})."
            raise EngineNotReadyError(text)
        self.took_over = {worker.took_over for worker in told if worker.took_over}
        gpus = {worker.gpu for worker in told}
        self.gpu = gpus.pop() if len(gpus) == 1 else ""
        self.capacity = min(worker.capacity for worker in told)
        self.others = max(worker.others for worker in told)
        self.multimodal = any(worker.multimodal for worker in told)
        self.holds_adapter = all(worker.held for worker in told)
        self.dtypes = told[0].dtypes
        self.notes = tuple(dict.fromkeys(note for worker in told for note in worker.notes))

    def send(self, parcel: Parcel, version: int, *, kind: Kind, beside: bool) -> float:
        """Send one bucket; return the slowest worker's seconds.

        Args:
            parcel: the bucket, ready to travel.
            version: the version that it is a part of.
            kind: ``"base"`` for the packed base that is sent once.
            beside: stage it beside what is served, while the engine generates; otherwise it goes into live weights.
        """
        message = BucketMessage(
            **self._next(),
            version=version,
            kind=kind,
            transport=parcel.way,
            fields=parcel.fields,
            digest=parcel.digest,
            background=beside and self.target.generates_meanwhile,
        )
        answers = self._asked(message, parcel.payload)
        if any(answer.pending for answer in answers.values()):
            answers = self._collected()
        check_digests(answers, parcel.digest, "staged")
        if kind == "bucket":
            self._sent.append(parcel.digest)
        return slowest(answers)

    def _collected(self) -> Answers:
        """Wait until every worker has staged the bucket in the background.

        Raises:
            SyncTimeoutError: naming the worker ranks that have not.
        """
        began = time.monotonic()
        limit = self.target.patience.seconds(f"{self.name}: its workers")
        while True:
            now = time.monotonic()
            answers = self._asked(Collect(**self._next()))
            late = [rank for rank, answer in answers.items() if answer.pending]
            if not late:
                return answers
            if now - began >= limit:
                self.target.patience.give_up()
                raise SyncTimeoutError(
                    f"worker ranks {late} of {self.ranks} did not stage a bucket within {limit:g} s. Are they busy or hung? "
                    "connect(..., timeout=…) sets the limit."
                )
            time.sleep(min(max((now - began) / 8, 0.0003), 0.02))  # noticed an eighth too late at most

    def commit(self, version: int, keep: Collection[int]) -> float:
        """Serve what was sent, if the engine still serves what the trainer believes; the slowest worker's seconds.

        Args:
            version: what it is from now on.
            keep: the versions of an adapter that stay beside it.

        Raises:
            StaleVersionError: if somebody else has pushed meanwhile.
        """
        digest, self._sent = digest_of_parts(self._sent), []
        others = self._replace_others()
        stay = tuple(sorted(keep))
        commit = Commit(**self._next(), version=version, expected=self.version, digest=digest, in_flight=stay)
        try:
            answers = self._asked(commit)
            check_digests(answers, digest, "applied")
        except StaleVersionError:  # nothing was touched: theirs are still there
            for other in others:
                other.replaced = False
            raise
        except SyncTimeoutError:
            answers = self._serving(version)  # the answer may be all that was lost
            if not answers:
                raise
        check_version(answers, version)
        self.version, self._torn, self._shut = version, "", ""
        return slowest(answers)

    def rollback(self, version: int, keep: Collection[int]) -> None:
        """Serve the version before; asked for the one after it, go forward again."""
        stay = tuple(sorted(keep))
        back = Rollback(**self._next(), version=version, expected=self.version, in_flight=stay)
        answers = self._asked(back)
        check_version(answers, version)
        self.version = version

    def take_on(self, version: int) -> None:
        """What the engine keeps of other weights goes, and its outputs say which version they are of.

        Raises:
            SyncError: if that fails; the engine is closed, as it would answer from both.
        """
        try:
            self.target.reset_caches()
            self.target.name_version(str(version))
        except BaseException as error:
            self.shut(
                f"Version {version} is in the engine, but so is what it has cached of the version before ({error}). "
                "Call send_weights() again; a push that completes opens the engine."
            )
            if isinstance(error, LorasyncError) or not isinstance(error, Exception):
                raise
            raise failure(error) from error

    def abort(self, version: int, error: BaseException) -> None:
        """Tell the workers to give the update up, and find out what they serve; never raises."""
        self._sent = []
        with contextlib.suppress(Exception):
            self._asked(Abort(**self._next()))
        self.find_out(version, error)

    def find_out(self, version: int, error: BaseException) -> None:
        """After a failure: ask what the engine serves now; one that does not say is closed."""
        try:
            self._learn(self._asked(self._status()))
        except Exception:
            self.unheard = True
            self._torn = (
                f"The push of version {version} failed ({type(error).__name__}) and the engine does not say what it "
                "serves. Call send_weights() again; if that fails too, restart the engine and connect() again."
            )

    def catch_up(self) -> None:
        """What an engine was told that did not answer in time, it may have done since."""
        if not self.unheard:
            return
        believed = self.version
        self._learn(self._asked(self._status()))
        self.unheard = False
        if self.version != believed:
            self.shut(
                f"The engine has taken version {self.version} after it had been waited for. Call send_weights() again; a "
                "push that completes opens the engine."
            )

    def check_ours(self) -> None:
        """Ask, before anything changes, whether the engine is alive and still takes this trainer's pushes.

        Raises:
            SyncError: if another trainer has shaken hands with it since.
        """
        if not all(answer.ours for answer in self._asked(self._status()).values()):
            raise SyncError(
                "session: got another trainer's, expected this one's. The engine was restarted or another trainer took "
                "it over: connect() again."
            )

    @property
    def outdated(self) -> bool:
        """Whether another trainer's versions are served; a worker that only an object of the user's reaches is asked."""
        if not self.replaced and self.target.engine is None:
            self.replaced = any(answer.replaced for answer in self._asked(self._status()).values())
        return self.replaced

    def digests(self) -> dict[int, str]:
        """What every worker serves: worker rank → digest over its live parameters."""
        answers = self._asked(Digest(**self._next()))
        return {rank: answer.digest for rank, answer in answers.items()}

    def goodbye(self, keep: Collection[int] = ()) -> None:
        """End the conversation; the engine keeps serving."""
        if not self._greeted:
            return
        self._greeted = False
        if self.capacity:
            self._replace_others()
        in_flight = tuple(sorted({*keep, *self.in_flight()}))
        self._asked(Goodbye(**self._next(), in_flight=in_flight))

    def in_flight(self) -> tuple[int, ...]:
        """The versions of our adapter that unfinished requests name."""
        return tuple(sorted(i - ADAPTER_IDS for i in self.target.adapters_in_flight() if i > ADAPTER_IDS))

    def wait_for_room(self) -> None:
        """Wait until the workers can hold one more adapter without dropping one that a request still names.

        Raises:
            SyncTimeoutError: naming the versions that hold it up.
        """
        if not self.capacity:
            return
        deadline = time.monotonic() + (self._limit if self.target.generates_meanwhile else 0.0)
        while True:
            held = {*self.in_flight(), *self.needed_beside()}
            if len(held) < self.capacity:
                return
            if time.monotonic() >= deadline:
                raise SyncTimeoutError(
                    f"max_cpu_loras: got {self.capacity}, expected room for one more adapter: requests in flight still "
                    f"name versions {sorted(held)}. Start the engine with max_cpu_loras={len(held) + 2} (host memory "
                    "only), or let requests finish before the next push."
                )
            time.sleep(0.01)

    def needed_beside(self) -> set[int]:
        """The version that new requests name until the commit, where some may come."""
        return {self.version} if self.target.generates_meanwhile and self.version else set()

    @property
    def _limit(self) -> float:
        return self.target.patience.limit

    def _asked(self, message: Message, payload: object = b"") -> Answers:
        """Send a message; return the answers of all workers, or raise what one of them reports."""
        return read_answers(self._told(message, payload), expected=self.target.workers)

    def _told(self, message: Message, payload: object) -> list[Any]:
        """Send a message; return what came back."""
        try:
            return self.target.call(message.to_dict(), payload)
        except LorasyncError:
            raise
        except Exception as error:
            raise failure(error) from error

    def _status(self) -> Status:
        return Status(**self._next())

    def _serving(self, version: int) -> Answers:
        """The workers' answers, if all of them serve this version; none otherwise."""
        with contextlib.suppress(Exception):
            answers = self._asked(self._status())
            if all(answer.version == version and not answer.closed for answer in answers.values()):
                return answers
        return {}

    def _learn(self, answers: Answers) -> None:
        self.version = max((answer.version for answer in answers.values()), default=self.version)
        self._torn = next((answer.closed for answer in answers.values() if answer.closed), "")
        served = sorted({answer.version for answer in answers.values()})
        if len(served) > 1 and not self._torn:
            self._torn = f"Its workers serve different versions: {served}. Call send_weights() again."

    def _replace_others(self) -> list[Session]:
        return [] if self.target.engine is None else replace_others(self.target.engine, self)

    def _next(self) -> _Numbered:
        """What every message says: whose it is, and which one; a worker refuses one that comes late, or twice."""
        self._calls += 1
        return {"session": self.token, "call": self._calls}
