"""What a bucket says of its weights, and what is kept for as long as it is the same."""

from __future__ import annotations

import pytest
import torch

from lorasync.bucket import Bucket, Item, Latest, made
from lorasync.kernels import PendingMerge, PlainBase
from lorasync.receive.staging import BucketCheck


def a_merge() -> PendingMerge:
    a, b = torch.ones(1, 4), torch.ones(8, 1)
    return PendingMerge(
        PlainBase(torch.zeros(8, 4)), a, b, 0.5, torch.bfloat16, make=lambda: torch.ones(8, 4).bfloat16()
    )


def test_a_merge_counts_as_what_it_becomes() -> None:
    bucket: Bucket[Item] = Bucket({"w": torch.zeros(3), "merge": a_merge()})
    assert bucket.nbytes == 3 * 4 + 8 * 4 * 2
    assert bucket.has_merges
    assert bucket.devices == {torch.device("cpu")}
    assert [made(item).nbytes for item in bucket.values()] == [12, 64]
    assert list(bucket) == ["w", "merge"]


def test_nothing_is_kept_of_a_bucket_that_comes_once() -> None:
    latest, calls = Latest[int](), iter(range(9))
    assert [latest.get(None, lambda: next(calls)) for _ in range(3)] == [0, 1, 2]
    first, second = object(), object()
    assert [latest.get(key, lambda: next(calls)) for key in (first, first, None, first, second, first)] == [
        3, 3, 4, 3, 5, 6,
    ]  # fmt: skip


def test_what_failed_is_not_kept() -> None:
    latest = Latest[int]()
    latest.get("a", lambda: 1)
    with pytest.raises(ZeroDivisionError):
        latest.get("b", lambda: 1 // 0)
    assert latest.get("a", lambda: 2) == 1


def test_a_key_with_a_list_in_it_is_compared_by_its_elements() -> None:
    latest, plan = Latest[int](), object()
    assert latest.get((plan, [1, 2]), lambda: 1) == latest.get((plan, [1, 2]), lambda: 2) == 1
    assert latest.get((plan, [1, 3]), lambda: 3) == 3


def test_a_reused_bucket_is_compared_with_the_handshake_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    monkeypatch.setattr("lorasync.receive.staging.check_bucket", lambda *a: looks.append(a))
    check, reused, once = (
        BucketCheck(),
        Bucket({"w": torch.zeros(1)}, key=object()),
        Bucket({"v": torch.zeros(1)}),
    )
    for bucket, received in ((reused, ()), (once, ("w",)), (reused, ()), (reused, ("w",)), (reused, ())):
        check(bucket, {}, received)
    assert (
        len(looks) == 3
    )  # the first time; what comes once; and beside what has come, where a name may come twice
