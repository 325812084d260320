"""What the workers of one engine answer, by rank, and what is wrong with it."""

from __future__ import annotations

from typing import Any

from lorasync.errors import EngineNotReadyError, PayloadError, SyncError
from lorasync.wire import error_from_dict

Replies = dict[int, dict[str, Any]]


def raise_failed(replies: Replies, cause: BaseException | None = None) -> None:
    failed = {rank: r for rank, r in replies.items() if not r["ok"]}
    if failed:
        raise error_from_dict(failed[min(failed)]["error"]) from cause


def failure(error: Exception) -> SyncError:
    """What vLLM, or a client of the user's, has failed with."""
    if isinstance(error, TypeError) and "serializable" in str(error):
        return EngineNotReadyError(
            f"The client can't carry bytes ({error}), expected one that passes dicts of strings, numbers and bytes on as "
            "they are (JSON doesn't). A vllm.LLM, an AsyncLLM or Ray handles do."
        )
    return SyncError(f"The engine failed: {type(error).__name__}: {error}")


NO_ANSWER = (
    "The handshake returned, and no worker of the engine has answered, so that a push could not be known to have arrived. "
    "Workers answer through a folder in /dev/shm: is the engine on another host, in another container, or another "
    "user's? Or did the client return before the engine had answered (an async call that was not awaited)? Use an engine "
    "on this host, of this user, and calls that wait for it."
)


def check_version(replies: Replies, expected: int) -> None:
    others = {rank: r["version"] for rank, r in replies.items() if r["version"] != expected}
    if others:
        raise SyncError(f"version: ranks {sorted(others)} serve versions {others}, expected {expected}.")


def check_digests(replies: Replies, expected: str, done: str) -> None:
    """Compare what each rank says of its bytes with what was sent.

    Raises:
        PayloadError: naming the ranks with others.
    """
    others = {
        rank: str(r.get("digest", "")) for rank, r in replies.items() if r.get("digest", "") != expected
    }
    if others:
        raise PayloadError(
            f"ranks {sorted(others)} have {done} other bytes than were sent: digests {others}, expected {expected}."
        )


def slowest(replies: Replies) -> float:
    return max((float(r["seconds"]) for r in replies.values()), default=0.0)
