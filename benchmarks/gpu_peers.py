"""What the GPU benchmarks need to push merged weights as others do.

In one process: `dense` and `fused_slices`. To another process on the same GPU: `handles` and `LoadHandles`, CUDA IPC
handles of every parameter into vLLM's loader, as verl and OpenRLHF do it; `stock_ipc`, vLLM's own "ipc" backend, fed by
a `MergedSource`.
"""

from __future__ import annotations

import base64
import os
import pickle
from typing import TYPE_CHECKING, Any

import torch
from gpu_parts import synchronize
from torch.multiprocessing.reductions import reduce_tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from torch import Tensor, nn
    from transformers import Qwen2Config

BUCKET_BYTES = 512 << 20
PACKED_BYTES = 2 << 30  # more than the largest tensor: an embedding has 1.1 to 1.6 GB
EXTENSION = f"{__name__}.LoadHandles"


def checkpoint_params(policy: PeftModel) -> Iterator[tuple[str, Tensor]]:
    """Every parameter but the adapter's own, as it is now, under the checkpoint's name."""
    for name, param in policy.get_base_model().named_parameters():
        if ".lora_" not in name:
            yield name.replace(".base_layer.", "."), param.data


def with_slots(name: str) -> str:
    """The name that vLLM's loader wants where a layer has LoRA slots: another one, unless these have a loader too."""
    from vllm.lora.layers import BaseLayerWithLoRA

    if hasattr(BaseLayerWithLoRA, "load_weights"):
        return name
    layer, _, kind = name.rpartition(".")
    return f"{layer}.base_layer.{kind}" if layer.endswith("_proj") else name


def adapted_layers(policy: PeftModel) -> Iterator[tuple[str, LoraLayer]]:
    """With the checkpoint's names."""
    from peft.tuners.lora import LoraLayer

    named = policy.get_base_model().named_modules()
    return ((name, layer) for name, layer in named if isinstance(layer, LoraLayer))


def dense(layer: LoraLayer) -> Tensor:
    """The base weight, dequantized if it is packed."""
    weight = layer.get_base_layer().weight
    if not hasattr(weight, "quant_state"):
        return weight.data
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state)


def fused_slices(model: nn.Module, config: Qwen2Config) -> dict[str, Tensor]:
    """Where each weight of the checkpoint lies in vLLM's parameters."""
    head = config.hidden_size // config.num_attention_heads
    key = config.num_key_value_heads * head
    fused = {
        "qkv_proj": {"q_proj": config.hidden_size, "k_proj": key, "v_proj": key},
        "gate_up_proj": {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size},
    }
    found = {}
    for name, param in model.named_parameters():
        if name.endswith(("_proj.weight", "_proj.base_layer.weight")):
            layer = name.removesuffix(".weight").removesuffix(".base_layer")
            parent, _, kind = layer.rpartition(".")
            members = fused.get(kind, {kind: len(param)})
            slices = param.data.split(list(members.values()))
            found |= {f"{parent}.{member}": part for member, part in zip(members, slices, strict=True)}
    return found


# ------------------------------------------------------------------------------------------- CUDA IPC handles


class LoadHandles:
    """Mixed into vLLM's worker by ``worker_extension_cls``."""

    @torch.no_grad()
    def load_handles(self, pickled: bytes) -> None:
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        opened = [(name, rebuild(*how)) for name, (rebuild, how) in pickle.loads(pickled)]
        runner.get_model().load_weights(opened)
        synchronize()  # the trainer may write to them again


def handles(policy: PeftModel) -> Iterator[bytes]:
    """The CUDA IPC handles of all parameters under their names in an engine with LoRA slots, a bucket at a time."""
    bucket: list[tuple[str, Any]] = []
    size = 0
    for name, param in checkpoint_params(policy):
        bucket.append((with_slots(name), reduce_tensor(param)))
        size += param.nbytes
        if size >= BUCKET_BYTES:
            yield pickle.dumps(bucket)
            bucket, size = [], 0
    if bucket:
        yield pickle.dumps(bucket)


# -------------------------------------------------------------------------------------- vLLM's own backend


def stock_ipc(policy: PeftModel, llm: Any) -> Callable[[], None]:
    """A push through vLLM's "ipc" backend; its handles are pickled, which vLLM wants to be allowed."""
    import lorasync as ls

    assert os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] == "1"
    source = ls.MergedSource(policy, dtype=torch.bfloat16).as_vllm_source()
    calls = Calls(llm)
    try:
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
    except ImportError:
        return _static_sender(source, calls)
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerWeightTransferEngine

    info = IPCTrainerInitInfo(rank=0, packed=True, packed_buffer_size_bytes=PACKED_BYTES)
    return IPCTrainerWeightTransferEngine.trainer_init(info, client=calls, source=source).send_weights


def _static_sender(source: Any, calls: Calls) -> Callable[[], None]:
    """As in 0.26: the trainer's side is a static method that sends what an iterator yields."""
    from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine

    calls.init_weight_transfer_engine({})
    how = {
        "send_mode": lambda info: calls.update_weights(dict(vars(info))),
        "packed": True,
        "packed_buffer_size_bytes": PACKED_BYTES,
    }

    def push() -> None:
        calls.start_weight_update()
        IPCWeightTransferEngine.trainer_send_weights(iter(source), how)
        calls.finish_weight_update()

    return push


class Calls:
    """vLLM's four weight-sync calls over a `vllm.LLM` in another process."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    def init_weight_transfer_engine(self, info: dict[str, Any]) -> None:
        self._llm.init_weight_transfer_engine({"init_info": info})

    def start_weight_update(self) -> None:
        self._llm.start_weight_update()

    def update_weights(self, info: dict[str, Any]) -> None:
        pickled = base64.b64encode(pickle.dumps(info.pop("ipc_handles"))).decode()
        self._llm.update_weights({"update_info": {**info, "ipc_handles_pickled": pickled}})

    def finish_weight_update(self, weight_version: str | None = None) -> None:  # noqa: ARG002
        self._llm.finish_weight_update()
