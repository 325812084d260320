"""What each worker answers, by value: never an exception through vLLM, an expected refusal is an answer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from lorasync import errors
from lorasync.errors import EngineNotReadyError, LorasyncError, Mismatch, MismatchError
from lorasync.wire.fields import made

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, kw_only=True)
class Introduction:
    """What a worker says of itself in the handshake.

    Attributes:
        refused: why it can't take buckets by a transport that was offered; empty for one that works.
        took_over: a digest of the session that was here before; empty if there was none.
        gpu: which GPU it is on; empty on a CPU.
        dtypes: what it serves ``weights`` and LoRA ``slots`` in.
        multimodal: whether the engine keeps outputs of encoders.
        capacity: how many adapters it holds at a time; 0 unless it serves adapters.
        held: whether it holds an adapter of the version that is served.
        others: how many adapters of the user's own it holds.
        notes: what a trainer should know although nothing is wrong.
    """

    refused: dict[str, str] = field(default_factory=dict)
    took_over: str = ""
    gpu: str = ""
    dtypes: dict[str, str] = field(default_factory=dict)
    multimodal: bool = False
    capacity: int = 0
    held: bool = False
    others: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One worker's answer to one message.

    Attributes:
        ok: whether it did what was asked.
        rank: which worker it is, of all replicas' of the engine.
        workers: how many workers the engine has, as far as the worker knows: with data parallelism of a dense model vLLM
            tells each replica that it is alone.
        version: what it serves.
        closed: why it must not generate; empty if it may.
        ours: whether it takes the pushes of the session that asks.
        replaced: whether it serves another session's versions, and the one that asks had versions of its own.
        seconds: how long it took, in the worker.
        pending: whether it is still staging.
        digest: of the bytes that it has staged, applied or serves.
        error: what went wrong.
        introduction: in a handshake.
    """

    ok: bool
    rank: int
    workers: int
    version: int
    closed: str = ""
    ours: bool = False
    replaced: bool = False
    seconds: float = 0.0
    pending: bool = False
    digest: str = ""
    error: dict[str, Any] | None = None
    introduction: Introduction | None = None

    def to_dict(self) -> dict[str, Any]:
        """The answer as vLLM's routes carry it."""
        return asdict(self)


def answer_from_dict(found: object) -> Answer:
    """Read what came back.

    Raises:
        EngineNotReadyError: if that is no answer of a worker of ours.
    """
    try:
        given = dict(found)  # type: ignore[call-overload]
        if given.get("introduction") is not None:
            given["introduction"] = made(Introduction, given["introduction"])
        if given.get("error") is not None:
            error_from_dict(given["error"])
        return made(Answer, given)
    except (TypeError, ValueError, KeyError) as error:
        raise EngineNotReadyError(
            f"answer: got {_shortened(found)}, expected one of lorasync's workers ({type(error).__name__}: {error}). Does "
            "collective_rpc return what the workers return, as a list with one entry a worker?"
        ) from error


def _shortened(found: object) -> str:
    text = repr(found)
    return text if len(text) <= 80 else f"{text[:77]}..."


def error_as_dict(error: BaseException) -> dict[str, Any]:
    """An error as JSON, so that the trainer can raise the same one."""
    if isinstance(error, MismatchError):
        listed = [asdict(m) for m in error.mismatches]
        return {"type": type(error).__name__, "message": error.summary, "mismatches": listed}
    return {"type": type(error).__name__, "message": str(error), "mismatches": []}


def error_from_dict(found: Mapping[str, Any]) -> LorasyncError:
    """The error that somebody reported; a type that is not ours becomes a `SyncError` that names it."""
    kind = getattr(errors, str(found["type"]), None)
    if not (isinstance(kind, type) and issubclass(kind, LorasyncError)):
        return errors.SyncError(f"{found['type']} in the engine: {found['message']}")
    if issubclass(kind, MismatchError):
        return kind(str(found["message"]), [Mismatch(**m) for m in found["mismatches"]])
    return kind(str(found["message"]))
