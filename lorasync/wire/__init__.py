"""What the trainer and the vLLM worker must agree on: messages, payloads, replies.

Messages are plain dicts of strings, numbers and bytes (they pass every route that vLLM offers, pickle is
never needed). Tensors travel as safetensors bytes, inline or as a file in a private shared-memory folder.
Replies and errors come back as JSON files in the same folder, because vLLM's weight-sync calls return nothing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args
from weakref import WeakValueDictionary

import safetensors
import safetensors.torch
import torch

from lorasync import errors
from lorasync.errors import LorasyncError, Mismatch, MismatchError, PayloadError

PROTOCOL = 5
INLINE_LIMIT = 4 << 20
"""Payloads up to this many bytes ride in the call itself; larger ones go through shared memory."""

ADAPTER_IDS = 1_000_000
"""Ids of our adapters in vLLM: this plus the version. vLLM wants whole numbers from 1 on; users count from there."""

Tensors = Mapping[str, torch.Tensor]
ControlOp = Literal["hello", "stage", "commit", "rollback", "status", "digest", "goodbye"]
UpdateOp = Literal["bucket", "base", "abort"]
_FOLDER_PREFIX = "lorasync-"
_OWNER = "owner"
_OUTDATED = "outdated"
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}
_MALFORMED = (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError)
_SAFETENSORS_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
_BY_SAFETENSORS_NAME = {name: _DTYPES[dtype] for dtype, name in _SAFETENSORS_NAMES.items()}


# --------------------------------------------------------------------------------------------- messages


@dataclass(frozen=True)
class Control:
    """Rides `init_weight_transfer_engine`: the handshake, and the questions asked outside of an update.

    ``expected`` is the version that the trainer believes is served (a commit is a compare-and-swap), ``in_flight``
    the versions that stay, as unfinished or later requests name them, ``background`` lets the worker stage while the
    engine generates.
    ``digest`` is that of a commit: of all buckets of the version, in their order.
    """

    op: ControlOp
    protocol: int
    lorasync: str
    session: str
    call: int
    mailbox: str
    apply: str = "{}"
    manifest: str = "[]"
    version: int = 0
    expected: int = 0
    in_flight: tuple[int, ...] = ()
    background: bool = False
    digest: str = ""
    bucket: Any = None

    def __post_init__(self) -> None:
        _check_op(self.op, ControlOp)
        texts = {
            n: getattr(self, n) for n in ("lorasync", "session", "mailbox", "apply", "manifest", "digest")
        }
        _check_types(texts, str)
        _check_types({n: getattr(self, n) for n in ("protocol", "call", "version", "expected")}, int)
        in_flight = list(self.in_flight) if isinstance(self.in_flight, (list, tuple)) else [self.in_flight]
        _check_types({f"in_flight[{n}]": number for n, number in enumerate(in_flight)}, int)
        _check_types({"background": self.background}, bool)
        _check_types({} if self.bucket is None else {"bucket": self.bucket}, dict)


@dataclass(frozen=True)
class Update:
    """Rides `update_weights`: one bucket of tensors, or the word that the update is given up."""

    op: UpdateOp
    session: str
    version: int
    call: int
    digest: str = ""
    path: str = ""
    gpu: str = ""
    layout: str = ""
    payload: bytes = b""
    tensors: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        _check_op(self.op, UpdateOp)
        _check_types({n: getattr(self, n) for n in ("session", "digest", "path", "gpu", "layout")}, str)
        _check_types({n: getattr(self, n) for n in ("version", "call")}, int)
        _check_types({"payload": self.payload}, bytes)


def _check_op(op: object, known: Any) -> None:
    if op not in get_args(known):
        raise PayloadError(
            f"op: got {op!r}, expected one of {', '.join(get_args(known))}. Nothing was touched."
        )


def _check_types(values: Mapping[str, object], kind: type) -> None:
    for name, value in values.items():
        if type(value) is not kind:
            raise PayloadError(
                f"{name}: got {type(value).__name__}, expected {kind.__name__}. Nothing was touched."
            )


Message = TypeVar("Message", Control, Update)


def message(kind: type[Message], fields: object) -> Message:
    """A message from the dict that travelled.

    Raises:
        PayloadError: if fields are missing, unknown or of another type.
    """
    if not isinstance(fields, dict):
        raise PayloadError(
            f"{kind.__name__}: got {type(fields).__name__}, expected dict. Nothing was touched."
        )
    known = {f.name for f in dataclass_fields(kind)}
    unknown = sorted(map(repr, fields.keys() - known))
    if unknown:
        raise PayloadError(
            f"{kind.__name__}: got the unknown fields {', '.join(unknown)}. Do both sides run the same lorasync? "
            "Nothing was touched."
        )
    try:
        return kind(**fields)
    except TypeError as error:
        raise PayloadError(f"{kind.__name__}: {error}. Nothing was touched.") from error


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise PayloadError(f"dtype {name!r} is not one that travels; expected one of {', '.join(_DTYPES)}.")
    return _DTYPES[name]


# --------------------------------------------------------------------------------------------- payloads


def nbytes(tensors: Tensors) -> int:
    """Bytes of the tensors' elements."""
    return sum(t.numel() * t.element_size() for t in tensors.values())


def write_safetensors(tensors: Tensors, path: Path) -> None:
    """Write ``tensors`` (any device) as a safetensors file, one after another, without a second copy of them all.

    `safetensors.torch.save_file` copies every tensor to bytes first. Copies by torch into the mapped file wait for threads
    that a busy engine may hold up, at each of hundreds of tensors.

    Raises:
        SyncError: if the file system has no room for it.
    """
    header, data_bytes = _header(tensors)
    with _room_in(path.parent, len(header) + data_bytes), path.open("xb") as file:
        os.posix_fallocate(file.fileno(), 0, len(header) + data_bytes)  # all of it, or nothing is written
        file.write(header)
        for tensor in tensors.values():
            file.write(as_bytes(tensor).cpu().numpy().data)


@contextlib.contextmanager
def _room_in(folder: Path, needed: int) -> Iterator[None]:
    """Say what to do where a file system is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(folder).free
        raise errors.SyncError(
            f"{folder.parent}: got {free / 1e6:.1f} MB free, expected room for {needed / 1e6:.1f} MB of this bucket: "
            "shared memory is full. Enlarge it (docker run --shm-size, an emptyDir of medium Memory), or send less at a "
            "time with connect(..., bucket_bytes=…)."
        ) from error


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Map a safetensors file; the tensors stay valid after the file is unlinked.

    Raises:
        PayloadError: if it is missing, truncated or malformed; the header is checked before anything is allocated.
    """
    try:
        return _mapped(path)
    except _MALFORMED as error:
        raise PayloadError(
            f"{path.name}: not a readable safetensors file ({error}); nothing was applied."
        ) from error


def _mapped(path: Path) -> dict[str, torch.Tensor]:
    """Views of one mapping, where a header that `safe_open` has checked says; its `get_tensor` leaks memory (0.8.0).

    The data follows the header without holes: safetensors refuses anything else.
    """
    with safetensors.safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.offset_keys()}
        kinds = {n: (_BY_SAFETENSORS_NAME[s.get_dtype()], tuple(s.get_shape())) for n, s in slices.items()}
    size = path.stat().st_size
    storage: Any = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=size)
    everything = torch.empty(0, dtype=torch.uint8).set_(storage)
    at = size - sum(dtype.itemsize * math.prod(shape) for dtype, shape in kinds.values())
    found = {}
    for name, (dtype, shape) in kinds.items():
        end = at + dtype.itemsize * math.prod(shape)
        part = everything[at:end] if at % dtype.itemsize == 0 else everything[at:end].clone()
        found[name] = part.view(dtype).reshape(shape)
        at = end
    return found


def pack(tensors: Tensors) -> bytes:
    """The same as safetensors bytes, for payloads that ride in the call."""
    return safetensors.torch.save({k: v.detach().contiguous().cpu() for k, v in tensors.items()})


def unpack(payload: bytes) -> dict[str, torch.Tensor]:
    """Read safetensors bytes.

    Raises:
        PayloadError: if they are truncated or malformed; the header is checked before anything is allocated.
    """
    try:
        return safetensors.torch.load(payload)
    except _MALFORMED as error:
        raise PayloadError(
            f"inline payload: not safetensors bytes ({error}); nothing was applied."
        ) from error


def digest(tensors: Tensors) -> str:
    """xxh3-128 over names, dtypes, shapes and bytes, sorted by name; equal on both sides of the wire."""
    import xxhash

    state = xxhash.xxh3_128()
    for name, tensor in sorted(tensors.items()):
        state.update(f"{name}|{dtype_name(tensor.dtype)}|{tuple(tensor.shape)}|".encode())
        state.update(as_bytes(tensor).cpu().numpy().data)
    return str(state.hexdigest())


def digest_of_text(text: str) -> str:
    """xxh3-128 of a string."""
    import xxhash

    return str(xxhash.xxh3_128_hexdigest(text.encode()))


def digest_of_parts(digests: Sequence[str]) -> str:
    """One digest of consecutive buckets'; empty where they had none, inside one process."""
    return digest_of_text("".join(digests)) if any(digests) else ""


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The elements as a flat uint8 tensor (a view where the tensor is contiguous)."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _header(tensors: Tensors) -> tuple[bytes, int]:
    entries, at = {}, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        kind = _SAFETENSORS_NAMES[dtype_name(tensor.dtype)]
        entries[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, at


# ---------------------------------------------------------------------------------- the shared folder


class Mailbox:
    """A private folder in shared memory: payload files go one way, one JSON reply a rank and call the other.

    Made by the trainer (mode 0700), read by workers of the same user on the same host. A worker elsewhere
    finds no folder and replies nothing: its errors still arrive as exceptions. One in the trainer's own process opens
    the trainer's own object, and its replies touch no file.

    The trainer holds a lock on the file ``owner`` (its process id is in it) for as long as it lives; the kernel lets
    go of it however the trainer dies. So the folder of a dead one is told from that of a live one, in any container.
    """

    def __init__(self, folder: Path, owner: int | None = None) -> None:
        self.folder = folder
        self._owner = owner
        self._replies: dict[int, dict[int, dict[str, Any]]] = {}  # from workers in this process

    @classmethod
    def create(cls) -> Mailbox:
        """A new folder; those that dead trainers of this user have left are removed first."""
        sweep()
        root = shared_memory_root()
        with _room_in(root / _OWNER, 0):
            folder = Path(tempfile.mkdtemp(prefix=_FOLDER_PREFIX, dir=root))
            box = cls(folder, _own(folder))
        _made_here[os.getpid(), str(folder)] = box
        return box

    @classmethod
    def open(cls, folder: str) -> Mailbox | None:
        """The folder of a handshake, if it is on this host and ours.

        Raises:
            PayloadError: if the path leads out of the shared-memory folder or belongs to somebody else.
        """
        mine = _made_here.get((os.getpid(), folder))
        if mine is not None:
            return mine
        path = Path(folder)
        if not folder or not path.exists():
            return None
        if path.resolve().parent != shared_memory_root().resolve() or not path.name.startswith(
            _FOLDER_PREFIX
        ):
            raise PayloadError(
                f"mailbox: got {folder}, expected {shared_memory_root()}/{_FOLDER_PREFIX}…. Nothing was touched."
            )
        status = path.stat()
        if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
            raise PayloadError(
                f"mailbox {folder}: must belong to this user with mode 0700. Nothing was touched."
            )
        return cls(path)

    def new_file(self) -> Path:
        return self.folder / f"{secrets.token_hex(8)}.safetensors"

    def payload(self, name: str) -> Path:
        """A payload file by its name alone: no path from the wire leads anywhere else."""
        if Path(name).name != name or name == ".." or "\0" in name:
            raise PayloadError(f"payload: got the path {name!r}, expected a file name. Nothing was applied.")
        return self.folder / name

    @property
    def exists(self) -> bool:
        return self._owner is not None or self.folder.exists()

    def reply(self, call: int, rank: int, body: Mapping[str, Any]) -> None:
        if self._owner is not None:
            self._replies.setdefault(call, {})[rank] = dict(body)
            return
        path = self.folder / f"{call}-{rank}.json"
        half = path.with_suffix(".part")
        half.write_text(json.dumps(body))
        half.rename(path)

    def collect(self, call: int) -> dict[int, dict[str, Any]]:
        """The replies to a call by rank; each is read once."""
        found = self._replies.pop(call, {})
        if found:
            return found
        with contextlib.suppress(FileNotFoundError):  # the folder was removed
            paths = [
                p for p in self.folder.iterdir() if p.name.startswith(f"{call}-") and p.suffix == ".json"
            ]
            for path in sorted(paths):
                found[int(path.stem.split("-")[1])] = json.loads(path.read_text())
                path.unlink()
        return found

    def outdate(self) -> None:
        """Leave word for this trainer that another one's versions are served; it is read without asking the engine."""
        (self.folder / _OUTDATED).touch()

    @property
    def outdated(self) -> bool:
        return (self.folder / _OUTDATED).exists()

    def remove(self) -> None:
        _made_here.pop((os.getpid(), str(self.folder)), None)
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._owner is not None:
            os.close(self._owner)
            self._owner = None


_made_here: WeakValueDictionary[tuple[int, str], Mailbox] = WeakValueDictionary()
"""By process, as a forked one inherits this; and by folder."""


def sweep() -> list[Path]:
    """Remove the folders in shared memory that dead trainers of this user have left; those of live ones stay."""
    removed = []
    for folder in sorted(shared_memory_root().glob(f"{_FOLDER_PREFIX}*")):
        with contextlib.suppress(OSError):  # gone meanwhile, somebody else's, or locked: not ours to remove
            if folder.lstat().st_uid == os.getuid() and not folder.is_symlink() and _is_orphan(folder):
                shutil.rmtree(folder, ignore_errors=True)
                removed.append(folder)
    return removed


def _own(folder: Path) -> int:
    """Lock the folder for this process; it is locked before it has the name that `sweep` looks at."""
    half = folder / f"{_OWNER}.part"
    descriptor = os.open(half, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.write(descriptor, f"{os.getpid()}\n".encode())
    half.rename(folder / _OWNER)
    return descriptor


def _is_orphan(folder: Path) -> bool:
    """Whether nobody holds the lock any more. A folder without an owner file is left alone."""
    descriptor = os.open(folder / _OWNER, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    finally:
        os.close(descriptor)


def shared_memory_root() -> Path:
    """``/dev/shm`` where there is one, otherwise the folder for temporary files."""
    shm = Path("/dev/shm")  # noqa: S108
    return shm if shm.is_dir() and os.access(shm, os.W_OK) else Path(tempfile.gettempdir())


# ----------------------------------------------------------------------------------- errors as replies


def error_as_dict(error: BaseException) -> dict[str, Any]:
    """An error as JSON, so that the trainer can raise the same one."""
    if isinstance(error, MismatchError):
        listed = [asdict(m) for m in error.mismatches]
        return {"type": type(error).__name__, "message": error.summary, "mismatches": listed}
    return {"type": type(error).__name__, "message": str(error), "mismatches": []}


def error_from_dict(found: Mapping[str, Any]) -> LorasyncError:
    """The error that a worker reported; a type that is not ours becomes a `SyncError` that names it."""
    kind = getattr(errors, str(found["type"]), None)
    if not (isinstance(kind, type) and issubclass(kind, LorasyncError)):
        return errors.SyncError(f"{found['type']} in the engine: {found['message']}")
    if issubclass(kind, MismatchError):
        return kind(str(found["message"]), [Mismatch(**m) for m in found["mismatches"]])
    return kind(str(found["message"]))


def manifest_as_text(entries: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> str:
    return json.dumps([[name, dtype_name(dtype), list(shape)] for name, dtype, shape in entries])


def manifest_from_text(text: str) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Names, dtypes and shapes of what will be sent, in order.

    Raises:
        PayloadError: if the text is no manifest.
    """
    try:
        return [
            (str(name), dtype_of(dtype), tuple(int(n) for n in shape))
            for name, dtype, shape in json.loads(text)
        ]
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise PayloadError(f"manifest: malformed ({error}). Nothing was touched.") from error
