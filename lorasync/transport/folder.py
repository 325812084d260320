"""A private folder in shared memory, which goes with the process that has made it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import tempfile
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

from lorasync.errors import PayloadError, SyncError

if TYPE_CHECKING:
    from collections.abc import Iterator

_PREFIX = "lorasync-"
_OWNER = "owner"


class Folder:
    """A folder of the trainer's (mode 0700), read by workers of the same user on the same host.

    The trainer holds a lock on the file ``owner`` (its process id is in it) for as long as it lives; the kernel lets go
    of the lock however the trainer dies. So the folder of a dead trainer is told from that of a live one, in any
    container.
    """

    def __init__(self) -> None:
        sweep()
        root = shared_memory_root()
        with room_in(root, 0):
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))
            owner = _own(self.path)
        self._remove = weakref.finalize(self, _removed, self.path, owner, os.getpid())

    def remove(self) -> None:
        """Remove the folder and all that is in it."""
        self._remove()


def opened(folder: str) -> Path | None:
    """The folder of a handshake, if it is on this host and this user's; None if there is none.

    Raises:
        PayloadError: if the path leads out of the shared-memory folder, or belongs to somebody else.
    """
    path = Path(folder)
    if not folder or "\0" in folder or not path.exists():
        return None
    if path.resolve().parent != shared_memory_root().resolve() or not path.name.startswith(_PREFIX):
        raise PayloadError(
            f"folder: got {folder}, expected {shared_memory_root()}/{_PREFIX}…. Nothing was touched."
        )
    status = path.stat()
    if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise PayloadError(f"folder {folder}: must belong to this user with mode 0700. Nothing was touched.")
    return path


def sweep() -> list[Path]:
    """Remove the folders in shared memory that dead trainers of this user have left; those of live ones stay."""
    removed = []
    for folder in sorted(shared_memory_root().glob(f"{_PREFIX}*")):
        with contextlib.suppress(OSError):  # gone meanwhile, somebody else's, or locked: not ours to remove
            if folder.lstat().st_uid == os.getuid() and not folder.is_symlink() and _is_orphan(folder):
                shutil.rmtree(folder, ignore_errors=True)
                removed.append(folder)
    return removed


@contextlib.contextmanager
def room_in(folder: Path, needed: int) -> Iterator[None]:
    """Say what to do where a file system is full.

    Raises:
        SyncError: with the bytes that are free, and those that were needed.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(folder).free
        raise SyncError(
            f"{shared_memory_root()}: got {free / 1e6:.1f} MB free, expected room for {needed / 1e6:.1f} MB of this "
            "bucket: shared memory is full. Enlarge it (docker run --shm-size, an emptyDir of medium Memory), or send less "
            "at a time with connect(..., bucket_bytes=…)."
        ) from error


def shared_memory_root() -> Path:
    """``/dev/shm`` where there is one, otherwise the folder for temporary files."""
    shm = Path("/dev/shm")  # noqa: S108
    return shm if shm.is_dir() and os.access(shm, os.W_OK) else Path(tempfile.gettempdir())


def _removed(folder: Path, owner: int, pid: int) -> None:
    """Remove the folder; not in a process that was forked from the one that has made it."""
    if os.getpid() != pid:
        return
    shutil.rmtree(folder, ignore_errors=True)
    os.close(owner)


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
