"""`connect` a source to an engine, then `send_weights` as often as the policy changes."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import threading
import time
import warnings
import weakref
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from lorasync import __version__
from lorasync.errors import EngineClosedError, LorasyncError, PushInProgressError, SyncError
from lorasync.push.apply import Apply, ServeAdapter, apply_message, packed_base, strategy_of
from lorasync.push.report import SyncReport
from lorasync.push.target import AsyncLLMTarget, Pause, Target, target_of
from lorasync.source import MergedSource
from lorasync.wire import (
    ADAPTER_IDS,
    INLINE_LIMIT,
    PROTOCOL,
    Control,
    Mailbox,
    Update,
    digest,
    digest_of_text,
    error_from_dict,
    manifest_as_text,
    nbytes,
    pack,
    write_safetensors,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_VANISHING = 0.2  # about a tenth of NF4's weights are exactly zero, and keep any update

Replies = dict[int, dict[str, Any]]
ControlOp = Literal["hello", "stage", "commit", "rollback", "status", "goodbye"]


class Meta(Protocol):
    """One tensor that a source will yield: `ParamMeta` of lorasync, or vLLM's own."""

    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


class Source(Protocol):
    """What travels: a `MergedSource`, or anything else whose metadata equals its iteration."""

    def metadata(self) -> Sequence[Meta]: ...

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]: ...


def connect(
    source: Source,
    target: object,
    apply: Apply | None = None,
    *,
    pause: Pause = "keep",
    timeout: float = 600.0,
    bucket_bytes: int = 256 << 20,
    measure_survival: bool = False,
) -> Sync:
    """Shake hands with a live engine and check that everything fits, before the first weight is sent.

    Every trainer rank calls it; rank 0 talks to the engine.

    Args:
        source: what travels; a `MergedSource`, or a `FactorSource` with an ``apply``.
        target: a `vllm.LLM` or an `AsyncLLM` started with ``weight_transfer_config={"backend": "lorasync"}``, or any
            object with vLLM's four weight-sync calls. With an `AsyncLLM` call from another thread than its loop's.
        apply: what the workers do with factors: `ServeAdapter` or `MergeInWorker`.
        pause: what happens to requests in flight on an `AsyncLLM` while weights change: ``"keep"`` them and go on
            after it with the new version, ``"wait"`` for them first, or ``"abort"`` them. Adapters need no pause.
        timeout: the longest wait for any answer, in seconds.
        bucket_bytes: how many bytes of merged weights exist at a time, at most (or one tensor, if larger).
        measure_survival: after each push, measure how much of the update is left after rounding to the served dtype, and
            warn if next to nothing is. Takes about as long as the merge; `MergedSource` only.

    Raises:
        EngineNotReadyError: if the engine was started without the backend; the message shows the flag.
        MismatchError: with every name, shape and dtype that does not fit the served model.
        SyncTimeoutError: if the engine does not answer.

    Example:
        >>> sync = connect(MergedSource(model), llm)  # doctest: +SKIP
        >>> report = sync.send_weights()  # doctest: +SKIP
        >>> llm.generate(prompts, **sync.request())  # doctest: +SKIP
    """
    return Sync(
        source,
        target,
        apply,
        pause=pause,
        timeout=timeout,
        bucket_bytes=bucket_bytes,
        measure_survival=measure_survival,
    )


class Sync:
    """A connection between one source and one engine; made by `connect`."""

    def __init__(
        self,
        source: Source,
        target: object,
        apply: Apply | None,
        *,
        pause: Pause,
        timeout: float,
        bucket_bytes: int,
        measure_survival: bool,
    ) -> None:
        self.source = source
        self.apply = apply
        self._newest = 0  # counts up, also after a rollback
        self.version = 0
        self.closed = ""
        self._bucket_bytes = bucket_bytes
        self._measure_survival = measure_survival and isinstance(source, MergedSource)
        self._is_sender = _rank() == 0
        self._busy = threading.Lock()
        self._session = secrets.token_hex(8)
        self._mailbox: Mailbox | None = None
        self._calls = 0
        self._ranks = 0
        with _agreed_by_all_ranks():
            manifest, message = source.metadata(), apply_message(apply, source)
            if self._is_sender:
                self._target: Target = target_of(target, timeout=timeout, pause=pause)
                self._mailbox = Mailbox.create()
                weakref.finalize(self, self._mailbox.remove)
                self._shake_hands(message, manifest_as_text((m.name, m.dtype, m.shape) for m in manifest))
        self.version = self._newest = _largest_of_all_ranks(
            self.version
        )  # only the sender has asked the engine
        with _agreed_by_all_ranks():
            self._send_base()

    def send_weights(self) -> SyncReport:
        """Push the policy as it is now; when it returns, the engine serves exactly that.

        Every trainer rank calls it, at the same point. On error the training model is as it was; what the engine
        serves then is said in the error, and calling again is always safe.

        Raises:
            PushInProgressError: if another push on this connection is under way; that one is unaffected.
            NonFiniteError: if the adapter holds NaN or Inf; nothing was sent.
            SyncError: if the engine refused, died or did not answer.
        """
        if not self._busy.acquire(blocking=False):
            raise PushInProgressError(
                "A push on this connection is under way; it is unaffected. Wait for it."
            )
        try:
            with _agreed_by_all_ranks():
                report = self._push() if self._is_sender else self._accompany()
                if self._measure_survival:
                    report = _with_survival(report, self.source)
            self.version = self._newest = report.version  # not before all ranks have agreed that it went well
            return report
        finally:
            self._busy.release()

    async def send_weights_async(self) -> SyncReport:
        """`send_weights` for async code: the event loop, and with it an `AsyncLLM`, goes on meanwhile."""
        return await asyncio.to_thread(self.send_weights)

    def rollback(self) -> None:
        """Serve the version before this one again; one step back, for factors and adapters.

        Every trainer rank calls it. The next push counts on from the newest version.

        Raises:
            SyncError: if there is no version before, or merged weights were pushed: they replace the old ones.
        """
        with _agreed_by_all_ranks():
            if self._is_sender:
                self._control("rollback", version=self.version - 1)
                self._target.reset_prefix_cache()
        self.version -= 1

    def request(self) -> dict[str, Any]:
        """What `generate` needs beyond the prompts to be answered by the version pushed last.

        Raises:
            EngineClosedError: if a push died half-way and none has completed since.
            SyncError: if an adapter is asked for before the first push.
        """
        if self.closed:
            raise EngineClosedError(self.closed)
        if not isinstance(self.apply, ServeAdapter):
            return {}
        if self.version == 0:
            raise SyncError("request: nothing was pushed yet, expected a version. Call send_weights() first.")
        from vllm.lora.request import LoRARequest

        name = f"{self.apply.name}@{self.version}"
        path = f"lorasync://{self.apply.name}/{self.version}"  # part of the prefix cache's key; never opened
        return {"lora_request": LoRARequest(name, ADAPTER_IDS + self.version, path)}

    def shutdown(self) -> None:
        """Say goodbye to the engine, which keeps serving, and remove the shared-memory folder."""
        if self._mailbox is None:
            return
        with contextlib.suppress(LorasyncError):
            self._control("goodbye")
        self._mailbox.remove()
        self._mailbox = None

    def __enter__(self) -> Sync:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    # ------------------------------------------------------------------------------------- a push

    def _push(self) -> SyncReport:
        began = time.perf_counter()
        version = self._newest + 1
        totals = _Totals(strategy_of(self.apply))
        stop = _Stop(self._target)
        try:
            if self.apply is None:
                stop.begin()  # merged weights are live as they come
            if not self._stages_only:
                self._answered(self._target.start, call=0)
            self._transfer(version, totals, stop)
            committing = time.perf_counter()
            self._commit(version)
            totals.apply += time.perf_counter() - committing
            if not self._stages_only:
                self._target.reset_prefix_cache()
        finally:
            if not self.closed:  # an engine that is closed stays stopped until a push completes
                stop.end()
        return totals.report(version, self._ranks, time.perf_counter() - began, stop.seconds)

    def _transfer(self, version: int, totals: _Totals, stop: _Stop) -> None:
        stream = _timed(self.source, totals)
        try:
            for bucket in _buckets(stream, self._bucket_bytes):
                self._send(bucket, version, totals)
            if not self._stages_only:
                stop.begin()  # factors were staged beside what is served until now
                self._target.finish(str(version))
        except BaseException as error:
            self._abort(version, error)
            for _ in stream:  # the other trainer ranks are in its collectives
                pass
            raise

    @property
    def _stages_only(self) -> bool:
        """An adapter leaves the weights alone: vLLM's update, which drops every loaded adapter, is not for it."""
        return isinstance(self.apply, ServeAdapter)

    def _send_base(self) -> None:
        """Once: the packed 4-bit weights that the workers merge from. Every rank takes part in reading them."""
        stream = packed_base(self.apply, self.source)
        for bucket in _buckets(stream, self._bucket_bytes):
            if self._is_sender:
                self._send(bucket, self.version, _Totals(""), op="base")

    def _send(
        self,
        bucket: dict[str, torch.Tensor],
        version: int,
        totals: _Totals,
        *,
        op: Literal["bucket", "base"] = "bucket",
    ) -> None:
        began = time.perf_counter()
        call = self._next_call()
        fields: dict[str, Any] = {"op": op, "session": self._session, "version": version, "call": call}
        with self._as_payload(bucket) as payload:
            update = Update(**fields, **payload)
            if self._stages_only or op == "base":
                replies = self._control("stage", bucket=_wire_dict(update), call=call)
            else:
                replies = self._answered(lambda: self._target.update(_wire_dict(update)), call=call)
        totals.add(bucket, update.digest, _slowest(replies), time.perf_counter() - began)

    @contextlib.contextmanager
    def _as_payload(self, bucket: dict[str, torch.Tensor]) -> Iterator[dict[str, Any]]:
        """The bucket as it travels: as it is inside one process, inline if small, else as a shared-memory file."""
        assert self._mailbox is not None
        if self._target.in_process:
            yield {"tensors": bucket}
        elif nbytes(bucket) <= INLINE_LIMIT:
            yield {"payload": pack(bucket), "digest": digest(bucket)}
        else:
            path = self._mailbox.new_file()
            try:
                write_safetensors(bucket, path)
                yield {"path": path.name, "digest": digest(bucket)}
            finally:
                path.unlink(missing_ok=True)

    def _commit(self, version: int) -> None:
        try:
            replies = self._control("commit", version=version)
        except BaseException as error:
            self._close(version, error)
            raise
        self.version = version
        self.closed = ""
        served = {reply["version"] for reply in replies.values()}
        assert served <= {version}, f"ranks serve versions {served}"

    def _abort(self, version: int, error: BaseException) -> None:
        """Tell the workers to give the update up; the first error is the one that counts."""
        call = self._next_call()
        update = Update(op="abort", session=self._session, version=version, call=call)
        with contextlib.suppress(Exception):
            if self._stages_only:
                self._control("stage", bucket=_wire_dict(update), call=call)
            else:
                self._target.update(_wire_dict(update))
        if self._mailbox is not None:
            self._mailbox.collect(call)
        self._close(version, error)

    def _close(self, version: int, error: BaseException) -> None:
        with contextlib.suppress(Exception):
            replies = self._control("status")
            self.closed = next((r["closed"] for r in replies.values() if r["closed"]), "")
            return
        self.closed = (
            f"The push of version {version} failed ({type(error).__name__}) and the engine does not say what it serves. "
            "Call send_weights() again; if that fails too, restart the engine and connect() again."
        )

    def _accompany(self) -> SyncReport:
        """A rank that is not the sender takes part in the source's collectives and drops what they yield."""
        began, totals = time.perf_counter(), _Totals(strategy_of(self.apply))
        for _, tensor in _timed(self.source, totals):
            totals.count(tensor)
        return totals.report(self._newest + 1, 0, time.perf_counter() - began)

    # ---------------------------------------------------------------------------------- the calls

    def _shake_hands(self, message: str, manifest: str) -> None:
        try:
            replies = self._control("hello", apply=message, manifest=manifest)
        except BaseException:
            assert self._mailbox is not None
            self._mailbox.remove()
            self._mailbox = None
            raise
        self._ranks = max((int(r["world_size"]) for r in replies.values()), default=0)
        self.version = max((int(r["version"]) for r in replies.values()), default=0)
        self.closed = next((r["closed"] for r in replies.values() if r["closed"]), "")

    def _control(self, op: ControlOp, *, call: int = 0, **fields: Any) -> Replies:
        assert self._mailbox is not None
        call = call or self._next_call()
        control = Control(
            op=op,
            protocol=PROTOCOL,
            lorasync=__version__,
            session=self._session,
            call=call,
            mailbox=str(self._mailbox.folder),
            **fields,
        )
        return self._answered(lambda: self._target.init(asdict(control)), call=call)

    def _answered(self, request: Any, *, call: int) -> Replies:
        """Make a call; raise the workers' own error if one of them reports one."""
        assert self._mailbox is not None
        try:
            request()
        except LorasyncError:
            self._mailbox.collect(call)
            raise
        except Exception as error:
            failed = {rank: r for rank, r in self._mailbox.collect(call).items() if not r["ok"]}
            if failed:
                raise error_from_dict(failed[min(failed)]["error"]) from error
            raise SyncError(f"The engine failed: {type(error).__name__}: {error}") from error
        replies = self._mailbox.collect(call) if call else {}
        silent = sorted(set(range(self._ranks)) - replies.keys()) if call and self._ranks else []
        if silent:
            raise SyncError(f"worker ranks {silent} of {self._ranks} took the call but did not answer.")
        return replies

    def _next_call(self) -> int:
        self._calls += 1
        return self._calls


def _with_survival(report: SyncReport, source: Any) -> SyncReport:
    """Add how much of the whole update survives rounding: the modules' shares, weighted by ‖Δ‖²."""
    found = list(source.delta_survival())
    whole = sum(module.norm**2 for module in found)
    kept = sum(module.kept * module.norm**2 for module in found) / whole if whole else 1.0
    if kept >= _VANISHING:
        return replace(report, delta_survival=kept)
    warning = (
        f"only {kept:.1%} of the update survives rounding to the served dtype: the engine all but serves the base. "
        "ServeAdapter rounds nothing; MergedSource(rounding=Stochastic(seed)) keeps it on average."
    )
    warnings.warn(warning, stacklevel=4)
    return replace(report, delta_survival=kept, warnings=(*report.warnings, warning))


class _Stop:
    """The time in which the engine does not generate."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._began: float | None = None
        self.seconds: float | None = None

    def begin(self) -> None:
        if self._began is None:
            self._began = time.perf_counter()
            self._target.pause()

    def end(self) -> None:
        self._target.resume()
        if self._began is not None and isinstance(self._target, AsyncLLMTarget):
            self.seconds = time.perf_counter() - self._began


class _Totals:
    """What adds up over the buckets of one push."""

    def __init__(self, strategy: str) -> None:
        self.strategy = strategy
        self.tensors = self.bytes = 0
        self.source = self.sending = self.apply = 0.0
        self.digests: list[str] = []

    def count(self, tensor: torch.Tensor) -> None:
        self.tensors += 1
        self.bytes += tensor.numel() * tensor.element_size()

    def add(
        self, bucket: Mapping[str, torch.Tensor], bucket_digest: str, applying: float, sending: float
    ) -> None:
        for tensor in bucket.values():
            self.count(tensor)
        if bucket_digest:
            self.digests.append(bucket_digest)
        self.apply += applying
        self.sending += sending

    def report(self, version: int, ranks: int, total: float, stall: float | None = None) -> SyncReport:
        seconds = {
            "source": self.source,
            "wire": max(self.sending - self.apply, 0.0),
            "apply": self.apply,
            "total": total,
        }
        return SyncReport(
            version=version,
            strategy=self.strategy,
            tensors=self.tensors,
            bytes=self.bytes,
            seconds=seconds,
            digest=digest_of_text("".join(self.digests)) if self.digests else "",
            ranks=ranks,
            stall_seconds=stall,
        )


def _timed(source: Source, totals: _Totals) -> Iterator[tuple[str, torch.Tensor]]:
    """The source's stream, with the time that it takes itself added to ``totals``."""
    stream = iter(source)
    while True:
        began = time.perf_counter()
        item = next(stream, None)
        totals.source += time.perf_counter() - began
        if item is None:
            return
        yield item


def _buckets(stream: Iterator[tuple[str, torch.Tensor]], limit: int) -> Iterator[dict[str, torch.Tensor]]:
    """Consecutive tensors, together at most ``limit`` bytes (a larger one travels alone)."""
    bucket: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in stream:
        if bucket and size + tensor.numel() * tensor.element_size() > limit:
            yield bucket
            bucket, size = {}, 0
        bucket[name] = tensor
        size += tensor.numel() * tensor.element_size()
    if bucket:
        yield bucket


def _wire_dict(update: Update) -> dict[str, Any]:
    return {k: v for k, v in vars(update).items() if v is not None}


def _slowest(replies: Replies) -> float:
    return max((float(r["seconds"]) for r in replies.values()), default=0.0)


def _rank() -> int:
    import torch.distributed as dist

    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@contextlib.contextmanager
def _agreed_by_all_ranks() -> Iterator[None]:
    """All trainer ranks leave the block the same way: if one fails, the others raise too instead of going on.

    Raises:
        SyncError: on the ranks that did not fail themselves.
    """
    import torch.distributed as dist

    if _alone():
        yield
        return
    failure: BaseException | None = None
    try:
        yield
    except Exception as error:
        failure = error
    failed = _largest_of_all_ranks(int(failure is not None))
    if failure is not None:
        raise failure
    if failed:
        raise SyncError(
            f"The push failed on another trainer rank than this one (rank {dist.get_rank()}): see its error."
        )


def _alone() -> bool:
    import torch.distributed as dist

    return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1


def _largest_of_all_ranks(number: int) -> int:
    import torch.distributed as dist

    if _alone():
        return number
    shared = torch.tensor([number], device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return int(shared.item())
