"""The methods that can pack a base's weights: their names, and what to do where lorasync can't read them."""

from __future__ import annotations

from dataclasses import dataclass, replace

LIVE = frozenset({"plain", "nf4", "fp4", "int8", "fp8"})
"""What is read from a model in memory."""
STORED = LIVE | {"mxfp4", "mxfp8"}
"""What is read from a folder."""
LOADED = frozenset({"plain", "nf4", "fp4", "int8"})
"""What `load_quantized` makes or takes as it is."""

_SHOWN = 5


@dataclass(frozen=True)
class Quantization:
    """How a base's weights are held.

    Attributes:
        kind: A short id: "plain", "nf4", "fp4", "int8", "fp8", "mxfp4", … or "unknown".
        name: What people call it.
        instead: What works where this kind isn't read.
        where: The modules or tensors that are held so, where they were looked at.
    """

    kind: str
    name: str
    instead: str = ""
    where: tuple[str, ...] = ()

    @property
    def plain(self) -> bool:
        """Whether the values lie in the tensors as they are."""
        return self.kind == "plain"

    def at(self, where: list[str]) -> Quantization:
        """Return the same, found in these modules or tensors."""
        return replace(self, where=tuple(where))

    def refusal(self, subject: str) -> str:
        """Say that ``subject`` is held so, what was expected, and what works.

        Example:
            >>> print(method("gptq").at(["model.layers.0.mlp"]).refusal("base"))
            base: got weights packed by GPTQ (model.layers.0.mlp), expected plain ones or bitsandbytes' NF4, FP4 or \
INT8. Take the 16-bit model that they were made from; load_quantized holds it in 4 bits.
        """
        found = ", ".join(self.where[:_SHOWN])
        more = f" and {len(self.where) - _SHOWN} more" if len(self.where) > _SHOWN else ""
        where = f" ({found}{more})" if found else ""
        return (
            f"{subject}: got weights packed by {self.name}{where}, expected plain ones or bitsandbytes' NF4, FP4 or "
            f"INT8. {self.instead}"
        )


_ORIGINAL = "Take the 16-bit model that they were made from; load_quantized holds it in 4 bits."
_AT_LOAD = "Load it as plain weights: from_pretrained(…, quantization_config={config}(dequantize=True))."

PLAIN = Quantization("plain", "nothing")
NF4 = Quantization("nf4", "bitsandbytes (NF4)", _ORIGINAL)
FP4 = Quantization("fp4", "bitsandbytes (FP4)", _ORIGINAL)
INT8 = Quantization("int8", "bitsandbytes (INT8)", _ORIGINAL)
UNPACKED_4BIT = Quantization(
    "unknown",
    "bitsandbytes' 4-bit layers, which were never quantized",
    "Move the model to its device first.",
)

_NAMES = {
    "aqlm": "AQLM",
    "auto_round": "AutoRound",
    "awq": "AWQ",
    "bitnet": "BitNet",
    "compressed_tensors": "compressed-tensors",
    "eetq": "EETQ",
    "fbgemm_fp8": "FBGEMM FP8",
    "fouroversix": "Four Over Six",
    "fp8": "FP8 with block scales (FP8Linear)",
    "fp_quant": "FP-Quant",
    "gemma": "Gemma's quantization",
    "gguf": "GGUF",
    "gptq": "GPTQ",
    "higgs": "HIGGS",
    "hqq": "HQQ",
    "metal": "Metal",
    "modelopt": "ModelOpt",
    "mxfp4": "MXFP4",
    "mxfp8": "MXFP8",
    "nvfp4": "NVFP4",
    "quanto": "quanto",
    "quark": "Quark",
    "sinq": "SINQ",
    "spqr": "SpQR",
    "torchao": "torchao",
    "vptq": "VPTQ",
}
_ALIASES = {
    "autoround": "auto_round",
    "intel/auto_round": "auto_round",
    "fine_grained_fp8": "fp8",
    "finegrained_fp8": "fp8",
    "fpquant": "fp_quant",
    "gptqmodel": "gptq",
}
_DEQUANTIZED = {"fp8": "FineGrainedFP8Config", "mxfp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config"}


def method(name: str) -> Quantization:
    """Look up a method by transformers' ``quant_method``; one that nobody knows keeps its own name.

    Example:
        >>> method("QuantizationMethod.HQQ").name, method("brand-new").name
        ('HQQ', 'brand-new')
    """
    key = name.rpartition(".")[2].lower().replace("-", "_").strip()
    key = _ALIASES.get(key, key)
    if key not in _NAMES:
        return unknown(name)
    at_load = _DEQUANTIZED.get(key)
    return Quantization(key, _NAMES[key], _AT_LOAD.format(config=at_load) if at_load else _ORIGINAL)


def unknown(what: str) -> Quantization:
    """Name what lorasync has never heard of by what is seen of it."""
    return Quantization("unknown", what, _ORIGINAL)
