"""Watching a loader: which elements of which parameter it writes, and from which checkpoint tensor."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lorasync.receive.windows import Row, Slice

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_FILLS = (torch.ops.aten.fill_.Scalar, torch.ops.aten.fill_.Tensor, torch.ops.aten.zero_.default)


class Writes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes which elements of some tensors are written, whatever operator writes them; also which tensors are replaced.

    Args:
        targets: The tensors, by name.
    """

    def __init__(self, targets: Mapping[str, torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.targets = dict(targets)
        self.windows: dict[str, list[Slice]] = defaultdict(list)
        self._names = {storage_key(t): n for n, t in targets.items()}
        self._held = [
            t.untyped_storage() for t in targets.values()
        ]  # no other storage gets their keys meanwhile

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for target in _mutated(func, args):
            name = self.name_of(target)
            if name is None:
                self.saw_other(target)
            else:
                self.windows[name].append(Slice.of(target))
                self.saw(func, name, target, args)
        return self.run(func, args, kwargs or {})

    def name_of(self, tensor: torch.Tensor) -> str | None:
        """Return which of the targets a tensor is, or is a view of; None if it is another one."""
        return self._names.get(storage_key(tensor))

    def saw(self, func: Any, name: str, target: torch.Tensor, args: Any) -> None:
        """Take note of a write into a target, before it happens."""

    def saw_other(self, target: torch.Tensor) -> None:
        """Take note of a write into another tensor, before it happens."""

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)

    def replaced(self) -> list[str]:
        """Return the targets that have got another storage (``param.data = …``), and count them as written.

        No dispatch mode sees such a replacement.
        """
        names = [n for n, t in self.targets.items() if self.name_of(t) != n]
        for name in names:
            self.windows[name].append(Slice.of(self.targets[name]))
        return names


class Recorder(Writes):  # type: ignore[no-untyped-call]
    """Notes copies of checkpoint tensors into parameters, and what computed values are made of; all are on meta.

    Args:
        sources: The checkpoint tensors, by name.
        params: The parameters, by name.
    """

    def __init__(self, sources: Mapping[str, torch.Tensor], params: Mapping[str, torch.Tensor]) -> None:
        super().__init__(params)
        self.sources = {storage_key(t): n for n, t in sources.items()}
        self.rows: list[Row] = []
        self.feeds: dict[str, set[str]] = defaultdict(set)
        self.computed: set[str] = set()
        self._derived: dict[int, frozenset[str]] = {}
        self._keep_alive: list[torch.Tensor] = []

    def saw(self, func: Any, name: str, target: torch.Tensor, args: Any) -> None:
        if func in _FILLS and not _tensors(args[1:]):
            return
        source = args[1] if func is torch.ops.aten.copy_.default else None
        if source is not None and source.numel() not in (1, target.numel()) and source.shape != target.shape:
            raise ValueError(f"shape {tuple(source.shape)} does not fit {tuple(target.shape)}")
        known = None if source is None else self.sources.get(storage_key(source))
        if source is not None and known is not None and source.shape == target.shape:
            self.rows.append(Row(known, Slice.of(source), name, Slice.of(target)))
            self.feeds[name].add(known)
        else:
            self.computed.add(name)
            self.feeds[name] |= self._origin(_tensors(args[1:]))

    def saw_other(self, target: torch.Tensor) -> None:
        """Treat a checkpoint tensor that the loader changes in place as computed from now on."""
        key = storage_key(target)
        name = self.sources.pop(key, None)
        if name is not None:
            self._derived[key] = frozenset({name})

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        result = func(*args, **kwargs)
        self._follow(args, result)
        return result

    def replaced(self) -> list[str]:
        names = super().replaced()
        for name in names:
            self.computed.add(name)
            self.feeds[name] |= self._origin([self.targets[name]])
        return names

    def _origin(self, tensors: Iterable[torch.Tensor]) -> frozenset[str]:
        found: frozenset[str] = frozenset()
        for tensor in tensors:
            key = storage_key(tensor)
            found |= {self.sources[key]} if key in self.sources else self._derived.get(key, frozenset())
        return found

    def _follow(self, args: Any, result: Any) -> None:
        """Remember which checkpoint tensors a computed tensor (a cast, a concatenation) was made of."""
        origins = self._origin(_tensors(args))
        if not origins:
            return
        for out in _tensors([result]):
            if storage_key(out) not in self.sources and self.name_of(out) is None:
                key = storage_key(out)
                self._derived[key] = self._derived.get(key, frozenset()) | origins
                self._keep_alive.append(out)


def storage_key(tensor: torch.Tensor) -> int:
    """Return a key that all views of one storage share, on the meta device too."""
    return int(tensor.untyped_storage()._cdata)


def _mutated(func: Any, args: Any) -> list[torch.Tensor]:
    """Return the tensors among the positional arguments that an operator writes to."""
    if not func._schema.is_mutable:
        return []
    arguments = func._schema.arguments
    written = [
        a for a, spec in zip(args, arguments, strict=False) if spec.alias_info and spec.alias_info.is_write
    ]
    return _tensors(written)


def _tensors(values: Iterable[Any]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found.extend(_tensors(value))
    return found
