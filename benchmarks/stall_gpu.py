"""For how long do requests wait while a push goes to an engine that is generating?

    python benchmarks/stall_gpu.py --shape 7b --rank 64 --results benchmarks/results

An AsyncLLM (its engine core a process of its own on the same GPU, CUDA graphs) decodes 64 requests; in the middle of them
comes a push of another adapter; then the next 64 and the next push, by one way and another in turn:

- factors: lorasync's `FactorSource` and `MergeInWorker(base="device")`, requests kept in flight
- the common way: pause, `merge_adapter`, CUDA IPC handles of every parameter, half a gigabyte a call, into vLLM's
  loader, prefix cache reset, `unmerge_adapter`, resume
- with --adapters also `ServeAdapter`, whose requests keep the version that they began with

The gap is the longest time between two consecutive tokens of one request around the push, less the median between two
tokens before it. It holds more than the stop: after both of the first two ways the keys and values of kept requests are
computed anew. The silence is the longest time in which no request at all got a token, less the same. Every request has
to end with its full count of tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:1] = [str(ROOT)]  # instead of this folder: its names shadow others
sys.path.append(str(ROOT / "benchmarks"))  # behind all others; a worker finds its extension here

import gpu_parts as parts
from gpu_parts import say
from gpu_peers import EXTENSION, handles

COMMON, ADAPTER = "merge_adapter, CUDA IPC handles, unmerge_adapter", "adapter"
TIMEOUT = 120.0


@dataclass(frozen=True)
class Outcome:
    """One push, in seconds; a way's own account of its parts; whether all requests ended with all their tokens."""

    way: str
    took: float
    gap: float
    silence: float
    usual: float
    whole: bool
    parts: dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts.add_options(parser)
    parser.add_argument("--requests", type=int, default=64, help="at most 64")
    parser.add_argument("--tokens", type=int, default=400, help="that each request asks for")
    parser.add_argument("--push-at", type=int, default=100, help="tokens that each has when a push begins")
    parser.add_argument("--pushes", type=int, default=10, help="of factors, and of adapters")
    parser.add_argument("--common-pushes", type=int, default=5)
    parser.add_argument("--adapters", action="store_true", help="push into LoRA slots too")
    options = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    parts.prepare(options)
    check_load(options)
    folder = Path(tempfile.mkdtemp(prefix="stall-gpu-", dir="/dev/shm"))
    try:
        asyncio.run(Bench(options, folder).run())
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_load(options: argparse.Namespace) -> None:
    """Refuse what the engine could not keep in flight, or the worker beside its weights."""
    wanted, room = options.requests * (options.tokens + 16), parts.cache_tokens(options.shape)
    if wanted > room:
        raise SystemExit(f"--tokens {options.tokens}: needs a cache for {wanted} tokens, it holds {room}.")
    if options.base == "bf16" and not parts.has_room_for_base(options):
        raise SystemExit(f"--shape {options.shape}: a copy of the base does not fit beside the rest.")


class Bench:
    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.outcomes: list[Outcome] = []
        self.failed: set[str] = set()
        self.ways: list[str] = []
        self.worker_base = parts.WORKER_BASE[options.base]
        self.policy = parts.make_policy(options, folder)
        say("policy ready")
        self.settings = parts.engine_settings(options, folder, max_loras=2, worker_extension_cls=EXTENSION)

    async def run(self) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self.engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**self.settings))
        say("engine ready")
        try:
            await self.give_base()
            for ways in self.phases():
                await self.in_turn(ways)
        finally:
            self.engine.shutdown()
            del self.engine
        o = self.options
        parts.write_report(o, f"stall_qwen2-{o.shape}-r{o.rank}", self.report())
        assert self.outcomes, "no way has worked"
        assert all(x.whole for x in self.outcomes), "a request has lost tokens"

    # ------------------------------------------------------------------------------------------ the ways

    def phases(self) -> list[list[str]]:
        """Adapters first: they are refused once weights have changed."""
        first = [[ADAPTER]] if self.options.adapters else []
        factors = f"factors ({self.worker_base})"
        if self.options.device == "cpu" or self.options.base == "nf4":  # no handles; packed, rounded again
            return [*first, [factors]]
        return [*first, [factors, COMMON]]

    async def give_base(self) -> None:
        """An engine with weights of its own gets the trainer's."""
        import lorasync as ls

        if self.options.device == "cuda":
            source = ls.MergedSource(self.policy, dtype=parts.served_dtype(self.options))
            sync = await self.connected(source)
            await sync.send_weights_async()
            await asyncio.to_thread(sync.shutdown)

    async def in_turn(self, ways: list[str]) -> None:
        """Connect the first way; push each once, unmeasured; then rounds of each, spread evenly."""
        import lorasync as ls
        from lorasync.push import MergeInWorker, ServeAdapter

        self.ways += ways
        apply = ServeAdapter("policy") if ways == [ADAPTER] else MergeInWorker(base=self.worker_base)
        try:
            self.sync = await self.connected(ls.FactorSource(self.policy), apply)
            for way in ways:
                parts.move(self.policy)
                await self.tried(way)
            for way in self.order(ways):
                if way not in self.failed:
                    await self.round(way)
            await asyncio.to_thread(self.sync.shutdown)
        except Exception:
            say(f"{ways} ENDED\n{traceback.format_exc()}")

    def order(self, ways: list[str]) -> list[str]:
        o = self.options
        counts = {way: o.common_pushes if way == COMMON else o.pushes for way in ways}
        places = [((i + 0.5) / count, way) for way, count in counts.items() for i in range(count)]
        return [way for _, way in sorted(places)]

    async def connected(self, source: Any, *apply: Any) -> Any:
        from lorasync.push import connect

        return await asyncio.to_thread(connect, source, self.engine, *apply, pause="keep", timeout=TIMEOUT)

    async def ours(self) -> dict[str, float]:
        report = await self.sync.send_weights_async()
        return {"stall": report.stall_seconds}

    async def common(self) -> dict[str, float]:
        stages = Stages()
        await self.engine.pause_generation(mode="keep", clear_cache=False)
        stages.end("pause")
        await asyncio.to_thread(self.policy.merge_adapter)
        stages.end("merge")
        try:
            for bucket in handles(self.policy):
                await self.engine.collective_rpc("load_handles", args=(bucket,))
            stages.end("load")
            await self.engine.reset_prefix_cache(reset_running_requests=True)
            stages.end("reset")
        finally:
            await asyncio.to_thread(self.policy.unmerge_adapter)
        parts.synchronize()
        stages.end("unmerge")
        await self.engine.resume_generation()
        stages.end("resume")
        return {"stall": sum(stages.seconds.values()), **stages.seconds}

    # ----------------------------------------------------------------------------------------- measuring

    async def round(self, way: str) -> None:
        """Requests, a push in the middle of them, and their end."""
        parts.move(self.policy)
        parts.synchronize()
        load = Load(self.engine, self.options, self.sync.request())
        await load.reached(self.options.push_at)
        began = time.perf_counter()
        account = await self.tried(way)
        ended = time.perf_counter()
        whole = await load.finished()
        if account is None:
            return
        usual = load.usual(until=began)
        gap, silence = load.longest_gap(began, ended) - usual, load.longest_silence(began, ended) - usual
        self.outcomes.append(Outcome(way, ended - began, gap, silence, usual, whole, account))
        stages = ", ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in account.items())
        say(
            f"{way}: {(ended - began) * 1e3:.0f} ms, gap {gap * 1e3:.1f} ms, silence {silence * 1e3:.1f} ms, "
            f"usual {usual * 1e3:.2f} ms, whole: {whole}; {stages}"
        )

    async def tried(self, way: str) -> dict[str, float] | None:
        """A way that fails is left out of the rest of the run; the others go on."""
        try:
            return await (self.common() if way == COMMON else self.ours())
        except Exception:
            say(f"{way} FAILED\n{traceback.format_exc()}")
            self.failed.add(way)
            with contextlib.suppress(Exception):
                await self.engine.resume_generation()
            return None

    # -------------------------------------------------------------------------------------------- report

    def report(self) -> str:
        o = self.options
        usual = statistics.median(x.usual for x in self.outcomes) if self.outcomes else 0.0
        lines = [
            f"# A push under load: Qwen2 {o.shape}, {o.base} trainer, {o.factors} factors",
            "",
            (
                f"{parts.circumstances(o)} LoRA r={o.rank} on all linear layers; {o.requests} requests of {o.tokens} tokens "
                f"in flight, a push when each has {o.push_at}; without one a token takes {usual * 1e3:.2f} ms (median). "
                "Milliseconds, median / max over the pushes; each way once before, unmeasured. Gap: the longest of one "
                "request around the push; silence: the longest of all requests together; both less the median."
            ),
            "",
            "| way | pushes | stopped | gap | silence | whole push | requests complete | |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        return "\n".join([*lines, *(self.line(way) for way in self.ways), ""])

    def line(self, way: str) -> str:
        found = [x for x in self.outcomes if x.way == way]
        if not found:
            return f"| {way} | 0 | | | | | | failed |"
        figures = [[x.parts["stall"] for x in found], [x.gap for x in found], [x.silence for x in found]]
        figures.append([x.took for x in found])
        stages = [name for name in found[0].parts if name != "stall"]
        note = ", ".join(f"{n} {statistics.median(x.parts[n] for x in found) * 1e3:.1f}" for n in stages)
        whole = f"{sum(x.whole for x in found)} of {len(found)}"
        return f"| {way} | {len(found)} | {' | '.join(map(spread, figures))} | {whole} | {note} |"


class Stages:
    """The time since the stage before, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began = time.perf_counter()

    def end(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self._began = now - self._began, now


class Load:
    """Requests that all decode, and when each token of each has come."""

    def __init__(self, engine: Any, options: argparse.Namespace, request: dict[str, Any]) -> None:
        self.stamps: list[list[float]] = [[] for _ in range(options.requests)]
        self._tokens = options.tokens
        asked = enumerate(parts.prompts(options.requests))
        self._users = [asyncio.create_task(self._user(engine, n, prompt, request)) for n, prompt in asked]

    async def _user(self, engine: Any, number: int, prompt: dict, request: dict[str, Any]) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        wanted = SamplingParams(
            temperature=0.0,
            max_tokens=self._tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        async for output in engine.generate(prompt, wanted, f"{id(self)}-{number}", **request):
            now = time.perf_counter()
            self.stamps[number] += [now] * len(output.outputs[0].token_ids)

    async def reached(self, count: int) -> None:
        """Until every request has so many tokens."""
        deadline = time.perf_counter() + TIMEOUT
        while min(map(len, self.stamps)) < count:
            assert time.perf_counter() < deadline, f"{min(map(len, self.stamps))} tokens in {TIMEOUT} s"
            await asyncio.sleep(0.005)

    async def finished(self) -> bool:
        """Whether all requests have ended with all that they asked for."""
        done = await asyncio.wait_for(asyncio.gather(*self._users, return_exceptions=True), TIMEOUT)
        return not any(done) and all(len(stamps) == self._tokens for stamps in self.stamps)

    def usual(self, *, until: float) -> float:
        """The median time between two tokens of a request, from when all are decoding."""
        since = max(stamps[min(8, len(stamps) - 1)] for stamps in self.stamps)
        return statistics.median(
            b - a for stamps in self.stamps for a, b in pairwise(stamps) if since < a and b < until
        )

    def longest_gap(self, began: float, ended: float) -> float:
        """The longest time that one request has waited for a token, around a push."""
        return max(longest(stamps, began, ended) for stamps in self.stamps)

    def longest_silence(self, began: float, ended: float) -> float:
        return longest(sorted(stamp for stamps in self.stamps for stamp in stamps), began, ended)


def longest(stamps: list[float], began: float, ended: float) -> float:
    return max((b - a for a, b in pairwise(stamps) if b > began and a < ended), default=0.0)


def spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds) * 1e3:.1f} / {max(seconds) * 1e3:.1f}"


if __name__ == "__main__":
    main()
