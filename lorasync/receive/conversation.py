"""A worker's side of the conversation with a trainer: handshake, buckets, commit, rollback; what each leaves behind."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as StillStaging
from typing import TYPE_CHECKING, Any, cast

from lorasync.errors import (
    EngineClosedError,
    EngineNotReadyError,
    LorasyncError,
    PayloadError,
    StaleVersionError,
    SyncError,
    SyncTimeoutError,
)
from lorasync.receive.appliers import Applier, applier_for
from lorasync.receive.device import beside_the_engine, wait_for, wait_for_stream
from lorasync.receive.served import ServedModel, notes_of
from lorasync.transport import in_process
from lorasync.transport.cuda_ipc import gpu_of
from lorasync.transport.receivers import Receivers
from lorasync.vllm_seam.layout import check_layout
from lorasync.wire import (
    PROBE,
    Abort,
    BucketMessage,
    Collect,
    Commit,
    Digest,
    Goodbye,
    Hello,
    Introduction,
    Message,
    Rollback,
    Status,
    digest_of_parts,
    digest_of_text,
    dtype_name,
)
from lorasync.wire import digest as digest_of

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from lorasync.bucket import Bucket, Item
    from lorasync.receive.adapter import AdapterApplier

_REMEMBERED = 64
"""How many earlier sessions are remembered as replaced."""


class Conversation:
    """What one worker and the trainers say to each other, one message at a time.

    Attributes:
        served: the model of the worker.
        session: the connection whose pushes are taken; empty before the first handshake.
        version: what is served.
        closed: why the engine must not generate; empty if it may.
        replaced: earlier sessions whose versions are gone.
    """

    def __init__(self, served: ServedModel) -> None:
        self.served = served
        self.session = ""
        self.version = 0
        self.closed = ""
        self.replaced: dict[str, None] = {}
        self._greeted: list[str] = []  # sessions that have shaken hands, and may have versions here
        self._applier: Applier | None = None
        self._before = -1  # the version that a rollback leads to
        self._limit = 600.0
        self._last_call = 0  # of the session's messages that change something
        self._receivers = Receivers(served.device)
        self._handed_over = False  # the trainer is in this process, and waits for the device itself
        self._beside = ThreadPoolExecutor(1, thread_name_prefix="lorasync-stage")
        self._staging: Future[str] | None = None
        self._digests: list[str] = []  # of the buckets that have come of the next version

    def answer(self, message: Message, payload: Any) -> Introduction | str | None:
        """Do what a message says.

        Returns:
            An introduction for a handshake, else a digest (empty for messages without one); None while a bucket is staged.

        Raises:
            LorasyncError: if it is refused, or failed; what it had touched is undone, or `closed` says why it can't be.
        """
        if isinstance(message, Collect):
            return self._collected(message)
        if isinstance(message, Status):
            return ""
        self._check_order(message)
        self._wait_for_staging()
        operations: dict[type[Message], Callable[[Any], Introduction | str | None]] = {
            Hello: lambda hello: self._hello(hello, payload),
            BucketMessage: lambda bucket: self._bucket(bucket, payload),
            Abort: self._give_up,
            Commit: self._commit,
            Rollback: self._rollback,
            Digest: lambda _: self._digest(),
            Goodbye: self._goodbye,
        }
        return operations[type(message)](message)

    def _check_order(self, message: Message) -> None:
        """Refuse a message that changes something and comes late, or a second time: the trainer has gone on without it.

        Raises:
            SyncError: if a later one of the same session was here before.
        """
        if isinstance(message, Digest) or not message.call:
            return
        if message.session != self.session:  # a handshake counts once it is accepted, all else is refused
            return
        if message.call <= self._last_call:
            raise SyncError(
                f"{message.op}: got message {message.call} of its connection after message {self._last_call}: late, or sent "
                "twice. Nothing was touched."
            )
        self._last_call = message.call

    def shutdown(self) -> None:
        """Forget the trainer; the served weights stay as they are."""
        self._wait_for_staging()
        if self._applier is not None:
            self._applier.close(())
        self._applier = None
        self._receivers.close()
        self._beside.shutdown(wait=False)

    # ------------------------------------------------------------------------------------------ the handshake

    def _hello(self, hello: Hello, payload: Any) -> Introduction:
        """Check everything against the served model; a handshake that is refused leaves all as it was."""
        if not isinstance(payload, bytes | bytearray | memoryview) or bytes(payload) != PROBE:
            got = (
                "other bytes"
                if isinstance(payload, bytes | bytearray | memoryview)
                else type(payload).__name__
            )
            raise EngineNotReadyError(
                f"handshake: got {got} beside the message, expected the bytes that the trainer has sent: what carries "
                "collective_rpc must pass bytes on as they are. Nothing was touched."
            )
        config = self.served.config
        check_layout(config.parallel_config)
        receivers = Receivers(self.served.device)
        refused = receivers.agree(hello.offers)
        applier, before = self._applier_for(hello), self._applier
        if before is not None:
            self._abort(before)  # of a trainer that died, or was not told that another one took over
        took_over = digest_of_text(self.session) if self.session else ""
        earlier = self.session, self._greeted
        self.session, self._limit = hello.session, hello.limit
        self._greeted = [*(each for each in self._greeted if each != hello.session), hello.session]
        try:
            if before is not None:
                self._take_over_from(before, applier, hello)
        except BaseException:
            self.session, self._greeted = earlier
            raise
        self._receivers.close()
        self._receivers, self._applier = receivers, applier
        self._last_call = hello.call
        described = applier.describe()
        return Introduction(
            refused=refused,
            took_over=took_over,
            gpu=gpu_of(self.served.device),
            dtypes=self._dtypes(),
            multimodal=bool(config.model_config.is_multimodal_model),
            capacity=described.capacity,
            held=described.held,
            others=described.others,
            notes=(*notes_of(config), *described.notes),
        )

    def _take_over_from(self, before: Applier, applier: Applier, hello: Hello) -> None:
        """Versions of an adapter stay until the next push, if the new trainer serves adapters too; else they go now."""
        if not before.changes_weights and not applier.changes_weights:
            cast("AdapterApplier", before).hand_over()
            return
        if not before.changes_weights:
            self._replace_others()
        before.close(hello.in_flight)

    def _dtypes(self) -> dict[str, str]:
        """What weights and LoRA slots are served in."""
        lora, weights = self.served.lora, dtype_name(self.served.dtype)
        return {"weights": weights, "slots": weights if lora is None else dtype_name(lora.lora_dtype)}

    def _applier_for(self, hello: Hello) -> Applier:
        try:
            return applier_for(hello.strategy, hello.manifest, self.served, self.version)
        except LorasyncError:
            raise
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise PayloadError(
                f"handshake: the worker can't make sense of it ({type(error).__name__}: {error}). Nothing was touched."
            ) from error

    # ---------------------------------------------------------------------------------------------- buckets

    def _bucket(self, message: BucketMessage, payload: Any) -> str | None:
        """Take a bucket now, or in the background."""
        applier = self._applier_of(message.session)
        if not message.background:
            return self._taken(applier, message, payload)
        self._staging = self._beside.submit(self._staged_beside, applier, message, payload)
        return None

    def _taken(self, applier: Applier, message: BucketMessage, payload: Any) -> str:
        """Check a bucket, stage or load it, and return the digest of what has come."""
        try:
            self._handed_over = message.transport == in_process.NAME
            bucket = self._receivers.take(message.transport, message.fields, payload, message.digest)
            if message.kind == "base":
                applier.receive_base(_without_merges(bucket))
            elif applier.takes_merges:
                applier.receive(bucket)
            else:
                applier.receive(_without_merges(bucket))
            if not self._handed_over:  # once it has its answer the trainer writes there again
                wait_for_stream(self.served.device)
            digest = "" if self._handed_over else message.digest
            if message.kind == "bucket":
                self._digests.append(digest)
            return digest
        except BaseException:
            self._abort(applier)
            raise

    def _staged_beside(self, applier: Applier, message: BucketMessage, payload: Any) -> str:
        with beside_the_engine(self.served.device):
            return self._taken(applier, message, payload)

    def _collected(self, message: Collect) -> str | None:
        """The outcome of the bucket that was staged in the background; None while it still is."""
        self._applier_of(message.session)
        if self._staging is None:
            raise SyncError("collect: no bucket is being staged, expected one. Was the update given up?")
        return self._staging.result() if self._staging.done() else None

    def _wait_for_staging(self) -> None:
        """One thing at a time; what came of the staging was told, or is asked no more.

        Raises:
            SyncTimeoutError: if it does not end.
        """
        if self._staging is None:
            return
        try:
            self._staging.exception(timeout=self._limit)
        except StillStaging as error:
            raise SyncTimeoutError(
                f"staging: a bucket has been staged for more than {self._limit:g} s. Nothing was touched."
            ) from error
        self._staging = None

    def _give_up(self, message: Abort) -> str:
        if message.session == self.session and self._applier is not None:
            self._abort(self._applier)
        return ""

    def _abort(self, applier: Applier) -> None:
        self._digests = []
        if applier.undo():
            self.closed = (
                f"The push of version {self.version + 1} died half-way: part of the engine's weights is new, part is "
                f"of version {self.version}. Call send_weights() again; a push that completes opens the engine."
            )

    # ---------------------------------------------------------------------------------------------- versions

    def _commit(self, message: Commit) -> str:
        applier = self._applier_of(message.session)
        digest = digest_of_parts(self._digests)
        try:
            self._check_commit(applier, message, digest)
            self._replace_others()
            applier.commit(message.version, message.in_flight)
            if not self._handed_over:
                wait_for(self.served.device)  # what fails on a GPU fails here, not in the first request
        except BaseException:
            self._abort(applier)
            raise
        self._before, self.version = self.version, message.version
        if applier.changes_weights:
            self.served.unseen.clear()
        self.closed = ""
        self._digests = []
        return digest

    def _check_commit(self, applier: Applier, message: Commit, digest: str) -> None:
        if message.expected != self.version:
            raise StaleVersionError(
                f"version: the engine serves {self.version}, expected {message.expected}: somebody else has pushed "
                f"meanwhile. Version {message.version} was not applied. connect() again to go on from what is served."
            )
        if self.closed and not applier.changes_weights:
            raise EngineClosedError(self.closed)
        if message.digest != digest:
            raise PayloadError(
                f"version {message.version}: its buckets have digest {digest or 'none'} here, expected "
                f"{message.digest or 'none'}: one is missing, or came twice. It is not served."
            )

    def _rollback(self, message: Rollback) -> str:
        applier = self._applier_of(message.session)
        if (message.expected, message.version) != (self.version, self._before):
            raise SyncError(
                f"rollback: the engine serves {self.version} and can go to {self._before}, expected {message.expected} and "
                f"{message.version}. Nothing was touched."
            )
        try:
            applier.rollback(message.in_flight)
        except BaseException:
            self._abort(applier)
            raise
        wait_for(self.served.device)
        self._before, self.version = self.version, message.version
        return ""

    def _goodbye(self, message: Goodbye) -> str:
        if message.session == self.session and self._applier is not None:
            if not self._applier.changes_weights:
                self._replace_others()
            self._applier.close(message.in_flight)
            self._applier = None
            self._receivers.close()
        return ""

    def _digest(self) -> str:
        """Over the live parameters, in the names and the order that vLLM gives them.

        Raises:
            SyncError: if one is empty because vLLM keeps it packed elsewhere.
        """
        live = dict(self.served.model.named_parameters())
        packed = sorted(name for name, param in live.items() if param.numel() == 0)
        if packed:
            raise SyncError(
                f"digest: {len(packed)} weights can't be read back, vLLM keeps them packed for this CPU: {packed[0]}"
            )
        return digest_of({name: param.detach() for name, param in live.items()})

    # ----------------------------------------------------------------------------------------------- sessions

    def _applier_of(self, session: str) -> Applier:
        if self._applier is None or session != self.session:
            raise SyncError(
                f"session: got {_shown(session)}, expected {_shown(self.session) if self.session else 'a handshake first'}. "
                "The engine was restarted or another trainer took it over: connect() again."
            )
        return self._applier

    def _replace_others(self) -> None:
        """Before what earlier trainers have pushed goes: vLLM ends the whole engine when a request names a lost adapter."""
        others = [session for session in self._greeted if session != self.session]
        self.replaced |= dict.fromkeys(others)
        for session in list(self.replaced)[:-_REMEMBERED]:
            del self.replaced[session]
        self._greeted = [session for session in self._greeted if session == self.session]


def _without_merges(bucket: Bucket[Item]) -> Bucket[torch.Tensor]:
    if bucket.has_merges:
        raise PayloadError(
            "bucket: got merges, expected factors: these are for a merged push. Nothing was touched."
        )
    return cast("Bucket[torch.Tensor]", bucket)


def _shown(session: str) -> str:
    """Enough of a session's name to tell it from others: who knows all of it may push."""
    return session[:8] or "none"
