"""Rules about packed weights: what casts, repacks or misreads them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lorasync.zero.report import Finding
from lorasync.zero.rules.case import spelt

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lorasync.zero.rules.case import Case

_INTEGERS_SHARDED = "2.13"  # torch, FSDP2: run by tests/source/test_ranks.py


def storage_cast(case: Case) -> Iterator[Finding]:
    """DeepSpeed casts packed 4-bit weights like any float parameter, if a float dtype other than the engine's holds them."""
    engine = case.config.engine_dtype
    if case.config.framework != "deepspeed" or case.model.initialized or engine in (None, torch.float32):
        return
    for storage in sorted(case.model.storage, key=str):
        if storage.is_floating_point and storage != engine:
            yield Finding(
                "storage-cast",
                "error",
                "bnb_4bit_quant_storage",
                spelt(storage),
                f"DeepSpeed casts every float parameter to {spelt(engine)}, packed 4-bit bytes included: "
                "the base becomes garbage, and training goes on.",
                "Load with storage_dtype=torch.uint8 (the default of load_quantized), or "
                f"torch.{spelt(engine)}.",
                "" if storage.itemsize == engine.itemsize else "shape '[…]' is invalid for input of size …",
            )


def packed_damage(case: Case) -> Iterator[Finding]:
    """An engine that was built already may have cast the packed bytes."""
    engine = case.config.engine_dtype
    if case.model.initialized and engine in case.model.storage:
        yield Finding(
            "storage-unproven",
            "warning",
            "bnb_4bit_quant_storage",
            spelt(engine),
            "packed weights have the engine's dtype now; whether they had it before deepspeed.initialize "
            "can't be seen any more.",
            "Run check_zero on the model before deepspeed.initialize.",
        )


def repacked(case: Case) -> Iterator[Finding]:
    """Weights that bitsandbytes has repacked in place for AVX512-BF16 dequantize to garbage."""
    if case.model.repacked:
        yield Finding(
            "weights-repacked",
            "error",
            case.model.repacked[0],
            f"{len(case.model.repacked)} modules repacked",
            "an eval-mode forward on this CPU has rewritten the packed weights into bitsandbytes' AVX512 "
            "layout; merging, gathering or training from them uses garbage.",
            "Load the model again with load_quantized, which switches the repacking off.",
        )


def avx512_trap(case: Case) -> Iterator[Finding]:
    """On an AVX512-BF16 CPU the next eval-mode forward would repack the weights."""
    if case.model.open_trap and not case.model.repacked:
        yield Finding(
            "avx512-trap",
            "warning" if case.model.training else "error",
            "support_avx512bf16_for_cpu",
            f"True on {len(case.model.open_trap)} modules, model.training = {case.model.training}",
            "bitsandbytes repacks 4-bit weights in place in an eval-mode forward on this CPU; what is "
            "dequantized or gathered afterwards is garbage, without an error.",
            "Call lorasync.load.close_avx512_trap(model), or load with load_quantized, which does.",
        )


def unread_base(case: Case) -> Iterator[Finding]:
    """The rules know how ZeRO treats weights that bitsandbytes packed; they know nothing of any other method."""
    if case.model.unread:
        yield Finding(
            "unread-base",
            "error",
            "model",
            case.model.subject,
            f"{case.model.unread} What ZeRO does to such weights was never tried, and no source reads them all.",
            "Judge, and train on, a plain base or one that load_quantized made.",
        )


def compute_dtype(case: Case) -> Iterator[Finding]:
    """Arithmetic in another dtype than the engine's is slower or less exact than was meant."""
    for dtype in sorted(case.model.compute, key=str):
        if case.config.engine_dtype is not None and dtype != case.config.engine_dtype:
            yield Finding(
                "compute-dtype",
                "warning",
                "bnb_4bit_compute_dtype",
                spelt(dtype),
                f"4-bit layers compute in {spelt(dtype)}, the rest of the engine in "
                f"{spelt(case.config.engine_dtype)} (fp32 is what bitsandbytes takes if nothing is said).",
                f"Load with dtype=torch.{spelt(case.config.engine_dtype)}.",
            )


def fsdp_storage(case: Case) -> Iterator[Finding]:
    """FSDP2 leaves integers alone, and casts packed weights in a float storage as it casts any; FSDP1 flattens all."""
    if case.config.framework == "deepspeed" or case.model.bits != 4:
        return
    expected = case.config.engine_dtype if case.config.engine_dtype is not None else torch.bfloat16
    wrong = [storage for storage in sorted(case.model.storage, key=str) if storage != expected]
    for storage in wrong:
        if case.config.framework == "fsdp1":
            yield Finding(
                "fsdp1-storage",
                "error",
                "bnb_4bit_quant_storage",
                spelt(storage),
                f"FSDP1 makes one flat tensor of a layer's parameters ({spelt(expected)}), which takes one float dtype.",
                f"Load with storage_dtype=torch.{spelt(expected)}, or use FSDP2.",
                "Cannot flatten integer dtype tensors",
            )
        elif storage.is_floating_point:
            yield Finding(
                "fsdp2-storage",
                "error",
                "bnb_4bit_quant_storage",
                spelt(storage),
                f"FSDP2's mixed precision casts float parameters to {spelt(expected)}, packed 4-bit weights too.",
                f"Load with storage_dtype=torch.uint8 or torch.{spelt(expected)}.",
            )
        elif case.versions.older("torch", _INTEGERS_SHARDED):
            yield Finding(
                "fsdp2-storage",
                "warning",
                "bnb_4bit_quant_storage",
                spelt(storage),
                f"That FSDP2 leaves integers as they are was run with torch {_INTEGERS_SHARDED}; this one is older.",
                f"Load with storage_dtype=torch.{spelt(expected)}, or upgrade torch.",
            )


def fused_experts(case: Case) -> Iterator[Finding]:
    """Transformers 5 keeps a layer's experts in one 3-D tensor, which bitsandbytes doesn't quantize."""
    if case.model.fused_experts and case.model.quantized:
        yield Finding(
            "experts-not-quantized",
            "note",
            case.model.fused_experts[0],
            f"{len(case.model.fused_experts)} tensors",
            "bitsandbytes quantizes nn.Linear only: fused experts, most of the model, stay 16-bit.",
            "Plan memory for 16-bit experts.",
        )
