"""One rank of the gathered() tests: `python zero_gather_worker.py CASE OUT` writes OUT/RANK.json."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from lorasync.errors import SyncTimeoutError, UngatheredError
from lorasync.verify import Canary
from lorasync.zero import full_shape, gathered, is_sharded

SHAPES = [(8, 4), (6, 2), (4, 4)]


def values(number: int) -> Tensor:
    return torch.arange(float(torch.Size(SHAPES[number]).numel())).reshape(SHAPES[number]) + number


def zero3_params() -> list[nn.Parameter]:
    import deepspeed
    from ds_worker import init_distributed

    init_distributed()
    module = nn.ParameterList([nn.Parameter(values(i)) for i in range(3)])
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    deepspeed.zero.Init(module=module, config_dict_or_path=config)
    return list(module.parameters())


def fsdp2_params() -> list[nn.Parameter]:
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    module = nn.ParameterList([nn.Parameter(values(i)) for i in range(3)])
    fully_shard(module, mesh=dist.init_device_mesh("cpu", (2,)))
    return list(module.parameters())


def attempt(action: Callable[[], Any]) -> dict[str, Any]:
    """Run something that should raise; say what it raised and how long that took."""
    started = time.perf_counter()
    try:
        action()
    except (UngatheredError, SyncTimeoutError) as error:
        return {
            "error": type(error).__name__,
            "message": str(error),
            "seconds": time.perf_counter() - started,
        }
    return {"error": None}


def enter(params: Any, **settings: Any) -> list[Tensor]:
    with gathered(params, **settings) as whole:
        return [p.clone() for p in whole]


def read(params: list[nn.Parameter]) -> dict[str, Any]:
    """The right uses: any order and form of argument, twice, mixed with plain tensors."""
    plain = torch.ones(3)
    shard = [tuple(p.shape) for p in params]
    with gathered([params[2], plain, params[0], params[2]]) as whole:
        same = [
            torch.equal(w, v) for w, v in zip(whole, [values(2), plain, values(0), values(2)], strict=True)
        ]
        once = is_sharded(params[1])
    return {
        "same": same,
        "others_stay_sharded": once,
        "sharded_before_and_after": [is_sharded(p) for p in params]
        and shard == [tuple(p.shape) for p in params],
        "full_shapes": [list(full_shape(p)) for p in params],
        "generator": [torch.equal(w, values(i)) for i, w in enumerate(enter(p for p in params))],
        "one": torch.equal(enter(params[1])[0], values(1)),
    }


def misuse(params: list[nn.Parameter]) -> dict[str, Any]:
    """The wrong uses, each of which must end in an error on both ranks; afterwards the right one works."""
    rank = dist.get_rank()
    order = params if rank == 0 else params[::-1]
    found = {"order": attempt(lambda: enter(order, timeout=30))}
    found["nested"] = attempt(lambda: nested(params))
    found["written"] = attempt(lambda: write(params))
    found["absent"] = attempt(lambda: enter(params, timeout=2)) if rank == 0 else {"error": "absent"}
    dist.barrier()
    found["late"] = attempt(lambda: enter(params, timeout=30)) if rank == 1 else {"error": "not late"}
    dist.barrier()
    found["subset"] = attempt(lambda: enter(params[: 2 + rank], timeout=30))
    found["canary"] = attempt(lambda: Canary(nn.ParameterList(params), None, ["The"]))
    found["afterwards"] = {"same": [torch.equal(w, values(i)) for i, w in enumerate(enter(params))]}
    return found


def nested(params: list[nn.Parameter]) -> None:
    with gathered(params[:2]), gathered(params[1:]):
        pass


def write(params: list[nn.Parameter]) -> None:
    with gathered(params) as whole, torch.no_grad():
        whole[0].add_(1)


def main() -> None:
    case, out = sys.argv[1:]
    torch.set_num_threads(1)
    params = zero3_params() if case == "zero3" else fsdp2_params()
    found = {"sharded": [is_sharded(p) for p in params], "read": read(params), "misuse": misuse(params)}
    Path(out, f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
