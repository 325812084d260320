"""Whatever the receiver's parsers are given, they raise a LorasyncError or return what was announced."""

from __future__ import annotations

import contextlib
import json
import random
import re
import tokenize
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

import lorasync as ls
from lorasync import base_check, wire
from lorasync.errors import LorasyncError, PayloadError
from lorasync.source import FactorSpec, base_samples
from tests import fuzz

SEEDS = st.integers(min_value=0, max_value=2**64)
TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.ones(4, dtype=torch.bfloat16),
    "c": torch.zeros(0, 2),
}
MANIFEST = [(n, t.dtype, tuple(t.shape)) for n, t in TENSORS.items()]
GOOD = wire.pack(TENSORS)
few = settings(max_examples=400, deadline=None)


def staging():
    # vLLM is not needed for this part of the receiver, but its package is what the receiver sits in.
    from lorasync.receive.staging import Staging

    return Staging(MANIFEST, torch.device("cpu"))


@few
@given(SEEDS)
def test_payloads_inline_and_in_files_are_refused_whole_or_as_announced(tmp_path_factory, seed):
    bad = fuzz.mutated(GOOD, random.Random(seed))
    file = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    file.write_bytes(bad)
    for read in (lambda: wire.unpack(bad), lambda: wire.read_safetensors(file)):
        waiting = staging()
        try:
            waiting.add(read())
        except LorasyncError:
            assert not waiting.received  # nothing of it was taken
        else:
            assert all((t.dtype, tuple(t.shape)) == waiting.expected[n] for n, t in waiting.received.items())


@few
@given(SEEDS)
def test_messages(seed):
    chance = random.Random(seed)
    control = {
        "op": "hello",
        "protocol": 1,
        "lorasync": "0",
        "session": "s",
        "call": 1,
        "mailbox": "",
        "bucket": {},
    }
    update = {
        "op": "bucket",
        "session": "s",
        "version": 1,
        "call": 1,
        "payload": b"x",
        "path": "",
        "digest": "",
    }
    for kind, good in ((wire.Control, control), (wire.Update, update)):
        with contextlib.suppress(LorasyncError):
            wire.message(kind, fuzz.changed_message(good, chance))


@few
@given(SEEDS)
def test_handshakes(seed):
    from lorasync.receive.staging import parsed

    chance = random.Random(seed)
    readers = {
        "manifest": (wire.manifest_as_text(MANIFEST), wire.manifest_from_text),
        "spec": (SPEC.to_json(), FactorSpec.from_json),
        "samples": (base_check.to_json(SAMPLES), base_check.from_json),
    }
    for key, (good, read) in readers.items():
        with contextlib.suppress(PayloadError):
            parsed(read, {key: fuzz.changed_text(good, chance)}, key)


@pytest.mark.parametrize(
    "change", [{"positions": ["x"]}, {"values": [None]}, {"shape": "ab"}, {"positions": []}, {"dtype": 1}]
)
def test_a_sample_of_other_types_or_of_unequal_length_is_none(change):
    samples = json.loads(base_check.to_json(SAMPLES))
    name = next(iter(samples))
    with pytest.raises(ValueError, match=re.escape(name)):
        base_check.from_json(json.dumps(samples | {name: samples[name] | change}))


@few
@given(st.text(max_size=40))
def test_a_payload_s_name_never_leads_out_of_its_folder(name):
    box = wire.Mailbox(Path("/dev/shm/lorasync-x"))
    with contextlib.suppress(PayloadError):
        assert box.payload(name).parent == box.folder or box.payload(name) == box.folder


@pytest.mark.parametrize("folder", ["lorasync", "examples"])
def test_nothing_of_ours_unpickles_or_evaluates(folder):
    risky = re.compile(
        r"pickle|(?<!safetensors\.)torch\.load\b|recv_pyobj|marshal|shelve|(?<![\w.])(eval|exec)\(|yaml\.load\b",
        re.I,
    )
    root = Path(__file__).resolve().parents[1] / folder
    found = {path.name: risky.findall(_code_of(path)) for path in sorted(root.rglob("*.py"))}
    assert {name: hits for name, hits in found.items() if hits} == {}
    assert risky.search("pickle.loads(x)")
    assert risky.search("torch.load(x)")


def _code_of(path: Path) -> str:
    """Without comments and texts."""
    with path.open("rb") as file:
        tokens = [
            t for t in tokenize.tokenize(file.readline) if t.type not in (tokenize.COMMENT, tokenize.STRING)
        ]
    return tokenize.untokenize(tokens[1:]) if tokens else ""


def _policy():
    torch.manual_seed(0)
    return get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 6)), LoraConfig(r=2, target_modules=["0"]))


_SOURCE = ls.FactorSource(_policy())
SPEC, SAMPLES = _SOURCE.spec(), base_samples(_SOURCE)
