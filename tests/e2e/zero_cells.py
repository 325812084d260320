"""The cells of the compatibility matrix, and the real two-process DeepSpeed runs that decide each of them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("ds_worker.py")
ROOT = WORKER.parent.parent.parent
RANKS = 2
# Largest difference of a loss from ZeRO-0's at any of ten steps; losses are about 5.5.
TOLERANCE = 0.006

_CPU = {"device": "cpu", "pin_memory": False}
OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "offload optimizer": {"offload_optimizer": _CPU},
    "offload optimizer and parameters": {"offload_optimizer": _CPU, "offload_param": _CPU},
    "hpZ 2": {"zero_hpz_partition_size": 2},
    "fetch by all-reduce": {"stage3_use_all_reduce_for_fetch_params": True},
    "ZeRO++ quantized weights": {"zero_quantized_weights": True},
    "NVMe parameters": {"offload_param": {"device": "nvme", "nvme_path": "NVME", "pin_memory": True}},
    "device_map, ZeRO-3 config active": {},
    "zero.Init": {},
    "re-entrant checkpointing, no input gradients": {},
    "no adapter": {},
}
_JOB_OPTIONS: dict[str, dict[str, Any]] = {
    "device_map, ZeRO-3 config active": {"hf_config": True, "device_map": {"": "cpu"}},
    "zero.Init": {"hf_config": True},
    "re-entrant checkpointing, no input gradients": {"reentrant": True},
    "no adapter": {"no_adapter": True},
}
_UNQUANTIZED_ONLY = (
    "device_map, ZeRO-3 config active",
    "zero.Init",
)  # transformers ignores both if quantized
_GPU_ONLY = ("ZeRO++ quantized weights", "NVMe parameters")


@dataclass(frozen=True)
class Cell:
    """One combination: base format, ZeRO stage, engine dtype, dtype of packed storage, and one option."""

    quant: str
    stage: int
    engine: str
    storage: str = "uint8"
    option: str = ""

    @property
    def id(self) -> str:
        return "/".join(str(part) for part in asdict(self).values())

    @property
    def needs_gpu(self) -> bool:
        return self.engine == "fp16" or self.option in _GPU_ONLY

    @property
    def reference(self) -> Cell:
        """The ZeRO-0 run that a working cell's losses are compared with.

        In fp32, because DeepSpeed's ZeRO-0 updates 16-bit weights directly where the other stages have fp32
        copies.
        """
        return Cell(self.quant, 0, "fp32")

    def config(self) -> dict[str, Any]:
        # Every parameter is partitioned (threshold 0), or a tiny model would stay whole under ZeRO-3.
        zero = {"stage": self.stage, "stage3_param_persistence_threshold": 0, **OPTIONS[self.option]}
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 1,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
            "zero_optimization": zero,
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
        }
        if self.engine == "fp16":
            config["fp16"] = {"enabled": True, "initial_scale_power": 8}
        elif self.engine == "bf16":
            config["bf16"] = {"enabled": True}
        return config

    def job(self, model: Path) -> dict[str, Any]:
        lora = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        job = {**asdict(self), "id": self.id, "model": str(model), "lora": lora, "config": self.config()}
        return {**job, **_JOB_OPTIONS.get(self.option, {})}


def all_cells() -> Iterator[Cell]:
    """Every cell of the matrix, the ZeRO-0 references first."""
    formats = [("none", "uint8"), ("int8", "uint8")]
    formats += [("nf4", storage) for storage in ("uint8", "bf16", "fp16", "fp32")] + [("fp4", "uint8")]
    for engine in ("bf16", "fp32", "fp16"):
        for stage in range(4):
            yield from (Cell(quant, stage, engine, storage) for quant, storage in formats)
    for quant in ("none", "nf4", "int8"):
        yield Cell(quant, 2, "bf16", option="offload optimizer")
        for option in OPTIONS:
            if option and (quant == "none" or option not in _UNQUANTIZED_ONLY):
                yield Cell(quant, 3, "bf16", option=option)
    for option in ("offload optimizer and parameters", "hpZ 2", "fetch by all-reduce"):
        yield Cell("nf4", 3, "bf16", "bf16", option)


@dataclass
class Outcome:
    """What a run showed, and what the guard had said."""

    cell: Cell
    ranks: list[dict[str, Any]]
    reference: list[float] | None = None

    @property
    def guard(self) -> str:
        return "error" if any(v == "error" for r in self.ranks for v in r["codes"].values()) else "works"

    @property
    def codes(self) -> list[str]:
        return sorted({code for r in self.ranks for code, kind in r["codes"].items() if kind == "error"})

    @property
    def loss_gap(self) -> float | None:
        losses = self.ranks[0].get("losses")
        if not losses or not self.reference:
            return None
        return max(abs(a - b) for a, b in zip(losses, self.reference, strict=True))

    @property
    def broken(self) -> list[str]:
        """Everything that keeps this run from counting as working."""
        found = [r["error"] for r in self.ranks if "error" in r][:1]
        first = self.ranks[0]
        if first.get("changed"):
            found.append(f"{len(first['changed'])} of {first['weights']} base weights changed")
        if first.get("changed_in_forward"):
            found.append(f"{len(first['changed_in_forward'])} base weights wrong in the forward pass")
        judged = self.cell.stage > 0 or self.cell.engine == "fp32"
        if judged and self.loss_gap is not None and self.loss_gap > TOLERANCE:
            found.append(f"loss {self.loss_gap:.4f} away from ZeRO-0's")
        return found

    @property
    def run(self) -> str:
        return "error" if self.broken else "works"

    @property
    def agrees(self) -> bool:
        return self.guard == self.run


def run_cells(
    cells: Iterable[Cell], model: Path, work: Path, *, cell_timeout: float = 120.0
) -> dict[Cell, Outcome]:
    """Run cells on two ranks; an option gets processes of its own, because DeepSpeed keeps state."""
    wanted = list(dict.fromkeys(cells))
    plain = [cell for cell in wanted if not cell.option]
    batches = ([plain] if plain else []) + [[cell] for cell in wanted if cell.option]
    results: list[dict[str, dict[str, Any]]] = [{} for _ in range(RANKS)]
    for number, batch in enumerate(batches):
        for rank, found in enumerate(run_batch(batch, model, work / str(number), cell_timeout)):
            results[rank] |= found
    losses = {cell: results[0][cell.id].get("losses") for cell in wanted}
    return {
        cell: Outcome(cell, [found[cell.id] for found in results], losses.get(cell.reference))
        for cell in wanted
    }


def run_batch(
    cells: list[Cell], model: Path, work: Path, cell_timeout: float
) -> list[dict[str, dict[str, Any]]]:
    """Run cells one after another in one pair of processes; where one hangs, go on with a fresh pair."""
    results: list[dict[str, dict[str, Any]]] = [{} for _ in range(RANKS)]
    while todo := [cell for cell in cells if cell.id not in results[0]]:
        folder = work / str(len(todo))
        folder.mkdir(parents=True)
        jobs = json.dumps([cell.job(model) for cell in todo]).replace(
            '"NVME"', json.dumps(str(work / "nvme"))
        )
        (folder / "jobs.json").write_text(jobs)
        run_pair([str(folder / "jobs.json"), str(folder)], folder, idle_timeout=cell_timeout)
        for rank in range(RANKS):
            results[rank] |= read_results(folder / f"{rank}.jsonl")
        if todo[0].id not in results[0]:
            log = (folder / "rank0.log").read_text()[-2000:]
            raise RuntimeError(f"the worker died before its first cell: {log}")
    return results


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Read a rank's records; a cell's first record is its start, the last one counts."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {result["id"]: result for result in map(json.loads, lines)}


def run_pair(arguments: list[str], work: Path, *, idle_timeout: float, worker: Path = WORKER) -> list[int]:
    """Start one process per rank and wait; kill all after ``idle_timeout`` seconds without a word."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = [start_rank(worker, arguments, work, rank, port) for rank in range(RANKS)]
    try:
        while any(process.poll() is None for process in started):
            newest = max(path.stat().st_mtime for path in work.iterdir())
            if time.time() - newest > idle_timeout:
                break
            time.sleep(0.2)
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
        codes = [process.wait() for process in started]
    return codes


def start_rank(
    worker: Path, arguments: list[str], work: Path, rank: int, port: int
) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(RANKS),
        "LOCAL_WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(worker.parent), os.environ.get("PYTHONPATH", "")]),
    }
    with (work / f"rank{rank}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, str(worker), *arguments], env=environment, stdout=log, stderr=subprocess.STDOUT
        )


def make_tiny_model(path: Path) -> Path:
    """Save a random two-layer Llama, small enough to train ten steps in a second."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path
