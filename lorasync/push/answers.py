"""What the workers of one engine answer, by rank, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lorasync.errors import EngineNotReadyError, PayloadError, SyncError
from lorasync.wire import Answer, answer_from_dict, error_from_dict

if TYPE_CHECKING:
    from collections.abc import Sequence

Answers = dict[int, Answer]


def read_answers(found: Sequence[Any], *, expected: int) -> Answers:
    """The answers of all workers that a call has to reach, by rank.

    Args:
        found: what came back.
        expected: how many workers the engine has; 0 if only their answers tell.

    Raises:
        EngineNotReadyError: if one is missing, comes twice, or is none of ours.
        LorasyncError: what the worker of the lowest rank reports, as its own type.
    """
    read = [answer_from_dict(each) for each in found]
    failed = [answer for answer in read if not answer.ok]
    if failed:  # also where others are missing: what a worker says tells more
        worst = min(failed, key=lambda answer: answer.rank)
        raise error_from_dict(worst.error or {"type": "SyncError", "message": "no reason was given"})
    answers = {answer.rank: answer for answer in read}
    needed = expected or max((answer.workers for answer in read), default=1)
    if len(answers) < len(read) or len(answers) != needed:
        ranks = sorted(answer.rank for answer in read)
        raise EngineNotReadyError(
            f"answers: got {len(read)} of worker ranks {ranks}, expected {needed}, one of each rank: what can't be known to "
            "have arrived is not pushed. Does collective_rpc return what all workers return?"
        )
    return answers


def any_has_agreed(found: Sequence[Any]) -> bool:
    """Whether one of the workers that have answered takes the pushes of the session that asks."""
    return any(isinstance(each, Mapping) and each.get("ours") is True for each in found)


def failure(error: Exception) -> SyncError:
    """What vLLM, or a client of the user's, has failed with, as an error of ours."""
    text = str(error)
    if isinstance(error, TypeError) and "serializable" in text:
        return EngineNotReadyError(
            f"The client can't carry bytes ({error}), expected one that passes dicts of strings, numbers and bytes on as "
            "they are (JSON doesn't). A vllm.LLM, an AsyncLLM or Ray handles do."
        )
    if "is not callable" in text or "weight_transfer_engine" in text:
        return EngineNotReadyError(
            f"weight transfer backend: the engine says {text.splitlines()[0]}, expected the backend 'lorasync'. Start it "
            """with --weight-transfer-config '{"backend": "lorasync"}', with the same lorasync installed."""
        )
    return SyncError(f"The engine failed: {type(error).__name__}: {error}")


def check_version(answers: Answers, expected: int) -> None:
    """Compare what each rank serves with what it should.

    Raises:
        SyncError: naming the ranks that serve another version.
    """
    others = {rank: answer.version for rank, answer in answers.items() if answer.version != expected}
    if others:
        raise SyncError(f"version: ranks {sorted(others)} serve versions {others}, expected {expected}.")


def check_digests(answers: Answers, expected: str, done: str) -> None:
    """Compare what each rank says of its bytes with what was sent.

    Raises:
        PayloadError: naming the ranks with others.
    """
    others = {rank: answer.digest for rank, answer in answers.items() if answer.digest != expected}
    if others:
        raise PayloadError(
            f"ranks {sorted(others)} have {done} other bytes than were sent: digests {others}, expected {expected}."
        )


def slowest(answers: Answers) -> float:
    """The slowest worker's seconds."""
    return max((answer.seconds for answer in answers.values()), default=0.0)
