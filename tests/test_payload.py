"""One bucket on its way to several engines: packed, hashed and written once."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from lorasync.errors import MismatchError
from lorasync.push.payload import Payload, buckets
from lorasync.transport.cuda_ipc import Lender
from lorasync.wire import Mailbox, digest, read_safetensors, unpack

BUCKET = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4, dtype=torch.uint8)}


@dataclass
class Place:
    folder: Mailbox | None
    gpu: str = ""


@pytest.fixture
def folders():
    boxes = [Mailbox.create() for _ in range(3)]
    yield boxes
    for box in boxes:
        box.remove()


def files(folders: list[Mailbox]) -> list[str]:
    return [path.name for box in folders for path in box.folder.glob("*.safetensors")]


def test_inside_one_process_the_tensors_are_handed_over_unhashed():
    with Payload(BUCKET, [Place(None)], Lender()) as payload:
        assert payload.fields(Place(None))["tensors"] is BUCKET
        assert payload.digest == ""


def test_a_small_bucket_rides_in_the_call_with_its_digest(folders):
    places = [Place(box) for box in folders]
    with Payload(BUCKET, places, Lender()) as payload:
        for place in places:
            fields = payload.fields(place)
            assert digest(unpack(fields["payload"])) == fields["digest"] == payload.digest == digest(BUCKET)
        assert not files(folders)


def test_a_large_bucket_is_written_once_linked_for_each_and_goes_with_the_block(folders, monkeypatch):
    monkeypatch.setattr("lorasync.push.payload.INLINE_LIMIT", 0)
    places = [Place(box) for box in folders]
    with Payload(BUCKET, places, Lender()) as payload:
        paths = [
            box.payload(payload.fields(place)["path"]) for box, place in zip(folders, places, strict=True)
        ]
        assert len({path.stat().st_ino for path in paths}) == 1
        for path in paths:
            assert digest(read_safetensors(path)) == payload.digest == digest(BUCKET)
    assert not files(folders)


def test_a_mixed_group_gets_each_its_own_form(folders, monkeypatch):
    monkeypatch.setattr("lorasync.push.payload.INLINE_LIMIT", 0)
    here, there = Place(None), Place(folders[0])
    with Payload(BUCKET, [here, there], Lender()) as payload:
        assert payload.fields(here)["tensors"] is BUCKET
        assert payload.fields(there)["digest"] == digest(BUCKET)


def test_nothing_is_left_of_a_payload_that_could_not_be_written_everywhere(folders, monkeypatch):
    monkeypatch.setattr("lorasync.push.payload.INLINE_LIMIT", 0)
    folders[1].folder.rmdir() if not any(folders[1].folder.iterdir()) else (
        folders[1].folder / "owner"
    ).unlink()
    folders[1].folder.rmdir()
    with pytest.raises(OSError):
        Payload(BUCKET, [Place(box) for box in folders], Lender())
    assert not files([folders[0], folders[2]])


def test_buckets_keep_order_and_limit_and_let_a_larger_tensor_travel_alone():
    sizes = [4, 4, 4, 100, 4]
    stream = [(str(i), torch.zeros(size, dtype=torch.uint8)) for i, size in enumerate(sizes)]
    found = [list(bucket) for bucket in buckets(iter(stream), 8)]
    assert found == [["0", "1"], ["2"], ["3"], ["4"]]
    assert list(buckets(iter([]), 8)) == []


def test_a_name_twice_in_a_bucket_is_refused():
    with pytest.raises(MismatchError, match="a second time"):
        list(buckets(iter([("a", torch.zeros(1)), ("a", torch.zeros(1))]), 100))
