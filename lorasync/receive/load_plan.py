"""Which slice of which checkpoint tensor lands where in vLLM's parameters, recorded from vLLM's own loader.

A twin of the served model is built on the meta device (no memory) and its `load_weights` is run on meta tensors
under a dispatch mode that notes each copy. So the plan knows fused and sharded parameters of every architecture
without a table of ours, and a manifest can be checked without touching the live model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch

from lorasync.errors import Mismatch, MismatchError
from lorasync.receive.recorder import Recorder, storage_key
from lorasync.receive.windows import Row as Row
from lorasync.receive.windows import Slice, covered, overlap

ManifestEntry = tuple[str, torch.dtype, tuple[int, ...]]
LoadWeights = Callable[[Iterable[tuple[str, torch.Tensor]]], object]


@dataclass(frozen=True)
class LoadPlan:
    """Every copy that loading a checkpoint makes, and what was computed on the way rather than copied."""

    rows: tuple[Row, ...]
    layouts: dict[str, tuple[Slice, torch.dtype]]
    """Shape, strides and dtype of every parameter of the engine, and of the buffers that are loaded."""
    feeds: dict[str, frozenset[str]]
    """For each of these, the checkpoint names that go into it."""
    computed: frozenset[str]
    """Those that get something else than plain slices of checkpoint tensors."""
    uncovered: dict[str, int] = field(default_factory=dict)
    """Those that the checkpoint leaves unset, with the number of elements that it does set."""
    written: dict[str, int] = field(default_factory=dict)
    """How many elements the loader writes, each counted once."""
    ignored: frozenset[str] = frozenset()
    """Checkpoint names that the engine takes nothing of."""
    aliases: dict[str, tuple[tuple[str, Slice], ...]] = field(default_factory=dict)
    """For each parameter what the constructor made as a view of it, with the window that it shows."""

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


def record_plan(
    twin: torch.nn.Module,
    manifest: Sequence[ManifestEntry],
    *,
    ranks: int = 1,
    may_ignore: Collection[str] = (),
) -> LoadPlan:
    """Run the loader of ``twin`` (on meta) for ``manifest`` and note where everything goes.

    Args:
        twin: The served model on the meta device.
        manifest: Names, dtypes and shapes of the checkpoint tensors.
        ranks: The tensor-parallel size that the twin was built for.
        may_ignore: Names that the engine may take nothing of; the plan lists those as ``ignored``.

    Raises:
        MismatchError: with every unknown or duplicate name and every wrong shape, all at once.
    """
    _refuse_duplicates(manifest)
    try:
        return _record(twin, manifest, ranks, may_ignore)
    except Exception as error:
        unknown = {
            entry[0] for entry in manifest if entry[0] in may_ignore and _is_unknown(twin, entry, ranks)
        }
        if not unknown:
            raise _diagnosis(twin, manifest, ranks, may_ignore, error) from error
    rest = [entry for entry in manifest if entry[0] not in unknown]
    plan = record_plan(twin, rest, ranks=ranks, may_ignore=may_ignore)
    return replace(plan, ignored=plan.ignored | unknown)


def _is_unknown(twin: torch.nn.Module, entry: ManifestEntry, ranks: int) -> bool:
    try:
        _record(twin, [entry], ranks, [entry[0]])
    except Exception as error:
        return _NO_PLACE in str(error)
    return False


def check_complete(plan: LoadPlan, only: Collection[str] | None = None) -> None:
    """Refuse a manifest that would leave part of the engine unset, or (with ``only``) part of these parameters.

    vLLM fills such a part from uninitialized memory (a fused layer sent in part) or keeps the old
    weights without a word.

    Raises:
        MismatchError: naming every parameter of the engine that is not (wholly) covered.
    """
    gaps = []
    for param, got in sorted(plan.uncovered.items()):
        if only is not None and param not in only:
            continue
        total = plan.layouts[param][0].numel
        got_text = f"{got} of its {total} elements" if got else "nothing for it"
        from_ = f" (from {', '.join(sorted(plan.feeds[param]))})" if plan.feeds.get(param) else ""
        gaps.append(
            Mismatch(
                param, got_text + from_, "every element", "Send every tensor that goes into it, or none."
            )
        )
    if gaps:
        raise MismatchError("The push leaves part of the engine's model unset; nothing was touched.", gaps)


def _record(
    twin: torch.nn.Module, manifest: Sequence[ManifestEntry], ranks: int, may_ignore: Collection[str]
) -> LoadPlan:
    params = dict(twin.named_parameters())
    targets = {n: b for n, b in twin.named_buffers() if b.is_meta} | params
    tensors = {name: torch.empty(shape, dtype=dtype, device="meta") for name, dtype, shape in manifest}
    recorder = Recorder(tensors, targets)
    layouts = {n: (Slice.of(t), t.dtype) for n, t in targets.items()}
    load: LoadWeights = twin.load_weights  # type: ignore[assignment]
    with torch.no_grad(), recorder:
        load(iter(tensors.items()))
    recorder.replaced()
    ignored = _check_all_used(recorder, tensors, ranks, may_ignore)
    _check_written_once(recorder)
    # Of the buffers only those that are loaded: the others are what the constructor made them.
    known = params.keys() | recorder.windows.keys()
    written = {n: covered(recorder.windows.get(n, ())) for n in known}
    return LoadPlan(
        rows=tuple(recorder.rows),
        layouts={n: layouts[n] for n in known},
        feeds={n: frozenset(recorder.feeds.get(n, ())) for n in known},
        computed=frozenset(recorder.computed),
        uncovered={n: c for n, c in written.items() if c < _needed(n, targets[n])},
        written=written,
        ignored=ignored,
        aliases=_aliases(twin, params),
    )


def _aliases(
    twin: torch.nn.Module, params: dict[str, torch.nn.Parameter]
) -> dict[str, tuple[tuple[str, Slice], ...]]:
    """A convolution's weight in another shape, for one: where vLLM packs the weight, the view keeps the old memory."""
    names = {storage_key(param): name for name, param in params.items()}
    found: dict[str, list[tuple[str, Slice]]] = defaultdict(list)
    for path, module in twin.named_modules():
        for attr, tensor in [*module._buffers.items(), *vars(module).items()]:
            param = names.get(storage_key(tensor)) if isinstance(tensor, torch.Tensor) else None
            if param is not None:
                found[param].append((f"{path}.{attr}", Slice.of(tensor)))
    return {param: tuple(views) for param, views in found.items()}


def _needed(name: str, tensor: torch.Tensor) -> int:
    """How many elements a checkpoint has to set; vLLM says where a weight is larger than that (padded experts)."""
    if name.rpartition(".")[-1] in _OPTIONAL:
        return 0
    return min(int(getattr(tensor, "weight_loader_numel", tensor.numel())), tensor.numel())


def _check_written_once(recorder: Recorder) -> None:
    """Two checkpoint tensors for the same elements: the last to come would win, without a word."""
    by_param: dict[str, list[Row]] = defaultdict(list)
    for row in recorder.rows:
        by_param[row.param].append(row)
    wrong = []
    for param, rows in by_param.items():
        if param.rpartition(".")[-1] in _OPTIONAL or _is_disjoint(rows):
            continue
        names = _names_that_meet(rows)
        if names:
            got = f"both {' and '.join(names)} for the same elements"
            wrong.append(Mismatch(param, got, "one tensor for each", "Send one of them only."))
    if wrong:
        raise MismatchError("Some weights of the engine would be written twice; nothing was touched.", wrong)


def _is_disjoint(rows: Sequence[Row]) -> bool:
    return len(rows) == 1 or covered(r.target for r in rows) == sum(r.target.numel for r in rows)


def _names_that_meet(rows: Sequence[Row]) -> list[str]:
    for index, left in enumerate(rows):
        for right in rows[index + 1 :]:
            if left.name != right.name and overlap(left.target, right.target):
                return [left.name, right.name]
    return []


_OPTIONAL = frozenset(
    {"k_scale", "v_scale", "q_scale", "prob_scale", "input_scale", "weight_scale", "e_score_correction_bias"}
)
"""Parameters that a checkpoint may leave at their defaults: scales of quantized engines and KV caches."""


def _check_all_used(
    recorder: Recorder, tensors: dict[str, torch.Tensor], ranks: int, may_ignore: Collection[str]
) -> frozenset[str]:
    """A loader that narrows a too large tensor takes a part of it without a word: every element must be used.

    Each of ``ranks`` tensor-parallel ranks may take its share, so at least that share must be seen here. Returns
    what is not used at all, and may be.
    """
    used: dict[str, int] = defaultdict(int)
    for row in recorder.rows:
        used[row.name] += row.source.numel
    computed = {n for param in recorder.computed for n in recorder.feeds[param]}
    wrong, ignored = [], set()
    for name, tensor in tensors.items():
        if name in computed:
            continue
        if name not in used:
            ignored.add(name)
        elif used[name] * ranks < tensor.numel():
            got = f"shape {tuple(tensor.shape)}, of which the engine takes {used[name]} elements"
            wrong.append(
                Mismatch(name, got, "a tensor that it takes whole", "Is this the model that was trained?")
            )
    wrong += _ignored(sorted(ignored - set(may_ignore)), tensors)
    if wrong:
        raise MismatchError("Some tensors would be dropped or cut by the engine; nothing was touched.", wrong)
    return frozenset(ignored)


def _unknown(names: Sequence[str], all_names: Collection[str]) -> list[Mismatch]:
    """One mismatch for each branch of the trainer's model that the engine's has no place for."""
    wrong = []
    for branch, members in _by_branch(names, all_names).items():
        more = f"{len(members)} tensors, {members[0]} for one" if len(members) > 1 else "a tensor"
        fix = (
            "Is this engine serving the model that was trained? If it serves a part of it, leave the rest out: "
            f"MergedSource(model, exclude=[{branch!r}])."
        )
        wrong.append(Mismatch(branch, more, "only names that the engine's model has a place for", fix))
    return wrong


def _by_branch(names: Sequence[str], all_names: Collection[str]) -> dict[str, list[str]]:
    branches: dict[str, list[str]] = defaultdict(list)
    for name in names:
        branches[_branch(name, set(names), all_names)].append(name)
    return branches


def _ignored(names: Sequence[str], all_names: Collection[str]) -> list[Mismatch]:
    """One mismatch for each branch of the model that the engine takes nothing of (the tower of a text-only engine)."""
    wrong = []
    for branch, members in _by_branch(names, all_names).items():
        more = f" ({len(members)} tensors, {members[0]} for one)" if len(members) > 1 else ""
        fix = f"Leave it out: MergedSource(model, exclude=[{branch!r}])."
        wrong.append(Mismatch(branch, f"what this engine ignores{more}", "only what it loads", fix))
    return wrong


def _branch(name: str, ignored: Collection[str], all_names: Collection[str]) -> str:
    """The shortest pattern of names for all that is ignored beside this one, and for nothing else."""
    path = name.split(".")
    for depth in range(1, len(path)):
        prefix = ".".join(path[:depth]) + "."
        if all(other in ignored for other in all_names if other.startswith(prefix)):
            return f"{prefix}*"
    return name


def _diagnosis(
    twin: torch.nn.Module,
    manifest: Sequence[ManifestEntry],
    ranks: int,
    may_ignore: Collection[str],
    error: Exception,
) -> MismatchError:
    """Try the names one by one, so that all that are wrong are named and not only the first."""
    if isinstance(error, MismatchError):
        return error
    wrong: list[Mismatch] = []
    ignored: set[str] = set()
    unknown: list[str] = []
    names = [name for name, _, _ in manifest]
    for entry in manifest:
        try:
            ignored |= _record(twin, [entry], ranks, [entry[0]]).ignored
        except MismatchError as found:
            wrong.extend(found.mismatches)
        except Exception as cause:
            known = _NO_PLACE not in str(cause) or entry[0].startswith("base_model.")
            if known:
                wrong.append(_mismatch(entry, cause))
            else:
                unknown.append(entry[0])
    wrong += _unknown(unknown, names) + _ignored(sorted(ignored - set(may_ignore)), names)
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


_NO_PLACE = "There is no module or parameter named"
"""How vLLM's loader says so."""


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
