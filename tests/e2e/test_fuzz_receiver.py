"""A million mutated messages into the receivers of two live engines: only our errors, no hang, nothing applied."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e import soak_results

COUNT = 500_000
STRATEGIES = ("merged", "factors")


@pytest.mark.soak
@pytest.mark.timeout(2400)
def test_a_million_mutated_messages_are_refused_or_as_announced(base, tmp_path):
    found = _fuzz(base, tmp_path, COUNT)
    if os.environ.get("LORASYNC_WRITE_SOAK"):
        content = {**soak_results.setting("make soak"), "receivers": found}
        soak_results.file_of("fuzz").write_text(json.dumps(content, indent=1) + "\n")


def _fuzz(base: str, out: Path, count: int) -> list[dict]:
    """Each receiver in a process of its own: one that crashes or hangs is seen, and named."""
    files = [out / f"{strategy}.json" for strategy in STRATEGIES]
    processes = [
        subprocess.Popen(
            [
                *(sys.executable, "-X", "faulthandler", "-m", "tests.e2e.fuzz_receiver"),
                *(strategy, str(index * count), str(count), base, str(file)),
            ],
            stderr=subprocess.STDOUT,
            stdout=file.with_suffix(".log").open("w"),
        )
        for index, (strategy, file) in enumerate(zip(STRATEGIES, files, strict=True))
    ]
    try:
        codes = [process.wait(2300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = "\n".join(file.with_suffix(".log").read_text()[-2500:] for file in files)
    assert codes == [0] * len(files), logs
    found = [json.loads(file.read_text()) for file in files]
    for receiver in found:
        assert receiver["not_ours"] == {}
        accepted = sum(receiver["accepted"].values())
        assert accepted + sum(receiver["refused"].values()) == count
        assert accepted < count / 5
        assert receiver["slowest"]["cpu_seconds"] < 1.0
        held = [
            receiver[when]["receiver: file handles"] for when in ("held_before", "held_after", "held_ended")
        ]
        assert held[1] <= held[0] + 8  # each mapped file keeps one
        assert held[2] <= held[0]
        assert (
            receiver["held_after"]["receiver: mapped payloads"] <= 8
        )  # both sides' files, and the damaged one
        assert receiver["held_ended"]["receiver: mapped payloads"] == 0
    return found
