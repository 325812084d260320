"""The memory of factors that wait for a commit: used again, never lost while somebody may still refer to it."""

from __future__ import annotations

import torch

from lorasync.bucket import Bucket
from lorasync.receive.staging import Staging

TENSORS = Bucket({"a": torch.ones(2), "b": torch.full((3,), 2.0)})


def staged(staging: Staging) -> Bucket[torch.Tensor]:
    staging.add(TENSORS)
    return staging.take(1)


def test_what_was_given_back_is_used_again_also_after_an_update_that_was_given_up() -> None:
    staging = Staging([(name, t.dtype, tuple(t.shape)) for name, t in TENSORS.items()], torch.device("cpu"))
    first, second = staged(staging), staged(staging)
    staging.give_back(first)
    staging.give_back(second)
    staging.add(Bucket({"a": TENSORS["a"]}))
    staging.drop()
    again = [staged(staging), staged(staging)]
    assert {id(tensors) for tensors in again} == {id(first), id(second)}
    assert all(torch.equal(tensors[name], t) for tensors in again for name, t in TENSORS.items())


def test_with_a_dtype_tensors_are_rounded_to_it_once_on_their_way() -> None:
    fine = Bucket({"a": torch.tensor([1.0, 1 + 2**-9, -(1 + 3 * 2**-9)])})
    staging = Staging([("a", torch.float32, (3,))], torch.device("cpu"), dtype=torch.bfloat16)
    staging.add(fine)
    taken = staging.take(1)["a"]
    assert taken.dtype == torch.bfloat16
    assert torch.equal(taken, fine["a"].to(torch.bfloat16))
