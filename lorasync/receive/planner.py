"""Recording a load plan from vLLM's own loader.

The twin of the served model has its parameters on the meta device, without memory. Its `load_weights` is run on meta
tensors under a dispatch mode that notes each copy. So the plan knows fused and sharded parameters of every architecture
without a table of ours, and a manifest can be checked without touching the live model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace

import torch

from lorasync.errors import Mismatch, MismatchError
from lorasync.receive.branches import ignored_branches, unknown_branches
from lorasync.receive.load_plan import LoadPlan, ManifestEntry
from lorasync.receive.recorder import Recorder, storage_key
from lorasync.receive.windows import Row, Slice, covered, overlap

LoadWeights = Callable[[Iterable[tuple[str, torch.Tensor]]], object]


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
    """Find the views of parameters that modules keep (a convolution's weight in another shape, for one).

    Where vLLM packs the weight, the view keeps the old memory.
    """
    names = {storage_key(param): name for name, param in params.items()}
    found: dict[str, list[tuple[str, Slice]]] = defaultdict(list)
    for path, module in twin.named_modules():
        for attr, tensor in [*module._buffers.items(), *vars(module).items()]:
            param = names.get(storage_key(tensor)) if isinstance(tensor, torch.Tensor) else None
            if param is not None:
                found[param].append((f"{path}.{attr}", Slice.of(tensor)))
    return {param: tuple(views) for param, views in found.items()}


def _needed(name: str, tensor: torch.Tensor) -> int:
    """Return how many elements a checkpoint has to set; vLLM says where a parameter has more (padded experts)."""
    if name.rpartition(".")[-1] in _OPTIONAL:
        return 0
    return min(int(getattr(tensor, "weight_loader_numel", tensor.numel())), tensor.numel())


def _check_written_once(recorder: Recorder) -> None:
    """Refuse two checkpoint tensors for the same elements: the last one would win, without a word."""
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
    """Refuse tensors of which the loader takes only a part: some loaders narrow a too large tensor without a word.

    Each of ``ranks`` tensor-parallel ranks takes its share, so this rank must take at least one share of each tensor.
    Return the tensors that the loader takes nothing of, if all of these may be ignored.
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
    wrong += ignored_branches(sorted(ignored - set(may_ignore)), tensors)
    if wrong:
        raise MismatchError("Some tensors would be dropped or cut by the engine; nothing was touched.", wrong)
    return frozenset(ignored)


def _diagnosis(
    twin: torch.nn.Module,
    manifest: Sequence[ManifestEntry],
    ranks: int,
    may_ignore: Collection[str],
    error: Exception,
) -> MismatchError:
    """Load the tensors one by one, so that the error names all that are wrong and not only the first."""
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
    wrong += unknown_branches(unknown, names) + ignored_branches(sorted(ignored - set(may_ignore)), names)
    if not wrong:
        wrong = [
            Mismatch(
                "load_weights",
                f"{type(error).__name__}: {error}",
                "a loadable set of tensors",
                "VLLM's loader takes each tensor alone, and not all of them: report this with its traceback.",
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
"""How vLLM's loader says that it does not know a name."""


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
