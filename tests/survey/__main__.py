"""`make survey`: every architecture, in processes of their own, and docs/architectures.md."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.survey.classes import architectures, with_names
from tests.survey.page import PAGE, written

_LIMIT = 300.0
"""Seconds for one class; a few are the rule."""
_MODULES = {"pushes": ("tests.survey.one", architectures), "names": ("tests.survey.names", with_names)}


def run(module: str, names: list[str]) -> Iterator[dict]:
    """What each class came to, in order. One that crashes or hangs costs itself; a new process takes the rest."""
    waiting = list(names)
    while waiting:
        begun, found = None, None
        for line in _lines(module, waiting):
            if "begin" in line:
                begun = line["begin"]
                waiting.remove(begun)
            else:
                found, begun = line, None
                yield found
        if begun is not None:
            yield {"name": begun, "ways": {"all": ["not built", "the process ended or hung"]}}
        elif found is None:
            raise SystemExit(f"{module}: no class of {waiting[:3]} … was begun; run it by hand")


def _lines(module: str, names: list[str]) -> Iterator[dict]:
    quiet = {
        "VLLM_LOGGING_LEVEL": "CRITICAL",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", module, *names],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **quiet},
    )
    lines: queue.Queue[str | None] = queue.Queue()
    assert process.stdout is not None
    threading.Thread(target=_pass_on, args=(process.stdout, lines), daemon=True).start()
    try:
        while (line := lines.get(timeout=_LIMIT)) is not None:
            if line.startswith("{"):
                yield json.loads(line)
    except queue.Empty:
        return
    finally:
        process.kill()
        process.wait()


def _pass_on(stream: Iterable[str], lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def main(wanted: list[str]) -> int:
    """Survey all classes, or those named; the page is written only of all."""
    outcomes: dict[str, list[dict]] = {}
    for part, (module, classes) in _MODULES.items():
        outcomes[part] = []
        for found in run(module, [n for n in classes() if not wanted or n in wanted]):
            outcomes[part].append(found)
            ways = "; ".join(f"{way}: {verdict} {why[:160]}" for way, (verdict, why) in found["ways"].items())
            print(f"{part} {found['name']}: {ways}".replace("\n", " "), flush=True)
    if not wanted:
        Path(PAGE).write_text(written(outcomes["pushes"], outcomes["names"]))
    wrong = [
        f["name"] for part in outcomes.values() for f in part for v, _ in f["ways"].values() if v == "wrong"
    ]
    print(f"{len(wrong)} wrong{': ' + ', '.join(wrong) if wrong else ''}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
