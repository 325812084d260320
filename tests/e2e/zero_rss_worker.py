"""One rank of the ZeRO-3 memory test: `python zero_rss_worker.py OUT` writes OUT/RANK.json, peaks by number of layers."""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from pathlib import Path

import torch
from ds_worker import init_distributed
from torch import distributed as dist

from lorasync.planning.memory import LiveBytes
from lorasync.source import MergedSource
from tests.ranks_worker import with_zero
from tests.tiny import TEXT, adapt

WIDTH = 512


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def peak(layers: int) -> dict[str, int]:
    """What a pass adds at its highest to the process's resident memory and to its live tensors, beside the model's size."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": layers}
    model = adapt(LlamaForCausalLM(LlamaConfig(**{**TEXT, **shape})).to(torch.bfloat16), cast=False)
    size = sum(p.numel() * p.itemsize for p in model.parameters())
    source = MergedSource(with_zero(model, 3))
    for _pass in range(2):  # what is allocated once is not of interest
        for _ in source:
            pass
    trim = ctypes.CDLL(
        None
    ).malloc_trim  # glibc keeps what is freed, scattered over its arenas: give it back before a look
    gc.collect()
    trim(0)
    before, most = resident("VmRSS"), 0
    with LiveBytes() as live:
        for _name, tensor in source:
            trim(0)
            most = max(most, resident("VmRSS") - before)
            del tensor
    return {"resident": most, "alive": live.peak, "model": size, "layer": size // layers}


def main() -> None:
    torch.set_num_threads(1)
    init_distributed()
    found = {layers: peak(layers) for layers in (6, 24)}
    Path(sys.argv[1], f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
