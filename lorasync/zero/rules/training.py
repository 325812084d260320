"""Rules about what is trained, and in which dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lorasync.zero.report import Finding
from lorasync.zero.rules.case import spelt

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lorasync.zero.rules.case import Case

_HALF = (torch.bfloat16, torch.float16)


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


def adapter_dtype(case: Case) -> Iterator[Finding]:
    """The adapter's dtype, and with it the last bits of a merge, depends on zero.Init."""
    if case.config.stage == 3 and case.config.engine_dtype in _HALF and not case.model.initialized:
        built = case.model.zero_init
        yield Finding(
            "adapter-dtype",
            "note",
            "adapter parameters",
            "fp32" if built else spelt(case.config.engine_dtype),
            (
                "the model was built under zero.Init: DeepSpeed leaves the adapters in PEFT's fp32."
                if built
                else "the model was not built under zero.Init: DeepSpeed casts the adapters to its own dtype."
            ),
            "Nothing to do; merges of both differ in the last bits.",
        )
