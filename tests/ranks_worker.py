"""One rank of a sharded training run: `python ranks_worker.py JOB OUT` with RANK, MASTER_ADDR, … set.

Trains one step, streams the model, and compares with what a single process makes of the same values.
"""

from __future__ import annotations

import json
import os
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel

from lorasync.errors import AdapterError, NonFiniteError, UngatheredError
from lorasync.source import FactorSource, MergedSource
from lorasync.source.plan import slots
from lorasync.zero import full_shape, is_sharded
from lorasync.zero import whole as whole_module
from lorasync.zero.whole import whole
from tests.tiny import TEXT, adapt, same_bits

LAYERS = 3


def llama(**adapter: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**TEXT, "num_hidden_layers": LAYERS})).to(torch.bfloat16)
    return adapt(model, cast=False, **adapter)


def packed(path: Path, storage: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=storage,
    )
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype=torch.bfloat16)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return adapt(model, cast=False)


def with_zero(model: Any, stage: int) -> Any:
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    }
    engine, *_ = deepspeed.initialize(model=model, config=config)
    return engine


def with_fsdp2(model: Any) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def step(model: Any, rank: int) -> None:
    ids = torch.arange(8).view(1, 8) + rank
    loss = model(input_ids=ids, labels=ids).loss
    if hasattr(model, "backward"):
        model.backward(loss)
        model.step()
        return
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-1)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def module_of(model: Any) -> Any:
    return getattr(model, "module", model)


def whole_values(model: Any) -> dict[str, torch.Tensor]:
    values = {}
    for name, param in module_of(model).named_parameters():
        with whole([param]) as gathered:
            values[name] = gathered(param).detach().clone()
    return values


def reference(make: Callable[[], Any], values: dict[str, torch.Tensor]) -> Any:
    """The same model in one process, with the trained values in its unpacked parameters."""
    model = make()
    for name, param in model.named_parameters():
        if not hasattr(param, "quant_state"):
            param.data = values[name]
    return model


class Gathered:
    """Counts the values that this rank holds whole though they are sharded."""

    def __init__(self, model: Any) -> None:
        self.params = [(n, p) for n, p in module_of(model).named_parameters() if is_sharded(p)]
        self.live: dict[str, int] = {}
        self.most = 0
        self.names: set[str] = set()

    def stream(self, source: Any) -> Gathered:
        original = whole_module.full_tensor
        names = {id(p): n for n, p in self.params}

        def counted(param: Any) -> torch.Tensor:
            full = original(param)
            self.live[names[id(param)]] = full.numel()
            weakref.finalize(full, self.live.pop, names[id(param)])
            return full

        whole_module.full_tensor = counted
        for _ in source:
            zero3 = {n: full_shape(p).numel() for n, p in self.params if not is_sharded(p)}
            self.most = max(self.most, sum(self.live.values()) + sum(zero3.values()))
            self.names |= self.live.keys() | zero3.keys()
        whole_module.full_tensor = original
        return self


def layer_size(model: Any) -> int:
    """The number of values in the largest decoder layer, or the largest other parameter."""
    sizes: dict[str, int] = {}
    for name, param in module_of(model).named_parameters():
        path = name.split(".")
        key = ".".join(path[: path.index("layers") + 2]) if "layers" in path else name
        sizes[key] = sizes.get(key, 0) + full_shape(param).numel()
    return max(sizes.values())


def check(model: Any, make: Callable[[], Any]) -> dict[str, Any]:
    source = MergedSource(model)
    before = {name: t.clone() for name, t in whole_values(model).items()}
    alone = reference(make, before)
    expected = dict(MergedSource(alone))
    ours = dict(source)
    described = [(m.name, m.dtype, m.shape) for m in source.metadata()]
    after = whole_values(model)
    factors = FactorSource(model)
    most = Gathered(model).stream(source).most
    names = sorted(Gathered(model).stream(factors).names)
    theirs = dict(FactorSource(alone))
    return {
        "same": sorted(n for n in expected if n not in ours or not same_bits(expected[n], ours[n])),
        "names": sorted(ours.keys() ^ expected.keys()),
        "metadata": described == [(n, t.dtype, tuple(t.shape)) for n, t in ours.items()],
        "changed": [n for n in before if not same_bits(before[n], after[n])],
        "trained": sum(not same_bits(before[n], p) for n, p in make().named_parameters() if "lora_" in n),
        "factors": sorted(n for n, t in FactorSource(model) if not same_bits(theirs[n], t)),
        "most": most,
        "layer": layer_size(model),
        "base gathered for factors": [n for n in names if "lora_" not in n and "modules_to_save" not in n],
        "sharded": any(is_sharded(p) for p in module_of(model).parameters()),
        "refusals": refusals(model, source),
    }


def refusals(model: Any, source: MergedSource) -> dict[str, str]:
    """An ungathered read, and a NaN in a shard that only rank 1 holds: every rank refuses by name."""
    said = {}
    slot = next(s for s in slots(module_of(model).base_model.model, None) if s.steps)
    try:
        slot.make(torch.bfloat16)
        said["ungathered"] = "nothing"
    except UngatheredError as error:
        said["ungathered"] = str(error)
    if dist.get_rank() == 1:
        target = slot.steps[0].params[1]
        shard = getattr(target, "ds_tensor", None)
        local = target.to_local() if shard is None and hasattr(target, "to_local") else shard
        if local is not None:
            local.detach().view(-1)[-1] = float("nan")
    try:
        next(iter(source))
        said["nan"] = "nothing"
    except NonFiniteError as error:
        said["nan"] = str(error)
    return said


def lends_alone(model: Any) -> bool:
    """Only the rank that pushes lends, and all go on to what trainer ranks agree on: so lending asks nobody."""
    same = []
    for source in (MergedSource(model), FactorSource(model)):
        expected = {name: tensor.clone() for name, tensor in source}
        checked = {}
        if isinstance(source, FactorSource):
            source.check_fits(torch.bfloat16, slots=True)
            checked = {"checked": True}
        stream = iter(source)
        if dist.get_rank() == 0:
            lent, stream = source.lend(**checked)
            expected = {name: tensor for name, tensor in expected.items() if name not in lent}
        dist.all_reduce(torch.ones(1))
        found = dict(stream)
        same.append(found.keys() == expected.keys() and all(same_bits(found[n], expected[n]) for n in found))
    return all(same)


def look_at_fsdp() -> dict[str, Any]:
    """What FSDP2 keeps gathered after a forward pass is outdated once an optimizer has stepped; FSDP1 has flat shards."""
    model = with_fsdp2(llama(modules_to_save=["lm_head"]))
    model.train()
    ids = torch.arange(8).view(1, 8)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(input_ids=ids, labels=ids).loss.backward()
    with torch.no_grad():
        model(input_ids=ids)
    found = {}
    merged, factors = MergedSource(model), FactorSource(model)
    optimizer.step()
    for name, source in (("merged", merged), ("factors", factors)):
        found[name] = {n: t.clone() for n, t in source}
    model.reshard()
    same = {
        "merged": _alike(found["merged"], dict(MergedSource(model))),
        "factors": _alike(found["factors"], dict(FactorSource(model))),
    }
    refusals = []
    flat = FullyShardedDataParallel(llama(), use_orig_params=True, device_id=torch.device("cpu"))
    for kind in (MergedSource, FactorSource):
        try:
            kind(flat)
        except AdapterError as error:
            refusals.append(str(error))
    return {"same": same, "refusals": refusals}


def _alike(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def main(job: str, out: Path) -> None:
    torch.set_num_threads(1)
    if job.startswith("zero"):
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="gloo")
    else:
        dist.init_process_group("gloo")
    path = out / "base"
    storage = torch.bfloat16 if job.startswith("fsdp2") else torch.uint8
    makes: dict[str, Callable[[], Any]] = {
        "plain": llama,
        "dora": lambda: llama(use_dora=True, modules_to_save=["lm_head"]),
        "4bit": lambda: packed(path, storage),
    }
    results: dict[str, Any] = {}
    if job == "fsdp2":  # it shards bytes as they are
        makes["4bit in bytes"] = lambda: packed(path, torch.uint8)
        results["fsdp"] = look_at_fsdp()
    for kind in makes:
        make = makes[kind]
        model = with_fsdp2(make()) if job == "fsdp2" else with_zero(make(), int(job[-1]))
        model.train()
        step(model, dist.get_rank())
        alone = lends_alone(model)
        results[kind] = check(model, make) | {"lends alone": alone}  # a check ends with a NaN in the model
    (out / f"{job}-{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
