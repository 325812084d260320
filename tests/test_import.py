"""`import lorasync` needs torch, transformers and peft, nothing else, and adds little to what they take."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

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


_MODULES = """
import json, sys, time
import torch

before, began = set(sys.modules), time.process_time()
import {module}
print(json.dumps({{"seconds": time.process_time() - began, "modules": sorted(set(sys.modules) - before)}}))
"""


def _imported_by(module: str) -> dict:
    script = _MODULES.format(module=module)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_the_package_and_the_plugin_import_next_to_nothing():
    """VLLM imports the plugin in every one of its processes, also where lorasync is not used."""
    for module in ("lorasync", "lorasync.plugin"):
        found = _imported_by(module)
        ours = [name for name in found["modules"] if name.startswith("lorasync")]
        assert set(ours) <= {"lorasync", "lorasync.version", "lorasync.plugin"}
        assert len(found["modules"]) < 50
        assert found["seconds"] < 0.3


def test_every_public_name_is_found_and_listed():
    import lorasync

    for name in lorasync.__all__:
        assert getattr(lorasync, name).__name__ if callable(getattr(lorasync, name)) else True
        assert name in dir(lorasync)
    assert lorasync.push.connect.__name__ == "connect"
    with pytest.raises(AttributeError, match="no attribute 'conect'"):
        lorasync.conect  # noqa: B018


def test_registering_twice_and_without_vllm_never_raises():
    from lorasync.plugin import register

    register()
    register()


def test_a_worker_reads_a_spec_without_peft():
    """A vLLM worker needs neither PEFT nor bitsandbytes to know what an adapter's factors do."""
    spec = {name.partition(".")[0] for name in _imported_by("lorasync.source.spec, lorasync.bnb")["modules"]}
    assert spec == {"lorasync"}
    worker = {name.partition(".")[0] for name in _imported_by("lorasync.receive")["modules"]}
    assert not worker & {"peft", "bitsandbytes", "deepspeed"}
