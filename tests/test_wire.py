"""Payloads, manifests, replies and the shared folder."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasync import wire
from lorasync.errors import Mismatch, MismatchError, NonFiniteError, PayloadError, SyncError

TENSORS = {
    "b": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "a": torch.tensor([1.5, -2.0]),
    "strided": torch.arange(12.0).reshape(3, 4).T,
    "empty": torch.zeros(0, 3),
    "packed": torch.arange(5, dtype=torch.uint8),
}


def test_a_file_and_inline_bytes_give_back_the_same_bits(tmp_path):
    wire.write_safetensors(TENSORS, tmp_path / "x.safetensors")
    for got in (wire.read_safetensors(tmp_path / "x.safetensors"), wire.unpack(wire.pack(TENSORS))):
        assert got.keys() == TENSORS.keys()
        assert all(torch.equal(got[n], t) and got[n].dtype == t.dtype for n, t in TENSORS.items())
        assert wire.digest(got) == wire.digest(TENSORS)


def test_tensors_outlive_their_file(tmp_path):
    path = tmp_path / "x.safetensors"
    wire.write_safetensors(TENSORS, path)
    got = wire.read_safetensors(path)
    path.unlink()
    assert torch.equal(got["a"], TENSORS["a"])


def test_tensors_that_lie_across_their_alignment_are_read(tmp_path):
    odd = {
        "a": torch.arange(5, dtype=torch.uint8),
        "b": torch.tensor([1.5, -2.0]),
        "c": torch.ones(3).double(),
    }
    wire.write_safetensors(odd, tmp_path / "x.safetensors")
    assert wire.digest(wire.read_safetensors(tmp_path / "x.safetensors")) == wire.digest(odd)


def test_reading_a_file_again_and_again_takes_no_more_memory(tmp_path):
    def rss_in_kb() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024

    file = tmp_path / "x.safetensors"
    wire.write_safetensors({str(i): torch.ones(8, 8) for i in range(100)}, file)
    for reads in (200, 1000):
        before = rss_in_kb()
        for _ in range(reads):
            wire.read_safetensors(file)
    assert rss_in_kb() - before < 1000  # 64 bytes a tensor would be 6,400 KB


@pytest.mark.parametrize("change", ["name", "dtype", "shape", "bit"])
def test_the_digest_sees_every_change(change):
    changed = {
        "name": {"c": torch.ones(4)},
        "dtype": {"a": torch.ones(4).view(torch.int32)},
        "shape": {"a": torch.ones(2, 2)},
        "bit": {"a": torch.tensor([1.0, 1.0, 1.0, 1.0000001])},
    }[change]
    assert wire.digest(changed) != wire.digest({"a": torch.ones(4)})


@settings(max_examples=300, deadline=None)
@given(st.integers(min_value=0), st.integers(min_value=0, max_value=255), st.booleans())
def test_mutated_payloads_are_refused_or_differ_in_digest_and_never_crash(place, byte, cut):
    good = wire.pack(TENSORS)
    index = place % len(good)
    bad = good[:index] if cut else good[:index] + bytes([good[index] ^ byte]) + good[index + 1 :]
    if bad == good:
        return
    try:
        got = wire.unpack(bad)
    except PayloadError:
        return
    assert (wire.digest(got) == wire.digest(TENSORS)) == _same(got, TENSORS)


def _same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[n].dtype == right[n].dtype
        and left[n].shape == right[n].shape
        and torch.equal(wire.as_bytes(left[n]), wire.as_bytes(right[n]))
        for n in left
    )


_KINDS = st.sampled_from([torch.float32, torch.bfloat16, torch.int32, torch.uint8])
_TENSOR = st.builds(
    lambda dtype, shape, seed: (torch.arange(shape[0] * shape[1]) * 7 + seed).to(dtype).reshape(shape),
    _KINDS,
    st.tuples(st.integers(0, 3), st.integers(0, 3)),
    st.integers(0, 2),
)
_BUCKETS = st.dictionaries(st.sampled_from(["a", "b", "a|b", "a.b"]), _TENSOR, max_size=3)


@settings(max_examples=500, deadline=None)
@given(_BUCKETS, _BUCKETS)
def test_two_buckets_have_one_digest_if_and_only_if_they_are_the_same(left, right):
    assert (wire.digest(left) == wire.digest(right)) == _same(left, right)
    assert wire.digest(left) == wire.digest(dict(reversed(left.items())))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from(["x" * 32, "y" * 32]), max_size=4),
    st.lists(st.sampled_from(["x" * 32, "y" * 32]), max_size=4),
)
def test_the_digest_of_a_version_tells_its_buckets_and_their_order(left, right):
    assert (wire.digest_of_parts(left) == wire.digest_of_parts(right)) == (left == right)


def test_a_truncated_file_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    wire.write_safetensors(TENSORS, path)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(PayloadError, match=r"x\.safetensors"):
        wire.read_safetensors(path)


def test_the_folder_is_private_and_leads_nowhere_else(tmp_path, monkeypatch):
    box = wire.Mailbox.create()
    monkeypatch.setattr(wire, "_made_here", {})  # as in another process
    try:
        assert box.folder.stat().st_mode & 0o777 == 0o700
        assert wire.Mailbox.open(str(box.folder)) is not None
        with pytest.raises(PayloadError, match="file name"):
            box.payload("../secret")
        with pytest.raises(PayloadError, match="mailbox"):
            wire.Mailbox.open(str(tmp_path))
        box.folder.chmod(0o755)
        with pytest.raises(PayloadError, match="0700"):
            wire.Mailbox.open(str(box.folder))
    finally:
        box.remove()
    assert wire.Mailbox.open(str(box.folder)) is None


@pytest.mark.parametrize("here", [True, False], ids=["one process", "two processes"])
def test_replies_are_read_once_by_rank(here):
    made = wire.Mailbox.create()
    box = wire.Mailbox.open(str(made.folder)) if here else wire.Mailbox(made.folder)
    try:
        assert (box is made) == here
        box.reply(3, 1, {"ok": True})
        box.reply(3, 0, {"ok": False})
        box.reply(4, 0, {"ok": True})
        assert made.collect(3) == {0: {"ok": False}, 1: {"ok": True}}
        assert made.collect(3) == {}
    finally:
        made.remove()


def test_a_worker_s_error_arrives_as_the_same_error():
    mismatch = MismatchError("two differ", [Mismatch("w", "1", "2", "Fix it.")])
    again = wire.error_from_dict(wire.error_as_dict(mismatch))
    assert isinstance(again, MismatchError)
    assert again.mismatches == mismatch.mismatches
    assert str(again) == str(mismatch)
    assert isinstance(wire.error_from_dict(wire.error_as_dict(NonFiniteError("x"))), NonFiniteError)
    foreign = wire.error_from_dict(wire.error_as_dict(ZeroDivisionError("y")))
    assert type(foreign) is SyncError
    assert "ZeroDivisionError" in str(foreign)


@pytest.mark.parametrize("text", ["", "{", "[[1]]", '[["w", "complex64", [1]]]', '[["w", "float32", ["x"]]]'])
def test_a_malformed_manifest_is_refused(text):
    with pytest.raises(PayloadError):
        wire.manifest_from_text(text)


_DIE = """
import os
from lorasync.wire import Mailbox
print(Mailbox.create().folder, flush=True)
os.kill(os.getpid(), 9)
"""


def test_folders_of_dead_trainers_are_swept_those_of_live_ones_stay_and_the_lock_ends_with_the_folder():
    handles = len(list(Path("/proc/self/fd").iterdir()))
    unowned = Path(tempfile.mkdtemp(prefix="lorasync-", dir=wire.shared_memory_root()))
    live = wire.Mailbox.create()
    left = Path(subprocess.run([sys.executable, "-c", _DIE], capture_output=True, text=True).stdout.strip())
    assert live.folder != left
    box = wire.Mailbox.create()
    try:
        assert (box.folder / "owner").read_text() == f"{os.getpid()}\n"
        assert not left.exists()
        assert live.folder.exists()
        assert unowned.exists()  # who made it, and whether they live, is not known
    finally:
        live.remove()
        box.remove()
        unowned.rmdir()
    assert len(list(Path("/proc/self/fd").iterdir())) == handles


GOOD_CONTROL = {"op": "hello", "protocol": 1, "lorasync": "0", "session": "s", "call": 1, "mailbox": ""}
GOOD_UPDATE = {"op": "bucket", "session": "s", "version": 1, "call": 1}


@pytest.mark.parametrize(
    ("kind", "good", "change"),
    [
        (wire.Control, GOOD_CONTROL, {"op": "erase"}),
        (wire.Control, GOOD_CONTROL, {"call": "1"}),
        (wire.Control, GOOD_CONTROL, {"call": True}),
        (wire.Control, GOOD_CONTROL, {"mailbox": None}),
        (wire.Control, GOOD_CONTROL, {"bucket": b"x"}),
        (wire.Control, GOOD_CONTROL, {"in_flight": "x"}),
        (wire.Update, GOOD_UPDATE, {"op": "hello"}),
        (wire.Update, GOOD_UPDATE, {"payload": "text"}),
        (wire.Update, GOOD_UPDATE, {"path": b"x"}),
        (wire.Update, GOOD_UPDATE, {"version": 1.5}),
    ],
)
def test_a_message_with_a_field_of_the_wrong_type_is_refused_by_name(kind, good, change):
    kind(**good)
    with pytest.raises(PayloadError, match=next(iter(change))):
        kind(**{**good, **change})


@pytest.mark.parametrize("name", ["..", "../x", "a/b", "/etc/passwd", "x\0y"])
def test_no_payload_name_leads_out_of_the_folder(name):
    with pytest.raises(PayloadError, match="file name"):
        wire.Mailbox(Path("/dev/shm/lorasync-x")).payload(name)
