"""Writing sharded safetensors one tensor at a time, into a folder that appears only when it is complete."""

from __future__ import annotations

import errno
import glob
import json
import os
import platform
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from lorasync.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path
    from typing import IO

    from torch import Tensor

    from lorasync.source import ParamMeta

# The names that safetensors has for dtypes (its format's README).
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
if hasattr(torch, "float8_e8m0fnu"):  # torch 2.7
    _DTYPES[torch.float8_e8m0fnu] = "F8_E8M0"
DTYPES = {name: dtype for dtype, name in _DTYPES.items()}
_ALIGN = 8


@contextmanager
def complete_or_nothing(out: Path, needed: int, *, overwrite: bool) -> Iterator[Path]:
    """Give a folder to fill; it becomes ``out`` at the end, or vanishes with an exception.

    Args:
        out: Where the model shall be.
        needed: Bytes that will be written.
        overwrite: Replace what is at ``out`` (only at the very end).

    Raises:
        ExportError: ``out`` is in use, or the disk is too small or gets full.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not overwrite:
        raise ExportError(
            f"{out}: got something there already, expected an empty place. "
            "Pass overwrite=True (--overwrite on the command line) or move it."
        )
    parent = out.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(out, parent)
        _check_space(parent, needed)
        partial = parent / f"{_partial(out)}{os.getpid()}"
        partial.mkdir()
    except OSError as error:
        raise _explained(error, out, needed) from error
    try:
        yield partial
        _replace(partial, out)
    except OSError as error:
        raise _explained(error, out, needed) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _partial(out: Path) -> str:
    return f".{out.name}.partial-{platform.node()}-"


def _remove_abandoned(out: Path, parent: Path) -> None:
    """Remove what runs on this machine left behind that were killed, so that nothing could clean up after them."""
    for folder in parent.glob(f"{glob.escape(_partial(out))}*"):
        process = folder.name.removeprefix(_partial(out))
        if process.isdigit() and (int(process) == os.getpid() or not _alive(int(process))):
            shutil.rmtree(folder, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ExportError(
            f"{folder}: got {free / 1e9:.2f} GB free, expected {needed / 1e9:.2f} GB for the merged model. "
            "Free some space or choose another disk. Nothing was written."
        )


def _explained(error: OSError, out: Path, needed: int) -> OSError:
    if isinstance(error, ExportError):
        return error
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ExportError(
            f"{out}: the disk is full, expected room for {needed / 1e9:.2f} GB. What was begun is removed."
        )
    return ExportError(f"{out}: can't be written ({error}). What was begun is removed.")


def _replace(partial: Path, out: Path) -> None:
    """Put the complete folder where ``out`` is; what was there is back if that fails half-way."""
    if not out.exists():
        partial.rename(out)
        return
    old = out.absolute().parent / f".{out.name}.old-{os.getpid()}"
    out.rename(old)
    try:
        partial.rename(out)
    except BaseException:
        old.rename(out)
        raise
    if old.is_dir() and not old.is_symlink():
        shutil.rmtree(old, ignore_errors=True)
    else:
        old.unlink()


def write_shards(
    folder: Path, metadata: Sequence[ParamMeta], tensors: Iterable[tuple[str, Tensor]], *, shard_bytes: int
) -> None:
    """Write the stream that ``metadata`` describes as one safetensors file, or several with an index.

    The index is written last, so that an unfinished folder doesn't load.
    """
    stream = iter(tensors)
    shards = _cut(metadata, shard_bytes)
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = (
            "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        )
        with (folder / file).open("wb") as sink:
            sink.write(_header(shard))
            for meta in shard:
                name, tensor = next(stream)
                assert (name, tensor.dtype, tuple(tensor.shape)) == (meta.name, meta.dtype, meta.shape), name
                _write(sink, tensor)
            sink.flush()
            os.fsync(sink.fileno())
        where.update({meta.name: file for meta in shard})
    if len(shards) > 1:
        total = sum(map(size, metadata))
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def size(meta: ParamMeta) -> int:
    """Return the bytes of one tensor."""
    return meta.dtype.itemsize * torch.Size(meta.shape).numel()


def _cut(metadata: Sequence[ParamMeta], shard_bytes: int) -> list[list[ParamMeta]]:
    shards: list[list[ParamMeta]] = [[]]
    used = 0
    for meta in metadata:
        if shards[-1] and used + size(meta) > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(meta)
        used += size(meta)
    return shards


def _header(shard: Sequence[ParamMeta]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for meta in shard:
        end = at + size(meta)
        entries[meta.name] = {
            "dtype": _DTYPES[meta.dtype],
            "shape": list(meta.shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGN)
    return len(text).to_bytes(8, "little") + text


def _write(sink: IO[bytes], tensor: Tensor) -> None:
    if tensor.numel():
        flat: Any = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        sink.write(memoryview(flat))
