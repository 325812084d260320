"""The exception tree: everything that lorasync raises on purpose is a `LorasyncError`.

A message says what (the name), what was got, what was expected and what to do about it. Where several
things are wrong at once they are collected and raised together, one `Mismatch` each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_SHOWN = 20


@dataclass(frozen=True)
class Mismatch:
    """One thing that is not as it must be: its name, what was got and expected, and the way out."""

    name: str
    got: str
    expected: str
    fix: str

    def __str__(self) -> str:
        return f"{self.name}: got {self.got}, expected {self.expected}. {self.fix}"


class LorasyncError(Exception):
    """Base class of every error that lorasync raises on purpose."""


class MismatchError(LorasyncError, ValueError):
    """Names, shapes, dtypes or settings of two sides disagree; all of them are in ``mismatches``."""

    def __init__(self, summary: str, mismatches: Iterable[Mismatch] = ()) -> None:
        self.summary = summary
        self.mismatches = tuple(mismatches)
        super().__init__(summary + _listing([str(m) for m in self.mismatches]))


class AdapterError(LorasyncError, ValueError):
    """The model carries no adapter, not the named one, or one that is in no state to be used."""


class UnmergeableError(AdapterError):
    """An adapter of this kind can't be merged into a weight; the message names what works instead."""


class NonFiniteError(LorasyncError, ValueError):
    """A tensor holds NaN or Inf: sending it would poison the engine for good."""


class UngatheredError(LorasyncError, RuntimeError):
    """A ZeRO-3 or FSDP2 shard was about to be used as if it were the whole parameter."""


class LoadError(LorasyncError, ValueError):
    """A checkpoint can't be loaded with this preset on this machine."""


class ExportError(LorasyncError, OSError):
    """A merged model can't be written to disk; what was begun is removed, what was there is untouched."""


class ZeroIncompatibilityError(LorasyncError, ValueError):
    """Model and DeepSpeed config do not work together; ``report`` holds every finding."""

    def __init__(self, message: str, report: object = None) -> None:
        self.report = report
        super().__init__(message)


class SyncError(LorasyncError, RuntimeError):
    """A push to the engine failed; the message says which version the engine serves now."""


class EngineNotReadyError(SyncError):
    """The target is no vLLM engine that can receive weights (often: started without the backend)."""


class EngineDeadError(SyncError):
    """The engine, or one of its workers, has died: start it again, `connect` again and push."""


class EngineClosedError(SyncError):
    """A merged push died half-way: the engine refuses to generate until a push completes."""


class PushInProgressError(SyncError):
    """Another push to the same engine is under way; it is unaffected."""


class StaleVersionError(SyncError):
    """The engine no longer serves the version that this trainer pushed last."""


class VersionGoneError(SyncError, ValueError):
    """A request names a version of an adapter that the engine no longer holds; that request alone fails."""


class PayloadError(SyncError):
    """Bytes on the wire are truncated, altered or malformed; nothing of them was applied."""


class SyncTimeoutError(SyncError, TimeoutError):
    """Somebody did not answer in time; the message says who."""


def _listing(lines: list[str]) -> str:
    shown = "".join(f"\n  {line}" for line in lines[:_SHOWN])
    return shown + (f"\n  … and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else "")
