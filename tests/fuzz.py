"""Mutated payloads, manifests and messages for the receiver's parsers."""

from __future__ import annotations

import contextlib
import json
import pickle
import random
from collections.abc import Iterator
from typing import Any
from unittest import mock


def mutated(good: bytes, chance: random.Random) -> bytes:
    """Safetensors bytes that something has happened to."""
    return chance.choice(_BYTES)(good, chance)


def mutated_bytes(good: bytes, chance: random.Random) -> bytes:
    """Bytes without a header of their own that something has happened to."""
    return chance.choice((_bits, _cut, _longer, _moved, _noise, _pickle))(good, chance)


@contextlib.contextmanager
def any_digest() -> Iterator[None]:
    """No digest refuses, so that what comes before it has to."""
    with mock.patch("lorasync.transport.shared_memory.check_digest"):
        yield


def _bits(good: bytes, chance: random.Random) -> bytes:
    bad = bytearray(good)
    for _ in range(chance.randint(1, 8)):
        bad[chance.randrange(len(bad))] ^= 1 << chance.randrange(8)
    return bytes(bad)


def _cut(good: bytes, chance: random.Random) -> bytes:
    return good[: chance.randrange(len(good))]


def _longer(good: bytes, chance: random.Random) -> bytes:
    return good + chance.randbytes(chance.randint(1, 64))


def _moved(good: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(good))
    return good[at:] + good[:at]


def _noise(good: bytes, chance: random.Random) -> bytes:
    return chance.randbytes(chance.randint(0, 256))


def _pickle(good: bytes, chance: random.Random) -> bytes:
    return pickle.dumps({"weights": chance.randbytes(16)})


def _length(good: bytes, chance: random.Random) -> bytes:
    length = chance.choice((0, 1, 7, len(good), 1 << 31, 1 << 63, (1 << 64) - 1, chance.getrandbits(64)))
    return length.to_bytes(8, "little") + good[8:]


def _header(good: bytes, chance: random.Random) -> bytes:
    """A header that is read, and says something else."""
    length = int.from_bytes(good[:8], "little")
    entries: dict[str, Any] = json.loads(good[8 : 8 + length])
    name = chance.choice([n for n in entries if n != "__metadata__"])
    entry = entries[name]
    change = chance.randrange(8)
    if change == 0:
        entries[name + "x"] = entries.pop(name)
    elif change == 1:
        entry["dtype"] = chance.choice(("F16", "BF16", "I32", "F64", "U8", "BOOL", "F4", "", "C64", 7, None))
    elif change == 2:
        entry["shape"] = entry["shape"][::-1]
    elif change == 3:
        entry["shape"] = chance.choice(([], [1], [-1], [1 << 62], [1 << 40, 1 << 40], ["2"], None, {"a": 1}))
    elif change == 4:
        entry["data_offsets"] = [chance.randint(0, 1 << 40) for _ in range(chance.randint(0, 3))]
    elif change == 5:
        del entries[name]
    elif change == 6:
        entries["__metadata__"] = chance.choice((7, [], {"a": 1}, "x"))
    else:
        entry[chance.choice(("dtype", "shape", "data_offsets"))] = junk(chance)
    text = json.dumps(entries, default=str).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + good[8 + length :]


_BYTES = (_bits, _bits, _cut, _longer, _moved, _noise, _pickle, _length, _header, _header, _header)


def junk(chance: random.Random, depth: int = 2) -> Any:
    """Any JSON value, or bytes."""
    simple = (
        None, True, False, 0, -1, 1 << 70, 1.5, float("nan"), "", "x", "../..", "/etc/passwd", "\0", "é" * 40, b"",
        b"\x80\x04.",
    )  # fmt: skip
    if depth and chance.random() < 0.3:
        inner = [junk(chance, depth - 1) for _ in range(chance.randint(0, 3))]
        return inner if chance.random() < 0.5 else {str(i): value for i, value in enumerate(inner)}
    return chance.choice(simple)


def changed_message(good: dict[str, Any], chance: random.Random) -> Any:
    """The fields of a message with one or two of them replaced, dropped or added."""
    bad = dict(good)
    for _ in range(chance.randint(1, 2)):
        what = chance.randrange(4)
        if what == 0 and bad:
            del bad[chance.choice(sorted(bad))]
        elif what == 1:
            bad["field" + str(chance.randrange(10))] = junk(chance)
        elif bad:
            bad[chance.choice(sorted(bad))] = junk(chance)
    return bad if chance.random() < 0.98 else junk(chance)


def changed_text(good: str, chance: random.Random) -> str:
    """A JSON text with a value replaced somewhere inside, or with a piece of the text itself damaged."""
    if chance.random() < 0.5:
        at = chance.randrange(len(good))
        return (
            good[:at]
            + chance.choice(("", "]", "{", '"', "-1", "null", "é"))
            + good[at + chance.randint(0, 3) :]
        )
    value = json.loads(good)
    _replace_somewhere(value, chance)
    return json.dumps(value, default=str)


def _replace_somewhere(value: Any, chance: random.Random) -> None:
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    if not keys:
        return
    key = chance.choice(keys)
    if isinstance(value[key], (dict, list)) and value[key] and chance.random() < 0.8:
        _replace_somewhere(value[key], chance)
    else:
        value[key] = junk(chance)
