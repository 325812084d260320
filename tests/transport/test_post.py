"""All transports on the trainer's side: what is offered to whom, which way a bucket goes, and when two may overlap."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from lorasync.bucket import Bucket
from lorasync.transport import in_process, inline, shared_memory
from lorasync.transport.post import CHEAPEST_FIRST, Post, ways_taken
from lorasync.transport.receivers import Receivers

SMALL = Bucket({"w": torch.zeros(8)})
LARGE = Bucket({"w": torch.zeros(inline.SMALL + 1, dtype=torch.uint8)})


@dataclass
class Place:
    ways: tuple[str, ...]
    name: str = "engine"
    gpu: str = ""


HERE, NEAR, FAR = Place(("in_process",)), Place(("shared_memory", "inline")), Place(("inline",))


@pytest.fixture
def post():
    post = Post()
    yield post
    post.close()


def test_an_engine_of_this_process_is_offered_nothing_else_and_others_never_that(post):
    assert post.offers(hands_over=True) == {"in_process": {}}
    offers = post.offers(hands_over=False)
    assert {"shared_memory", "inline"} <= offers.keys() <= set(CHEAPEST_FIRST) - {"in_process"}
    assert post.offers(hands_over=False) == offers, "one folder for all engines"


def test_what_this_trainer_can_t_use_is_not_offered():
    class Never(shared_memory.Sender):
        def offer(self):
            return None

    assert Post([Never(), inline.Sender(), in_process.Sender()]).offers(hands_over=False) == {"inline": {}}


@pytest.mark.parametrize(
    ("refused", "ways"),
    [
        ([{"inline": "", "shared_memory": "", "cuda_ipc": ""}], ("cuda_ipc", "shared_memory", "inline")),
        ([{"inline": "", "shared_memory": ""}, {"inline": "", "shared_memory": "no"}], ("inline",)),
        ([{"inline": ""}, {}], ()),
        ([{"pigeon": "", "inline": ""}], ("inline",)),
    ],
)
def test_a_way_is_taken_that_no_worker_refuses_the_cheapest_first(refused, ways):
    assert ways_taken(refused) == ways


def test_each_engine_gets_a_bucket_by_its_own_cheapest_way(post):
    for bucket, expected in ((SMALL, ["inline", "inline"]), (LARGE, ["shared_memory", "inline"])):
        post.offers(hands_over=False)
        assert [parcel.way for parcel in post.parcels(bucket, [NEAR, FAR])] == expected
        assert [post.way_of(bucket, place) for place in (NEAR, FAR)] == expected
        first, *others = post.parcels(bucket, [FAR, FAR, FAR])
        assert all(other is first for other in others), "it is written once for each way"


def test_tensors_are_written_as_they_come_where_shared_memory_is_the_cheapest_way_to_all(post):
    ways = ("cuda_ipc", "shared_memory", "inline")
    one_gpu, two_gpus = Place(ways, gpu="GPU-1"), Place(ways)
    for places, as_they_come in (
        ([NEAR, NEAR], True),
        ([NEAR, two_gpus], True),  # no bucket can be read by all its workers where it lies
        ([NEAR, one_gpu], False),
        ([NEAR, FAR], False),
        ([HERE], False),
    ):
        assert (post.pages(places, inline.SMALL + 1) is not None) == as_they_come
        assert post.pages(places, inline.SMALL) is None


@pytest.mark.parametrize("bucket", [SMALL, LARGE])
def test_tensors_that_are_read_where_they_lie_must_have_been_read_before_the_next_ones_are_made(post, bucket):
    assert post.overlap(bucket, [NEAR, FAR])
    assert not post.overlap(bucket, [HERE])
    assert not post.overlap(bucket, [NEAR, HERE])


def test_what_a_failed_push_and_an_ended_connection_have_taken_is_given_back():
    post = Post()
    folder = post.offers(hands_over=False)["shared_memory"]["folder"]
    receivers = Receivers(torch.device("cpu"))
    receivers.agree(post.offers(hands_over=False))
    (parcel,) = post.parcels(LARGE, [NEAR])
    post.release()
    assert not (Path(folder) / parcel.fields["file"]).exists()
    (again,) = post.parcels(LARGE, [NEAR])
    assert torch.equal(receivers.take(again.way, again.fields, b"", again.digest)["w"], LARGE["w"])
    assert parcel.fields["file"] != again.fields["file"]
    receivers.close()
    post.close()
    fresh = Receivers(torch.device("cpu")).agree({"shared_memory": {"folder": folder}})
    assert fresh["shared_memory"], "the folder is gone"
