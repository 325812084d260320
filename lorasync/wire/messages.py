"""What the trainer says to every worker of an engine: JSON-safe messages; bytes ride beside them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

from lorasync.errors import Mismatch, MismatchError, PayloadError
from lorasync.version import __version__
from lorasync.wire.fields import made

PROTOCOL = 5
PROBE = b"\0\xff\x80"
"""Rides beside every handshake: a client that can't carry bytes shows it there, not in the middle of the first push."""

ADAPTER_IDS = 1_000_000
"""Ids of our adapters in vLLM: this plus the version. vLLM wants whole numbers from 1 on; users count from there."""

Kind = Literal["bucket", "base"]


@dataclass(frozen=True, kw_only=True)
class Message:
    """What every message says.

    Attributes:
        session: which connection speaks; only the one that shook hands last changes anything.
        call: counts the messages of a session.
        protocol: the version of this protocol.
        lorasync: the trainer's version of lorasync, for the error if protocols differ.
    """

    op: ClassVar[str] = ""
    session: str
    call: int = 0
    protocol: int = PROTOCOL
    lorasync: str = __version__

    def to_dict(self) -> dict[str, Any]:
        """The message as vLLM's routes carry it: strings, numbers, lists and dicts."""
        return {"op": self.op, **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class Hello(Message):
    """The handshake: the worker checks everything against the served model before anything is sent.

    Attributes:
        strategy: what the worker will do with what comes, as JSON text.
        manifest: names, dtypes and shapes of what will come.
        offers: the transports that the trainer can use, by name, each with what the worker needs to try it.
        in_flight: versions of an adapter that unfinished requests name.
        limit: for how many seconds the trainer waits for an answer.
    """

    op = "hello"
    strategy: str
    manifest: str
    offers: dict[str, dict[str, str]] = field(default_factory=dict)
    in_flight: tuple[int, ...] = ()
    limit: float = 600.0


@dataclass(frozen=True, kw_only=True)
class BucketMessage(Message):
    """One bucket of tensors.

    Attributes:
        version: the version that it is a part of.
        kind: ``"base"`` for the packed base that is sent once, else ``"bucket"``.
        transport: how the bytes travel.
        fields: what the transport's receiver needs to find them.
        digest: of the bytes; empty where tensors are handed over inside one process.
        background: stage it beside the engine's work; the answer says ``pending``, and `Collect` asks for the outcome.
    """

    op = "bucket"
    version: int
    kind: Kind
    transport: str
    fields: dict[str, str] = field(default_factory=dict)
    digest: str = ""
    background: bool = False


@dataclass(frozen=True, kw_only=True)
class Collect(Message):
    """Ask for the outcome of the bucket that is being staged in the background."""

    op = "collect"


@dataclass(frozen=True, kw_only=True)
class Abort(Message):
    """The trainer gives the update up: what has come of it goes."""

    op = "abort"


@dataclass(frozen=True, kw_only=True)
class Commit(Message):
    """Serve what has come, if the engine still serves what the trainer believes.

    Attributes:
        version: what it is from now on.
        expected: the version that the trainer believes is served (compare-and-swap).
        digest: of all buckets of the version, in their order.
        in_flight: the versions of an adapter that stay.
    """

    op = "commit"
    version: int
    expected: int
    digest: str = ""
    in_flight: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Rollback(Message):
    """Serve the version before; asked for the one after it, go forward again."""

    op = "rollback"
    version: int
    expected: int
    in_flight: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Status(Message):
    """Ask what is served, and whose pushes are taken; nothing changes."""

    op = "status"


@dataclass(frozen=True, kw_only=True)
class Digest(Message):
    """Ask for a digest of the live parameters."""

    op = "digest"


@dataclass(frozen=True, kw_only=True)
class Goodbye(Message):
    """The connection ends; the engine keeps what it serves, and these versions of an adapter."""

    op = "goodbye"
    in_flight: tuple[int, ...] = ()


_KINDS: dict[str, type[Message]] = {
    kind.op: kind
    for kind in (Hello, BucketMessage, Collect, Abort, Commit, Rollback, Status, Digest, Goodbye)
}


def message_from_dict(found: object) -> Message:
    """Read the dict that travelled.

    Raises:
        MismatchError: if the other side speaks another protocol.
        PayloadError: if fields are missing, unknown or of another type.
    """
    if not isinstance(found, dict):
        raise PayloadError(f"message: got {type(found).__name__}, expected dict. Nothing was touched.")
    _check_protocol(found)
    op = found.get("op")
    if not isinstance(op, str) or op not in _KINDS:
        raise PayloadError(f"op: got {op!r}, expected one of {', '.join(_KINDS)}. Nothing was touched.")
    try:
        return made(_KINDS[op], {name: value for name, value in found.items() if name != "op"})
    except TypeError as error:
        raise PayloadError(f"{op}: {error}. Nothing was touched.") from error


def _check_protocol(found: dict[Any, Any]) -> None:
    protocol = found.get("protocol")
    if type(protocol) is int and protocol == PROTOCOL:
        return
    raise MismatchError(
        "Trainer and engine run versions of lorasync that don't understand each other; nothing was touched.",
        [
            Mismatch(
                "lorasync",
                f"{found.get('lorasync')} (protocol {protocol}) in the trainer",
                f"{__version__} (protocol {PROTOCOL}) as in the engine",
                "Install the same version on both sides.",
            )
        ],
    )
