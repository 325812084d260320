"""The conversation with one engine: handshake, buckets, commit; and what its workers answer."""

from __future__ import annotations

import contextlib
import secrets
import time
import weakref
from typing import TYPE_CHECKING, Any, Literal

from lorasync.errors import (
    EngineDeadError,
    EngineNotReadyError,
    LorasyncError,
    SyncError,
    SyncTimeoutError,
)
from lorasync.push.answers import (
    NO_ANSWER,
    Replies,
    check_digests,
    check_version,
    failure,
    raise_failed,
    slowest,
)
from lorasync.version import __version__
from lorasync.wire import (
    ADAPTER_IDS,
    PROTOCOL,
    Control,
    ControlOp,
    Mailbox,
    Update,
    digest_of_parts,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from lorasync.push.payload import Payload
    from lorasync.targets.base import Target


class EngineSession:
    """One engine, from the handshake to the goodbye.

    Attributes:
        name: what errors call the engine.
        ranks: how many workers it has; each of them answers every message.
        version: what it serves, as far as the trainer knows.
        gpu: the GPU that all its workers are on; empty if there is no such one.
        capacity: how many adapters its workers hold at a time; 0 unless it serves adapters.
        others: how many adapters of the user's own its workers hold.
        holds_adapter: whether requests can name an adapter of the version.
        dtypes: what its weights, and its LoRA slots, are in.
        notes: what its workers had to say in the handshake.
        unheard: whether it did not say what it serves after a failure.
    """

    def __init__(self, target: Target, *, name: str) -> None:
        self.name = name
        self.target = target
        self.ranks = self.version = self.capacity = self.others = 0
        self.gpu = self._torn = self._shut = ""
        self.holds_adapter = self.unheard = self.multimodal = False
        self.dtypes: dict[str, str] = {}
        self.notes: tuple[str, ...] = ()
        self._token = secrets.token_hex(8)
        self._calls = 0
        self._sent: list[str] = []  # the digests of the buckets of the version that is on its way
        self._mailbox = Mailbox.create()
        self._remove = weakref.finalize(self, self._mailbox.remove)

    @property
    def closed(self) -> str:
        """Why it must not generate; empty if it may."""
        return self._shut or self._torn

    def shut(self, reason: str) -> None:
        """It must not generate until a push completes, whatever its workers say."""
        self._shut = reason

    @property
    def folder(self) -> Mailbox | None:
        """Where payloads for the engine are put; None if it is in this process and needs none."""
        return None if self.target.in_process else self._mailbox

    @property
    def outdated(self) -> bool:
        """Whether another trainer's versions are served: the workers leave word of it."""
        return self._mailbox.outdated

    # ------------------------------------------------------------------------------------ what is asked

    def hello(self, apply: str, manifest: str) -> None:
        """Shake hands: everything is checked against the served model before anything is sent."""
        call = self._next_call()
        try:
            replies = self.control(
                "hello",
                call=call,
                apply=apply,
                manifest=manifest,
                in_flight=self.in_flight(),
                bucket=self._bytes_to_try(),
            )
            if not replies:
                raise EngineNotReadyError(NO_ANSWER)
            self.ranks = max(int(r["world_size"]) for r in replies.values())
            replies = self._replies_to(call, replies)  # how many to wait for is known only now
        except BaseException:
            self._remove()
            raise
        self._learn_engine(replies)
        self._learn(replies)

    def _bytes_to_try(self) -> dict[str, Any]:
        """A client that can't carry bytes shows it here, instead of in the middle of the first push."""
        return _as_dict(Update(op="abort", session=self._token, version=0, call=0, payload=b"\0"))

    def _learn_engine(self, replies: Replies) -> None:
        gpus = {str(r.get("gpu", "")) for r in replies.values()}
        self.gpu = gpus.pop() if len(gpus) == 1 else ""
        self.capacity = min(int(r.get("capacity", 0)) for r in replies.values())
        self.others = max(int(r.get("others", 0)) for r in replies.values())
        self.multimodal = any(r.get("multimodal", False) for r in replies.values())
        self.holds_adapter = all(r.get("held", False) for r in replies.values())
        self.dtypes = next(iter(replies.values())).get("dtypes", {})
        self.notes = tuple(dict.fromkeys(str(note) for r in replies.values() for note in r.get("notes", ())))

    def send(self, payload: Payload, version: int, *, op: Literal["bucket", "base"], beside: bool) -> float:
        """One bucket; the slowest worker's seconds.

        Args:
            payload: the bucket.
            version: the version that it is a part of.
            op: ``"base"`` for the packed base that is sent once.
            beside: stage it beside what is served, while the engine generates; otherwise it goes into live weights.
        """
        call = self._next_call()
        update = Update(
            op=op,
            session=self._token,
            version=version,
            call=call,
            **payload.fields(self),
        )
        background = beside and self.ranks > 0 and not self.target.in_process
        if beside:
            replies = self.control("stage", bucket=_as_dict(update), call=call, background=background)
            replies = self._replies_to(call) if background else replies
        else:
            replies = self._answered(lambda: self.target.update(_as_dict(update)), call=call)
        check_digests(replies, update.digest, "staged")
        if op == "bucket":
            self._sent.append(update.digest)
        return slowest(replies)

    def start(self) -> None:
        try:
            self._answered(self.target.start, call=0)
        except (SyncTimeoutError, EngineDeadError) as error:
            self.find_out(self.version + 1, error)
            raise
        except SyncError as error:
            # A trainer that died has left its update open.
            self.abort(self.version + 1, error, beside=False)
            self._answered(self.target.start, call=0)

    def finish(self) -> None:
        self._answered(self.target.finish, call=0)

    def commit(self, version: int, keep: Collection[int]) -> float:
        """Serve what was sent, if the engine still serves what the trainer believes; the slowest worker's seconds.

        Args:
            version: what it is from now on.
            keep: the versions of an adapter that stay beside it.

        Raises:
            StaleVersionError: if somebody else has pushed meanwhile.
        """
        digest, self._sent = digest_of_parts(self._sent), []
        try:
            replies = self.control(
                "commit",
                version=version,
                expected=self.version,
                digest=digest,
                in_flight=tuple(sorted(keep)),
            )
            check_digests(replies, digest, "applied")
        except SyncTimeoutError:
            replies = self._serving(version)  # the answer may be all that was lost
            if not replies:
                raise
        check_version(replies, version)
        self.version, self._torn, self._shut = version, "", ""
        return slowest(replies)

    def rollback(self, version: int, keep: Collection[int]) -> None:
        """Serve the version before; asked for the one after it, go forward again."""
        replies = self.control(
            "rollback", version=version, expected=self.version, in_flight=tuple(sorted(keep))
        )
        check_version(replies, version)
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

    def abort(self, version: int, error: BaseException, *, beside: bool) -> None:
        """Tell the workers to give the update up, and find out what they serve; never raises."""
        self._sent = []
        call = self._next_call()
        update = _as_dict(Update(op="abort", session=self._token, version=version, call=call))
        with contextlib.suppress(Exception):  # not by vLLM's update, which may have ended
            self.control("stage", bucket=update, call=call)
        if not beside:  # the workers answer, they don't fail: vLLM's update is still open
            with contextlib.suppress(Exception):
                self.target.finish()
        self._mailbox.collect(call)
        self.find_out(version, error)

    def undo_commit(self, version: int, error: BaseException) -> None:
        """A commit has failed, or never arrived: what was sent for it goes, and what is served is asked; never raises."""
        self.abort(version, error, beside=True)

    def find_out(self, version: int, error: BaseException) -> None:
        """After a failure: ask what the engine serves now; one that does not say is closed."""
        try:
            self._learn(self.control("status"))
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
        self._learn(self.control("status"))
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
        if not all(reply["ours"] for reply in self.control("status").values()):
            raise SyncError(
                "session: got another trainer's, expected this one's. The engine was restarted or another trainer took "
                "it over: connect() again."
            )

    def digests(self) -> dict[int, dict[str, Any]]:
        return self.control("digest")

    def goodbye(self, keep: Collection[int] = ()) -> None:
        """The engine keeps serving; the folder in shared memory goes."""
        if not self._remove.alive:
            return
        try:
            self.control("goodbye", in_flight=tuple(sorted({*keep, *self.in_flight()})))
        finally:
            self._remove()

    # -------------------------------------------------------------------------------- adapters in flight

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

    # ---------------------------------------------------------------------------------- calls and answers

    def control(self, op: ControlOp, *, call: int = 0, **fields: Any) -> Replies:
        call = call or self._next_call()
        control = Control(
            op=op,
            protocol=PROTOCOL,
            lorasync=__version__,
            session=self._token,
            call=call,
            mailbox=str(self._mailbox.folder),
            **fields,
        )
        return self._answered(
            lambda: self.target.init(dict(vars(control))), call=call, at_once=not control.background
        )

    @property
    def _limit(self) -> float:
        return self.target.patience.limit

    def _answered(self, request: Callable[[], None], *, call: int, at_once: bool = True) -> Replies:
        """Make a call; raise the workers' own error if one of them reports one."""
        began = time.monotonic()
        try:
            request()
        except LorasyncError:
            self._mailbox.collect(call)
            raise
        except Exception as error:
            replies = self._mailbox.collect(call)
            raise_failed(replies, error)
            if not replies or self.ranks == 1:
                raise failure(error) from error
            # What failed was an earlier call: vLLM had given that up before it read the answer of this rank.
            return self._replies_to(call, replies, began=began)
        if not call or not at_once:
            return {}
        return self._replies_to(call, began=began)

    def _replies_to(self, call: int, known: Replies | None = None, *, began: float | None = None) -> Replies:
        """Wait for the answers of all ranks, which may come after vLLM's own call has returned.

        A rank that stages beside the engine's work answers when it is done. And vLLM gives a call up at the first rank
        that fails and leaves the other answers unread, so that all its later calls return before those ranks are done.
        """
        patience = self.target.patience
        asked = checked = time.monotonic()
        deadline = (asked if began is None else began) + patience.seconds(f"{self.name}: its workers")
        replies: Replies = dict(known or {})
        while True:
            replies |= self._mailbox.collect(call)
            raise_failed(replies)
            if len(replies) >= self.ranks:
                return replies
            now = time.monotonic()
            if now >= deadline:
                silent = sorted(set(range(self.ranks)) - replies.keys())
                patience.give_up()
                raise SyncTimeoutError(
                    f"worker ranks {silent} of {self.ranks} did not answer within {self._limit:g} s. Are they busy, "
                    "hung or dead? connect(..., timeout=…) sets the limit."
                )
            if now - checked > 1.0:
                self.target.check_alive()
                checked = now
            time.sleep(min(max((now - asked) / 8, 0.0003), 0.02))  # it is noticed an eighth too late at most

    def _serving(self, version: int) -> Replies:
        """The workers' answers, if all of them serve this version; none otherwise."""
        with contextlib.suppress(Exception):
            replies = self.control("status")
            if all(r["version"] == version and not r["closed"] for r in replies.values()):
                return replies
        return {}

    def _learn(self, replies: Replies) -> None:
        self.version = max((int(r["version"]) for r in replies.values()), default=self.version)
        self._torn = next((r["closed"] for r in replies.values() if r["closed"]), "")
        served = sorted({int(r["version"]) for r in replies.values()})
        if len(served) > 1 and not self._torn:
            self._torn = f"Its workers serve different versions: {served}. Call send_weights() again."

    def _next_call(self) -> int:
        self._calls += 1
        return self._calls


def _as_dict(update: Update) -> dict[str, Any]:
    return {k: v for k, v in vars(update).items() if v is not None}
