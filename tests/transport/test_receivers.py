"""All transports on a worker's side: only what the last handshake has agreed on is taken."""

from __future__ import annotations

import json

import pytest
import torch

from lorasync.bucket import Bucket
from lorasync.errors import PayloadError
from lorasync.transport import inline
from lorasync.transport.folder import shared_memory_root
from lorasync.transport.receivers import Receivers

BUCKET = Bucket({"w": torch.arange(6.0)})


@pytest.fixture
def receivers():
    receivers = Receivers(torch.device("cpu"))
    yield receivers
    receivers.close()


def take(receivers: Receivers) -> torch.Tensor:
    parcel = inline.Sender().put(BUCKET)
    return receivers.take(parcel.way, parcel.fields, parcel.payload, parcel.digest)["w"]


def test_before_a_handshake_nothing_is_taken(receivers):
    with pytest.raises(PayloadError, match=r"got 'inline', expected one of the handshake's: none"):
        take(receivers)


def test_what_was_agreed_on_is_taken_until_another_handshake_or_the_end(receivers):
    assert receivers.agree({"inline": {}}) == {"inline": ""}
    assert torch.equal(take(receivers), BUCKET["w"])
    receivers.agree({"in_process": {}})
    with pytest.raises(PayloadError, match=r"expected one of the handshake's: in_process"):
        take(receivers)
    receivers.agree({"inline": {}})
    receivers.close()
    with pytest.raises(PayloadError, match="handshake's: none"):
        take(receivers)


@pytest.mark.parametrize("name", ["pigeon", "", "Inline"])
def test_an_unknown_transport_is_refused_beside_those_that_work(receivers, name):
    refused = receivers.agree({name: {}, "inline": {}})
    assert refused == {name: "not known to this version of lorasync", "inline": ""}
    with pytest.raises(PayloadError, match=r"handshake's: inline\."):
        receivers.take(name, {}, b"", "")
    assert torch.equal(take(receivers), BUCKET["w"])


@pytest.mark.parametrize("folder", ["/", "", "..", "relative", str(shared_memory_root() / "lorasync-gone")])
def test_a_transport_that_can_t_even_be_tried_is_refused_and_no_error_of_the_handshake(receivers, folder):
    refused = json.loads(json.dumps(receivers.agree({"shared_memory": {"folder": folder}, "inline": {}})))
    assert refused["shared_memory"]
    assert refused["inline"] == ""
    with pytest.raises(PayloadError, match=r"handshake's: inline\."):
        receivers.take("shared_memory", {"file": "0", "layout": "[]"}, b"", "")
