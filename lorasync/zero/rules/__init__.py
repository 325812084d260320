"""The rules of the guard: each looks at one thing; docs/zero.md has a section on every finding.

Every verdict on a combination of quantization, stage, dtypes and offload is shown by a real run: the rows of
docs/compatibility.md are generated from them, and the run's outcome must agree with the rule.
"""

from __future__ import annotations

from lorasync.zero.rules.case import Case, Rule
from lorasync.zero.rules.packed import (
    avx512_trap,
    compute_dtype,
    fsdp_storage,
    fused_experts,
    packed_damage,
    repacked,
    storage_cast,
    unread_base,
)
from lorasync.zero.rules.sharding import (
    all_reduce_fetch,
    device_map,
    eight_bit_zero3,
    nvme,
    offload_stage,
    quantized_weights,
    whole_load,
)
from lorasync.zero.rules.stack import auto_precision, ignored_keys, old_stack
from lorasync.zero.rules.training import adapter_dtype, kbit_upcast, no_adapter, reentrant, tied_adapter

__all__ = ["RULES", "Case", "Rule"]

RULES: tuple[Rule, ...] = (
    storage_cast,
    packed_damage,
    repacked,
    avx512_trap,
    all_reduce_fetch,
    unread_base,
    quantized_weights,
    nvme,
    device_map,
    no_adapter,
    reentrant,
    fsdp_storage,
    old_stack,
    ignored_keys,
    auto_precision,
    offload_stage,
    kbit_upcast,
    compute_dtype,
    tied_adapter,
    eight_bit_zero3,
    whole_load,
    adapter_dtype,
    fused_experts,
)
