"""Buckets by every transport: what arrives is what was sent, and what can't have been sent is refused."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasync.bucket import Bucket
from lorasync.errors import PayloadError, SyncError
from lorasync.transport import in_process, inline, shared_memory
from lorasync.transport.folder import Folder, opened, shared_memory_root, sweep
from lorasync.transport.post import Post, ways_taken
from lorasync.transport.receivers import Receivers
from lorasync.wire import digest

BUCKET = Bucket(
    {
        "a": torch.arange(6.0).reshape(2, 3),
        "b": torch.arange(5, dtype=torch.uint8),
        "c": torch.randn(3, 5).to(torch.bfloat16),
        "none": torch.zeros(0, 4),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "cut": torch.arange(12.0).reshape(3, 4).t(),
    }
)
CPU = torch.device("cpu")


@dataclass
class Place:
    ways: tuple[str, ...]
    name: str = "engine"
    gpu: str = ""


@pytest.fixture
def post(monkeypatch: pytest.MonkeyPatch) -> Iterator[Post]:
    monkeypatch.setattr("lorasync.transport.shared_memory.SMALL", 0)
    post = Post()
    yield post
    post.close()


def agreed(post: Post, *, hands_over: bool = False) -> tuple[Receivers, Place]:
    receivers = Receivers(CPU)
    refused = receivers.agree(json.loads(json.dumps(post.offers(hands_over=hands_over))))
    return receivers, Place(ways_taken([refused]))


def same(found: Any, bucket: dict[str, torch.Tensor]) -> bool:
    return set(found) == set(bucket) and all(
        found[n].dtype == t.dtype and torch.equal(found[n], t) for n, t in bucket.items()
    )


@pytest.mark.parametrize("way", ["shared_memory", "inline"])
def test_what_arrives_is_what_was_sent(post, way):
    receivers, place = agreed(post)
    assert place.ways == ("shared_memory", "inline")
    (parcel,) = post.parcels(BUCKET, [Place((way,))])
    fields = json.loads(json.dumps(parcel.fields))
    assert parcel.way == way
    assert parcel.digest == digest(BUCKET)
    assert same(receivers.take(way, fields, parcel.payload, parcel.digest), BUCKET)


def test_inside_one_process_the_bucket_is_handed_over_unhashed(post):
    receivers, place = agreed(post, hands_over=True)
    assert place.ways == ("in_process",)
    (parcel,) = post.parcels(BUCKET, [place])
    assert parcel.payload is BUCKET
    assert parcel.digest == ""
    assert receivers.take("in_process", {}, parcel.payload, "") is BUCKET
    with pytest.raises(PayloadError, match="got bytes, expected the trainer's tensors"):
        receivers.take("in_process", {}, b"x", "")


def test_small_buckets_ride_in_the_call():
    post = Post()
    _, place = agreed(post)
    assert post.way_of(BUCKET, place) == "inline"
    large = Bucket({"w": torch.zeros(inline.SMALL + 1, dtype=torch.uint8)})
    assert post.way_of(large, place) == "shared_memory"
    assert post.way_of(large, Place(("inline",))) == "inline"
    post.close()


def test_a_bucket_is_written_once_for_all_engines_that_it_goes_to_in_the_same_way(post):
    shared, call = Place(("shared_memory", "inline"), "a"), Place(("inline",), "b")
    agreed(post)
    one, other, third = post.parcels(BUCKET, [shared, call, Place(("shared_memory",), "c")])
    assert one is third
    assert (one.way, other.way) == ("shared_memory", "inline")


def test_two_files_take_turns_and_the_one_before_stays_readable(post):
    receivers, _ = agreed(post)
    sender = post._senders["shared_memory"]
    made = [Bucket({"w": torch.full((1000,), float(n))}) for n in range(5)]
    parcels = [sender.put(bucket) for bucket in made[:2]]
    for parcel, bucket in zip(parcels, made, strict=False):
        assert same(receivers.take("shared_memory", parcel.fields, b"", parcel.digest), bucket)
    for bucket in made[2:]:
        parcel = sender.put(bucket)
        assert same(receivers.take("shared_memory", parcel.fields, b"", parcel.digest), bucket)
    assert len({parcel.fields["file"] for parcel in parcels}) == 2
    assert len(files(post)) == 2


def test_a_larger_bucket_gets_a_larger_file_and_the_small_one_goes(post):
    receivers, _ = agreed(post)
    sender = post._senders["shared_memory"]
    for size in (10, 10, 100_000, 50, 200_000):
        bucket = Bucket({"w": torch.arange(size)})
        parcel = sender.put(bucket)
        assert same(receivers.take("shared_memory", parcel.fields, b"", parcel.digest), bucket)
        assert len(files(post)) <= 2
    assert len(receivers._receivers["shared_memory"]._mapped) <= 2
    post.release()
    assert not files(post)


def files(post: Post) -> list[Path]:
    folder = post._senders["shared_memory"].offer()["folder"]
    return sorted(Path(folder).glob("*.bucket"))


@pytest.mark.parametrize("way", ["shared_memory", "inline"])
def test_any_altered_byte_is_refused(post, way):
    receivers, _ = agreed(post)
    (parcel,) = post.parcels(Bucket({"w": torch.arange(64, dtype=torch.uint8)}), [Place((way,))])
    payload = bytearray(parcel.payload)
    if way == "inline":
        payload[-7] ^= 1
    else:
        (file,) = files(post)
        content = bytearray(file.read_bytes())
        content[7] ^= 1
        with file.open("r+b") as opened_file:
            opened_file.write(content)
    with pytest.raises(PayloadError, match="bytes were altered"):
        receivers.take(way, parcel.fields, bytes(payload), parcel.digest)
    with pytest.raises(PayloadError, match="bytes were altered"):
        receivers.take(way, parcel.fields, parcel.payload, "0" * 32)


def test_a_file_that_was_cut_is_refused_before_it_is_read(post):
    receivers, _ = agreed(post)
    (parcel,) = post.parcels(Bucket({"w": torch.arange(10_000)}), [Place(("shared_memory",))])
    receivers.take("shared_memory", parcel.fields, b"", parcel.digest)
    (file,) = files(post)
    os.truncate(file, 100)
    with pytest.raises(PayloadError, match="got 100 bytes, expected 80000"):
        receivers.take("shared_memory", parcel.fields, b"", parcel.digest)


def test_tensors_outlive_their_file(post):
    receivers, _ = agreed(post)
    (parcel,) = post.parcels(BUCKET, [Place(("shared_memory",))])
    found = receivers.take("shared_memory", parcel.fields, b"", parcel.digest)
    post.close()
    receivers.close()
    assert same(found, BUCKET)


def test_sending_again_and_again_takes_no_more_memory_and_no_more_handles(post):
    def taken() -> tuple[int, int]:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") // 1024, len(list(Path("/proc/self/fd").iterdir()))

    receivers, place = agreed(post)
    bucket = Bucket({str(i): torch.ones(8, 8) for i in range(100)})
    for pushes in (200, 1000):
        before = taken()
        for _ in range(pushes):
            (parcel,) = post.parcels(bucket, [place])
            receivers.take(parcel.way, parcel.fields, parcel.payload, parcel.digest)
    after = taken()
    assert after[0] - before[0] < 1000  # 64 bytes a tensor would be 6,400 KB
    assert after[1] == before[1]


@pytest.mark.parametrize("name", ["", ".", "..", "../owner", "/etc/passwd", "a/b", "gone", "a\0b"])
def test_a_file_name_from_the_wire_leads_nowhere_else(post, name):
    receivers, _ = agreed(post)
    (parcel,) = post.parcels(BUCKET, [Place(("shared_memory",))])
    with pytest.raises(PayloadError):
        receivers.take("shared_memory", {**parcel.fields, "file": name}, b"", parcel.digest)


def test_a_link_in_the_folder_is_not_followed(post, tmp_path):
    receivers, _ = agreed(post)
    (parcel,) = post.parcels(BUCKET, [Place(("shared_memory",))])
    (file,) = files(post)
    (tmp_path / "secret").write_bytes(file.read_bytes())
    (file.parent / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(PayloadError, match="can't be read"):
        receivers.take("shared_memory", {**parcel.fields, "file": "link"}, b"", parcel.digest)


@pytest.mark.parametrize(
    "layout",
    [
        "",
        "{",
        "5",
        "[5]",
        "[[1]]",
        '[["w", "float32", [2], -4]]',
        '[["w", "float32", [-2], 0]]',
        '[["w", "float32", [2], 2]]',
        '[["w", "complex64", [2], 0]]',
        '[["w", "float32", [99999999], 0]]',
        '[["w", "float32", [2], 99999999999999999999]]',
        '[["w", "float32", [2], 0], ["w", "float32", [2], 0]]',
        '[["w", "float32", ["x"], 0]]',
    ],
)
def test_a_layout_that_can_t_be_is_refused(post, layout):
    receivers, _ = agreed(post)
    (parcel,) = post.parcels(BUCKET, [Place(("shared_memory",))])
    with pytest.raises(PayloadError):
        receivers.take("shared_memory", {**parcel.fields, "layout": layout}, b"", parcel.digest)


def test_a_transport_that_was_not_agreed_on_is_refused(post):
    receivers, _ = agreed(post)
    for way in ("in_process", "cuda_ipc", "pigeon"):
        with pytest.raises(PayloadError, match=r"expected one of the handshake's: inline, shared_memory"):
            receivers.take(way, {}, {}, "")
    receivers.close()
    with pytest.raises(PayloadError, match="handshake's: none"):
        receivers.take("inline", {}, b"", "")


def test_a_worker_says_why_it_does_not_take_a_transport():
    receivers = Receivers(CPU)
    refused = receivers.agree(
        {
            "pigeon": {},
            "cuda_ipc": {},
            "inline": {},
            "shared_memory": {"folder": str(shared_memory_root() / "lorasync-gone")},
        }
    )
    assert "not known" in refused["pigeon"]
    assert "no GPU" in refused["cuda_ipc"]
    assert "another host" in refused["shared_memory"]
    assert ways_taken([refused]) == ("inline",)
    assert ways_taken([refused, {**refused, "inline": "no"}]) == ()
    assert ways_taken([{"in_process": "", "inline": ""}, {"inline": ""}]) == ("inline",)


# ------------------------------------------------------------------------------------------- the folder


def test_a_folder_outside_of_shared_memory_or_open_to_others_is_refused(tmp_path):
    receivers = Receivers(CPU)
    assert "expected" in receivers.agree({"shared_memory": {"folder": str(tmp_path)}})["shared_memory"]
    folder = Folder()
    folder.path.chmod(0o755)
    assert "0700" in receivers.agree({"shared_memory": {"folder": str(folder.path)}})["shared_memory"]
    folder.path.chmod(0o700)
    assert opened(str(folder.path)) == folder.path
    folder.remove()
    assert opened(str(folder.path)) is None
    assert opened("") is None


_DIE = """
import os
from lorasync.transport.folder import Folder
folder = Folder()
print(folder.path, flush=True)
os.kill(os.getpid(), 9)
"""


def test_folders_of_dead_trainers_are_swept_those_of_live_ones_stay_and_the_lock_ends_with_the_folder():
    handles = len(list(Path("/proc/self/fd").iterdir()))
    unowned = Path(tempfile.mkdtemp(prefix="lorasync-", dir=shared_memory_root()))
    live = Folder()
    left = Path(subprocess.run([sys.executable, "-c", _DIE], capture_output=True, text=True).stdout.strip())
    assert live.path != left
    new = Folder()
    try:
        assert new.path.stat().st_mode & 0o777 == 0o700
        assert (new.path / "owner").read_text() == f"{os.getpid()}\n"
        assert not left.exists()
        assert live.path.exists()
        assert unowned.exists()  # who made it, and whether they live, is not known
    finally:
        live.remove()
        new.remove()
        unowned.rmdir()
    assert len(list(Path("/proc/self/fd").iterdir())) == handles


def test_a_folder_goes_with_its_sender():
    sender = shared_memory.Sender()
    folder = Path(sender.offer()["folder"])
    sender.put(BUCKET)
    assert folder.exists()
    del sender
    gc.collect()
    assert not folder.exists()


def test_what_sweeps_removes_says_which(monkeypatch, tmp_path):
    monkeypatch.setattr("lorasync.transport.folder.shared_memory_root", lambda: tmp_path)
    living, dead = Folder(), Folder()
    os.close(dead._remove.detach()[2][1])  # as the kernel does when a process dies
    assert sweep() == [dead.path]
    assert living.path.exists()
    living.remove()


def test_a_file_that_does_not_fit_says_so_and_leaves_nothing(post, monkeypatch):
    agreed(post)
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(SyncError, match=r"shared memory is full.*bucket_bytes"):
        post.parcels(BUCKET, [Place(("shared_memory",))])
    assert not files(post)


def test_every_transport_has_its_name():
    assert [module.NAME for module in (in_process, shared_memory, inline)] == [
        "in_process",
        "shared_memory",
        "inline",
    ]


def test_a_folder_that_somebody_has_removed_is_told_as_such(post):
    agreed(post)
    shutil.rmtree(post._senders["shared_memory"].offer()["folder"])
    with pytest.raises(SyncError, match=r"is gone.*connect\(\) again"):
        post.parcels(BUCKET, [Place(("shared_memory",))])


def test_a_forked_process_that_ends_leaves_its_parent_s_folder():
    script = (
        "import os, sys\n"
        "from lorasync.transport.folder import Folder\n"
        "folder = Folder()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    sys.exit()\n"
        "os.waitpid(child, 0)\n"
        "print(folder.path.exists())\n"
        "folder.remove()\n"
        "print(folder.path.exists())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.split() == ["True", "False"]


@pytest.mark.parametrize("harm", [lambda file: os.truncate(file, 10), lambda file: file.unlink()])
def test_a_file_that_somebody_has_cut_or_removed_is_made_anew(post, harm):
    receivers, place = agreed(post)
    for _ in range(2):
        post.parcels(BUCKET, [place])
    for file in files(post):
        harm(file)
    for _ in range(3):
        (parcel,) = post.parcels(BUCKET, [place])
        assert same(receivers.take(parcel.way, parcel.fields, b"", parcel.digest), BUCKET)
