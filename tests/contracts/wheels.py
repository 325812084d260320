"""The Python source of a vLLM version, from its wheel on PyPI."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from packaging.version import Version

_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_31_x86_64", "manylinux_2_35_x86_64", "manylinux1_x86_64")


def source_of(minor: str, cache: Path) -> tuple[str, Path]:
    """The newest patch of a minor version, as ``("0.32.0", folder)``; ``folder / "vllm"`` holds its Python files.

    The wheel (about 320 MB) is deleted at once; a version that is in the cache is not downloaded again.

    Raises:
        LookupError: if PyPI has no such version.
    """
    version = newest(minor, published())
    if (cache / version / "vllm").is_dir():
        return version, cache / version
    with tempfile.TemporaryDirectory(dir=_made(cache)) as folder:
        wheel = _downloaded(version, Path(folder))
        unpacked = Path(folder) / "source"
        with zipfile.ZipFile(wheel) as archive:
            names = [n for n in archive.namelist() if n.startswith("vllm/") and n.endswith(".py")]
            archive.extractall(unpacked, names)
        shutil.move(unpacked, cache / version)
    return version, cache / version


@functools.cache
def published() -> tuple[str, ...]:
    """The versions of vLLM on PyPI."""
    command = [sys.executable, "-m", "pip", "index", "versions", "vllm", "--disable-pip-version-check"]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    line = next(line for line in found.splitlines() if line.startswith("Available versions:"))
    return tuple(version.strip() for version in line.partition(":")[2].split(","))


def newest(minor: str, versions: tuple[str, ...]) -> str:
    """The newest patch of a minor version.

    Raises:
        LookupError: if there is none.
    """
    of_it = [Version(v) for v in versions if v.startswith(f"{minor}.")]
    if not of_it:
        raise LookupError(f"vLLM {minor}: not among the {len(versions)} versions on PyPI")
    return str(max(of_it))


def _downloaded(version: str, folder: Path) -> Path:
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"),
        *("--no-deps", "--only-binary=:all:", "--no-cache-dir", "--python-version", "3.12"),
        *(part for platform in _PLATFORMS for part in ("--platform", platform)),
        *("--dest", str(folder), f"vllm=={version}"),
    ]
    subprocess.run(command, check=True)
    return next(folder.glob("vllm-*.whl"))


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
