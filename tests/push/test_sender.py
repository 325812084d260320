"""What trainer ranks read together is read to its end on each of them, also where an engine fails."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lorasync.errors import SyncError
from lorasync.push.engines import Engines
from lorasync.push.sender import Sender
from lorasync.push.strategies import MergeInWorker
from lorasync.wire import manifest_as_text
from tests.stub_engine import StubLLM, raising


class Base:
    """A source whose packed base is put together from all ranks."""

    def __init__(self) -> None:
        self.read: list[str] = []

    def packed_base(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name in "abcd":
            self.read.append(name)
            yield name, torch.zeros(8)


@pytest.mark.parametrize("fails", [False, True])
def test_the_packed_base_is_read_to_its_end_whatever_an_engine_says(fails):
    llm, source = StubLLM(), Base()
    engines = Engines({"engine": llm}, timeout=10.0, pause="keep", changes_weights=True)
    engines.hello('{"kind": "merge"}', manifest_as_text([]))
    sender = Sender(MergeInWorker(base="nf4"), bucket_bytes=64)
    told: Any = source
    if fails:
        llm.on["receive"] = raising(MemoryError("no room"))
        with pytest.raises(SyncError, match="no room"):
            sender.send_base(told, engines, 0)
    else:
        sender.send_base(told, engines, 0)
    assert source.read == list("abcd")
    engines.goodbye()
