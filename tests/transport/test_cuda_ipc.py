"""What is checked before memory of another process is read; opening it needs a GPU (tests/gpu)."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lorasync as ls
from lorasync.bucket import Bucket, Item, made
from lorasync.errors import PayloadError
from lorasync.kernels import Int8Base, NestedAbsmax, PackedBase, PendingMerge, PlainBase
from lorasync.kernels.checksum import Checksum
from lorasync.transport.cuda_ipc import NO_SHARED_GPU, Receiver, Sender
from lorasync.transport.cuda_ipc.handle import Handle, handles_as_text, handles_from_text
from lorasync.transport.cuda_ipc.items import Parts, Storages, as_text, from_text
from tests import models

HANDLE = Handle("00" * 64, 1024, 0, "aa", 0, "bb", event_sync=True)


def bases() -> dict[str, Any]:
    torch.manual_seed(0)
    packed = torch.randint(0, 256, (8 * 64,), dtype=torch.uint8)
    absmax, code = torch.rand(16), torch.linspace(-1, 1, 16)
    nested = NestedAbsmax(torch.rand(1), torch.randn(256), 0.125)
    small = torch.randint(0, 256, (16,), dtype=torch.uint8)
    return {
        "plain": PlainBase(torch.randn(8, 128, dtype=torch.bfloat16)),
        "nf4": PackedBase(packed, absmax, code, 64, (8, 128), torch.bfloat16),
        "nested": PackedBase(packed, small, code, 64, (8, 128), torch.bfloat16, nested),
        "int8": Int8Base(torch.randint(-9, 9, (8, 128), dtype=torch.int8), torch.rand(8), torch.bfloat16),
    }


def a_merge(base: Any, **settings: Any) -> PendingMerge:
    a, b = torch.randn(4, 128, dtype=torch.bfloat16), torch.randn(8, 4, dtype=torch.bfloat16)
    return PendingMerge(base, a, b, 0.3, torch.bfloat16, make=lambda: torch.empty(0), **settings)


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The storage that a tensor lies in, as bytes."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())  # type: ignore[call-overload]


def read_back(bucket: dict[str, Item]) -> dict[str, Any]:
    storages = Storages()
    text = as_text(bucket, storages)
    opened = [*map(raw, storages.tensors)]
    return from_text(text, opened)


# ------------------------------------------------------------------------------------ what is written


@pytest.mark.parametrize("kind", bases())
@pytest.mark.parametrize("settings", [{}, {"magnitude": torch.rand(8)}], ids=["lora", "dora"])
def test_a_merge_is_read_back_as_it_was(kind: str, settings: dict[str, Any]) -> None:
    merge = a_merge(bases()[kind], **settings)
    back = read_back({"w": merge})["w"]
    assert isinstance(back, PendingMerge)
    assert (back.scaling, back.dtype, back.fan_in_fan_out) == (0.3, torch.bfloat16, False)
    assert back.lora_a.data_ptr() == merge.lora_a.data_ptr()  # where it lies, not a copy
    assert torch.equal(back.base.dequantize(), merge.base.dequantize())
    want = torch.empty(8, 128, dtype=torch.bfloat16)
    merge_into(merge, want)
    assert torch.equal(back.make(), want)


def merge_into(merge: PendingMerge, out: torch.Tensor) -> None:
    from lorasync.kernels import merge_job

    merge_job(merge.whole_job(out))


def test_tensors_are_read_back_as_they_were() -> None:
    whole = torch.arange(100, dtype=torch.float32)
    bucket: dict[str, Item] = {
        "held": torch.nn.Parameter(torch.randn(3, 5)).detach(),
        "part": whole[10:20].view(2, 5),
        "again": whole[50:],
        "small": torch.arange(7, dtype=torch.int8),
        "empty": torch.empty(0, 4),
    }
    back = read_back(bucket)
    assert list(back) == list(bucket)
    for name, item in bucket.items():
        assert torch.equal(back[name], made(item))
        assert back[name].dtype == item.dtype


def test_a_model_is_lent_as_a_whole() -> None:
    """Everything that a source lends of a real model comes back in the same values."""
    policy = models.with_adapter(models.tiny_llama())
    lent = ls.MergedSource(policy).lend()[0]
    back = read_back(lent)
    for name, tensor in ls.MergedSource(policy):
        got = back[name].make() if isinstance(back[name], PendingMerge) else back[name]
        assert torch.equal(got, tensor), name
    frozen, fresh = Parts.of(lent).frozen, Parts.of(lent).fresh
    assert len(frozen) == 14  # seven linear weights a layer
    assert {t.data_ptr() for t in fresh} >= {
        p.data_ptr() for n, p in policy.named_parameters() if "lora_" in n
    }


# ------------------------------------------------------------------------------------- what is refused


def changed(text: str, path: list[Any], value: Any) -> str:
    data = json.loads(text)
    at = data
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["w", "lora_a", "offset"], 1 << 40),
        (["w", "lora_a", "offset"], -8),
        (["w", "lora_a", "offset"], 1),
        (["w", "lora_a", "shape"], [4, 1 << 40]),
        (["w", "lora_a", "shape"], [-4, -128]),
        (["w", "lora_a", "storage"], 99),
        (["w", "lora_a", "storage"], -1),
        (["w", "lora_a", "dtype"], "object"),
        (["w", "lora_a"], None),
        (["w", "lora_a"], 3),
        (["w", "scaling"], "1"),
        (["w", "base", "kind"], "Handle"),
        (["w", "base", "code", "shape"], [15]),
        (["w", "base", "absmax", "shape"], [15]),
        (["w", "base", "packed", "shape"], [100]),
        (["w", "base", "blocksize"], 0),
        (["w", "base", "blocksize"], 1),
        (["w", "base", "shape"], [1 << 20, 128]),
        (["w", "base", "offset"], 1 << 20),
        (["w", "base", "row_stride"], 1),
        (["w", "kind"], "PlainBase"),
        (["w", "kind"], []),
        (["w"], 3),
        (["w"], {}),
    ],
)
def test_a_layout_leads_nowhere_else(path: list[Any], value: Any) -> None:
    storages = Storages()
    text = as_text({"w": a_merge(bases()["nf4"])}, storages)
    opened = [*map(raw, storages.tensors)]
    assert from_text(text, opened)
    with pytest.raises(PayloadError, match="layout: malformed"):
        from_text(changed(text, path, value), opened)


@pytest.mark.parametrize("text", ["", "[", "[]", "3", '{"a": {"kind": "dtype", "name": "int8"}, "a": 3}'])
def test_no_layout_at_all_is_refused(text: str) -> None:
    with pytest.raises(PayloadError, match="layout: malformed"):
        from_text(text, [])


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_a_mutated_layout_is_read_or_refused(data: st.DataObject) -> None:
    """Whatever it became: no other error, and nothing outside of the storages."""
    storages = Storages()
    text = as_text({"w": a_merge(bases()["nested"]), "t": torch.zeros(8)}, storages)
    opened = [*map(raw, storages.tensors)]
    at = data.draw(st.integers(0, len(text) - 1))
    upto = data.draw(st.integers(at, min(len(text), at + 9)))
    text = text[:at] + data.draw(st.text('0123456789.-e,:[]{}"ntuls', max_size=6)) + text[upto:]
    try:
        found = from_text(text, opened)
    except PayloadError:
        return
    ends = [r.data_ptr() + r.numel() for r in opened]
    parts = Parts.of(found)
    for tensor in [*parts.frozen, *parts.fresh]:
        inside = [
            r.data_ptr() <= tensor.data_ptr() and tensor.data_ptr() + tensor.nbytes <= end
            for r, end in zip(opened, ends, strict=True)
        ]
        assert any(inside) or tensor.numel() == 0


def test_a_handle_survives_the_wire() -> None:
    assert handles_from_text(handles_as_text([HANDLE, HANDLE])) == [HANDLE, HANDLE]


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
    (fields,) = json.loads(handles_as_text([HANDLE]))
    with pytest.raises(PayloadError, match="GPU handle: malformed"):
        handles_from_text(json.dumps([{**fields, **change}]))
    with pytest.raises(PayloadError, match="GPU handle: malformed"):
        handles_from_text("[")


def test_a_worker_without_a_gpu_opens_nothing_and_says_so_in_the_handshake() -> None:
    assert "no GPU" in Receiver(torch.device("cpu")).refuses({})
    with pytest.raises(PayloadError, match="on a worker on cpu"):
        Receiver(torch.device("cpu")).take(
            {"handles": handles_as_text([HANDLE]), "layout": "{}"}, b"", "0" * 32
        )


# ---------------------------------------------------------------------- both sides, memory in one process


def test_a_trainer_without_a_gpu_does_not_offer_it_and_sends_nothing_by_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert torch.cuda.is_available() or Sender().offer() is None
    bucket: Bucket[Item] = Bucket({"w": torch.zeros(4)})
    for gpu in ("", "GPU-of-an-engine"):
        assert not Sender().takes(bucket, SimpleNamespace(name="engine", ways=("cuda_ipc",), gpu=gpu))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert Sender().offer() == {}
    monkeypatch.setenv(NO_SHARED_GPU, "1")
    assert Sender().offer() is None


class HereOnly:
    """Stands in for CUDA's handles, which need a GPU and two processes (tests/gpu): memory by its number."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shown: list[torch.Tensor] = []
        monkeypatch.setattr(Handle, "open", lambda handle, device: self.shown[handle.offset])

    def export(self, tensor: torch.Tensor) -> Handle:
        self.shown.append(raw(tensor))
        return Handle("00", self.shown[-1].numel(), len(self.shown) - 1, "", 0, "", event_sync=False)


def test_a_bucket_is_the_same_for_both_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    here = HereOnly(monkeypatch)
    sender, receiver = Sender(here.export), Receiver(torch.device("cpu"))
    held, merge = torch.nn.Parameter(torch.randn(4, 4)), a_merge(bases()["nf4"])
    askew = torch.zeros(3, 2).T
    lent: Bucket[Item] = Bucket({"held": held.detach(), "merge": merge, "askew": askew}, key=object())
    parcels, buckets = [], []
    for step in range(3):
        held.data.fill_(step)
        askew.fill_(step)
        parcel = sender.put(lent)
        bucket = receiver.take(parcel.fields, b"", parcel.digest)
        parcels.append(parcel)
        buckets.append(bucket)
        assert torch.equal(bucket["held"], held.detach())  # type: ignore[arg-type]
        assert bucket["askew"].tolist() == [[step] * 3] * 2  # type: ignore[union-attr]
    assert len({json.dumps(parcel.fields, sort_keys=True) for parcel in parcels}) == 1
    assert len({parcel.digest for parcel in parcels}) == 3
    assert buckets[1] is buckets[0]
    assert len(here.shown) == 7  # the held one, the packed base's three, A and B; and the buffer


def test_what_a_source_made_is_copied_into_a_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    here = HereOnly(monkeypatch)
    sender, receiver = Sender(here.export), Receiver(torch.device("cpu"))
    for step in range(3):
        for names in ("ab", "cd"):  # two buckets, one buffer
            made_now = Bucket({name: torch.full((5,), float(step), dtype=torch.bfloat16) for name in names})
            parcel = sender.put(made_now)
            bucket = receiver.take(parcel.fields, b"", parcel.digest)
            assert {name: t.tolist() for name, t in bucket.items()} == {n: [step] * 5 for n in names}  # type: ignore[union-attr]
    assert len(here.shown) == 2
    sender.put(Bucket({"a": torch.zeros(1000)}))
    assert len(here.shown) == 3


def test_what_moves_is_shown_anew_and_the_old_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    here = HereOnly(monkeypatch)
    sender, receiver = Sender(here.export), Receiver(torch.device("cpu"))
    param = torch.nn.Parameter(torch.zeros(4))
    first = sender.put(Bucket({"w": param.detach()}, key=object()))
    receiver.take(first.fields, b"", first.digest)
    param.data = torch.ones(4)
    second = sender.put(Bucket({"w": param.detach()}, key=object()))
    assert second.fields["handles"] != first.fields["handles"]
    assert receiver.take(second.fields, b"", second.digest)["w"].tolist() == [1.0] * 4  # type: ignore[union-attr]
    assert len(receiver._pages) == 1


def test_after_a_failed_push_the_buffer_is_kept_and_after_the_end_it_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = HereOnly(monkeypatch)
    sender, receiver = Sender(here.export), Receiver(torch.device("cpu"))
    first = sender.put(Bucket({"w": torch.ones(4)}))
    assert receiver.take(first.fields, b"", first.digest)["w"].tolist() == [1.0] * 4  # type: ignore[union-attr]
    sender.release()
    assert sender.put(Bucket({"w": torch.zeros(4)})).fields == first.fields
    sender.close()
    receiver.close()
    assert not sender._buffer.numel()
    assert not sender._pages
    assert not receiver._pages


@pytest.mark.parametrize("where", ["held", "base", "a"])
def test_altered_bytes_are_not_read(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    here = HereOnly(monkeypatch)
    sender, receiver = Sender(here.export), Receiver(torch.device("cpu"))
    held, merge = torch.zeros(4), a_merge(bases()["plain"])
    parcel = sender.put(Bucket({"held": held, "merge": merge}, key=object()))
    changes = {"held": held, "base": merge.base.weight, "a": merge.lora_a}  # type: ignore[union-attr]
    changes[where].view(torch.uint8)[0] ^= 1
    with pytest.raises(PayloadError, match="bytes were altered"):
        receiver.take(parcel.fields, b"", parcel.digest)


def test_a_base_that_was_written_to_is_summed_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    here = HereOnly(monkeypatch)
    sender, receiver = Sender(here.export), Receiver(torch.device("cpu"))
    merge = a_merge(bases()["plain"])
    lent: Bucket[Item] = Bucket({"merge": merge}, key=object())
    for _ in range(2):
        parcel = sender.put(lent)
        receiver.take(parcel.fields, b"", parcel.digest)
        merge.base.weight.add_(1)  # type: ignore[union-attr]


# --------------------------------------------------------------------------------------- the checksum


@settings(deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=4), st.data())
def test_the_checksum_sees_any_byte(sizes: list[int], data: st.DataObject) -> None:
    tensors = [torch.randint(0, 256, (size,), dtype=torch.uint8) for size in sizes]
    before = Checksum(tensors).now()
    assert Checksum([t.clone() for t in tensors]).now() == before
    which = data.draw(st.integers(0, len(sizes) - 1))
    if sizes[which]:
        tensors[which][data.draw(st.integers(0, sizes[which] - 1))] ^= data.draw(st.integers(1, 255))
        assert Checksum(tensors).now() != before


def test_the_checksum_sees_words_that_change_places() -> None:
    words = torch.arange(64, dtype=torch.int64)
    swapped = words.clone()
    swapped[[3, 40]] = words[[40, 3]]
    assert Checksum([words]).now() != Checksum([swapped]).now()
    assert Checksum([words, swapped]).now() != Checksum([swapped, words]).now()


def test_the_checksum_wants_whole_words_to_begin_with() -> None:
    data = torch.zeros(32, dtype=torch.uint8)
    for wrong in (data[1:], data.view(4, 8).T):
        with pytest.raises(ValueError, match="contiguous"):
            Checksum([wrong])
