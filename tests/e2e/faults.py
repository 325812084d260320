"""Ways to break a push: at the source, on the wire, in the policy, in the processes. All through public seams."""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lorasync import ParamMeta
from lorasync.targets.base import METHOD
from lorasync.transport.folder import shared_memory_root

Item = tuple[str, torch.Tensor]


# ------------------------------------------------------------------------------------------ at the source


@dataclass
class Broken:
    """A source whose stream is not what its metadata says, from some tensor on."""

    source: Any
    change: Callable[[int, str, torch.Tensor], Iterable[Item]]

    def metadata(self) -> list[ParamMeta]:
        return self.source.metadata()

    def __iter__(self) -> Iterator[Item]:
        for index, (name, tensor) in enumerate(self.source):
            yield from self.change(index, name, tensor)


def from_the_middle(source: Any, change: Callable[[str, torch.Tensor], Iterable[Item]]) -> Broken:
    """Change one tensor, half-way."""
    middle = len(source.metadata()) // 2
    return Broken(source, lambda i, name, t: change(name, t) if i == middle else [(name, t)])


def raising(error: BaseException) -> Callable[[str, torch.Tensor], Iterable[Item]]:
    def change(name: str, tensor: torch.Tensor) -> Iterable[Item]:
        raise error

    return change


@dataclass
class Fixed:
    """A source over given tensors."""

    tensors: dict[str, torch.Tensor]

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(n, t.dtype, tuple(t.shape)) for n, t in self.tensors.items()]

    def __iter__(self) -> Iterator[Item]:
        return iter(self.tensors.items())


PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
COPIES = (torch.ops.aten.copy_,)


class NoMemory(TorchDispatchMode):
    """Memory runs out at the n-th of these operations on this thread: torch's own allocator says so."""

    def __init__(self, after: int, operations: tuple[Any, ...] = PRODUCTS) -> None:
        super().__init__()
        self.left = after
        self.operations = operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._overloadpacket in self.operations:
            self.left -= 1
            if self.left == 0:
                torch.empty(1 << 60, dtype=torch.uint8)
        return func(*args, **(kwargs or {}))


# ------------------------------------------------------------------------------------------- on the wire


@dataclass
class Call:
    """One message of the trainer's, and what rides beside it, before the engine gets both."""

    message: dict[str, Any]
    payload: Any
    folder: Path


OnBucket = Callable[[Call], None]
OnControl = Callable[[dict[str, Any]], None]


@dataclass
class Wire:
    """A `vllm.LLM` whose weight-sync calls can be looked at, altered, or cut off on their way."""

    llm: Any
    on_bucket: OnBucket | None = None
    on_control: OnControl | None = None
    beside_hello: Callable[[Any], Any] | None = None
    folder: Path = field(default_factory=Path)
    buckets: int = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.llm, name)

    def collective_rpc(
        self, method: str, timeout: float | None = None, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> list[Any]:
        if method == METHOD:
            args = self._altered(*args)
        found: list[Any] = self.llm.collective_rpc(method, timeout, args, kwargs)
        return found

    def _altered(self, message: dict[str, Any], payload: Any) -> tuple[dict[str, Any], Any]:
        call = Call(dict(message), payload, self.folder)
        if message["op"] == "bucket":
            self.buckets += 1
            if self.on_bucket is not None:
                self.on_bucket(call)
        elif self.on_control is not None:
            self.on_control(call.message)
        if message["op"] == "hello":
            self.folder = call.folder = Path(message["offers"].get("shared_memory", {}).get("folder", ""))
            if self.beside_hello is not None:
                call.payload = self.beside_hello(payload)
        return call.message, call.payload


def nth_bucket(change: OnBucket, *, bucket: int) -> OnBucket:
    """Do something to the n-th bucket only (from 1 on)."""
    left = bucket

    def on_bucket(call: Call) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            change(call)

    return on_bucket


def payload_change(change: Callable[[bytes], bytes], *, bucket: int) -> OnBucket:
    """Alter the bytes of the n-th bucket, inline or in shared memory."""

    def altered(call: Call) -> None:
        if call.message["transport"] == "shared_memory":
            _change_in_place(call, change)
        else:
            call.payload = change(call.payload)

    return nth_bucket(altered, bucket=bucket)


def _change_in_place(call: Call, change: Callable[[bytes], bytes]) -> None:
    """Both sides keep the file mapped; it may be longer than the bucket, and ends with it if the bucket is cut short."""
    used = max(at + 4 * math.prod(shape) for _, _, shape, at in json.loads(call.message["fields"]["layout"]))
    with (call.folder / call.message["fields"]["file"]).open("r+b") as file:
        changed = change(file.read(used))
        file.seek(0)
        file.write(changed)
        if len(changed) < used:
            file.truncate()


def header_that_lies(*, bucket: int) -> OnBucket:
    """The lengths that the n-th bucket announces are not its own: in its first bytes, or in the layout of its file."""

    def altered(call: Call) -> None:
        if call.message["transport"] == "shared_memory":
            layout = json.loads(call.message["fields"]["layout"])
            layout[-1][2] = [1 << 61]
            call.message["fields"] = {**call.message["fields"], "layout": json.dumps(layout)}
        else:
            call.payload = b"\xff" * 8 + call.payload[8:]

    return nth_bucket(altered, bucket=bucket)


def field_change(*, bucket: int, **fields: Any) -> OnBucket:
    return nth_bucket(lambda call: call.message.update(fields), bucket=bucket)


def another_file(name: str, *, bucket: int) -> OnBucket:
    """The n-th bucket is said to be in this file, whichever way it really travels."""
    fields = {"file": name, "layout": '[["weight","float32",[1],0]]'}
    return field_change(bucket=bucket, transport="shared_memory", fields=fields)


class Bomb:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


# ------------------------------------------------------------------------------------------ in the policy


@contextlib.contextmanager
def replaced(param: torch.nn.Parameter, data: torch.Tensor) -> Iterator[None]:
    """Give a parameter other data, and its own back."""
    kept = param.data
    param.data = data
    try:
        yield
    finally:
        param.data = kept


def factor(policy: torch.nn.Module, part: str) -> torch.nn.Parameter:
    """The A or B of one module in the last layer."""
    return next(
        p for n, p in policy.named_parameters() if "layers.1.mlp.up_proj" in n and f"lora_{part}" in n
    )


def with_value(param: torch.nn.Parameter, value: float) -> torch.Tensor:
    data = param.data.clone()
    data[1, 1] = value
    return data


# --------------------------------------------------------------------------------------- in the processes


class SlowStaging:
    """Mixed into vLLM's worker."""

    def stage_slowly(self, seconds: float) -> None:
        from lorasync.receive.adapter import AdapterApplier
        from lorasync.receive.factors import FactorApplier

        for applier in (AdapterApplier, FactorApplier):
            applier.receive = _after(seconds, applier.receive)  # type: ignore[method-assign]


def _after(seconds: float, call: Any) -> Any:
    def slow(*arguments: Any) -> Any:
        time.sleep(seconds)
        return call(*arguments)

    return slow


def children_of(pid: int) -> set[int]:
    """All processes below this one."""
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found |= {int(child)} | children_of(int(child))
    return found


def command_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip() + " " + Path(f"/proc/{pid}/cmdline").read_text()
    return ""


def engine_core_of(llm: Any) -> int:
    """The process id of the engine core of an `LLM` or an `AsyncLLM`."""
    (process,) = getattr(llm, "llm_engine", llm).engine_core.resources.engine_manager.processes
    return int(process.pid)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def shared_memory(*, owner: int | None = None) -> set[Path]:
    """The folders of a process in shared memory (this one's), and the files in them."""
    pid = str(os.getpid() if owner is None else owner)
    found: set[Path] = set()
    for folder in shared_memory_root().glob("lorasync-*"):
        with contextlib.suppress(OSError):
            if (folder / "owner").read_text().strip() == pid:
                found |= {folder, *folder.rglob("*")}
    return found


def payloads() -> set[Path]:
    """The files of buckets in this process's folders: a connection keeps two of them from push to push."""
    return {path for path in shared_memory() if path.suffix == ".bucket"}


@contextlib.contextmanager
def leaving_out(llm: Any, part: str) -> Iterator[None]:
    """VLLM's loader, in this process, leaves one tensor out without a word, once."""
    model = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.get_model()
    load, left = model.load_weights, [part]

    def incomplete(weights: Iterable[Item]) -> Any:
        given = dict(weights)
        for name in [n for n in given if left and left[0] in n][:1]:
            del given[name]
            left.clear()
        return load(iter(given.items()))

    model.load_weights = incomplete
    try:
        yield
    finally:
        del model.load_weights


def worker_of(llm: Any) -> int:
    """The process id of the (only) worker."""
    (worker,) = [pid for pid in children_of(engine_core_of(llm)) if "Worker" in command_of(pid)]
    return worker


@contextlib.contextmanager
def no_more_memory(pid: int) -> Iterator[Callable[[], None]]:
    """Gives what takes away all address space that a process does not have yet; it gets it back after the block."""
    before = resource.prlimit(pid, resource.RLIMIT_AS)

    def take() -> None:
        size = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
        resource.prlimit(pid, resource.RLIMIT_AS, (size, before[1]))

    try:
        yield take
    finally:
        resource.prlimit(pid, resource.RLIMIT_AS, before)


def may_mount(folder: Path) -> bool:
    """Whether this process may mount a small file system of its own (root in a container often may not)."""
    if os.system(f"mount -t tmpfs -o size=64k tmpfs {folder} 2>/dev/null"):
        return False
    return os.system(f"umount {folder}") == 0


@contextlib.contextmanager
def full(folder: Path, *, size: str) -> Iterator[None]:
    """A real small file system over the folder; what is left in it would go with it unseen."""
    assert os.system(f"mount -t tmpfs -o size={size},mode=0700 tmpfs {folder}") == 0
    try:
        yield
    finally:
        left = [path.name for path in folder.iterdir()]
        assert os.system(f"umount {folder}") == 0
        assert not left, f"left in shared memory: {left}"
