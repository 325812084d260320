"""What the trainer says to every worker of an engine: JSON-safe messages; bytes ride beside them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Literal, get_args, get_type_hints

from lorasync.errors import Mismatch, MismatchError, PayloadError
from lorasync.version import __version__

PROTOCOL = 5
PROBE = b"\0\xff\x80"
"""Rides beside every handshake: a client that can't carry bytes shows it there, not in the middle of the first push."""

ADAPTER_IDS = 1_000_000
"""Ids of our adapters in vLLM: this plus the version. vLLM wants whole numbers from 1 on; users count from there."""

Kind = Literal["bucket", "base"]
Offers = dict[str, dict[str, str]]


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

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise PayloadError(
                f"kind: got {self.kind!r}, expected one of {', '.join(get_args(Kind))}. Nothing was touched."
            )


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
    kind = _KINDS[op]
    given = {name: value for name, value in found.items() if name != "op"}
    unknown = sorted(map(repr, given.keys() - {each.name for each in fields(kind)}))
    if unknown:
        raise PayloadError(f"{op}: got the unknown fields {', '.join(unknown)}. Nothing was touched.")
    hints = _hints(kind)
    try:
        return kind(**{name: _checked(name, value, hints[name]) for name, value in given.items()})
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


def _hints(kind: type[Message]) -> dict[str, Any]:
    if kind not in _hints_of:
        _hints_of[kind] = get_type_hints(kind)
    return _hints_of[kind]


_hints_of: dict[type[Message], dict[str, Any]] = {}


def _checked(name: str, value: Any, hint: Any) -> Any:
    """The value, if it is of its type; lists come as lists or tuples, whatever the route made of them."""
    if hint == tuple[int, ...] and isinstance(value, list | tuple):
        return tuple(_checked(f"{name}[{n}]", each, int) for n, each in enumerate(value))
    if hint == dict[str, str] and isinstance(value, dict):
        return {_checked(name, k, str): _checked(f"{name}[{k!r}]", v, str) for k, v in value.items()}
    if hint == dict[str, dict[str, str]] and isinstance(value, dict):
        return {
            _checked(name, k, str): _checked(f"{name}[{k!r}]", v, dict[str, str]) for k, v in value.items()
        }
    if hint is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if value is not None and (type(value) is hint or (hint == Kind and isinstance(value, str))):
        return value
    expected = getattr(hint, "__name__", str(hint))
    raise PayloadError(f"{name}: got {type(value).__name__}, expected {expected}. Nothing was touched.")
