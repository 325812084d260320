"""An engine for what a real one can't be made to do on demand: its workers are the real `WorkerEngine`, applying to dicts.

Messages, compare-and-swap, digests and answers are the product's own; only what a worker does with tensors is
replaced, and vLLM around it. `tests/e2e/test_stub.py` shows that a real engine answers the same.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Collection, Mapping
from types import SimpleNamespace
from typing import Any

import torch

from lorasync.errors import SyncError
from lorasync.receive.conversation import Conversation
from lorasync.receive.described import Described
from lorasync.receive.engine import WorkerEngine
from lorasync.wire import ADAPTER_IDS, Hello


class Slots:
    """An applier that keeps versions: the whole of an adapter's, or the last two of factors."""

    def __init__(self, worker: StubWorker, *, adapter: bool) -> None:
        self.worker, self.adapter, self.changes_weights = worker, adapter, not adapter
        self.takes_merges = False
        self.staged: dict[str, torch.Tensor] = {}
        self.current = worker.version if worker.version in worker.held else -1
        self.previous = -1

    def describe(self) -> Described:
        llm = self.worker.llm
        if not self.adapter:
            return Described(notes=tuple(llm.notes))
        return Described(llm.capacity, self.current > 0, llm.others, tuple(llm.notes))

    def receive(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.worker.llm.happens("receive")
        self.staged |= {n: t.clone() for n, t in tensors.items()}

    receive_base = receive

    def commit(self, version: int, in_flight: Collection[int]) -> None:
        self.worker.llm.happens("commit in the worker")
        self._keep(set(in_flight) - {version})
        self.worker.held[version] = self.staged
        self.previous, self.current, self.staged = self.current, version, {}

    def rollback(self, in_flight: Collection[int]) -> None:
        self.worker.llm.happens("rollback in the worker")
        if self.previous < 0:
            raise SyncError("rollback: there is no version before this one on this connection.")
        back = self.previous
        self.worker.held.setdefault(back, {})
        self._keep({*in_flight, back})
        self.previous, self.current = self.current, back

    def undo(self) -> bool:
        self.staged = {}
        return False

    def hand_over(self) -> None:
        self.staged = {}

    def close(self, in_flight: Collection[int]) -> None:
        self._keep(set(in_flight))

    def _keep(self, versions: set[int]) -> None:
        if self.adapter:
            for gone in self.worker.held.keys() - versions:
                del self.worker.held[gone]


class Weights:
    """An applier of merged weights: what comes is live at once."""

    changes_weights = takes_merges = True

    def __init__(self, worker: StubWorker) -> None:
        self.worker, self.touched = worker, False

    def describe(self) -> Described:
        return Described(notes=tuple(self.worker.llm.notes))

    def receive(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.worker.llm.happens("load")
        self.worker.live |= {n: t.clone() for n, t in tensors.items()}
        self.touched = True

    receive_base = receive

    def commit(self, version: int, in_flight: Collection[int]) -> None:
        self.worker.llm.happens("commit in the worker")
        self.touched = False

    def rollback(self, in_flight: Collection[int]) -> None:
        raise SyncError(
            "rollback: merged weights replace the old ones in place. Push the older policy instead."
        )

    def undo(self) -> bool:
        touched, self.touched = self.touched, False
        return touched

    def close(self, in_flight: Collection[int]) -> None:
        self.undo()


class StubWorker(WorkerEngine):
    """One worker: the product's own, but for the applier."""

    def __init__(self, llm: StubLLM, rank: int, parallel: dict[str, Any]) -> None:
        self.llm = llm
        self.live: dict[str, torch.Tensor] = {}
        self.held: dict[int, dict[str, torch.Tensor]] = {}
        config = SimpleNamespace(
            parallel_config=SimpleNamespace(**{"world_size": 1, **parallel, "rank": rank}),
            model_config=SimpleNamespace(dtype=llm.dtype, is_multimodal_model=llm.multimodal),
            lora_config=SimpleNamespace(lora_dtype=llm.dtype),
        )
        super().__init__(None, config, torch.device("cpu"), torch.nn.Linear(1, 1))
        self.conversation = StubConversation(self)

    @property
    def version(self) -> int:
        return self.conversation.version

    @property
    def closed(self) -> str:
        return self.conversation.closed


class StubConversation(Conversation):
    """The product's own, but for the applier."""

    def __init__(self, worker: StubWorker) -> None:
        super().__init__(worker.served)
        self.worker = worker

    def _applier_for(self, hello: Hello) -> Any:
        kind = json.loads(hello.strategy)["kind"]
        return Weights(self.worker) if kind == "load" else Slots(self.worker, adapter=kind == "adapter")


class StubCore:
    """Stands for vLLM's client of an engine core."""


class StubLLM:
    """Looks like a `vllm.LLM` whose engine core is in another process.

    Attributes:
        on: what happens at a point, by its name: one of vLLM's calls, a message's ``op``, or a step in a worker.
        calls: which of vLLM's calls were made, and messages by their ``op``.
        in_flight: unfinished requests, by id: the adapter request that each names.
    """

    def __init__(
        self,
        *,
        workers: int = 1,
        dtype: torch.dtype = torch.float32,
        capacity: int = 4,
        multimodal: bool = False,
        first_rank: int = 0,
        **parallel: Any,
    ) -> None:
        self.capacity, self.others, self.dtype, self.notes = capacity, 0, dtype, ()
        self.multimodal = multimodal
        self.on: dict[str, Callable[[], Any]] = {}
        self.calls: list[str] = []
        self.versions: list[str] = []
        self.in_flight: dict[str, Any] = {}
        self._serial = threading.Lock()  # one thing at a time, as in vLLM's engine core
        parallel = {"world_size": workers, **parallel}
        self.workers = [StubWorker(self, first_rank + n, parallel) for n in range(workers)]
        self.llm_engine = self  # as far as it is asked
        config = SimpleNamespace(backend="lorasync")
        parallel_config = SimpleNamespace(**parallel)
        self.vllm_config = SimpleNamespace(parallel_config=parallel_config, weight_transfer_config=config)
        self.engine_core = StubCore()
        self.output_processor = self

    # vLLM's own

    def collective_rpc(
        self, method: str, timeout: float | None = None, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> list[Any]:
        assert method == "weight_transfer_engine"
        message, payload = json.loads(json.dumps(args[0])), args[1]  # JSON-safe, as some routes want it
        with self._serial:
            self.happens(message["op"])
            return [worker(message, payload) for worker in self.workers]

    def reset_prefix_cache(self) -> bool:
        with self._serial:
            return self.happens("reset_prefix_cache") is not False

    def reset_encoder_cache(self) -> None:
        with self._serial:
            self.happens("reset_encoder_cache")

    def set_weight_version(self, version: str) -> None:
        with self._serial:
            self.happens("name")
            self.versions.append(version)

    def has_unfinished_requests(self) -> bool:
        return bool(self.in_flight)

    @property
    def request_states(self) -> dict[str, Any]:
        return {
            name: SimpleNamespace(lora_request=r, lora_name=getattr(r, "served_as", ""))
            for name, r in self.in_flight.items()
        }

    # for the tests

    def generate(self, **request: Any) -> int | None:
        """What vLLM's front end does, and the version that the engine answers with; None is the base.

        A request for an adapter that no worker holds ends the engine.
        """
        if "lora_request" not in request:
            return None
        name = request["lora_request"].lora_name  # where `RequestState` reads it
        version = int(request["lora_request"].lora_int_id) - ADAPTER_IDS
        assert all(version in worker.held for worker in self.workers), f"EngineDeadError: {name}"
        return version

    def happens(self, point: str) -> Any:
        self.calls.append(point)
        return self.on[point]() if point in self.on else None


class Client:
    """An engine elsewhere, as a user's own object reaches it."""

    def __init__(self, llm: StubLLM) -> None:
        self.llm = llm

    def collective_rpc(
        self, method: str, timeout: float | None = None, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> list[Any]:
        return self.llm.collective_rpc(method, timeout, args, kwargs)

    def reset_prefix_cache(self) -> None:
        self.llm.reset_prefix_cache()


def raising(error: BaseException) -> Callable[[], Any]:
    def happens() -> Any:
        raise error

    return happens


__all__ = ["Client", "StubLLM", "StubWorker", "raising"]
