"""One rank of a real DeepSpeed run: `python ds_worker.py JOBS.json OUT_DIR` with RANK, MASTER_ADDR, … set.

For every cell of the job list it loads a model, attaches LoRA, trains ten steps and compares the base that
the engine holds afterwards, gathered and dequantized, with the one that was loaded. Results go to
OUT_DIR/RANK.jsonl.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "uint8": torch.uint8}
STEPS = 10


def init_distributed() -> None:
    """Start gloo (or NCCL) without the shared-memory op, which is for inference and takes 90 s to compile."""
    import deepspeed

    if os.environ.get("DS_ACCELERATOR") == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo" if os.environ.get("DS_ACCELERATOR") == "cpu" else "nccl")


def load_model(job: dict[str, Any]) -> nn.Module:
    from transformers import AutoModelForCausalLM

    from lorasync.load import load_quantized

    dtype = DTYPES[job["engine"]]
    if job["quant"] != "none":
        storage = DTYPES[job["storage"]]
        model = load_quantized(job["model"], preset(job), dtype=dtype, storage_dtype=storage, progress=False)
    else:
        devices = job.get("device_map")
        model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype, device_map=devices)
        model.requires_grad_(False)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
        model.train()
    return model


def checkpoint_reentrantly(model: nn.Module) -> None:
    """Do what is wrong: PEFT and transformers have both turned input gradients on."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.get_input_embeddings()._forward_hooks.clear()


def preset(job: dict[str, Any]) -> Any:
    from lorasync import presets

    return {"none": None, "nf4": presets.NF4, "fp4": presets.FP4, "int8": presets.INT8}[job["quant"]]


def plan(job: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    from lorasync.zero import ZeroPlan

    return ZeroPlan(
        AutoConfig.from_pretrained(job["model"]),
        preset(job),
        dtype=DTYPES[job["engine"]],
        storage_dtype=DTYPES[job["storage"]],
        device_map=job.get("device_map"),
    )


def base_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers that own a base weight, by the names that the unwrapped model has for them."""
    for name, module in model.named_modules():
        leaf = next(module.children(), None) is None
        if leaf and ".lora_" not in name and isinstance(getattr(module, "weight", None), Tensor):
            yield name.removeprefix("base_model.model.").replace(".base_layer", ""), module


def base_digests(model: nn.Module) -> dict[str, str]:
    """Digest what every base weight means: packed weights dequantized, sharded ones gathered."""
    from lorasync.zero import gathered

    digests = {}
    for name, module in base_layers(model):
        with gathered(module.weight), torch.no_grad():
            digests[name] = digest(module, module.weight)
    return digests


def digest(module: nn.Module, weight: Tensor) -> str:
    try:
        value = dequantized(module, weight)
    except Exception as error:
        return f"unreadable: {type(error).__name__}"
    return hashlib.sha256(value.contiguous().cpu().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def dequantized(module: nn.Module, weight: Tensor) -> Tensor:
    import bitsandbytes as bnb

    state = getattr(weight, "quant_state", None)
    if state is not None:
        return bnb.functional.dequantize_4bit(weight.data, state)
    if weight.dtype == torch.int8 or isinstance(module, bnb.nn.Linear8bitLt):
        scale = module.state.SCB if module.state.SCB is not None else weight.SCB
        return weight.data.float() * scale.reshape(-1, 1)
    return weight.data


def batches(rank: int, job: dict[str, Any], vocab: int) -> list[Tensor]:
    """Return two batches for this rank: cut from the job's token ids, or random."""
    if "tokens" in job:
        return list(torch.tensor(job["tokens"])[rank::2].chunk(2))
    generator = torch.Generator().manual_seed(100 + rank)
    return [torch.randint(3, vocab, (2, 16), generator=generator) for _ in range(2)]


def watch_forward(model: nn.Module, seen: dict[str, str]) -> list[Any]:
    """Digest every base weight as the forward pass sees it, after ZeRO-3 has fetched it."""

    def watch(name: str) -> Callable[..., None]:
        def note(module: nn.Module, _: object) -> None:
            if name not in seen:
                seen[name] = digest(module, module.weight)

        return note

    return [module.register_forward_pre_hook(watch(name)) for name, module in base_layers(model)]


def train(engine: Any, job: dict[str, Any], seen: dict[str, str]) -> list[float]:
    data = [b.to(engine.device) for b in batches(engine.global_rank, job, engine.module.config.vocab_size)]
    losses = []
    for step in range(job.get("steps", STEPS)):
        batch = data[step % len(data)]
        if job.get("eval_first") and step == 1:
            engine.module.eval()
            with torch.no_grad():
                engine(input_ids=batch)
            engine.module.train()
        hooks = watch_forward(engine.module, seen) if step == job.get("steps", STEPS) - 1 else []
        loss = engine(input_ids=batch, labels=batch).loss
        for hook in hooks:
            hook.remove()
        engine.backward(loss)
        engine.step()
        value = loss.detach().float()
        torch.distributed.all_reduce(value)
        losses.append(value.item() / torch.distributed.get_world_size())
    return losses


def run(job: dict[str, Any], begin: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    import deepspeed
    from peft import LoraConfig, get_peft_model
    from transformers.integrations import HfDeepSpeedConfig

    from lorasync.zero import inspect_zero

    torch.manual_seed(0)
    started = time.perf_counter()
    report = inspect_zero(plan(job), job["config"])
    result: dict[str, Any] = {"id": job["id"], "stage": "load", "codes": severities(report)}
    begin({**result, "error": "hung, or the process died"})
    engine = keep = None
    try:
        keep = HfDeepSpeedConfig(job["config"]) if job.get("hf_config") else None
        model = load_model(job)
        torch.manual_seed(0)  # loading drew from the generator, how often depends on the way
        if not job.get("no_adapter"):
            model = get_peft_model(model, LoraConfig(**job["lora"]))
        if job.get("reentrant"):
            checkpoint_reentrantly(model)
        before = base_digests(model)
        report = inspect_zero(model, job["config"])
        result["codes"] |= severities(report)
        result["stage"] = "initialize"
        params = [p for p in model.parameters() if p.requires_grad]
        engine, *_ = deepspeed.initialize(model=model, config=job["config"], model_parameters=params)
        result["stage"] = "train"
        seen: dict[str, str] = {}
        result["losses"] = train(engine, job, seen)
        result["stage"] = "compare"
        after = base_digests(engine.module)
        result["weights"] = len(before)
        result["changed"] = sorted(k for k in before if before[k] != after.get(k))
        result["changed_in_forward"] = sorted(k for k in seen if before[k] != seen[k])
        result["seen_in_forward"] = len(seen)
        result["stage"] = "done"
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {error}".strip()[:300]
        result["traceback"] = traceback.format_exc()[-1500:]
    finally:
        if engine is not None:
            engine.destroy()
        if keep is not None:
            unset_hf_config()
    result["seconds"] = time.perf_counter() - started
    return result


def severities(report: Any) -> dict[str, str]:
    return {finding.code: finding.severity for finding in report.findings}


def unset_hf_config() -> None:
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def main() -> None:
    jobs_file, out_dir = sys.argv[1:]
    torch.set_num_threads(1)
    init_distributed()
    rank = torch.distributed.get_rank()
    with Path(out_dir, f"{rank}.jsonl").open("a", buffering=1) as out:

        def write(record: dict[str, Any]) -> None:
            out.write(json.dumps(record) + "\n")

        for job in json.loads(Path(jobs_file).read_text()):
            write(run(job, write))
            torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
