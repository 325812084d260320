"""Whatever the receiver's parsers are given, they raise a LorasyncError or return what was announced."""

from __future__ import annotations

import contextlib
import json
import random
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

import lorasync as ls
from lorasync import base_check, wire
from lorasync.bucket import Bucket
from lorasync.errors import LorasyncError, Mismatch, MismatchError, PayloadError
from lorasync.push.answers import read_answers
from lorasync.source import FactorSpec, base_samples
from lorasync.transport import inline, shared_memory
from lorasync.transport.base import Parcel
from tests import fuzz

SEEDS = st.integers(min_value=0, max_value=2**64)
TENSORS = Bucket(
    {
        "a": torch.arange(6.0).reshape(2, 3),
        "b": torch.ones(4, dtype=torch.bfloat16),
        "c": torch.zeros(0, 2),
    }
)
MANIFEST = [(n, t.dtype, tuple(t.shape)) for n, t in TENSORS.items()]
GOOD = wire.pack(TENSORS)
few = settings(max_examples=400, deadline=None)


def staging():
    # vLLM is not needed for this part of the receiver, but its package is what the receiver sits in.
    from lorasync.receive.staging import Staging

    return Staging(MANIFEST, torch.device("cpu"))


@few
@given(SEEDS)
def test_payloads_in_the_call_are_refused_whole_or_as_announced(seed):
    bad = fuzz.mutated(GOOD, random.Random(seed))
    with contextlib.suppress(LorasyncError):
        _staged(
            inline.Receiver().take({}, bad, wire.digest(wire.unpack(bad)))
        )  # its digest is not what refuses


def _staged(received: Any) -> None:
    waiting = staging()
    try:
        waiting.add(received)
    except LorasyncError:
        assert not waiting.received  # nothing of it was taken
        raise
    assert all((t.dtype, tuple(t.shape)) == waiting.expected[n] for n, t in waiting.received.items())


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[shared_memory.Sender, shared_memory.Receiver, Parcel]]:
    sender, receiver = shared_memory.Sender(), shared_memory.Receiver()
    assert not receiver.refuses(sender.offer() or {})
    yield sender, receiver, sender.put(TENSORS)
    sender.close()


@few
@given(SEEDS)
@example(18690307)
def test_layouts_and_file_names_are_refused_whole_or_as_announced(shared, seed):
    chance = random.Random(seed)
    _, receiver, parcel = shared
    fields = dict(parcel.fields)
    if chance.random() < 0.8:
        fields["layout"] = fuzz.changed_text(fields["layout"], chance)
    else:
        changed = fuzz.changed_message(fields, chance)  # which may be no dict any more
        fields = {k: v for k, v in changed.items() if isinstance(v, str)} if isinstance(changed, dict) else {}
    with contextlib.suppress(LorasyncError), fuzz.any_digest():
        _staged(receiver.take(fields, b"", ""))


@few
@given(SEEDS)
def test_files_that_something_has_happened_to_are_refused(shared, seed):
    """By their digest, or as too short: it is over all that is read."""
    chance = random.Random(seed)
    sender, receiver, _ = shared
    parcel = sender.put(TENSORS)
    file = Path(sender.offer()["folder"]) / parcel.fields["file"]
    good = file.read_bytes()
    ends = [
        at + t.nbytes
        for (_, _, _, at), t in zip(json.loads(parcel.fields["layout"]), TENSORS.values(), strict=True)
    ]
    with file.open("r+b") as opened:
        bad = fuzz.mutated_bytes(good, chance)
        opened.write(bad)
        opened.truncate(max(len(bad), len(good)))  # what is cut off while it is mapped ends a process
    altered = any(
        file.read_bytes()[end - t.nbytes : end] != good[end - t.nbytes : end]
        for end, t in zip(ends, TENSORS.values(), strict=True)
    )
    try:
        found = receiver.take(parcel.fields, b"", parcel.digest)
    except PayloadError:
        assert altered
    else:
        assert not altered
        assert wire.digest(found) == parcel.digest


MESSAGES = (
    wire.Hello(session="s", strategy="{}", manifest="[]", offers={"inline": {}}, in_flight=(1,)),
    wire.BucketMessage(session="s", version=1, kind="bucket", transport="inline", fields={"file": "x"}),
    wire.Collect(session="s"),
    wire.Abort(session="s"),
    wire.Commit(session="s", version=1, expected=0, in_flight=(1,)),
    wire.Rollback(session="s", version=1, expected=2),
    wire.Status(session="s"),
    wire.Digest(session="s"),
    wire.Goodbye(session="s"),
)


@few
@given(SEEDS)
def test_messages(seed):
    chance = random.Random(seed)
    for good in MESSAGES:
        bad = fuzz.changed_message(good.to_dict(), chance)
        try:
            found = wire.message_from_dict(bad)
        except LorasyncError:
            continue
        assert wire.message_from_dict(json.loads(json.dumps(found.to_dict()))) == found


@few
@given(SEEDS)
def test_answers(seed):
    chance = random.Random(seed)
    introduction = wire.Introduction(refused={"inline": ""}, dtypes={"weights": "float32"}, notes=("a",))
    error = wire.error_as_dict(MismatchError("x", [Mismatch("w", "1", "2", "Fix it.")]))
    good = wire.Answer(
        ok=False, rank=0, workers=1, version=1, error=error, introduction=introduction
    ).to_dict()
    bad = fuzz.changed_message(good, chance)
    if isinstance(bad, dict) and chance.random() < 0.5:
        part = chance.choice(("introduction", "error"))
        bad = {**good, part: fuzz.changed_message(good[part], chance)}
    with contextlib.suppress(LorasyncError):
        found = wire.answer_from_dict(bad)
        read_answers([bad], expected=0)
        assert wire.answer_from_dict(found.to_dict()) == found


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
def test_a_file_s_name_never_leads_out_of_its_folder(shared, name):
    sender, receiver, parcel = shared
    try:
        receiver.take({**parcel.fields, "file": name}, b"", parcel.digest)
    except PayloadError:
        return
    assert name in {path.name for path in Path(sender.offer()["folder"]).glob("*.bucket")}


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
