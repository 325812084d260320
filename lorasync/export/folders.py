"""Finding the folder of a model or an adapter, and saying what is there instead where it is not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lorasync.errors import LoadError
from lorasync.export.config import read_json

if TYPE_CHECKING:
    import os

_MODEL, _ADAPTER = "config.json", "adapter_config.json"
_UNSAFE_FILES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_FOREIGN = {".gguf": "GGUF", ".h5": "TensorFlow", ".msgpack": "Flax", ".npz": "NumPy", ".onnx": "ONNX"}


def model_folder(base: str | os.PathLike[str]) -> Path:
    """Return the folder of a base model: the folder itself, or a hub id's in the local cache.

    Raises:
        LoadError: There is no such folder, it is not one of a model, or the hub id was never downloaded.
    """
    folder = _folder(base, "base")
    if (folder / _MODEL).is_file():
        return folder
    if (folder / _ADAPTER).is_file():
        raise LoadError(
            f"base: got an adapter ({folder}), expected the model that it was trained on. "
            "The base comes first, the adapter second."
        )
    raise LoadError(f"base: got no {_MODEL} in {folder}, expected the folder of a model.")


def adapter_folder(adapter: str | os.PathLike[str]) -> Path:
    """Return the folder of an adapter; PEFT saves one that isn't called "default" in a subfolder of its name.

    Raises:
        LoadError: There is no such folder, or not one adapter in it.
    """
    folder = _folder(adapter, "adapter")
    if (folder / _ADAPTER).is_file():
        return folder
    inside = sorted(config.parent for config in folder.glob(f"*/{_ADAPTER}"))
    if len(inside) == 1:
        return inside[0]
    if inside:
        names = ", ".join(path.name for path in inside)
        raise LoadError(
            f"adapter: got {len(inside)} adapters in {folder} ({names}), expected one. "
            f"Name its folder: {inside[0]}."
        )
    if (folder / _MODEL).is_file():
        raise LoadError(
            f"adapter: got a model ({folder}), expected a folder with {_ADAPTER}. "
            "The base comes first, the adapter second."
        )
    raise LoadError(
        f"adapter: got no {_ADAPTER} in {folder} or right below it, expected what PEFT's save_pretrained wrote."
    )


def weight_files(folder: Path, stem: str) -> list[Path]:
    """Return the safetensors files of one save, all of them there.

    Args:
        folder: Where they are.
        stem: ``"model"`` or ``"adapter_model"``.

    Raises:
        LoadError: A file is missing, or the weights are stored in another format.
    """
    files = [folder / name for name in _named_files(folder, stem)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise LoadError(f"{folder}: got no {', '.join(missing)}, expected {_instead(folder, stem)}")
    return files


def _named_files(folder: Path, stem: str) -> list[str]:
    index = folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        return [f"{stem}.safetensors"]
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise LoadError(f"{index}: got no weight_map, expected the index of a complete save.")
    return sorted(set(named.values()))


def _instead(folder: Path, stem: str) -> str:
    """Say what was expected, and how to get there from what is in the folder."""
    unsafe = sorted({file.name for pattern in _UNSAFE_FILES for file in folder.glob(pattern)} - _NO_WEIGHTS)
    if unsafe:
        return _converted(unsafe[0], stem)
    others = sorted(file for file in folder.iterdir() if file.suffix in _FOREIGN)
    if others:
        kind = _FOREIGN[others[0].suffix]
        return f"safetensors. {others[0].name} is {kind}: get the model as its publisher trained it, in safetensors."
    return "safetensors files of a complete save. From the hub: `hf download` fetches what is missing."


_NO_WEIGHTS = {"training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "optimizer.bin"}


def _converted(file: str, stem: str) -> str:
    say = "safetensors. {} is a pickle, which runs code when it is opened, so lorasync doesn't. If you trust it: {}"
    if stem == "model":
        way = 'AutoModelForCausalLM.from_pretrained(folder, dtype="auto").save_pretrained(another)'
    else:
        way = 'safetensors.torch.save_file(torch.load(file, weights_only=True), "adapter_model.safetensors")'
    return say.format(file, way)


def _folder(given: str | os.PathLike[str], what: str) -> Path:
    path = Path(given).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise LoadError(f"{what}: got a file ({path}), expected a folder.")
    return _cached(str(given), what)


def _cached(name: str, what: str) -> Path:
    """Look a hub id up in the local cache; nothing is downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except HFValidationError:
        raise LoadError(
            f"{what}: got {name}, expected a folder: there is none, and it is no hub id."
        ) from None
    except OSError:
        raise LoadError(
            f"{what}: got {name}, expected a folder or a hub id that was downloaded: there is no such folder, and "
            f"nothing of that name in the local cache. For the hub: `hf download {name}`."
        ) from None
