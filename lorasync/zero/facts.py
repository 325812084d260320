"""The few facts about a model that the guard judges by, read from a live model, an engine or a plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lorasync import bnb
from lorasync.model_size import skeleton, unquantized
from lorasync.quantization import LOADED, Quantization, of_config, of_model
from lorasync.zero.gather import full_shape

if TYPE_CHECKING:
    from lorasync.presets.quantization import QuantPreset

_FLOAT16 = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class ZeroPlan:
    """A model that does not exist yet: enough to judge it before anything is loaded.

    Attributes:
        config: a `transformers.PretrainedConfig`; a checkpoint that is quantized already says so in it.
        quantization: how it will be quantized; None if not (or not again).
        lora: the `peft.LoraConfig`; None if nothing is said about it.
        dtype: dtype of what is not quantized.
        storage_dtype: dtype that holds packed 4-bit weights.
        device_map: what will be passed to `from_pretrained`.
    """

    config: Any
    quantization: QuantPreset | None = None
    lora: Any = None
    dtype: torch.dtype = torch.bfloat16
    storage_dtype: torch.dtype = torch.uint8
    device_map: Any = None


@dataclass(frozen=True)
class ModelFacts:
    """The facts about a model that the guard judges by; names are of modules, dtypes are torch's."""

    subject: str
    bits: int | None = None
    storage: frozenset[torch.dtype] = frozenset()
    compute: frozenset[torch.dtype] = frozenset()
    trainable: int | None = None
    adapter_dtypes: frozenset[torch.dtype] = frozenset()
    float_dtypes: frozenset[torch.dtype] = frozenset()
    upcast_bytes: int = 0
    wrapped: bool = True
    zero_init: bool = False
    fsdp: bool = False
    device_map: tuple[str, ...] = ()
    device_map_given: bool = False
    checkpointing: bool = False
    reentrant: bool | None = None
    input_grads: bool = False
    training: bool = True
    open_trap: tuple[str, ...] = ()
    repacked: tuple[str, ...] = ()
    tied_adapted: tuple[str, ...] = ()
    fused_experts: tuple[str, ...] = ()
    initialized: bool = False
    unread: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def quantized(self) -> bool:
        """Whether bitsandbytes holds the linear layers."""
        return self.bits is not None


def read_facts(model: Any) -> ModelFacts:
    """Read the facts of a plan, a live model or a DeepSpeed engine around one."""
    if isinstance(model, ZeroPlan):
        return _plan_facts(model)
    if hasattr(model, "zero_optimization_stage"):
        return _live_facts(model.module, "engine")
    if type(model).__name__ in {"DistributedDataParallel", "DataParallel"}:
        model = model.module
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: got {type(model).__name__}, expected a model, a DeepSpeed engine or a ZeroPlan."
        )
    return _live_facts(model, "live model")


def _live_facts(model: nn.Module, subject: str) -> ModelFacts:
    layers = {name: m for name, m in model.named_modules() if bnb.layer_bits(m) is not None}
    four = {name: m for name, m in layers.items() if bnb.layer_bits(m) == 4}
    packed = {id(m.weight) for m in layers.values()}
    floats = [p for p in model.parameters() if p.is_floating_point() and id(p) not in packed]
    trainable = [p for p in floats if p.requires_grad]
    base = _base(model)
    return ModelFacts(
        subject=subject,
        bits=4 if four else 8 if layers else None,
        storage=frozenset(m.weight.dtype for m in four.values()),
        compute=frozenset(dtype for m in four.values() if (dtype := bnb.compute_dtype(m)) is not None),
        trainable=len(trainable),
        adapter_dtypes=frozenset(p.dtype for p in trainable),
        float_dtypes=frozenset(p.dtype for p in floats if not p.requires_grad),
        upcast_bytes=_upcast_bytes(floats),
        wrapped=base is not model,
        zero_init=any(hasattr(p, "ds_id") for p in floats) and subject != "engine",
        fsdp=any(type(p).__name__ == "DTensor" for p in model.parameters()),
        device_map=_devices(getattr(base, "hf_device_map", None)),
        checkpointing=bool(getattr(base, "is_gradient_checkpointing", False)),
        reentrant=_reentrant(model),
        input_grads=_has_input_grads(base),
        training=model.training,
        open_trap=tuple(n for n, m in four.items() if bnb.has_open_trap(m)),
        repacked=tuple(n for n, m in four.items() if bnb.is_repacked(bnb.quant_state(m, "weight"))),
        tied_adapted=_tied_adapted(base),
        fused_experts=tuple(n for n, p in model.named_parameters() if _is_fused_expert(n, full_shape(p))),
        initialized=subject == "engine",
        unread=_unread(of_model(model)),
    )


def _plan_facts(plan: ZeroPlan) -> ModelFacts:
    settings = getattr(plan.config, "quantization_config", None)
    existing = None if settings is None else bnb.read_settings(settings)
    asked = plan.quantization or existing
    bits = None if asked is None else asked.bits
    storage = plan.storage_dtype if existing is None else existing.storage
    compute = plan.dtype if existing is None else existing.compute
    plain = unquantized(plan.config)
    shapes = skeleton(plain, dtype=plan.dtype)
    return ModelFacts(
        subject="plan",
        bits=bits,
        storage=frozenset([storage]) if bits == 4 else frozenset(),
        compute=frozenset([compute]) if bits == 4 else frozenset(),
        float_dtypes=frozenset([plan.dtype]),
        device_map=_planned_devices(plan.device_map),
        device_map_given=plan.device_map is not None,
        tied_adapted=_planned_tied(shapes, plan.lora),
        fused_experts=tuple(n for n, p in shapes.named_parameters() if _is_fused_expert(n, p.shape)),
        unread=_unread(of_config(plan.config)),
    )


def _unread(found: Quantization) -> str | None:
    """Name what packed the weights where the rules know nothing about it: they are bitsandbytes'."""
    return found.refusal("base") if found.kind not in LOADED else None


def _base(model: nn.Module) -> nn.Module:
    """Return the transformers model inside a PeftModel, or the model itself."""
    get = getattr(model, "get_base_model", None)
    return get() if callable(get) else model


def _upcast_bytes(floats: list[nn.Parameter]) -> int:
    """Return the bytes of frozen fp32 parameters, without the vectors that models keep in fp32 on purpose."""
    return sum(
        full_shape(p).numel() * 4
        for p in floats
        if p.dtype == torch.float32 and not p.requires_grad and len(full_shape(p)) > 1
    )


def _devices(device_map: Mapping[str, Any] | None) -> tuple[str, ...]:
    return tuple(sorted({str(device) for device in (device_map or {}).values()}))


def _planned_devices(device_map: Any) -> tuple[str, ...]:
    if device_map is None:
        return ()
    if isinstance(device_map, Mapping):
        return _devices(device_map)
    return (
        ("several",) * 2
        if device_map in ("auto", "balanced", "balanced_low_0", "sequential")
        else (str(device_map),)
    )


def _reentrant(model: nn.Module) -> bool | None:
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if isinstance(function, partial):
            return bool(function.keywords.get("use_reentrant", True))
    return None


def _has_input_grads(base: nn.Module) -> bool:
    """Whether the embedding's output is made to require gradients (by transformers or by PEFT, in a hook)."""
    embed = _embedding(base, "get_input_embeddings")
    hooks = {} if embed is None else embed._forward_hooks
    return any("require_grad" in getattr(hook, "__name__", "") for hook in hooks.values())


def _is_fused_expert(name: str, shape: torch.Size) -> bool:
    return len(shape) == 3 and "experts" in name.split(".")


def _tied_adapted(base: nn.Module) -> tuple[str, ...]:
    """Return which side of tied embeddings carries an adapter, if exactly one does."""
    embed, head = _embedding(base, "get_input_embeddings"), _embedding(base, "get_output_embeddings")
    if embed is None or head is None:
        return ()
    tied = _innermost(embed).weight is _innermost(head).weight
    sides = [name for name, module in (("embed_tokens", embed), ("lm_head", head)) if _adapted(module)]
    return tuple(sides) if tied and len(sides) == 1 else ()


def _embedding(base: nn.Module, getter: str) -> nn.Module | None:
    get = getattr(base, getter, None)
    return get() if callable(get) else None


def _innermost(module: nn.Module) -> Any:
    """Return the original layer below PEFT's wrappers."""
    for name in ("base_layer", "original_module"):
        inner = getattr(module, name, None)
        if isinstance(inner, nn.Module):
            return _innermost(inner)
    return module


def _adapted(module: nn.Module) -> bool:
    kinds = ("lora_A", "lora_embedding_A", "modules_to_save", "trainable_tokens_delta")
    return any(bool(getattr(module, kind, None)) for kind in kinds)


def _planned_tied(shapes: nn.Module, lora: Any) -> tuple[str, ...]:
    if lora is None or not getattr(getattr(shapes, "config", None), "tie_word_embeddings", False):
        return ()
    wanted = set(_names(getattr(lora, "target_modules", None))) | set(
        _names(getattr(lora, "modules_to_save", None))
    )
    sides = [side for side in ("embed_tokens", "lm_head") if any(n.split(".")[-1] == side for n in wanted)]
    return tuple(sides) if len(sides) == 1 and not getattr(lora, "ensure_weight_tying", False) else ()


def _names(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif value is not None:
        yield from value
