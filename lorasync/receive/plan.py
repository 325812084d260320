"""Which slice of which checkpoint tensor lands where in vLLM's parameters, recorded from vLLM's own loader.

A twin of the served model is built on the meta device (no memory) and its `load_weights` is run on meta tensors
under a dispatch mode that notes each copy instead of doing it. So the plan knows fused and sharded parameters
of every architecture without a table of ours, and a manifest can be checked without touching the live model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lorasync.errors import Mismatch, MismatchError

ManifestEntry = tuple[str, torch.dtype, tuple[int, ...]]
LoadWeights = Callable[[Iterable[tuple[str, torch.Tensor]]], object]


@dataclass(frozen=True)
class Slice:
    """A strided window of a tensor's storage, in elements."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Slice:
        return cls(tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset()))

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """The window over ``tensor``, which must be laid out as the one that the slice was taken of."""
        return tensor.as_strided(self.shape, self.stride, tensor.storage_offset() + self.offset)


@dataclass(frozen=True)
class Row:
    """One copy of the loader: ``param[target] = checkpoint[source]``."""

    name: str
    source: Slice
    param: str
    target: Slice


@dataclass(frozen=True)
class LoadPlan:
    """Every copy that loading a checkpoint makes, and what was computed on the way rather than copied."""

    rows: tuple[Row, ...]
    layouts: dict[str, tuple[Slice, torch.dtype]]
    feeds: dict[str, frozenset[str]]
    """For each parameter of the engine, the checkpoint names that go into it."""
    computed: frozenset[str]
    """Parameters that get something else than plain slices of checkpoint tensors."""
    uncovered: dict[str, int] = field(default_factory=dict)
    """Parameters that the checkpoint leaves unset, with the number of elements that it does set."""

    def rows_of(self, name: str) -> tuple[Row, ...]:
        return self._rows_by_name().get(name, ())

    def _rows_by_name(self) -> dict[str, tuple[Row, ...]]:
        cached: dict[str, tuple[Row, ...]] | None = self.__dict__.get("_by_name")
        if cached is None:
            collected: dict[str, list[Row]] = defaultdict(list)
            for row in self.rows:
                collected[row.name].append(row)
            cached = {name: tuple(rows) for name, rows in collected.items()}
            object.__setattr__(self, "_by_name", cached)
        return cached


def record_plan(twin: torch.nn.Module, manifest: Sequence[ManifestEntry], *, ranks: int = 1) -> LoadPlan:
    """Run the loader of ``twin`` (on meta) for ``manifest`` and note where everything goes.

    ``ranks`` is the tensor-parallel size that the twin was built for.

    Raises:
        MismatchError: with every unknown or duplicate name and every wrong shape, all at once.
    """
    _refuse_duplicates(manifest)
    try:
        return _record(twin, manifest, ranks)
    except Exception as error:
        raise _diagnosis(twin, manifest, ranks, error) from error


def check_complete(plan: LoadPlan) -> None:
    """Refuse a manifest that would leave part of the engine unset.

    vLLM fills such a part from uninitialized memory (a fused layer sent in part) or keeps the old
    weights without a word.

    Raises:
        MismatchError: naming every parameter of the engine that is not (wholly) covered.
    """
    gaps = []
    for param, got in sorted(plan.uncovered.items()):
        total = _numel(plan.layouts[param][0].shape)
        got_text = f"{got} of its {total} elements" if got else "nothing for it"
        from_ = f" (from {', '.join(sorted(plan.feeds[param]))})" if plan.feeds.get(param) else ""
        gaps.append(
            Mismatch(
                param, got_text + from_, "every element", "Send every tensor that goes into it, or none."
            )
        )
    if gaps:
        raise MismatchError("The push leaves part of the engine's model unset; nothing was touched.", gaps)


# ------------------------------------------------------------------------------------------- recording


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes `copy_` from known meta tensors into known parameters, and follows values that are computed."""

    def __init__(self, sources: dict[int, str], params: dict[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sources = sources
        self.params = params
        self.derived: dict[int, frozenset[str]] = {}
        self.keep_alive: list[torch.Tensor] = []
        self.rows: list[Row] = []
        self.feeds: dict[str, set[str]] = defaultdict(set)
        self.computed: set[str] = set()
        self.covered: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and _key(args[0]) in self.params:
            return self._copy(args[0], args[1])
        if (
            func in (torch.ops.aten.fill_.Scalar, torch.ops.aten.zero_.default)
            and _key(args[0]) in self.params
        ):
            self.covered[self.params[_key(args[0])]] += args[0].numel()
            return args[0]
        result = func(*args, **(kwargs or {}))
        self._follow(args, result)
        return result

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        if source.numel() not in (1, target.numel()) and source.shape != target.shape:
            raise ValueError(f"shape {tuple(source.shape)} does not fit {tuple(target.shape)}")
        param = self.params[_key(target)]
        self.covered[param] += target.numel()
        name = self.sources.get(_key(source))
        if name is not None and source.shape == target.shape:
            self.rows.append(Row(name, Slice.of(source), param, Slice.of(target)))
            self.feeds[param].add(name)
        else:
            self.computed.add(param)
            self.feeds[param] |= self._origin(source)
        return target

    def _origin(self, tensor: torch.Tensor) -> frozenset[str]:
        key = _key(tensor)
        return frozenset({self.sources[key]}) if key in self.sources else self.derived.get(key, frozenset())

    def _follow(self, args: Any, result: Any) -> None:
        """Remember which checkpoint tensors a computed tensor (a cast, a concatenation) was made of."""
        origins = frozenset().union(*(self._origin(a) for a in _tensors(args))) if args else frozenset()
        if not origins:
            return
        for out in _tensors([result]):
            if _key(out) not in self.sources and _key(out) not in self.params:
                self.derived[_key(out)] = self.derived.get(_key(out), frozenset()) | origins
                self.keep_alive.append(out)


def _record(twin: torch.nn.Module, manifest: Sequence[ManifestEntry], ranks: int) -> LoadPlan:
    params = dict(twin.named_parameters())
    tensors = {name: torch.empty(shape, dtype=dtype, device="meta") for name, dtype, shape in manifest}
    recorder = _Recorder({_key(t): n for n, t in tensors.items()}, {_key(p): n for n, p in params.items()})
    load: LoadWeights = twin.load_weights  # type: ignore[assignment]
    with torch.no_grad(), recorder:
        load(iter(tensors.items()))
    _check_all_used(recorder, tensors, ranks)
    covered = {n: recorder.covered[n] for n in params}
    return LoadPlan(
        rows=tuple(recorder.rows),
        layouts={n: (Slice.of(p), p.dtype) for n, p in params.items()},
        feeds={n: frozenset(recorder.feeds[n]) for n in params},
        computed=frozenset(recorder.computed),
        uncovered={
            n: c
            for n, c in covered.items()
            if c < params[n].numel() and n.rsplit(".", 1)[-1] not in _OPTIONAL
        },
    )


_OPTIONAL = frozenset(
    {"k_scale", "v_scale", "q_scale", "prob_scale", "input_scale", "weight_scale", "e_score_correction_bias"}
)
"""Parameters that a checkpoint may leave at their defaults: scales of quantized engines and KV caches."""


def _check_all_used(recorder: _Recorder, tensors: dict[str, torch.Tensor], ranks: int) -> None:
    """A loader that narrows a too large tensor takes a part of it without a word: every element must be used.

    Each of ``ranks`` tensor-parallel ranks may take its share, so at least that share must be seen here.
    """
    used: dict[str, int] = defaultdict(int)
    for row in recorder.rows:
        used[row.name] += _numel(row.source.shape)
    computed = {n for param in recorder.computed for n in recorder.feeds[param]}
    wrong = []
    for name, tensor in tensors.items():
        if name in computed:
            continue
        if name not in used:
            wrong.append(
                Mismatch(name, "a tensor that this engine ignores", "only what it loads", "Leave it out.")
            )
        elif used[name] * ranks < tensor.numel():
            got = f"shape {tuple(tensor.shape)}, of which the engine takes {used[name]} elements"
            wrong.append(
                Mismatch(name, got, "a tensor that it takes whole", "Is this the model that was trained?")
            )
    if wrong:
        raise MismatchError("Some tensors would be dropped or cut by the engine; nothing was touched.", wrong)


def _diagnosis(
    twin: torch.nn.Module, manifest: Sequence[ManifestEntry], ranks: int, error: Exception
) -> MismatchError:
    """Try the names one by one, so that all that are wrong are named and not only the first."""
    if isinstance(error, MismatchError):
        return error
    wrong: list[Mismatch] = []
    for entry in manifest:
        try:
            _record(twin, [entry], ranks)
        except MismatchError as ignored:
            wrong.extend(ignored.mismatches)
        except Exception as cause:
            wrong.append(_mismatch(entry, cause))
    if not wrong:
        wrong = [
            Mismatch(
                "load_weights", f"{type(error).__name__}: {error}", "a loadable set of tensors", "See cause."
            )
        ]
    summary = (
        f"{len(wrong)} of {len(manifest)} tensors don't fit the model that the engine serves "
        f"({type(twin).__name__}); nothing was touched."
    )
    return MismatchError(summary, wrong)


def _mismatch(entry: ManifestEntry, cause: Exception) -> Mismatch:
    name, dtype, shape = entry
    got = f"{tuple(shape)} {str(dtype).removeprefix('torch.')}"
    # vLLM's message goes on to list every parameter of the model.
    text = str(cause).partition(" The available parameters")[0].strip()
    text = text or f"{type(cause).__name__} in the engine's loader (a shape that does not fit)"
    if name.startswith("base_model."):
        return Mismatch(
            name, got, f"a checkpoint name ({text})", "Map it with lorasync.checkpoint_name first."
        )
    return Mismatch(name, got, text, "Is this engine serving the model that was trained?")


def _refuse_duplicates(manifest: Sequence[ManifestEntry]) -> None:
    seen: set[str] = set()
    twice = sorted({name for name, _, _ in manifest if name in seen or seen.add(name)})  # type: ignore[func-returns-value]
    if twice:
        raise MismatchError(
            "Some names are sent twice; nothing was touched.",
            [
                Mismatch(n, "more than one tensor", "one", "A source must yield each name once.")
                for n in twice
            ],
        )


def _tensors(values: Iterable[Any]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found.extend(_tensors(value))
    return found


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _numel(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())
