"""Frozen, proven settings to quantize (`NF4`, `FP4`, `INT8`) and to train (`QLORA_ZERO2`, `LORA_ZERO3`).

A preset is data. `dataclasses.replace(QLORA_ZERO2, micro_batch=8)` gives a changed one, and the methods turn
it into the objects that transformers, PEFT and DeepSpeed take; their keywords override single entries.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from lorasync.errors import Mismatch, MismatchError, ZeroIncompatibilityError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig

# Elements. DeepSpeed allocates a whole bucket however few gradients there are; its default, 500 M, is 1 GB
# in bf16.
REDUCE_BUCKET = 50_000_000

_ALSO_CALLED = {"rank": "r", "lora_r": "r", "alpha": "lora_alpha"}

Precision = Literal["bf16", "fp16", "fp32"]
Offload = Literal["none", "cpu"]


@dataclass(frozen=True)
class QuantPreset:
    """How bitsandbytes stores the frozen base: code book, bits a weight, double quantization of scales."""

    name: str
    quant_type: Literal["nf4", "fp4", "int8"]
    double_quant: bool = False

    def __post_init__(self) -> None:
        _refuse_values(self)

    @property
    def bits(self) -> int:
        """Bits of one packed weight, without its share of the scales."""
        return 8 if self.quant_type == "int8" else 4

    def bnb_config(
        self,
        *,
        compute_dtype: torch.dtype | None = None,
        storage_dtype: torch.dtype | None = None,
        **overrides: Any,
    ) -> BitsAndBytesConfig:
        """Build the `transformers.BitsAndBytesConfig` of this preset.

        Args:
            compute_dtype: dtype that 4-bit weights are dequantized to in the forward pass; bf16 if None.
            storage_dtype: dtype of the tensor that holds packed 4-bit weights; uint8 if None. Under DeepSpeed
                it must be uint8 or the engine's dtype, under FSDP1 the dtype of the other parameters.
            **overrides: entries of `BitsAndBytesConfig`, for example ``llm_int8_skip_modules=["lm_head"]``.

        Raises:
            MismatchError: An entry that `BitsAndBytesConfig` doesn't have, which it would ignore.

        Example:
            >>> NF4.bnb_config().bnb_4bit_quant_type
            'nf4'
        """
        import torch
        from transformers import BitsAndBytesConfig

        known = _parameters(BitsAndBytesConfig)
        other = "bnb_4bit_" if self.bits == 8 else "load_in_8bit"
        _refuse_unknown(
            "BitsAndBytesConfig", overrides, [name for name in known if not name.startswith(other)]
        )
        if self.bits == 8:
            return BitsAndBytesConfig(**{"load_in_8bit": True, **overrides})
        settings = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": self.quant_type,
            "bnb_4bit_use_double_quant": self.double_quant,
            "bnb_4bit_compute_dtype": torch.bfloat16 if compute_dtype is None else compute_dtype,
            "bnb_4bit_quant_storage": torch.uint8 if storage_dtype is None else storage_dtype,
        }
        return BitsAndBytesConfig(**{**settings, **overrides})


@dataclass(frozen=True)
class TrainPreset:
    """A way to train that is known to work: ZeRO stage, precision, LoRA shape, batch, checkpointing, offload.

    The four levers of practice are fields: ``micro_batch`` and ``global_batch`` (sequences per rank and
    forward pass; per optimizer step over all ranks, None: micro_batch x ranks), ``precision``,
    ``gradient_checkpointing`` (DeepSpeed has no key for it: hand it to `load_quantized`) and
    ``optimizer_offload``.
    """

    name: str
    stage: Literal[0, 1, 2, 3]
    quantization: QuantPreset | None
    r: int = 64
    alpha: int = 64
    precision: Precision = "bf16"
    micro_batch: int = 1
    global_batch: int | None = None
    gradient_checkpointing: bool = True
    optimizer_offload: Offload = "none"
    learning_rate: float = 1e-4

    def __post_init__(self) -> None:
        _refuse_values(self)

    @property
    def dtype(self) -> torch.dtype:
        """The engine's dtype: what parameters that are not quantized are cast to."""
        import torch

        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[self.precision]

    def lora_config(self, **overrides: Any) -> LoraConfig:
        """Build the `peft.LoraConfig`: all linear layers, no dropout (logprobs must be reproducible).

        Args:
            **overrides: entries of `LoraConfig`.

        Raises:
            MismatchError: An entry that this release's `LoraConfig` doesn't have.

        Example:
            >>> QLORA_ZERO2.lora_config(r=8).r
            8
        """
        from peft import LoraConfig

        _refuse_unknown("LoraConfig", overrides, _parameters(LoraConfig))
        settings = {
            "task_type": "CAUSAL_LM",
            "r": self.r,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0,
            "target_modules": "all-linear",
        }
        return LoraConfig(**{**settings, **overrides})

    def deepspeed_config(self, **overrides: Any) -> dict[str, Any]:
        """Build the DeepSpeed config as a new dict.

        Args:
            **overrides: top-level keys of the DeepSpeed config. Dicts are merged key by key, other values
                replace, None removes the key.

        Raises:
            ZeroIncompatibilityError: A key, at any level, that DeepSpeed doesn't know, or a value that it refuses.

        Example:
            >>> config = QLORA_ZERO2.deepspeed_config(train_micro_batch_size_per_gpu=8, gradient_clipping=0.5)
            >>> config["zero_optimization"]["stage"], config["train_micro_batch_size_per_gpu"]
            (2, 8)
        """
        config: dict[str, Any] = {
            **self._batch(),
            "gradient_clipping": 1.0,
            "optimizer": {"type": "AdamW", "params": self._adam()},
            "zero_optimization": self._zero(),
            "zero_allow_untested_optimizer": True,
        }
        if self.precision != "fp32":
            config[self.precision] = {"enabled": True}
        if "gradient_accumulation_steps" in overrides and "train_batch_size" not in overrides:
            config.pop("train_batch_size", None)
        if not overrides:
            return config
        self._refuse_own(overrides)
        return _accepted(_merged(config, _by_names_in(config, overrides)))

    def _refuse_own(self, overrides: Mapping[str, Any]) -> None:
        """Refuse the preset's own fields where keys of DeepSpeed are meant."""
        own = {_squeezed(field.name): field.name for field in fields(self)}
        wrong = [key for key in overrides if _squeezed(key) in own]
        if wrong:
            changes = ", ".join(f"{own[_squeezed(key)]}={overrides[key]!r}" for key in wrong)
            raise ZeroIncompatibilityError(
                f"deepspeed_config(): got {', '.join(wrong)}, expected keys of a DeepSpeed config. Did you mean "
                f"dataclasses.replace({self.name}, {changes}).deepspeed_config()?"
            )

    def _batch(self) -> dict[str, int]:
        batch = {"train_micro_batch_size_per_gpu": self.micro_batch}
        if self.global_batch is None:
            return {**batch, "gradient_accumulation_steps": 1}
        return {**batch, "train_batch_size": self.global_batch}

    def _adam(self) -> dict[str, Any]:
        # DeepSpeed compiles its fused Adam at the first step, which needs a CUDA compiler that matches
        # torch, and adapters are too few to gain from it. Its CPU Adam is what makes offload bearable.
        settings = {"lr": self.learning_rate, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
        return {**settings, "torch_adam": self.optimizer_offload == "none"}

    def _zero(self) -> dict[str, Any]:
        zero: dict[str, Any] = {
            "stage": self.stage,
            "contiguous_gradients": True,
            "overlap_comm": False,
            "reduce_bucket_size": REDUCE_BUCKET,
            "allgather_bucket_size": REDUCE_BUCKET,
        }
        if self.stage == 3:
            zero["stage3_gather_16bit_weights_on_model_save"] = True
        if self.optimizer_offload != "none":
            zero["offload_optimizer"] = {"device": self.optimizer_offload, "pin_memory": True}
        return zero


def _accepted(config: dict[str, Any]) -> dict[str, Any]:
    """Have the guard read a config that somebody had a hand in; what DeepSpeed would ignore is refused here."""
    from lorasync.zero import read_settings  # it needs torch

    ignored = read_settings(config).ignored
    if ignored:
        raise ZeroIncompatibilityError(
            "\n  ".join(["deepspeed_config(): got wrong keys:", *map(str, ignored)])
        )
    return config


def _by_names_in(config: Mapping[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Rename settings of ``zero_optimization`` that DeepSpeed takes under two names to the one that is there."""
    from lorasync.zero.section import aliases  # it needs torch

    zero = overrides.get("zero_optimization")
    if not isinstance(zero, dict):
        return overrides
    other = {name: alias for name, alias in aliases().items() if alias in config["zero_optimization"]}
    given = {other[key] if key in other and other[key] not in zero else key: v for key, v in zero.items()}
    return {**overrides, "zero_optimization": given}


_VALUES: dict[str, tuple[Any, ...]] = {
    "quant_type": ("nf4", "fp4", "int8"),
    "stage": (0, 1, 2, 3),
    "precision": ("bf16", "fp16", "fp32"),
    "optimizer_offload": ("none", "cpu"),
}
_COUNTS = ("r", "alpha", "micro_batch", "global_batch")


def _refuse_values(preset: Any) -> None:
    """Refuse values that no preset can have, all at once: a changed copy of one comes by here too."""
    given = {field.name: getattr(preset, field.name) for field in fields(preset)}
    wrong = [
        Mismatch(name, repr(value), "one of " + ", ".join(map(repr, _VALUES[name])), "Choose one.")
        for name, value in given.items()
        if name in _VALUES and not any(value == each and type(value) is type(each) for each in _VALUES[name])
    ]
    wrong += [
        Mismatch(name, repr(value), "a whole number above 0", "Correct it.")
        for name, value in given.items()
        if name in _COUNTS and value is not None and (type(value) is not int or value < 1)
    ]
    if wrong:
        raise MismatchError(f"{type(preset).__name__} {preset.name!r}: got values that it can't have.", wrong)


def _refuse_unknown(owner: str, given: Mapping[str, Any], known: Iterable[str]) -> None:
    """Refuse arguments that a constructor doesn't have, all at once, with the names that were meant."""
    from lorasync.zero.unknown import nearest  # it needs torch

    names = sorted(known)
    near = {key: _ALSO_CALLED.get(key) or nearest(key, names) for key in given if key not in names}
    if near:
        fixes = {key: f"Did you mean {name}?" if name else "Leave it out." for key, name in near.items()}
        raise MismatchError(
            f"{owner} doesn't have all that was given.",
            [Mismatch(key, repr(given[key]), f"an entry of {owner}", fix) for key, fix in fixes.items()],
        )


def _parameters(kind: type) -> list[str]:
    found = inspect.signature(kind).parameters.values()
    return [each.name for each in found if each.kind is not inspect.Parameter.VAR_KEYWORD]


def _squeezed(name: str) -> str:
    return name.replace("_", "").lower()


def _merged(config: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Merge ``overrides`` into a copy of ``config``: dicts key by key, None removes."""
    result = copy.deepcopy(config)
    for key, value in overrides.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = _merged(result[key], value)
        else:
            result[key] = copy.deepcopy(value)
    return result


NF4 = QuantPreset("NF4", "nf4", double_quant=True)
"""4-bit NormalFloat with doubly quantized scales, the format of the QLoRA paper (arXiv:2305.14314)."""

FP4 = QuantPreset("FP4", "fp4", double_quant=True)
"""4-bit floats with doubly quantized scales."""

INT8 = QuantPreset("INT8", "int8")
"""8-bit integers with outlier columns in 16 bits, LLM.int8() (arXiv:2208.07339)."""

QLORA_ZERO2 = TrainPreset("QLORA_ZERO2", stage=2, quantization=NF4)
"""QLoRA on an NF4 base, the base replicated on every rank: the fastest where the 4-bit model fits one GPU."""

LORA_ZERO3 = TrainPreset("LORA_ZERO3", stage=3, quantization=None, optimizer_offload="cpu")
"""LoRA on an unquantized base that is sharded over the ranks, optimizer states in host memory."""
