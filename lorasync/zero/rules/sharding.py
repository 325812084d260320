"""Rules about what ZeRO shards, sends and offloads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorasync.zero.report import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lorasync.zero.rules.case import Case


def all_reduce_fetch(case: Case) -> Iterator[Finding]:
    """Fetching by all-reduce adds packed bytes as if they were numbers."""
    if case.config.stage == 3 and case.config.all_reduce_fetch and case.model.quantized:
        packed_float = case.model.bits == 4 and all(s.is_floating_point for s in case.model.storage)
        yield Finding(
            "all-reduce-fetch",
            "error",
            "zero_optimization.stage3_use_all_reduce_for_fetch_params",
            "true",
            "parameters are summed over the ranks in one flat buffer of one dtype: packed integers don't "
            "fit into it, and packed bytes in a float dtype are not safe in a float sum (-0.0 and NaN "
            "patterns change).",
            "Remove the key, or set it to false.",
            "" if packed_float else "expected there to be only one unique element",
        )


def quantized_weights(case: Case) -> Iterator[Finding]:
    """ZeRO++ quantizes weights for communication: packed ones a second time, and by value."""
    key = "zero_quantized_weights" if case.config.quantized_weights else "zero_quantized_nontrainable_weights"
    asked = case.config.quantized_weights or case.config.quantized_nontrainable_weights
    if case.config.stage != 3 or not asked:
        return
    if case.model.quantized:
        yield Finding(
            "zeropp-weights",
            "error",
            f"zero_optimization.{key}",
            "true",
            "ZeRO++ quantizes parameters by value before it sends them; packed bytes are no values.",
            "Remove the key: a 4-bit base is four times smaller on the wire already.",
        )
    else:
        yield Finding(
            "zeropp-lossy",
            "error",
            f"zero_optimization.{key}",
            "true",
            "the forward pass sees weights that went through 8 bits, a merge sees the exact ones: the engine "
            "would serve another policy than the one that is trained.",
            "Remove the key.",
        )


def nvme(case: Case) -> Iterator[Finding]:
    """NVMe offload of parameters keeps one dtype for its swap buffers."""
    if case.config.param_offload == "nvme" and case.model.quantized:
        yield Finding(
            "nvme-params",
            "error",
            "zero_optimization.offload_param.device",
            "nvme",
            "the swap buffers have the dtype of the model's first parameter; packed bytes of another dtype "
            "are read back wrongly.",
            'Use {"device": "cpu"}: a 4-bit base is small, and works there.',
        )


def offload_stage(case: Case) -> Iterator[Finding]:
    """Offload does nothing, or fails, below the stage that partitions what is offloaded."""
    if case.config.param_offload != "none" and case.config.stage < 3:
        yield _useless("offload_param", case.config.param_offload, case.config.stage, "3")
    if case.config.optimizer_offload != "none" and case.config.stage < 1:
        yield _useless("offload_optimizer", case.config.optimizer_offload, case.config.stage, "1, 2 or 3")


def _useless(key: str, value: str, stage: int, needed: str) -> Finding:
    return Finding(
        "offload-stage",
        "warning",
        f"zero_optimization.{key}.device",
        value,
        f"stage {stage} partitions nothing that this could move.",
        f"Remove the key, or use stage {needed}.",
    )


def device_map(case: Case) -> Iterator[Finding]:
    """A model that is spread over devices can't be one rank's model."""
    if len(case.model.device_map) > 1:
        yield Finding(
            "device-map",
            "error",
            "device_map",
            ", ".join(dict.fromkeys(case.model.device_map)),
            "one copy of the model is spread over devices; every rank needs a copy, or a shard, of its own.",
            "Load without device_map; load_quantized puts each rank's model on its own device.",
            "You can't train a model that has been loaded with `device_map='auto'` in any distributed mode",
        )
    elif case.model.device_map_given and case.config.stage == 3 and case.config.framework == "deepspeed":
        yield Finding(
            "device-map",
            "error",
            "device_map",
            case.model.device_map[0],
            "transformers refuses any device_map while a ZeRO-3 config is active.",
            "Leave device_map out, and set the device of the rank first (torch.cuda.set_device(local_rank)).",
            "DeepSpeed Zero-3 is not compatible with passing a `device_map`",
        )


def eight_bit_zero3(case: Case) -> Iterator[Finding]:
    """8-bit layers keep a whole copy of the weight beside the parameter."""
    if case.model.bits == 8 and case.config.sharded:
        yield Finding(
            "int8-not-sharded",
            "warning",
            "zero_optimization.stage"
            if case.config.framework == "deepspeed"
            else case.config.framework.upper(),
            "3" if case.config.framework == "deepspeed" else "on",
            "8-bit layers keep the whole weight in state.CB: it trains correctly, but sharding saves no "
            "memory.",
            "Use NF4, or stage 2.",
        )


def whole_load(case: Case) -> Iterator[Finding]:
    """zero.Init is skipped for quantized models."""
    if case.model.quantized and case.config.stage == 3 and not case.model.initialized:
        yield Finding(
            "whole-model-load",
            "note",
            "zero_optimization.stage",
            "3",
            "transformers skips zero.Init for quantized models: every rank loads the whole quantized model "
            "and is sharded by deepspeed.initialize.",
            "Make sure that one device holds the whole quantized model.",
        )
