"""The rules of the guard: each looks at one thing; docs/zero.md has a section on every finding.

Every verdict on a combination of quantization, stage, dtypes and offload is shown by a real run: the rows of
docs/compatibility.md are generated from them, and the run's outcome must agree with the rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lorasync.zero.report import Finding, Versions

if TYPE_CHECKING:
    from lorasync.zero.facts import ModelFacts
    from lorasync.zero.settings import ZeroSettings


@dataclass(frozen=True)
class Case:
    """What a rule sees: the model, the training config, and the versions to judge for."""

    model: ModelFacts
    config: ZeroSettings
    versions: Versions


Rule = Callable[[Case], Iterator[Finding]]

_HALF = (torch.bfloat16, torch.float16)
_MANY_DTYPES_SINCE = "0.12.3"  # DeepSpeed #4647: ZeRO-3 gathers parameters of several dtypes
_PARAM_CAST_SINCE = (
    "0.19.2"  # DeepSpeed #8066: casts parameters itself; before, module.half() or module.bfloat16()
)
_MOVE_4BIT_SINCE = "4.45.0"  # transformers #33122: a 4-bit model may be moved
_INTEGERS_SHARDED = "2.13"  # torch, FSDP2: run by tests/test_source_ranks.py
_MOVE_8BIT_SINCE = "0.48.0"  # bitsandbytes, asked for by transformers 5


def storage_cast(case: Case) -> Iterator[Finding]:
    """Packed 4-bit weights in a float tensor of another dtype than the engine's are cast like weights."""
    engine = case.config.engine_dtype
    if case.config.framework != "deepspeed" or case.model.initialized or engine in (None, torch.float32):
        return
    for storage in sorted(case.model.storage, key=str):
        if storage.is_floating_point and storage != engine:
            yield Finding(
                "storage-cast",
                "error",
                "bnb_4bit_quant_storage",
                _name(storage),
                f"DeepSpeed casts every float parameter to {_name(engine)}, packed 4-bit bytes included: "
                "the base becomes garbage, and training goes on.",
                "Load with storage_dtype=torch.uint8 (the default of load_quantized), or "
                f"torch.{_name(engine)}.",
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
            _name(engine),
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


def unread_base(case: Case) -> Iterator[Finding]:
    """What holds for bitsandbytes' packed weights is known; of any other method nothing is."""
    if case.model.unread:
        yield Finding(
            "unread-base",
            "error",
            "model",
            case.model.subject,
            f"{case.model.unread} What ZeRO does to such weights was never tried, and no source reads them all.",
            "Judge, and train on, a plain base or one that load_quantized made.",
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


def no_adapter(case: Case) -> Iterator[Finding]:
    """A frozen model without an adapter has nothing to train."""
    if case.model.trainable == 0:
        yield Finding(
            "no-adapter",
            "error",
            "trainable parameters",
            "0",
            "nothing would be trained: "
            + ("packed weights have no gradients." if case.model.quantized else "all is frozen."),
            "Attach one first: get_peft_model(model, QLORA_ZERO2.lora_config()).",
            "You cannot perform fine-tuning on purely quantized models",
        )


def reentrant(case: Case) -> Iterator[Finding]:
    """Re-entrant checkpointing needs inputs with gradients, which a frozen embedding doesn't give."""
    if case.model.checkpointing and case.model.reentrant and not case.model.input_grads:
        yield Finding(
            "reentrant-checkpointing",
            "error",
            "gradient_checkpointing_kwargs.use_reentrant",
            "true",
            "the embedding is frozen, so no checkpointed block has an input with gradients, and the "
            "adapters in it get none.",
            'Call model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": '
            "False}), or model.enable_input_require_grads().",
            "None of the inputs have requires_grad=True. Gradients will be None; loss must be a scalar tensor",
        )


def kbit_upcast(case: Case) -> Iterator[Finding]:
    """`prepare_model_for_kbit_training` turns embeddings, heads and experts into fp32."""
    if case.model.upcast_bytes and case.model.quantized and case.config.engine_dtype in _HALF:
        yield Finding(
            "kbit-upcast",
            "warning",
            "frozen fp32 parameters",
            f"{case.model.upcast_bytes / 2**20:.0f} MiB",
            "prepare_model_for_kbit_training has upcast what is not quantized; DeepSpeed casts it back, "
            "after twice the memory has been used.",
            "Leave prepare_model_for_kbit_training out: load_quantized freezes, enables input gradients "
            "and checkpointing without it.",
        )


def compute_dtype(case: Case) -> Iterator[Finding]:
    """Arithmetic in another dtype than the engine's is slower or less exact than was meant."""
    for dtype in sorted(case.model.compute, key=str):
        if case.config.engine_dtype is not None and dtype != case.config.engine_dtype:
            yield Finding(
                "compute-dtype",
                "warning",
                "bnb_4bit_compute_dtype",
                _name(dtype),
                f"4-bit layers compute in {_name(dtype)}, the rest of the engine in "
                f"{_name(case.config.engine_dtype)} (fp32 is what bitsandbytes takes if nothing is said).",
                f"Load with dtype=torch.{_name(case.config.engine_dtype)}.",
            )


def tied_adapter(case: Case) -> Iterator[Finding]:
    """An adapter on one side of tied embeddings makes two matrices out of one."""
    if case.model.tied_adapted:
        side = case.model.tied_adapted[0]
        yield Finding(
            "tied-adapter",
            "warning",
            side,
            "adapter on one side of tied embeddings",
            "embed_tokens and lm_head are one matrix; merged, it would get the adapter's change on both "
            "sides, which is not the policy that was trained.",
            "Leave both out of target_modules and modules_to_save, or untie the embeddings first.",
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


def adapter_dtype(case: Case) -> Iterator[Finding]:
    """The adapter's dtype, and with it the last bits of a merge, depends on zero.Init."""
    if case.config.stage == 3 and case.config.engine_dtype in _HALF and not case.model.initialized:
        built = case.model.zero_init
        yield Finding(
            "adapter-dtype",
            "note",
            "adapter parameters",
            "fp32" if built else _name(case.config.engine_dtype),
            (
                "the model was built under zero.Init: DeepSpeed leaves the adapters in PEFT's fp32."
                if built
                else "the model was not built under zero.Init: DeepSpeed casts the adapters to its own dtype."
            ),
            "Nothing to do; merges of both differ in the last bits.",
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
                _name(storage),
                f"FSDP1 makes one flat tensor of a layer's parameters ({_name(expected)}), which takes one float dtype.",
                f"Load with storage_dtype=torch.{_name(expected)}, or use FSDP2.",
                "Cannot flatten integer dtype tensors",
            )
        elif storage.is_floating_point:
            yield Finding(
                "fsdp2-storage",
                "error",
                "bnb_4bit_quant_storage",
                _name(storage),
                f"FSDP2's mixed precision casts float parameters to {_name(expected)}, packed 4-bit weights too.",
                f"Load with storage_dtype=torch.uint8 or torch.{_name(expected)}.",
            )
        elif case.versions.older("torch", _INTEGERS_SHARDED):
            yield Finding(
                "fsdp2-storage",
                "warning",
                "bnb_4bit_quant_storage",
                _name(storage),
                f"That FSDP2 leaves integers as they are was run with torch {_INTEGERS_SHARDED}; this one is older.",
                f"Load with storage_dtype=torch.{_name(expected)}, or upgrade torch.",
            )


def ignored_keys(case: Case) -> Iterator[Finding]:
    """What DeepSpeed doesn't know it ignores; a key that is a known one misspelt is refused before any rule."""
    for unknown in case.config.ignored:
        yield Finding(
            "ignored-key",
            "warning",
            unknown.key,
            "set",
            "DeepSpeed has no such key and ignores it without a word.",
            "Remove it, or put an underscore in front if it is a remark.",
        )


def auto_precision(case: Case) -> Iterator[Finding]:
    """A precision of "auto" leaves the most important question open."""
    if case.config.engine_dtype is None:
        yield Finding(
            "auto-precision",
            "warning",
            "bf16.enabled / fp16.enabled",
            "auto",
            "the engine's dtype is not known yet, so nothing could be judged that depends on it.",
            "Pass the TrainingArguments instead of the raw config, or write true or false.",
        )


def old_stack(case: Case) -> Iterator[Finding]:
    """Combinations that fail on older releases, and work on newer ones."""
    if not case.model.quantized or case.config.framework != "deepspeed" or case.model.initialized:
        return
    bare = not case.model.wrapped  # in a PeftModel nobody calls the inner model's own to() or half()
    if bare and case.versions.older("transformers", _MOVE_4BIT_SINCE):
        yield _old(
            "transformers",
            case.versions.transformers,
            _MOVE_4BIT_SINCE,
            "refuses to move quantized models, and deepspeed.initialize moves the model",
            "`.to` is not supported for `4-bit` or `8-bit` models",
        )
    if bare and case.model.bits == 8 and case.versions.older("bitsandbytes", _MOVE_8BIT_SINCE):
        yield _old(
            "bitsandbytes",
            case.versions.bitsandbytes,
            _MOVE_8BIT_SINCE,
            "can't move 8-bit models, and deepspeed.initialize moves the model",
            "`.to` is not supported for `4-bit` or `8-bit` models",
        )
    halved = bare and case.config.engine_dtype == torch.float16
    if halved and case.versions.older("deepspeed", _PARAM_CAST_SINCE):
        yield _old(
            "deepspeed",
            case.versions.deepspeed,
            _PARAM_CAST_SINCE,
            "calls model.half(), which transformers refuses for quantized models",
            "`.half()` is not supported for quantized model",
        )
    if case.config.stage == 3 and case.versions.older("deepspeed", _MANY_DTYPES_SINCE):
        yield _old(
            "deepspeed",
            case.versions.deepspeed,
            _MANY_DTYPES_SINCE,
            "gathers parameters of one dtype only under ZeRO-3, and packed weights have another",
            "expected there to be only one unique element",
        )


def _old(library: str, found: str | None, since: str, what: str, symptom: str) -> Finding:
    return Finding(
        "old-stack",
        "error",
        library,
        str(found),
        f"this release {what}.",
        f"pip install -U '{library}>={since}'",
        symptom,
    )


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


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")
