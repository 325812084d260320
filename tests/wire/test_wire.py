"""Messages and answers, manifests, tensors as bytes, and digests."""

from __future__ import annotations

import dataclasses
import json
import typing
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasync import wire
from lorasync.errors import (
    EngineNotReadyError,
    Mismatch,
    MismatchError,
    NonFiniteError,
    PayloadError,
    SyncError,
)
from lorasync.wire.messages import Message

TENSORS = {
    "b": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "a": torch.tensor([1.5, -2.0]),
    "strided": torch.arange(12.0).reshape(3, 4).T,
    "empty": torch.zeros(0, 3),
    "packed": torch.arange(5, dtype=torch.uint8),
}


def test_inline_bytes_give_back_the_same_bits():
    got = wire.unpack(wire.pack(TENSORS))
    assert got.keys() == TENSORS.keys()
    assert all(torch.equal(got[n], t) and got[n].dtype == t.dtype for n, t in TENSORS.items())
    assert wire.digest(got) == wire.digest(TENSORS)


@pytest.mark.parametrize("change", ["name", "dtype", "shape", "bit"])
def test_the_digest_sees_every_change(change):
    changed = {
        "name": {"c": torch.ones(4)},
        "dtype": {"a": torch.ones(4).view(torch.int32)},
        "shape": {"a": torch.ones(2, 2)},
        "bit": {"a": torch.tensor([1.0, 1.0, 1.0, 1.0000001])},
    }[change]
    assert wire.digest(changed) != wire.digest({"a": torch.ones(4)})


@settings(max_examples=300, deadline=None)
@given(st.integers(min_value=0), st.integers(min_value=0, max_value=255), st.booleans())
def test_mutated_payloads_are_refused_or_differ_in_digest_and_never_crash(place, byte, cut):
    good = wire.pack(TENSORS)
    index = place % len(good)
    bad = good[:index] if cut else good[:index] + bytes([good[index] ^ byte]) + good[index + 1 :]
    if bad == good:
        return
    try:
        got = wire.unpack(bad)
    except PayloadError:
        return
    assert (wire.digest(got) == wire.digest(TENSORS)) == _same(got, TENSORS)


def _same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[n].dtype == right[n].dtype
        and left[n].shape == right[n].shape
        and torch.equal(wire.as_bytes(left[n]), wire.as_bytes(right[n]))
        for n in left
    )


_KINDS = st.sampled_from([torch.float32, torch.bfloat16, torch.int32, torch.uint8])
_TENSOR = st.builds(
    lambda dtype, shape, seed: (torch.arange(shape[0] * shape[1]) * 7 + seed).to(dtype).reshape(shape),
    _KINDS,
    st.tuples(st.integers(0, 3), st.integers(0, 3)),
    st.integers(0, 2),
)
_BUCKETS = st.dictionaries(st.sampled_from(["a", "b", "a|b", "a.b"]), _TENSOR, max_size=3)


@settings(max_examples=500, deadline=None)
@given(_BUCKETS, _BUCKETS)
def test_two_buckets_have_one_digest_if_and_only_if_they_are_the_same(left, right):
    assert (wire.digest(left) == wire.digest(right)) == _same(left, right)
    assert wire.digest(left) == wire.digest(dict(reversed(left.items())))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from(["x" * 32, "y" * 32]), max_size=4),
    st.lists(st.sampled_from(["x" * 32, "y" * 32]), max_size=4),
)
def test_the_digest_of_a_version_tells_its_buckets_and_their_order(left, right):
    assert (wire.digest_of_parts(left) == wire.digest_of_parts(right)) == (left == right)


# ------------------------------------------------------------------------------------------------ messages

MESSAGES: dict[str, Message] = {
    message.op: message
    for message in (
        wire.Hello(
            session="s",
            call=1,
            strategy="{}",
            manifest="[]",
            offers={"inline": {}, "shared_memory": {"folder": "/dev/shm/lorasync-x"}},
            in_flight=(1, 2),
            limit=30.0,
        ),
        wire.BucketMessage(
            session="s",
            call=2,
            version=1,
            kind="base",
            transport="shared_memory",
            fields={"file": "x"},
            digest="d",
            background=True,
        ),
        wire.Collect(session="s"),
        wire.Abort(session="s"),
        wire.Commit(session="s", version=2, expected=1, digest="d", in_flight=(1,)),
        wire.Rollback(session="s", version=1, expected=2, in_flight=()),
        wire.Status(session="s"),
        wire.Digest(session="s"),
        wire.Goodbye(session="s", in_flight=(3,)),
    )
}
ROUTES = {"as it is": lambda found: found, "JSON": lambda found: json.loads(json.dumps(found))}


def test_there_is_an_example_of_every_message():
    kinds = {kind.op for kind in Message.__subclasses__()}
    assert kinds == set(MESSAGES)
    assert len(kinds) == 9


@pytest.mark.parametrize("op", MESSAGES)
@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
def test_a_message_that_has_travelled_is_the_same(op, route):
    message = MESSAGES[op]
    again = wire.message_from_dict(route(message.to_dict()))
    assert again == message
    assert type(again) is type(message)


@pytest.mark.parametrize("op", MESSAGES)
def test_a_field_of_another_type_is_refused_by_name(op):
    """Whatever field, whatever it was meant to be: also a number where there should be a yes or a no."""
    good = MESSAGES[op].to_dict()
    hints = typing.get_type_hints(type(MESSAGES[op]))
    for name, hint in hints.items():
        if name in ("op", "protocol"):
            continue
        for value in _others_than(hint):
            with pytest.raises(PayloadError, match=rf"^{op}: {name}.*Nothing was touched"):
                wire.message_from_dict({**good, name: value})


def _others_than(hint: Any) -> list[Any]:
    if hint is str:
        return [None, 5, b"x", ["x"], {}]
    if hint is int:
        return [None, "1", 1.5, True, [], b"1"]
    if hint is float:
        return [None, "1", True, float("nan"), float("inf")]
    if hint is bool:
        return [None, 1, 0, "yes", []]
    if typing.get_origin(hint) is tuple:
        return [None, "x", 5, [1.5], ["1"], [True], {1: 1}]
    if typing.get_origin(hint) is dict:
        return [None, "x", [], {1: {}}, {"x": None}, {"x": 5}, {"x": {"y": 5}}, {"x": {5: "y"}}]
    return [None, 5, "buckets", "", b"base", []]  # the kind of a bucket


@pytest.mark.parametrize("op", MESSAGES)
def test_a_missing_or_an_unknown_field_is_refused_by_name(op):
    good = MESSAGES[op].to_dict()
    needed = [
        each.name
        for each in dataclasses.fields(MESSAGES[op])
        if each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
    ]
    assert "session" in needed
    for name in needed:
        with pytest.raises(PayloadError, match=rf"^{op}: .*missing.*'{name}'"):
            wire.message_from_dict({n: v for n, v in good.items() if n != name})
    for name in ("more", "payload", 5, None):
        with pytest.raises(PayloadError, match=rf"^{op}: got the unknown fields {name!r}"):
            wire.message_from_dict({**good, name: "x"})


@pytest.mark.parametrize("found", [None, 5, "hello", [], ["op"], b"x"])
def test_what_is_no_message_is_refused(found):
    with pytest.raises(PayloadError, match="expected dict"):
        wire.message_from_dict(found)


@pytest.mark.parametrize("op", [None, "", "erase", 5, ["hello"], {}, b"hello"])
def test_an_unknown_operation_is_refused_with_those_that_are_known(op):
    with pytest.raises(PayloadError, match=r"^op: got .*expected one of hello, bucket, collect"):
        wire.message_from_dict({**MESSAGES["status"].to_dict(), "op": op})


@pytest.mark.parametrize("op", MESSAGES)
@pytest.mark.parametrize("protocol", [wire.PROTOCOL - 1, wire.PROTOCOL + 1, None, "5", 5.0, True])
def test_another_protocol_is_refused_with_both_versions_whatever_else_the_message_says(op, protocol):
    found = {**MESSAGES[op].to_dict(), "protocol": protocol, "lorasync": "0.0.9", "of another protocol": 1}
    with pytest.raises(
        MismatchError, match=rf"0\.0\.9 \(protocol {protocol}\).*protocol {wire.PROTOCOL}.*Install the same"
    ):
        wire.message_from_dict(found)


# ------------------------------------------------------------------------------------------------- answers

INTRODUCTION = wire.Introduction(
    refused={"inline": "", "shared_memory": "another host"},
    gpu="GPU-1",
    dtypes={"weights": "bfloat16", "slots": "bfloat16"},
    multimodal=True,
    capacity=3,
    held=True,
    others=1,
    notes=("a note",),
)
WRONG = wire.error_as_dict(MismatchError("two differ", [Mismatch("w", "1", "2", "Fix it.")]))
ANSWERS = {
    "plain": wire.Answer(ok=True, rank=0, workers=1, version=3),
    "all of it": wire.Answer(
        ok=False,
        rank=1,
        workers=2,
        version=3,
        closed="torn",
        ours=True,
        replaced=True,
        seconds=0.5,
        pending=True,
        digest="d",
        error=WRONG,
    ),
    "introduced": wire.Answer(ok=True, rank=0, workers=1, version=0, introduction=INTRODUCTION),
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
def test_an_answer_that_has_travelled_is_the_same(answer, route):
    assert wire.answer_from_dict(route(answer.to_dict())) == answer


@pytest.mark.parametrize(
    "change",
    [
        {"ok": 1},
        {"ok": None},
        {"rank": "0"},
        {"rank": None},
        {"rank": []},
        {"rank": True},
        {"workers": 1.5},
        {"version": "3"},
        {"closed": None},
        {"ours": "yes"},
        {"seconds": "x"},
        {"seconds": float("nan")},
        {"pending": 0},
        {"digest": b"x"},
        {"error": "no"},
        {"error": {}},
        {"error": {"type": "MismatchError", "message": "x", "mismatches": [{"name": "w"}]}},
        {"error": {"type": "MismatchError", "message": "x", "mismatches": None}},
        {"introduction": 5},
        {"introduction": {"capacity": "3"}},
        {"introduction": {"refused": {"inline": None}}},
        {"introduction": {"notes": [5]}},
        {"introduction": {"more": 1}},
        {"more": 1},
        {5: 1},
    ],
    ids=str,
)
def test_an_answer_that_was_altered_on_its_way_is_none(change):
    good = ANSWERS["introduced"].to_dict()
    with pytest.raises(EngineNotReadyError, match="expected one of lorasync's workers"):
        wire.answer_from_dict({**good, **change})


@pytest.mark.parametrize("name", ["ok", "rank", "workers", "version"])
def test_an_answer_that_lacks_what_all_have_is_none(name):
    found = {n: v for n, v in ANSWERS["plain"].to_dict().items() if n != name}
    with pytest.raises(EngineNotReadyError, match=rf"expected one of lorasync's workers.*'{name}'"):
        wire.answer_from_dict(found)


@pytest.mark.parametrize("found", [None, 5, "ok", [1], b"x", "x" * 500])
def test_what_is_no_answer_is_shown_shortened(found):
    with pytest.raises(EngineNotReadyError, match="expected one of lorasync's workers") as caught:
        wire.answer_from_dict(found)
    assert len(str(caught.value)) < 400


def test_a_worker_s_error_arrives_as_the_same_error():
    mismatch = MismatchError("two differ", [Mismatch("w", "1", "2", "Fix it.")])
    for route in ROUTES.values():
        again = wire.error_from_dict(route(wire.error_as_dict(mismatch)))
        assert isinstance(again, MismatchError)
        assert again.mismatches == mismatch.mismatches
        assert str(again) == str(mismatch)
    assert isinstance(wire.error_from_dict(wire.error_as_dict(NonFiniteError("x"))), NonFiniteError)
    foreign = wire.error_from_dict(wire.error_as_dict(ZeroDivisionError("y")))
    assert type(foreign) is SyncError
    assert "ZeroDivisionError" in str(foreign)
    for not_ours in ("Mismatch", "dataclass", "annotations", "__name__"):  # names in the same module
        assert type(wire.error_from_dict({"type": not_ours, "message": "x", "mismatches": []})) is SyncError


# ------------------------------------------------------------------------------------------------ manifests


def test_a_manifest_that_has_travelled_is_the_same():
    entries = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()]
    assert wire.manifest_from_text(wire.manifest_as_text(entries)) == entries


@pytest.mark.parametrize("text", ["", "{", "[[1]]", '[["w", "complex64", [1]]]', '[["w", "float32", ["x"]]]'])
def test_a_malformed_manifest_is_refused(text):
    with pytest.raises(PayloadError):
        wire.manifest_from_text(text)
