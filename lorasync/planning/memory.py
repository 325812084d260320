"""`estimate_memory`: what a training step needs on one rank, before anything is loaded.

DeepSpeed's own estimators (`estimate_zero2_model_states_mem_needs_all_live` and the like) and accelerate's
count a model all of whose parameters are trained. With LoRA nearly none is, so the states are counted here
by the same rules on the adapter alone. Activations are not guessed by a formula: the model runs forward and
backward once on fake tensors, which have shapes and no storage, and the most bytes alive at once are
counted.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorasync.model_size import count_weights, human, quantizable, skeleton, unquantized
from lorasync.presets.training import REDUCE_BUCKET, TrainPreset


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank at the peak of a training step.

    Attributes:
        weights: the base model, or this rank's shard of it.
        adapter: the adapter's parameters, likewise.
        optimizer: Adam's moments and fp32 copies of what is trained.
        step: the most that a forward and backward pass, or the optimizer's step after it, needs besides.
        host: what optimizer offload moves to the host.
    """

    weights: int
    adapter: int
    optimizer: int
    step: int
    host: int = 0

    @property
    def total(self) -> int:
        """Bytes on the rank's device."""
        return self.weights + self.adapter + self.optimizer + self.step

    def __str__(self) -> str:
        names = ("weights", "adapter", "optimizer", "step", "host")
        parts = ", ".join(f"{name} {human(getattr(self, name))}" for name in names if getattr(self, name))
        return f"{human(self.total)} a rank ({parts})"


def estimate_memory(
    model: Any, preset: TrainPreset, world_size: int = 1, *, sequence_length: int = 1024
) -> MemoryEstimate:
    """Estimate the peak memory of training with a preset; nothing is loaded.

    Args:
        model: a model directory, a hub id or a `transformers.PretrainedConfig`.
        preset: what to train with; batch, precision, checkpointing and offload count.
        world_size: ranks that states (and under ZeRO-3 weights) are sharded over.
        sequence_length: tokens of one sequence; a forward pass has ``preset.micro_batch`` of them.

    Example:
        >>> from lorasync.presets import QLORA_ZERO2
        >>> print(estimate_memory("HuggingFaceTB/SmolLM2-135M-Instruct", QLORA_ZERO2))  # doctest: +SKIP
    """
    config = _config(model)
    plain = skeleton(config, dtype=preset.dtype)
    weights = count_weights(plain, quantize=preset.quantization is not None)
    base = weights.bytes(preset.quantization, preset.dtype)
    largest = _largest_packed(plain) * preset.dtype.itemsize if preset.quantization else 0
    layer = _largest_layer(plain) * (0.5 if preset.quantization else preset.dtype.itemsize)
    adapter, step = _dry_run(plain, preset, world_size, sequence_length)
    shards = world_size if preset.stage else 1
    states = _states(adapter, preset) // shards
    whole = preset.stage < 3
    offloaded = preset.optimizer_offload != "none"
    return MemoryEstimate(
        weights=base if whole or _keeps_copy(preset) else base // world_size + int(layer),
        adapter=adapter * preset.dtype.itemsize // (1 if whole else world_size),
        optimizer=0 if offloaded else states,
        step=max(
            step + largest + _kept(adapter, preset, world_size) // shards, _update(adapter, preset) // shards
        ),
        host=states if offloaded else 0,
    )


def _states(adapter: int, preset: TrainPreset) -> int:
    """Adam's two moments, and the fp32 copy that every ZeRO stage above 0 trains on, also in fp32."""
    return adapter * (12 if preset.stage else 8)


def _update(adapter: int, preset: TrainPreset) -> int:
    """Gradients, the flat copy of them, that in fp32, and Adam's denominator, while the optimizer steps."""
    if preset.optimizer_offload != "none":
        return 0
    width = preset.dtype.itemsize
    return adapter * (2 * width + (4 if width < 4 else 0) + 4)


def _kept(adapter: int, preset: TrainPreset, world_size: int) -> int:
    """Gradients of earlier micro-batches, which wait while the next one's are made."""
    accumulates = preset.global_batch is not None and preset.global_batch > preset.micro_batch * world_size
    return adapter * preset.dtype.itemsize if accumulates else 0


def _keeps_copy(preset: TrainPreset) -> bool:
    return preset.quantization is not None and preset.quantization.bits == 8


def _config(model: Any) -> Any:
    from transformers import AutoConfig, PretrainedConfig

    config = model if isinstance(model, PretrainedConfig) else AutoConfig.from_pretrained(model)
    return unquantized(config)


def _largest_packed(model: nn.Module) -> int:
    """Elements of the largest weight that is dequantized for one product, forward or backward."""
    return max((m.get_parameter("weight").numel() for _, m in quantizable(model)), default=0)


def _largest_layer(model: nn.Module) -> int:
    """Elements that ZeRO-3 holds gathered at once, about one decoder layer."""
    layers = [child for m in model.modules() if isinstance(m, nn.ModuleList) for child in m]
    return max((sum(p.numel() for p in layer.parameters()) for layer in layers), default=0)


def _dry_run(model: Any, preset: TrainPreset, world_size: int, sequence_length: int) -> tuple[int, int]:
    """Train one step on fake tensors; return the adapter's elements and the step's peak in bytes."""
    from peft import get_peft_model
    from torch._subclasses.fake_tensor import FakeTensorMode

    model.config.use_cache = False
    if preset.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.requires_grad_(False)
    model.enable_input_require_grads()
    trained = get_peft_model(model, preset.lora_config(), autocast_adapter_dtype=False).train()
    adapter = sum(p.numel() for p in trained.parameters() if p.requires_grad)
    with FakeTensorMode():
        _make_fake(trained, preset.dtype)
        gradients = _Gradients(preset, world_size)
        for param in trained.parameters():
            if param.requires_grad:
                param.register_post_accumulate_grad_hook(gradients)
        ids = torch.zeros(preset.micro_batch, sequence_length, dtype=torch.long)
        with LiveBytes() as live:
            trained(input_ids=ids, labels=ids).loss.backward()
    return adapter, live.peak


class _Gradients:
    """Keeps of the gradients what the ZeRO stage keeps: one bucket, and this rank's shards."""

    def __init__(self, preset: TrainPreset, world_size: int) -> None:
        self.preset = preset
        self.world_size = world_size
        self.kept: list[Tensor] = []

    def __call__(self, param: Tensor) -> None:
        if self.preset.stage == 0:
            return
        if not self.kept:
            self.kept.append(torch.empty(REDUCE_BUCKET, dtype=param.dtype))
        self.kept.append(torch.empty(param.numel() // self.world_size, dtype=param.dtype))
        param.grad = None


def _make_fake(model: nn.Module, dtype: torch.dtype) -> None:
    """Give a model on the meta device fake parameters and buffers of the same shapes; ties stay ties."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, param in list(module._parameters.items()):
            if param is not None:
                fake = made.setdefault(
                    id(param), nn.Parameter(torch.empty(param.shape, dtype=dtype), param.requires_grad)
                )
                module._parameters[name] = fake
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of storages that come into being inside, and of those the most alive at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and note the storages of its results, unless they are its arguments'."""
        inputs = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            # DeepSpeed keeps shapes as tensors on meta; a fake tensor names the device that it stands for.
            real = isinstance(tensor, Tensor) and tensor.device.type != "meta"
            if real and _storage(tensor) not in inputs:
                self._note(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known.add(key)
            self.now += storage.nbytes()
            weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
