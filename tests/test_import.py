"""`import lorasync` needs torch, transformers and peft, nothing else, and adds little to what they take."""

from __future__ import annotations

import json
import subprocess
import sys

_SCRIPT = """
import json, sys, time

from importlib.machinery import PathFinder

ABSENT = {"bitsandbytes", "deepspeed", "vllm", "xxhash", "typer", "rich", "matplotlib"}
find = PathFinder.find_spec

def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in ABSENT else find(name, path, target)

PathFinder.find_spec = staticmethod(find_spec)
import torch, transformers, peft
from peft import LoraConfig, get_peft_model
began = time.process_time()
import lorasync
seconds = time.process_time() - began
model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
names = [name for name, _ in lorasync.MergedSource(model)]
import lorasync.load, lorasync.plugin, lorasync.push, lorasync.verify
lorasync.plugin.register()
loaded = sorted(ABSENT & sys.modules.keys())
print(json.dumps({"seconds": seconds, "names": names, "loaded": loaded}))
"""


def test_importing_and_merging_work_where_the_optional_libraries_are_absent_and_fast():
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["names"] == ["0.weight", "0.bias"]
    assert found["loaded"] == []
    assert found["seconds"] < 1.0


def test_registering_twice_and_without_vllm_never_raises():
    from lorasync.plugin import register

    register()
    register()
