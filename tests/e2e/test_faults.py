"""The fault table: every row breaks one thing of a push into a real vLLM, and docs/reliability.md shows the outcomes.

After each fault: the promised error; the training model bit-identical; the promised version served (token ids and
log-probabilities); a clean push recovers; nothing is left behind. ``LORASYNC_WRITE_RELIABILITY=1`` writes the page.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Listener
from pathlib import Path
from typing import Any

import pytest
import torch

import lorasync as ls
from lorasync.errors import (
    AdapterError,
    EngineClosedError,
    EngineDeadError,
    EngineNotReadyError,
    ExportError,
    MismatchError,
    NonFiniteError,
    PayloadError,
    PushInProgressError,
    StaleVersionError,
    SyncError,
    VersionGoneError,
)
from lorasync.export import merge_to_disk
from lorasync.push import MergeInWorker, ServeAdapter, Sync, connect
from lorasync.verify import logprob_gap, model_digest
from lorasync.wire import ADAPTER_IDS
from tests import models
from tests.e2e import reliability_page
from tests.e2e.dying_trainer import Calls, serve_until_gone
from tests.e2e.engines import PROMPTS, Answers, answers_of, check_alike, greedy, running_llm
from tests.e2e.faults import (
    COPIES,
    PRODUCTS,
    Bomb,
    Broken,
    Call,
    Fixed,
    NoMemory,
    Wire,
    another_file,
    engine_core_of,
    factor,
    field_change,
    from_the_middle,
    full,
    header_that_lies,
    kill,
    leaving_out,
    may_mount,
    no_more_memory,
    nth_bucket,
    payload_change,
    payloads,
    raising,
    replaced,
    shared_memory,
    with_value,
    worker_of,
)
from tests.e2e.ranks import run_two
from tests.models import tiny

pytestmark = pytest.mark.timeout(200)
MIDDLE_BUCKET = 3
STRATEGIES = ("merged", "factors", "adapter")
FILE, CALL = "through a file", "in the call"
WAYS = {FILE: 0, CALL: 4 << 20}
"""How a payload travels, and the largest one that rides in the call."""
TRANSPORTS = {FILE: "shared_memory", CALL: "inline"}
KEPT, CLOSED, RESTART = "K", "Q", "R"
LORA = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2, "max_cpu_loras": 4}


# ------------------------------------------------------------------------------------------- the bench


@dataclass
class Bench:
    """One engine, one policy, and a connection; `served` is what the engine must answer right now."""

    strategy: str
    policy: Any
    wire: Wire
    base: str
    tmp: Path
    sync: Sync = None  # type: ignore[assignment]
    answers: dict[int, Answers] = None  # type: ignore[assignment]
    version_seed: int = 0

    def source(self, policy: Any = None) -> Any:
        policy = self.policy if policy is None else policy
        return ls.MergedSource(policy) if self.strategy == "merged" else ls.FactorSource(policy)

    def apply(self) -> Any:
        return {"merged": None, "factors": MergeInWorker(base="device"), "adapter": ServeAdapter("policy")}[
            self.strategy
        ]

    def connect(self, source: Any = None, wire: Any = None) -> Sync:
        return connect(
            self.source() if source is None else source,
            self.wire if wire is None else wire,
            self.apply(),
            timeout=60,
            bucket_bytes=1 << (21 if self.strategy == "merged" else 16),  # more than three buckets
        )

    def push(self, seed: int) -> str:
        """Push a clean version; return how its buckets have travelled."""
        models.move(self.policy, seed=seed)
        self.sync.source = self.source()
        transport = self.sync.send_weights().transport
        self.version_seed = seed
        return transport

    def serves(self, seed: int) -> bool:
        return greedy(self.wire, **self.sync.request()) == self.answers[seed]

    def ready(self) -> None:
        """Version "seed 0" is served, and the policy has moved on to what the next push would bring."""
        self.wire.on_bucket = self.wire.on_control = self.wire.beside_hello = None
        try:
            if self.version_seed != 0:
                self.push(0)
            assert self.serves(0)
        except (SyncError, AssertionError):  # the row before has failed: don't let it spoil this one
            self.sync.shutdown()
            self.sync = self.connect()
            self.push(0)
        models.move(self.policy, seed=1)
        self.version_seed = 0


@pytest.fixture(scope="module")
def engine(base) -> Iterator[Any]:
    """One engine in a process of its own serves all rows but those that end it."""
    with running_llm(base, dtype="float32", block_size=32, **LORA) as llm:
        yield llm


@pytest.fixture(scope="module", params=["adapter", "factors", "merged"])
def bench(request, engine, base, tmp_path_factory) -> Iterator[Bench]:
    yield from _bench(request.param, engine, base, tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def engine_here(base) -> Iterator[Any]:
    """An engine in this process, where what a worker allocates can be made to fail; some layers are written by then."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("lorasync.receive.restore.LOAD_BYTES", 1)
        with running_llm(base, in_process=True, dtype="float32", **LORA) as llm:
            yield llm


@pytest.fixture(scope="module", params=["adapter", "factors", "merged"])
def bench_here(request, engine_here, base, tmp_path_factory) -> Iterator[Bench]:
    yield from _bench(request.param, engine_here, base, tmp_path_factory.mktemp("bench"))


def _bench(strategy: str, engine: Any, base: str, tmp: Path) -> Iterator[Bench]:
    before = shared_memory()
    made = Bench(strategy, tiny(base), Wire(engine), base, tmp)
    made.sync, made.answers = made.connect(), {}
    for seed in (2, 1, 0):
        made.push(seed)
        made.answers[seed] = greedy(made.wire, **made.sync.request())
        assert logprob_gap(made.policy, made.wire, PROMPTS, request=made.sync.request()).max < 0.001
    assert made.answers[0] != made.answers[1] != made.answers[2] != made.answers[0]
    yield made
    made.sync.shutdown()
    assert shared_memory() <= before, "a connection that has ended leaves something in shared memory"


@pytest.fixture(scope="module", autouse=True)
def page() -> Iterator[reliability_page.Page]:
    """The outcomes of this run, for docs/reliability.md."""
    found = reliability_page.Page()
    yield found
    if os.environ.get("LORASYNC_WRITE_RELIABILITY"):
        found.write()


# -------------------------------------------------------------------------------------------- the rows


@dataclass(frozen=True)
class Row:
    """A fault of a push, or of a handshake.

    Attributes:
        what: what is injected, as the page says it.
        error: the type that is promised.
        message: what the message must say; by way, if that differs.
        inject: puts the fault in place for as long as the context lasts.
        state: what is promised afterwards, by strategy; a strategy that is not named is not affected.
        act: what the trainer does; `send_weights` by default.
        sends_nothing: not one byte may have reached the engine.
    """

    what: str
    error: type[BaseException]
    message: str | dict[str, str]
    inject: Callable[[Bench], Any]
    state: dict[str, str]
    act: Callable[[Bench], Any] = lambda bench: bench.sync.send_weights()
    sends_nothing: bool = False

    def __str__(self) -> str:
        return self.what


MIDDLE = {"merged": CLOSED, "factors": KEPT, "adapter": KEPT}
NOWHERE = {"merged": KEPT, "factors": KEPT, "adapter": KEPT}
FACTORS = {"factors": KEPT, "adapter": KEPT}
MERGED = {"merged": KEPT}


@contextlib.contextmanager
def _source(bench: Bench, change: Any) -> Iterator[None]:
    bench.sync.source = from_the_middle(bench.source(), change)
    try:
        yield
    finally:
        bench.sync.source = bench.source()


@contextlib.contextmanager
def _on_wire(bench: Bench, **hooks: Any) -> Iterator[None]:
    for name, hook in hooks.items():
        setattr(bench.wire, name, hook)
    try:
        yield
    finally:
        bench.wire.on_bucket = bench.wire.on_control = bench.wire.beside_hello = None


def _wanted() -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=8, logprobs=0, ignore_eos=True)


def _other_version_expected(info: dict[str, Any]) -> None:
    if info["op"] == "commit":
        info["expected"] -= 1


def _payload(bench: Bench, change: Callable[[bytes], bytes]) -> Any:
    return _on_wire(bench, on_bucket=payload_change(change, bucket=MIDDLE_BUCKET))


def _flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def _pickled(bench: Bench) -> Any:
    return _payload(bench, lambda _: pickle.dumps(Bomb(bench.tmp / "unpickled")))


def _param(part: str, value: float) -> Callable[[Bench], Any]:
    return lambda b: replaced(factor(b.policy, part), with_value(factor(b.policy, part), value))


@contextlib.contextmanager
def _product_out_of_range(bench: Bench) -> Iterator[None]:
    """Factors that are finite, and fp32 can't hold what they make."""
    with contextlib.ExitStack() as stack:
        for part in ("A", "B"):
            stack.enter_context(_param(part, 1e25)(bench))
        yield


@contextlib.contextmanager
def _trained_beside(bench: Bench) -> Iterator[None]:
    norm = bench.policy.get_base_model().model.norm.weight
    norm.requires_grad_(True)
    try:
        yield
    finally:
        norm.requires_grad_(False)


@contextlib.contextmanager
def _other_adapter(bench: Bench) -> Iterator[None]:
    bench.policy.add_adapter("other", bench.policy.peft_config["default"])
    bench.policy.set_adapter("other")
    try:
        yield
    finally:
        bench.policy.set_adapter("default")
        bench.policy.delete_adapter("other")


def _bad_base(bench: Bench) -> Any:
    weight = bench.policy.get_base_model().model.layers[1].mlp.up_proj.base_layer.weight
    return replaced(weight, with_value(weight, float("nan")))


def _shard(bench: Bench) -> Any:
    return replaced(factor(bench.policy, "B"), torch.empty(0))


def _rank(bench: Bench) -> Any:
    stack = contextlib.ExitStack()
    a, b = factor(bench.policy, "A"), factor(bench.policy, "B")
    stack.enter_context(replaced(a, torch.randn(4, a.shape[1])))
    stack.enter_context(replaced(b, torch.randn(b.shape[0], 4)))
    return stack


@contextlib.contextmanager
def _scaling(bench: Bench) -> Iterator[None]:
    layer = bench.policy.get_base_model().model.layers[1].mlp.up_proj
    layer.scaling["default"] *= 2
    try:
        yield
    finally:
        layer.scaling["default"] /= 2


@contextlib.contextmanager
def _merged_in_place(bench: Bench) -> Iterator[None]:
    layer = bench.policy.get_base_model().model.layers[1].mlp.up_proj
    kept = layer.base_layer.weight.data.clone()
    layer.merge()
    try:
        yield
    finally:
        layer.unmerge()
        layer.base_layer.weight.data.copy_(kept)


@contextlib.contextmanager
def _without_files(bench: Bench) -> Iterator[None]:
    """The next bucket needs a file: a push that fails before its first one frees those that are kept."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("lorasync.transport.shared_memory.SMALL", 0)
        at_once = raising(ConnectionError("at the start"))
        bench.sync.source = Broken(bench.source(), lambda index, name, tensor: at_once(name, tensor))
        with pytest.raises(ConnectionError, match="at the start"):
            bench.sync.send_weights()
        assert not payloads(), "a push that has failed keeps its files"
        bench.sync.source = bench.source()
        yield


@contextlib.contextmanager
def _full_shared_memory(bench: Bench) -> Iterator[None]:
    """A real file system of 8 KB over the connection's folder, or else what a full one does at the first call."""
    with (
        _without_files(bench),
        pytest.MonkeyPatch.context() as patched,
        contextlib.ExitStack() as stack,
    ):
        if may_mount(bench.tmp):
            stack.enter_context(full(bench.wire.folder, size="8k"))
        else:
            patched.setattr(os, "posix_fallocate", _no_space)
        yield


def _no_space(*_: object) -> None:
    raise OSError(28, "No space left on device")


@contextlib.contextmanager
def _out_of_memory_in_a_worker(bench: Bench) -> Iterator[None]:
    """The second bucket is in a file that the worker has not mapped yet, and can't."""
    with (
        _without_files(bench),
        no_more_memory(worker_of(bench.wire.llm)) as take,
        _on_wire(bench, on_bucket=nth_bucket(lambda call: take(), bucket=2)),
    ):
        yield


@contextlib.contextmanager
def _id_is_taken(bench: Bench) -> Iterator[None]:
    """A user's adapter sits in the engine under the id that the next version would get."""
    mine = _saved_adapter(bench, ADAPTER_IDS + bench.sync.version + 1, "mine")
    assert bench.wire.llm_engine.add_lora(mine)
    theirs = greedy(bench.wire, lora_request=mine)
    try:
        yield
    finally:
        assert greedy(bench.wire, lora_request=mine) == theirs
        bench.wire.llm_engine.remove_lora(mine.lora_int_id)


def _saved_adapter(bench: Bench, number: int, name: str) -> Any:
    from vllm.lora.request import LoRARequest

    folder = bench.tmp / name
    tiny(bench.base, seed=7).save_pretrained(folder)
    return LoRARequest(name, number, str(folder))


@contextlib.contextmanager
def _other_base(bench: Bench) -> Iterator[None]:
    weight = bench.policy.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight
    with replaced(weight, weight.data * 1.5):
        yield


def _connect_anew(bench: Bench) -> None:
    with bench.connect():
        pass


def _without_bytes(bench: Bench) -> Any:
    """What carries the calls makes text of the bytes, as JSON does."""
    return _on_wire(bench, beside_hello=repr)


def _connect_with(bench: Bench, source: Any) -> None:
    with bench.connect(source):
        pass


def _other_architecture(bench: Bench) -> None:
    other = models.with_adapter(models.tiny_llama(vocab_size=49152, num_hidden_layers=3, hidden_size=64))
    _connect_with(bench, bench.source(other))


def _changed_names(bench: Bench, change: Callable[[str, torch.Tensor], dict[str, torch.Tensor]]) -> None:
    tensors = {n: t for name, tensor in bench.source() for n, t in change(name, tensor).items()}
    _connect_with(bench, Fixed(tensors))


def _push_twice(bench: Bench) -> None:
    """A second push while the first is in its source; the first one goes through."""
    inside, go_on, failed = threading.Event(), threading.Event(), []

    def wait(index: int, name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        if index == 1:
            inside.set()
            assert go_on.wait(30)
        return [(name, tensor)]

    bench.sync.source = Broken(bench.source(), wait)

    def first() -> None:
        try:
            bench.sync.send_weights()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=first)
    thread.start()
    assert inside.wait(30)
    try:
        bench.sync.send_weights()
    finally:
        go_on.set()
        thread.join(60)
        assert not failed, failed
        assert bench.serves(1)  # what the first push brought
        bench.push(0)
        models.move(bench.policy, seed=1)


@contextlib.contextmanager
def _generating(bench: Bench) -> Iterator[None]:
    """Requests are in flight; they have to be answered as the same batch is that nothing disturbs."""

    def enqueue() -> None:
        bench.wire.llm.enqueue(list(PROMPTS), _wanted(), use_tqdm=False, **bench.sync.request())

    def answers() -> Answers:
        return answers_of(bench.wire.llm.wait_for_completion(use_tqdm=False))

    enqueue()
    undisturbed = answers()
    check_alike(undisturbed, bench.answers[0])
    enqueue()
    try:
        yield
    finally:
        assert answers() == undisturbed, "requests in flight lost their version"


def _request_of_a_version_that_is_gone(bench: Bench) -> None:
    kept = bench.sync.request()
    for seed in (1, 2, 0):
        bench.push(seed)
        assert bench.serves(seed)
    models.move(bench.policy, seed=1)
    greedy(bench.wire, PROMPTS[:1], **kept)


ROWS = (
    Row("the source raises in the middle", ConnectionError, "the trainer died here",
        lambda b: _source(b, raising(ConnectionError("the trainer died here"))), MIDDLE),
    Row("out of memory while merging or copying (trainer)", RuntimeError, "can't allocate memory",
        lambda b: NoMemory(after=3), {"merged": CLOSED}),
    Row("out of memory in a worker while it reads a bucket", SyncError, "can't be mapped .*Cannot allocate memory",
        _out_of_memory_in_a_worker, MIDDLE),
    Row("a name twice in the stream", MismatchError, "a second time",
        lambda b: _source(b, lambda n, t: [(n, t), (n, t)]), MIDDLE),
    Row("a tensor missing in the stream", PayloadError, "never came",
        lambda b: _source(b, lambda n, t: []), MIDDLE),
    Row("an unknown name in the stream", MismatchError, r"elsewhere.*only names of the handshake",
        lambda b: _source(b, lambda n, t: [("elsewhere." + n, t)]), MIDDLE),
    Row("a tensor of another shape in the stream", MismatchError, r"got float32 \(.*expected float32 \(",
        lambda b: _source(b, lambda n, t: [(n, torch.cat([t, t]))]), MIDDLE),
    Row("a tensor of another dtype in the stream", MismatchError, r"got float64 .*expected float32",
        lambda b: _source(b, lambda n, t: [(n, t.double())]), MIDDLE),
    Row("NaN in A", NonFiniteError, "NaN or Inf", _param("A", float("nan")), NOWHERE, sends_nothing=True),
    Row("NaN in B", NonFiniteError, "NaN or Inf", _param("B", float("nan")), NOWHERE, sends_nothing=True),
    Row("Inf in A", NonFiniteError, "NaN or Inf", _param("A", float("inf")), NOWHERE, sends_nothing=True),
    Row("-Inf in B", NonFiniteError, "NaN or Inf", _param("B", float("-inf")), NOWHERE, sends_nothing=True),
    Row("NaN in a base weight", NonFiniteError, "NaN or Inf", _bad_base, MERGED, sends_nothing=True),
    Row("A and B whose product leaves the served dtype's range", NonFiniteError, r"float32.*up_proj",
        _product_out_of_range, {"merged": KEPT, "factors": KEPT}, sends_nothing=True),
    Row("parameters are trained beside the adapter", AdapterError, r"model\.norm\.weight.*modules_to_save",
        _trained_beside, FACTORS, sends_nothing=True),
    Row("another adapter is active than at connect()", AdapterError, r"'other'.*'default'", _other_adapter, NOWHERE,
        sends_nothing=True),
    Row("an empty tensor for a factor (an ungathered ZeRO-3 shard)", MismatchError, r"up_proj", _shard, NOWHERE),
    Row("the adapter's rank changes after the handshake", MismatchError, r"up_proj.*rank", _rank,
        FACTORS),
    Row("the adapter's scaling changes after the handshake", MismatchError, r"scaling", _scaling, FACTORS,
        sends_nothing=True),
    Row("the adapter is merged in place", AdapterError, "merged", _merged_in_place, NOWHERE, sends_nothing=True),
    Row("the payload is cut short", PayloadError, {FILE: "bytes, expected .* of its layout", CALL: "safetensors"},
        lambda b: _payload(b, lambda d: d[:-1]), MIDDLE),
    Row("one bit of the payload is flipped", PayloadError, "digest", lambda b: _payload(b, _flipped), MIDDLE),
    Row("the payload's header lies about its length", PayloadError,
        {FILE: "with shape .* can.t be", CALL: "safetensors"},
        lambda b: _on_wire(b, on_bucket=header_that_lies(bucket=MIDDLE_BUCKET)), MIDDLE),
    Row("the payload is a pickle", PayloadError, {FILE: "bytes, expected .* of its layout", CALL: "safetensors"},
        _pickled, MIDDLE),
    Row("the payload names a file outside of its folder", PayloadError, "file name",
        lambda b: _on_wire(b, on_bucket=another_file("../../etc/passwd", bucket=MIDDLE_BUCKET)), MIDDLE),
    Row("the payload's file is gone", PayloadError, "can't be read .*No such file",
        lambda b: _on_wire(b, on_bucket=another_file("gone.bucket", bucket=MIDDLE_BUCKET)), MIDDLE),
    Row("a payload without its digest", PayloadError, "digest",
        lambda b: _on_wire(b, on_bucket=field_change(bucket=MIDDLE_BUCKET, digest="")), MIDDLE),
    Row("a message of another type", SyncError, "version: got str, expected int",
        lambda b: _on_wire(b, on_bucket=field_change(bucket=MIDDLE_BUCKET, version="1")), MIDDLE),
    Row("shared memory is full", SyncError, r"shared memory is full.*bucket_bytes", _full_shared_memory, NOWHERE),
    Row("a user's own adapter has the id of the next version", SyncError, r"lora_int_id.*Remove it", _id_is_taken,
        {"adapter": KEPT}),
    Row("two pushes at once on one connection", PushInProgressError, "unaffected",
        lambda b: contextlib.nullcontext(), NOWHERE, act=_push_twice),
    Row("a push of weights during generation", SyncError, "requests in flight.*between generate",
        _generating, {"merged": KEPT, "factors": KEPT}),
    Row("another trainer has pushed meanwhile", StaleVersionError, "somebody else has pushed",
        lambda b: _on_wire(b, on_control=_other_version_expected), MIDDLE),
    Row("a request for a version that is gone", VersionGoneError, r"policy@.*sync\.request\(\)",
        lambda b: contextlib.nullcontext(), {"adapter": KEPT}, act=_request_of_a_version_that_is_gone),
    Row("another protocol version on the other side", MismatchError, "Install the same version on both sides",
        lambda b: _on_wire(b, on_control=lambda info: info.update(protocol=999)), NOWHERE, act=_connect_anew,
        sends_nothing=True),
    Row("what carries the calls can't carry bytes", EngineNotReadyError, "bytes.*Nothing was touched", _without_bytes,
        NOWHERE, act=_connect_anew, sends_nothing=True),
    Row("another base than the one trained on", MismatchError, r"layers\.0\.mlp\.up_proj.*base|base.*layers\.0",
        _other_base, FACTORS, act=_connect_anew, sends_nothing=True),
    Row("a model of another architecture", MismatchError, r"nothing was touched", lambda b: contextlib.nullcontext(),
        NOWHERE, act=_other_architecture, sends_nothing=True),
    Row("a name missing in the handshake", MismatchError, r"norm",
        lambda b: contextlib.nullcontext(), MERGED, sends_nothing=True,
        act=lambda b: _changed_names(b, lambda n, t: {} if "layers.1.input_layernorm" in n else {n: t})),
    Row("PEFT's names instead of the checkpoint's", MismatchError, r"checkpoint_name",
        lambda b: contextlib.nullcontext(), MERGED, sends_nothing=True,
        act=lambda b: _changed_names(b, lambda n, t: {f"base_model.model.{n}": t})),
)  # fmt: skip


ROWS_IN_THIS_PROCESS = (
    Row("out of memory in a worker while it merges or installs", RuntimeError, "can't allocate memory",
        lambda b: NoMemory(3, PRODUCTS if b.strategy == "factors" else COPIES),  # copies into the slots: the first ones
        FACTORS),
    Row("an incomplete reload", MismatchError, r"not loaded as the load plan says.*qkv_proj",
        lambda b: leaving_out(b.wire.llm, "layers.1.self_attn.k_proj"), {"merged": CLOSED, "factors": KEPT}),
)  # fmt: skip


@pytest.mark.parametrize(
    ("row", "way"),
    [(row, way) for row in ROWS for way in WAYS if not (row.sends_nothing and WAYS[way])],
    ids=str,
)
def test_a_fault_has_the_promised_outcome(
    row: Row, way: str, bench: Bench, page: reliability_page.Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorasync.transport.shared_memory.SMALL", WAYS[way])
    _check(row, bench, page, way)


@pytest.mark.parametrize("row", ROWS_IN_THIS_PROCESS, ids=str)
def test_a_fault_inside_of_a_worker(row: Row, bench_here: Bench, page: reliability_page.Page) -> None:
    _check(row, bench_here, page, "")


def _check(row: Row, bench: Bench, page: reliability_page.Page, way: str) -> None:
    if bench.strategy not in row.state:
        pytest.skip("not a fault of this strategy")
    bench.ready()
    kept, sent = model_digest(bench.policy), bench.wire.buckets
    before, old_payloads = shared_memory(), payloads()
    message = row.message if isinstance(row.message, str) else row.message[way]
    began = time.monotonic()
    with pytest.raises(row.error, match=f"(?s){message}") as caught, row.inject(bench):
        row.act(bench)
    seconds = time.monotonic() - began
    if row.act is Row.act:
        assert shared_memory() <= before, "a push that has failed leaves a payload in shared memory"
    assert model_digest(bench.policy) == kept, "the training model changed"
    if row.sends_nothing:
        assert bench.wire.buckets == sent, "bytes were sent"
    if row.state[bench.strategy] == CLOSED:
        with pytest.raises(EngineClosedError, match=r"Call send_weights\(\) again"):
            bench.sync.request()
    else:
        assert bench.serves(0), "the version before is not served"
    transport = bench.push(2)  # not what has failed: nothing of that may be left
    assert bench.serves(2), "a clean push did not recover"
    assert TRANSPORTS.get(way, "in_process") in transport
    assert len(payloads()) <= 2, "more than two files are kept in shared memory"
    assert shared_memory() - payloads() == before - old_payloads, "something is left in shared memory"
    assert _adapters(bench) <= 2, "adapters are left in the engine"
    assert not (bench.tmp / "unpickled").exists()
    page.add(row.what, bench.strategy, type(caught.value), row.state[bench.strategy], seconds)


def _adapters(bench: Bench) -> int:
    return sum(number > ADAPTER_IDS for number in bench.wire.llm_engine.list_loras())


def test_an_adapter_pushed_during_generation_leaves_requests_in_flight_their_version(bench: Bench) -> None:
    if bench.strategy != "adapter":
        pytest.skip("weights that change need an engine that stands still: see the row")
    bench.ready()
    with _generating(bench):
        bench.sync.send_weights()
    bench.version_seed = 1
    assert bench.serves(1)


def test_a_user_s_adapter_with_our_name_and_ours_each_give_their_own_answers(bench: Bench) -> None:
    if bench.strategy != "adapter":
        pytest.skip("no adapter is served")
    bench.ready()
    mine = _saved_adapter(bench, 7, f"policy@{bench.sync.version}")
    long = [" ".join(PROMPTS * 4)]  # more than a block of the prefix cache

    def both() -> list[Answers]:
        ours = bench.sync.request()["lora_request"]
        return [greedy(bench.wire, [*PROMPTS, *long], lora_request=one) for one in (mine, ours, mine, ours)]

    theirs, ours, *again = both()
    assert again == [theirs, ours]
    assert ours[: len(PROMPTS)] == bench.answers[0]
    assert all(a != b for a, b in zip(theirs, ours, strict=True))
    bench.push(1)
    assert bench.serves(1)
    after = both()
    assert after[0] == theirs
    assert bench.wire.reset_prefix_cache()
    assert both() == after, "cached keys and values of another version were used"
    bench.wire.llm_engine.remove_lora(7)


def test_an_engine_without_the_backend_is_refused_and_goes_on_serving(base, tmp_path, page: Any) -> None:
    with running_llm(base, backend=None, dtype="float32", **LORA) as llm:
        before = greedy(llm)
        for strategy in STRATEGIES:
            with pytest.raises(EngineNotReadyError, match="weight_transfer_config") as caught:
                Bench(strategy, tiny(base), Wire(llm), base, tmp_path).connect()
            assert greedy(llm) == before
            page.add("vLLM is started without the backend", strategy, type(caught.value), KEPT, 0.0)


def test_a_push_after_shutdown_is_refused_and_the_engine_goes_on(bench: Bench, page: Any) -> None:
    bench.ready()
    old, sent = bench.sync, bench.wire.buckets
    old.shutdown()
    for verb in (old.send_weights, old.request, old.rollback, old.digests):
        with pytest.raises(SyncError, match=r"shut down: connect\(\) again") as caught:
            verb()
    assert bench.wire.buckets == sent
    if bench.strategy != "adapter":  # its versions have gone with the connection
        assert greedy(bench.wire) == bench.answers[0]
    bench.sync = bench.connect()
    for seed in (2, 0):
        bench.push(seed)
        assert bench.serves(seed)
    page.add("a push after shutdown()", bench.strategy, type(caught.value), KEPT, 0.0)


def test_a_worker_that_can_not_reach_the_trainer_s_folder_gets_all_in_the_call(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another host, in a container of its own, or as another user."""
    monkeypatch.setattr("lorasync.transport.shared_memory.SMALL", 0)
    bench.ready()

    def elsewhere(message: dict[str, Any]) -> None:
        if message["op"] == "hello":
            offers = {**message["offers"], "shared_memory": {"folder": "/dev/shm/lorasync-elsewhere"}}
            message["offers"] = offers

    with _on_wire(bench, on_control=elsewhere):
        sync = bench.connect()
    try:
        models.move(bench.policy, seed=1)
        assert sync.send_weights().transport == "inline"
        assert greedy(bench.wire, **sync.request()) == bench.answers[1]
    finally:
        sync.shutdown()
        bench.sync.shutdown()
        bench.sync = bench.connect()
        bench.push(0)
    assert bench.serves(0)


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_engines_of_several_trainer_ranks_take_a_push_or_none_does(base, tmp_path, page: Any) -> None:
    """Two ranks with an engine each: the one of rank 1 refuses at the commit, or rank 1 has trained apart."""
    run_two(
        Path(__file__).with_name("own_engines.py"), "2", "1", base, str(tmp_path), logs=tmp_path, limit=500
    )
    outcomes = [json.loads((tmp_path / f"outcome{rank}.json").read_text()) for rank in range(2)]
    for strategy, state in (
        ("merged", CLOSED),
        ("factors", KEPT),
        ("adapter", KEPT),
    ):  # as the script has seen
        for found in outcomes:
            kind, message, seconds = found[f"{strategy} refused"]
            assert kind == "SyncError"
            assert "rank 1's engine" in message
            page.add(
                "another trainer rank's engine refuses at the commit", strategy, SyncError, state, seconds
            )
            kind, message, seconds = found[f"{strategy} apart"]
            assert kind == "MismatchError"
            assert "trainer ranks [1]" in message
            page.add("a trainer rank has trained apart", strategy, MismatchError, KEPT, seconds)


def test_an_adapter_over_weights_that_a_push_has_changed_is_refused(bench: Bench, page: Any) -> None:
    """Packed weights can't be read back, so nothing else would notice: the update would be served twice."""
    if bench.strategy != "merged":
        pytest.skip("needs weights that were pushed")
    bench.ready()
    with pytest.raises(SyncError, match="earlier push") as caught:
        connect(ls.FactorSource(bench.policy), bench.wire, ServeAdapter("policy"), timeout=60)
    assert bench.serves(0)
    page.add("an adapter over weights that a push has changed", "adapter", type(caught.value), KEPT, 0.0)


def test_a_trainer_killed_in_the_middle_of_a_push(engine, base, tmp_path, page: Any) -> None:
    """The engine knows that its weights are torn, and says so to the next trainer, whose push recovers."""
    policy = tiny(base)
    with connect(ls.MergedSource(policy), engine, timeout=60) as sync:
        sync.send_weights()
        expected = greedy(engine)
    address = str(tmp_path / "calls")
    with Listener(address) as listener:
        trainer = subprocess.Popen([sys.executable, "-m", "tests.e2e.dying_trainer", address, base])
        calls = serve_until_gone(listener, Calls(engine))
    assert trainer.wait(30) == -signal.SIGKILL
    assert calls[0] == "hello"
    assert "bucket" in calls
    assert "commit" not in calls
    assert shared_memory(owner=trainer.pid), "nothing was left to be swept"
    with connect(ls.MergedSource(policy), engine, timeout=60) as sync:
        assert not shared_memory(owner=trainer.pid)
        with pytest.raises(EngineClosedError, match=r"died half-way.*Call send_weights\(\) again") as caught:
            sync.request()
        sync.send_weights()
        assert greedy(engine, **sync.request()) == expected
    page.add("the trainer is killed in the middle of a push", "merged", type(caught.value), CLOSED, 0.0)


def test_a_full_disk_ends_a_merge_to_disk_and_leaves_nothing(base, tmp_path, page: Any) -> None:
    policy = tiny(base)
    kept, limits = model_digest(policy), resource.getrlimit(resource.RLIMIT_FSIZE)
    began = time.monotonic()
    try:  # the limit of a file's size fails as a full disk does: in the middle of a write
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
        with pytest.raises(ExportError, match="begun is removed") as caught:
            merge_to_disk(policy, tmp_path / "merged", progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    seconds = time.monotonic() - began
    assert list(tmp_path.iterdir()) == []
    assert model_digest(policy) == kept
    merge_to_disk(policy, tmp_path / "merged", progress=False)
    page.add("the disk gets full (lorasync merge)", "no engine", type(caught.value), KEPT, seconds)


@pytest.mark.soak
def test_raw_zero3_shards_are_refused_and_the_gathered_policy_recovers(base, tmp_path, page: Any) -> None:
    """What `named_parameters` gives under ZeRO-3: tensors without elements, from two real ranks."""
    run_two(Path(__file__).with_name("raw_shards.py"), base, str(tmp_path), logs=tmp_path)
    found = json.loads((tmp_path / "outcome.json").read_text())
    assert found["error"] == "MismatchError"
    assert re.search(r"up_proj.*\(0,\)", found["message"])
    assert found["after"] == found["base"]
    assert found["recovered"] != found["base"]
    assert found["left"] == []
    page.add("raw shards of ZeRO-3 (two real ranks)", "merged", MismatchError, KEPT, found["seconds"])


# ---------------------------------------------------------------------------- the engine, or a part of it, dies


def _killing(bench: Bench, pid: Callable[[Any], int], when: str, lying: list[set[Path]]) -> dict[str, Any]:
    """Hooks that kill a process of the engine at a point of the push, once, and note what payloads lie there then."""

    def die() -> None:
        lying.append(_payloads_of(bench))
        kill(pid(bench.wire.llm))

    def bucket(call: Call) -> None:
        if when == "bucket":
            die()
        elif when == "staging":  # in a moment: the worker is in the middle of it then
            threading.Timer(1.0, die).start()

    def control(message: dict[str, Any]) -> None:
        if message["op"] == when:
            die()

    return {"on_bucket": nth_bucket(bucket, bucket=1), "on_control": control}


def _payloads_of(bench: Bench) -> set[Path]:
    """Those of the connection that shook hands last."""
    return {path for path in payloads() if path.parent == bench.wire.folder}


DEATHS = (
    pytest.param("the engine core is killed in the middle of a push", "merged", engine_core_of, "bucket"),
    pytest.param("a worker is killed while it stages", "factors", worker_of, "staging"),
    pytest.param("the engine core is killed while a worker stages", "adapter", engine_core_of, "staging",
                 marks=pytest.mark.soak),
    pytest.param("a worker is killed before staging", "factors", worker_of, "bucket", marks=pytest.mark.soak),
    pytest.param("a worker is killed after staging, before the commit", "factors", worker_of, "commit",
                 marks=pytest.mark.soak),
    pytest.param("the engine core is killed at the commit", "adapter", engine_core_of, "commit", marks=pytest.mark.soak),
)  # fmt: skip


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("what", "strategy", "pid", "when"), DEATHS)
def test_a_dead_engine_is_named_at_once_and_a_new_one_recovers(
    what: str,
    strategy: str,
    pid: Any,
    when: str,
    base: str,
    tmp_path: Path,
    page: reliability_page.Page,
    monkeypatch,
) -> None:
    bench, before = Bench(strategy, tiny(base), Wire(None), base, tmp_path), shared_memory()
    lying: list[set[Path]] = []
    settings = {"dtype": "float32", **LORA}
    monkeypatch.setattr("lorasync.transport.shared_memory.SMALL", 0)
    with running_llm(base, worker_extension_cls="tests.e2e.faults.SlowStaging", **settings) as llm:
        bench.wire.llm = llm
        bench.sync = bench.connect()
        bench.push(0)
        expected = greedy(llm, **bench.sync.request())
        behind_url = Calls(llm)
        if strategy == "merged":
            remote = connect(bench.source(), behind_url, timeout=60)
            remote.send_weights()
            bench.sync = bench.connect()
        if when == "staging":
            llm.collective_rpc("stage_slowly", args=(30.0,))
        kept = model_digest(bench.policy)
        began = time.monotonic()
        with (
            pytest.raises(EngineDeadError, match=r"died.*Restart the engine, connect\(\) again") as caught,
            _on_wire(bench, **_killing(bench, pid, when, lying)),
        ):
            bench.sync.send_weights()
        seconds = time.monotonic() - began
        assert seconds < 10
        assert [bool(files) for files in lying] == [True], "no payload lay there, or not one death"
        assert not _payloads_of(bench), "a payload is left in shared memory"
        assert model_digest(bench.policy) == kept
        with pytest.raises(EngineDeadError, match="Restart the engine"):
            bench.sync.send_weights()
        bench.sync.shutdown()
    page.add(what, strategy, type(caught.value), RESTART, seconds)
    with running_llm(base, **settings) as llm:
        bench.wire.llm = behind_url.llm = llm
        if strategy == "merged":
            with pytest.raises(SyncError, match=r"restarted.*connect\(\) again") as caught:
                remote.send_weights()
            remote.shutdown()
            page.add("the engine is restarted between pushes", strategy, type(caught.value), RESTART, 0.0)
        bench.sync = bench.connect()
        bench.push(0)
        assert greedy(llm, **bench.sync.request()) == expected
        bench.sync.shutdown()
    assert shared_memory() == before


def test_every_row_and_strategy_is_on_the_page() -> None:
    expected = {(row.what, strategy) for row in (*ROWS, *ROWS_IN_THIS_PROCESS) for strategy in row.state}
    expected |= {param.values[:2] for param in DEATHS}
    expected |= {
        *(("vLLM is started without the backend", strategy) for strategy in STRATEGIES),
        ("an adapter over weights that a push has changed", "adapter"),
        ("raw shards of ZeRO-3 (two real ranks)", "merged"),
        *(("a push after shutdown()", strategy) for strategy in STRATEGIES),
        ("the trainer is killed in the middle of a push", "merged"),
        ("the disk gets full (lorasync merge)", "no engine"),
        ("the engine is restarted between pushes", "merged"),
    }
    assert reliability_page.rows_of_the_page() == expected
