"""Tiny model folders whose weights are packed as published checkpoints pack them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.tiny import build

BLOCK = 16
GPT_OSS: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}


def gpt_oss() -> Any:
    import transformers

    torch.manual_seed(0)
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**GPT_OSS)).to(torch.bfloat16).eval()


def rewrite(folder: Path, change: Any, **config: Any) -> Path:
    """Let ``change`` edit a folder's tensors in place, and put entries into its config (None removes one)."""
    tensors = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    change(tensors)
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    written = json.loads((folder / "config.json").read_text())
    written = {key: value for key, value in {**written, **config}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(written))
    return folder


def mxfp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight in float8, and exponents of its rows' blocks."""
    rows, columns = weight.shape
    tiles = weight.float().view(rows, columns // BLOCK, BLOCK)
    exponents = (tiles.abs().amax(2) / 448).log2().ceil()
    packed = (tiles / exponents.exp2()[..., None]).view(rows, columns).to(torch.float8_e4m3fn)
    return packed, (exponents + 127).to(torch.uint8)


def fp8(weight: torch.Tensor, block: int | None = BLOCK) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight in float8, and the scales of its blocks (None: one scale)."""
    rows, columns = weight.shape
    high, wide = (rows, columns) if block is None else (block, block)
    tiles = weight.float().view(rows // high, high, columns // wide, wide)
    scale = tiles.abs().amax((1, 3)) / 448
    packed = (tiles / scale[:, None, :, None]).view(rows, columns).to(torch.float8_e4m3fn)
    return packed, scale if block is not None else scale.reshape(())


def fp8_folder(folder: Path, architecture: str, *, skip: tuple[str, ...] = ("lm_head",), **how: Any) -> Path:
    """A model of which all linear layers but some are in FP8, as DeepSeek's and Qwen's."""
    build(architecture).save_pretrained(folder)
    suffix, block = how.get("suffix", "_scale_inv"), how.get("block", BLOCK)

    def pack(tensors: dict[str, torch.Tensor]) -> None:
        for name in [
            n for n in tensors if "proj" in n and n.endswith("weight") and not any(s in n for s in skip)
        ]:
            weight = tensors[name]
            tensors[name], scale = mxfp8(weight) if how.get("method") == "mxfp8" else fp8(weight, block)
            tensors[name.removesuffix(how.get("instead", "")) + suffix] = scale.to(
                how.get("scale_dtype", scale.dtype)
            )
            if block is None:
                tensors[name.removesuffix("weight") + "input_scale"] = torch.tensor(0.5)

    said = {
        "quant_method": how.get("method", "fp8"),
        "activation_scheme": "dynamic" if block else "static",
        "weight_block_size": [block, block] if block else None,
        "modules_to_not_convert": list(skip),
    }
    return rewrite(folder, pack, quantization_config=said)


def mxfp4_folder(folder: Path) -> Path:
    """gpt-oss with its experts in MXFP4 and all else in 16 bits, as published."""
    gpt_oss().save_pretrained(folder)
    generator = torch.Generator().manual_seed(3)

    def pack(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
            experts, inputs, outputs = tensors.pop(name).shape
            grid = (experts, outputs, inputs // 32)
            tensors[f"{name}_blocks"] = _bytes((*grid, 16), 0, 256, generator)
            tensors[f"{name}_scales"] = _bytes(grid, 118, 124, generator)

    said = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    return rewrite(folder, pack, quantization_config=said)


def _bytes(shape: tuple[int, ...], low: int, high: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=generator, dtype=torch.uint8)


def foreign_folder(folder: Path, method: str) -> Path:
    """A model that some other library packed in part; the tensors look as that library's do."""
    build("llama").save_pretrained(folder)
    parts = {
        "gptq": {
            "qweight": torch.int32,
            "qzeros": torch.int32,
            "g_idx": torch.int32,
            "scales": torch.float16,
        },
        "awq": {"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16},
        "hqq": {"W_q": torch.uint8, "meta": torch.uint8},
        "compressed-tensors": {
            "weight_packed": torch.int32,
            "weight_scale": torch.bfloat16,
            "weight_shape": torch.int64,
        },
        "quanto": {"weight._data": torch.int8, "weight._scale": torch.bfloat16},
        "torchao": {"weight_qdata": torch.int8, "weight_scale": torch.bfloat16},
        "modelopt": {
            "weight": torch.uint8,
            "weight_scale": torch.float8_e4m3fn,
            "weight_scale_2": torch.float32,
        },
        "bitnet": {"weight": torch.uint8, "weight_scale": torch.bfloat16},
    }[method]

    def pack(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if "mlp" in n]:
            del tensors[name]
            for part, dtype in parts.items():
                tensors[f"{name.removesuffix('weight')}{part}"] = torch.ones(16, 16).to(dtype)

    return rewrite(folder, pack, quantization_config={"quant_method": method, "bits": 4})
