"""What is checked before memory of another process is read; opening it needs a GPU (tests/gpu)."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasync.errors import PayloadError
from lorasync.shared_gpu import Handle, Openings, bytes_of, checksum, layout_as_text, layout_of, views

HANDLE = Handle("00" * 64, 1024, 0, "aa", 0, "bb", event_sync=True)


def test_a_bucket_is_read_back_from_its_layout() -> None:
    bucket = {
        "a": torch.randn(3, 5),
        "b": torch.arange(7, dtype=torch.int8),
        "c": torch.randn(2, dtype=torch.bfloat16),
    }
    layout = layout_of(bucket)
    buffer = torch.zeros(bytes_of(layout), dtype=torch.uint8)
    for name, place in views(buffer, layout).items():
        place.copy_(bucket[name])
    assert all(torch.equal(view, bucket[name]) for name, view in views(buffer, layout).items())
    assert all(view.data_ptr() % 16 == buffer.data_ptr() % 16 for view in views(buffer, layout).values())


@settings(deadline=None)  # the first call makes the weights
@given(st.integers(0, 300), st.data())
def test_the_checksum_sees_any_byte(size: int, data: st.DataObject) -> None:
    buffer = torch.tensor(
        data.draw(st.lists(st.integers(0, 255), min_size=size, max_size=size)), dtype=torch.uint8
    )
    before = checksum(buffer, size)
    assert checksum(buffer.clone(), size) == before
    if size:
        buffer[data.draw(st.integers(0, size - 1))] ^= data.draw(st.integers(1, 255))
        assert checksum(buffer, size) != before


def test_the_checksum_sees_words_that_change_places() -> None:
    words = torch.arange(64, dtype=torch.int64)
    swapped = words.clone()
    swapped[[3, 40]] = words[[40, 3]]
    assert checksum(words.view(torch.uint8), 512) != checksum(swapped.view(torch.uint8), 512)


def test_a_handle_survives_the_wire() -> None:
    assert Handle.from_text(HANDLE.to_text()) == HANDLE


@pytest.mark.parametrize(
    "change",
    [
        {"memory": "zz"},
        {"memory": 3},
        {"size": "1"},
        {"size": -1},
        {"offset": True},
        {"more": 1},
        {"memory": "00" * 4096},
    ],
)
def test_a_malformed_handle_is_refused(change: dict[str, object]) -> None:
    fields = {**json.loads(HANDLE.to_text()), **change}
    with pytest.raises(PayloadError, match="GPU handle: malformed"):
        Handle.from_text(json.dumps(fields))
    with pytest.raises(PayloadError, match="GPU handle: malformed"):
        Handle.from_text("[")


def test_a_worker_without_a_gpu_opens_nothing() -> None:
    with pytest.raises(PayloadError, match="on a worker on cpu"):
        Openings(torch.device("cpu")).read(HANDLE.to_text(), "[]", "0" * 16)


def an_opened_buffer(size: int) -> Openings:
    openings = Openings(torch.device("cpu"))
    openings._opened = ("handle", torch.zeros(size, dtype=torch.uint8))
    return openings


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ('[["a", "float32", [1000]]]', "expected at most the buffer's 1024"),
        ('[["a", "float32", [-1]]]', "negative"),
        ('[["a", "float32", [1]], ["a", "float32", [1]]]', "a name twice"),
        ('[["a", "object", [1]]]', "dtype"),
        ('[["a"]]', "layout: malformed"),
        ("", "layout: malformed"),
    ],
)
def test_a_layout_leads_nowhere_else(layout: str, message: str) -> None:
    with pytest.raises(PayloadError, match=message):
        an_opened_buffer(1024).read("handle", layout, "0" * 16)


def test_altered_bytes_are_not_read() -> None:
    layout = [("a", torch.float32, (4,))]
    openings = an_opened_buffer(256)
    right = checksum(torch.zeros(256, dtype=torch.uint8), 256)
    assert openings.read("handle", layout_as_text(layout), right)["a"].tolist() == [0.0] * 4
    openings._opened[1][5] = 1  # type: ignore[index]
    with pytest.raises(PayloadError, match="bytes were altered"):
        openings.read("handle", layout_as_text(layout), right)
