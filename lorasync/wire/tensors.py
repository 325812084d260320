"""Tensors as bytes, their dtypes by name, and digests that both sides compute alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import safetensors
import safetensors.torch
import torch

from lorasync.errors import PayloadError

Tensors = Mapping[str, torch.Tensor]
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


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype as it travels: ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """The dtype of a name that has travelled.

    Raises:
        PayloadError: if no tensor of such a dtype travels.
    """
    if name not in _DTYPES:
        raise PayloadError(f"dtype {name!r} is not one that travels; expected one of {', '.join(_DTYPES)}.")
    return _DTYPES[name]


def nbytes(tensors: Tensors) -> int:
    """Bytes of the tensors' elements."""
    return sum(t.numel() * t.element_size() for t in tensors.values())


def pack(tensors: Tensors) -> bytes:
    """The tensors as safetensors bytes, for payloads that ride in the call."""
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
