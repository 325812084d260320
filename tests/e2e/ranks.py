"""Two processes that find each other, as a launcher starts them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path


def run_two(script: Path, *arguments: str, logs: Path, limit: float = 300) -> None:
    """Run a script as ranks 0 and 1; if one fails, both logs are shown."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    files = [(logs / f"rank{rank}.log").open("w+") for rank in range(2)]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), *arguments],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=files[rank],
            stderr=files[rank],
        )
        for rank in range(2)
    ]
    try:
        codes = [rank.wait(timeout=limit) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
        for file in files:
            file.close()
    tails = "\n".join((logs / f"rank{rank}.log").read_text()[-2500:] for rank in range(2))
    assert codes == [0, 0], tails
