"""`connect` a source to an engine, then `send_weights` as often as the policy changes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorasync.push.sync import Sync

if TYPE_CHECKING:
    from lorasync.push.issued import OnGone
    from lorasync.push.strategies import Strategy
    from lorasync.source.meta import Source
    from lorasync.targets.base import Pause
    from lorasync.verify import Canary


def connect(
    source: Source,
    target: object,
    apply: Strategy | None = None,
    *,
    pause: Pause = "keep",
    timeout: float = 600.0,
    bucket_bytes: int = 256 << 20,
    measure_survival: bool = False,
    canary: Canary | None = None,
    on_gone: OnGone = "refuse",
) -> Sync:
    """Shake hands with one or more live engines and check that everything fits, before the first weight is sent.

    Every trainer rank calls it. A rank passes the engine of its own process (an `LLM` or an `AsyncLLM`), or ``None`` if it
    has none; engines that are reached from outside are talked to by rank 0, whoever else passes them. All engines of all
    ranks take a push, or none does.

    Args:
        source: what travels; a `MergedSource`, or a `FactorSource` with an ``apply``.
        target: a `vllm.LLM` or an `AsyncLLM` started with ``weight_transfer_config={"backend": "lorasync"}`` (or given to
            `attach`), or any object with vLLM's ``collective_rpc``. With an `AsyncLLM` call from another thread than its
            loop's. Several engines (replicas) in a list, or in a dict with names for errors to use. An engine that is
            spread over trainer ranks (``external_launcher``) is passed by each of them, as the `LLM` of that rank.
        apply: what the workers do with what comes: `ServeAdapter` or `MergeInWorker` with factors, `LoadMerged` (the
            default) with merged weights.
        pause: what happens to requests in flight on an `AsyncLLM` while weights change: ``"keep"`` them and go on
            after it with the new version, ``"wait"`` for them first, or ``"abort"`` them. Adapters need no pause.
            Requests that come meanwhile queue with ``"keep"``; with the others vLLM 0.33 refuses them (HTTP 503).
        timeout: the longest wait for any answer, in seconds; an engine that hangs is waited for once.
        bucket_bytes: how many bytes of merged weights exist at a time, at most (or one tensor, if larger).
        measure_survival: after each push, measure how much of the update is left after rounding to the served dtype, and
            warn if next to nothing is. Takes about as long as the merge; `MergedSource` only.
        canary: tries each push on a few tokens; see `lorasync.verify.Canary`.
        on_gone: what becomes of a kept `Sync.request` whose version of the adapter is gone: ``"refuse"`` it, alone, with
            `VersionGoneError`, or let it be answered by the ``"newest"`` version.

    Raises:
        EngineNotReadyError: if the engine was started without the backend (the message shows the flag), or its workers
            can't answer.
        MismatchError: with every argument that can't be meant, every name, shape and dtype that does not fit the served
            model, or a layout of which a push would reach a part only.
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
        canary=canary,
        on_gone=on_gone,
    )
