"""Finding out how a checkpoint holds its weights: by its config, and by its tensors where the config doesn't say."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from lorasync import bnb
from lorasync.quantization.methods import FP4, INT8, LIVE, NF4, PLAIN, Quantization, method, unknown

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

_SETTINGS = ("quantization_config", "compression_config")
_BITSANDBYTES = {"nf4": NF4, "fp4": FP4, "int8": INT8}
_FLOAT8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
_CODES = ("I8", "U8", "I16", "U16", "I32", "U32")
# A tensor that ends so holds codes; with a companion the method is known.
_ENDINGS = (
    ("W_q", (), "hqq"),
    ("qweight", ("qzeros", "g_idx"), "gptq"),
    ("qweight", ("qzeros",), "awq"),
    ("weight_packed", (), "compressed_tensors"),
    ("codes", ("codebooks",), "aqlm"),
    ("indices", ("centroids",), "vptq"),
    ("weight", ("weight_scales",), "eetq"),
    ("weight", ("scales", "tables"), "higgs"),
    ("weight", ("weight_scale_2",), "modelopt"),
)


def of_config(config: Any) -> Quantization:
    """Say what a config declares, in whichever of its nested configs; what lorasync can't read comes first.

    Args:
        config: A `transformers.PretrainedConfig`, or what `config.json` holds.

    Example:
        >>> of_config({"text_config": {"quantization_config": {"quant_method": "awq"}}}).name
        'AWQ'
    """
    said = config if isinstance(config, dict) else config.to_dict()
    found = [_settings(each) for each in _levels(said)]
    return next((each for each in found if each.kind not in LIVE), found[0] if found else PLAIN)


def of_tensors(dtypes: Mapping[str, str]) -> Quantization:
    """Say what packed a checkpoint's tensors, by their names and their dtypes as safetensors spells them.

    Example:
        >>> of_tensors({"x.qweight": "I32", "x.qzeros": "I32", "x.scales": "F16"}).name
        'AWQ'
    """
    found = [(name, each) for name in dtypes if not (each := _stored(name, dtypes)).plain]
    if not found:
        return PLAIN
    unread = [(name, each) for name, each in found if each.kind not in LIVE]
    first = (unread or found)[0][1]
    return first.at([name for name, each in found if each.kind == first.kind])


def of_folder(folder: Path) -> Quantization:
    """Say what packed a checkpoint: its config if it says so, else its tensors; no weight is read.

    Raises:
        OSError: A file can't be read.
        ValueError: A file is damaged.
    """
    config = folder / "config.json"
    declared = of_config(json.loads(config.read_text())) if config.is_file() else PLAIN
    return declared if not declared.plain else of_tensors(_headers(folder))


def _settings(settings: dict[str, Any]) -> Quantization:
    packed = bnb.read_settings(settings)
    if packed is not None:
        return _BITSANDBYTES[packed.kind]
    name = str(settings.get("quant_method") or "").rpartition(".")[2].lower()
    return method(name) if name else unknown("a method that its config doesn't name")


def _levels(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for key in _SETTINGS:
        settings = config.get(key)
        if settings is not None:
            yield settings if isinstance(settings, dict) else settings.to_dict()
    for key, value in config.items():
        if key not in _SETTINGS and key.endswith("_config"):
            nested = value if isinstance(value, dict) or not hasattr(value, "to_dict") else value.to_dict()
            if isinstance(nested, dict):
                yield from _levels(nested)


def _stored(name: str, dtypes: Mapping[str, str]) -> Quantization:
    by_bnb = bnb.find_stored(name, dtypes)
    if by_bnb is not None:
        return _BITSANDBYTES[by_bnb.kind]
    stem, _, last = name.rpartition(".")
    path = f"{stem}." if stem else ""
    if dtypes[name] in _FLOAT8:
        return _float8(name, path, dtypes)
    if dtypes[name] not in _CODES:
        return PLAIN
    for ending, beside, packed in _ENDINGS:
        if last == ending and all(path + other in dtypes for other in beside):
            return method(packed)
    return _codes(name, path, last, dtypes)


def _float8(name: str, path: str, dtypes: Mapping[str, str]) -> Quantization:
    scaled = (f"{name}_scale_inv", f"{name}_scale", f"{path}scale")
    if any(other in dtypes for other in scaled):
        return method("fp8")
    return unknown(f"float8 without scales ({name})")


def _codes(name: str, path: str, last: str, dtypes: Mapping[str, str]) -> Quantization:
    if last.endswith("_blocks") and f"{name.removesuffix('_blocks')}_scales" in dtypes:
        return method("mxfp4")
    if f"{name}_scale_inv" in dtypes or (last == "weight" and f"{path}scale" in dtypes):
        return method("fp8")  # E2M1 codes with the scales of their blocks
    if last in ("weight", "qweight"):
        return unknown(f"{dtypes[name]} codes in {name}")
    return PLAIN


def _headers(folder: Path) -> dict[str, str]:
    """Read the dtypes of all stored tensors from the files' headers."""
    found: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(size)) if size <= file.stat().st_size else None
        if not isinstance(header, dict):
            raise ValueError(f"{file}: got no safetensors header, expected one.")
        found.update({name: entry["dtype"] for name, entry in header.items() if name != "__metadata__"})
    return found
