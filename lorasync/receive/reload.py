"""Loading layers anew: into fresh memory by vLLM's loader, then processed by vLLM, then copied to the old storage.

VLLM's own layerwise reload wraps weight loaders: a model that copies into its parameters itself (gpt-oss, and others)
passes it by, and the layer keeps its old weights without an error; a layer's parameters that were not loaded are left
as uninitialized memory. Here loaders write into real parameters, as when the engine starts, and each element is counted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lorasync.errors import Mismatch, MismatchError
from lorasync.receive.recorder import Writes
from lorasync.receive.windows import covered
from lorasync.vllm_seam import reload

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence


class FreshLayer:
    """One layer, whose own parameters (not those of its children) are fresh until it is closed.

    Buffers, and what vLLM never reloads (biases), stay where they are: loaders write to them in place.
    """

    def __init__(self, layer: torch.nn.Module) -> None:
        self.layer = layer
        self._before = dict(layer._parameters)  # with what is None, which forward asks for
        self._kernel = {n: p for n, p in layer._parameters.items() if p is not None}
        self._buffers = {n: b for n, b in layer._buffers.items() if b is not None}
        fresh = dict(reload.fresh_parameters(layer))
        for name in self._kernel.keys() - reload.never_reloaded() - fresh.keys():
            del layer._parameters[name]
        for name, param in fresh.items():
            layer._parameters[name] = param

    def process(self) -> None:
        """Quantize and repack, as vLLM does after loading."""
        reload.process(self.layer)

    def check(self, name: str) -> None:
        """Check, before anything is overwritten, that the new parameters fit the old storage.

        Raises:
            MismatchError: A parameter does not fit; the message names each.
        """
        wrong = [
            Mismatch(
                f"{name}.{n}",
                _layout(self.layer._parameters.get(n)),
                _layout(old),
                "vLLM made another layout of it than when the engine started: restart the engine, and report this.",
            )
            for n, old in self._kernel.items()
            if _layout(self.layer._parameters.get(n)) != _layout(old)
        ]
        if wrong:
            raise MismatchError("A layer can't be loaded anew; it keeps its old weights.", wrong)

    @torch.no_grad()
    def close(self, *, keep: bool) -> None:
        """Put the old parameters back, with the new values in them if these are to be kept."""
        for name, old in self._kernel.items():
            new = self.layer._parameters.get(name)
            if keep and new is not None and new is not old:
                old.data.copy_(new.data)
        for name, buffer in self._buffers.items():
            made = self.layer._buffers.get(name)
            if keep and made is not None and made is not buffer:
                buffer.copy_(made)
        self.layer._parameters.clear()
        self.layer._parameters.update(self._before)
        self.layer._buffers.update(self._buffers)


def load_counted(
    load: Callable[[Iterator[tuple[str, torch.Tensor]]], object],
    tensors: Mapping[str, torch.Tensor],
    layers: Mapping[str, torch.nn.Module],
    expected: Mapping[str, int],
) -> None:
    """Let vLLM's loader load tensors, and count what it writes to the parameters of these layers.

    Args:
        load: The model's ``load_weights``.
        tensors: Checkpoint tensors by name.
        layers: The layers by name.
        expected: For each of their parameters, the elements that have to be written.

    Raises:
        MismatchError: A parameter got fewer or more elements; the message names each.
    """
    targets = {f"{n}.{p}": t for n, layer in layers.items() for p, t in _own_tensors(layer)}
    with torch.no_grad(), Writes(targets) as writes:
        load(iter(tensors.items()))
    # A tensor that was replaced is another one now.
    writes.targets = {f"{n}.{p}": t for n, layer in layers.items() for p, t in _own_tensors(layer)}
    writes.replaced()
    wrong = []
    for name, elements in expected.items():
        found = covered(writes.windows.get(name, ()))
        if found != elements:
            fix = "VLLM's loader left it out or wrote something else: restart the engine, and report this."
            wrong.append(Mismatch(name, f"{found} elements loaded", str(elements), fix))
    if wrong:
        raise MismatchError("A layer was not loaded as the load plan says.", wrong)


def can_be_fresh(layer: torch.nn.Module, params: Sequence[str]) -> bool:
    """Whether vLLM has kept what these parameters of a layer looked like before they were processed."""
    kept = reload.as_constructed(layer)[0].keys() | reload.never_reloaded()
    return kept.issuperset(params)


def _own_tensors(layer: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from ((n, p) for n, p in layer._parameters.items() if p is not None)
    yield from ((n, b) for n, b in layer._buffers.items() if b is not None)


def _layout(tensor: torch.Tensor | None) -> str:
    return "nothing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
