"""Reading a TensorRT network back through the API: its weights, and everything else of it.

Both are read from the network and not from Torch-TensorRT's own bookkeeping, whose names change when one graph is
converted twice, and which leaves out what a converter adds by itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ts_handlers.errors import RefitError

_SKIPPED = {"name", "metadata"}  # names of layers depend on how often Torch-TensorRT has converted a graph


@dataclasses.dataclass(frozen=True)
class Weight:
    """One weight of a network.

    Attributes
    ----------
    handle:
        What TensorRT's API takes for it.
    value:
        A copy, as a vector on the CPU.
    where:
        Kind of its layer and role in it, for messages.
    """

    handle: Any
    value: torch.Tensor
    where: str


class NetworkReader:
    """What a network consists of.

    Parameters
    ----------
    trt:
        The module of the flavour.
    network:
        An ``INetworkDefinition``.
    recorded:
        The tensors that Torch-TensorRT gave to TensorRT. Only weights in bfloat16, which the API does not show, are
        taken from there.

    Raises
    ------
    RefitError
        It holds something that cannot be read.

    Attributes
    ----------
    weights:
        All weights, in the order of the layers.
    structure:
        Everything else: kinds of layers, their attributes, and their connections. Equal for networks that differ in
        the values of weights only.
    """

    def __init__(self, trt: Any, network: Any, recorded: Sequence[torch.Tensor]) -> None:
        self._trt = trt
        self._classes = {
            name[1:-5].lower(): getattr(trt, name)
            for name in dir(trt)
            if name.startswith("I") and name.endswith("Layer") and name != "ILayer"
        }
        self.weights: list[Weight] = []
        self.structure: list[Any] = []
        self._hidden: list[str] = []
        self._tensors: dict[str, int] = {}
        for index in range(network.num_inputs):
            self._tensor(network.get_input(index))
        for index in range(network.num_layers):
            self._layer(network.get_layer(index))
        self.structure.append([self._tensor(network.get_output(index)) for index in range(network.num_outputs)])
        self._read_hidden(recorded)

    def _layer(self, layer: Any) -> None:
        kind = layer.type.name
        cls = self._classes.get(kind.replace("_", "").lower())
        if cls is None or kind.startswith("PLUGIN"):
            raise RefitError(f"the network has a layer of kind {kind}, whose attributes cannot be read")
        layer.__class__ = cls
        facts: list[Any] = [kind]
        facts.append([self._tensor(layer.get_input(i)) for i in range(layer.num_inputs)])
        for name in sorted(dir(cls)):
            if name in _SKIPPED or not isinstance(getattr(cls, name), property):
                continue
            facts.append([name, self._attribute(layer, name, kind)])
        facts.append([self._tensor(layer.get_output(i)) for i in range(layer.num_outputs)])
        self.structure.append(facts)

    def _attribute(self, layer: Any, name: str, kind: str) -> Any:
        try:
            value = getattr(layer, name)
        except Exception as error:  # an attribute that this kind of layer does not have in this state
            return type(error).__name__
        where = f"{kind.lower()} {name}"
        if isinstance(value, np.ndarray):
            if value.size:
                copy = torch.from_numpy(value.copy().reshape(-1))
                self.weights.append(Weight(value, copy, where))
            return ["weights", str(value.dtype), value.size]
        if isinstance(value, self._trt.Weights):
            if value.size:
                self._hidden.append(f"{where} ({value.dtype.name})")
            return ["weights", value.dtype.name, value.size]
        text = repr(value)
        return type(value).__name__ if " object at 0x" in text else text

    def _read_hidden(self, recorded: Sequence[torch.Tensor]) -> None:
        if not self._hidden:
            return
        if any("(BF16)" not in where for where in self._hidden):
            raise RefitError(f"the network has weights that cannot be read: {', '.join(self._hidden[:5])}")
        tensors = {tensor.data_ptr(): tensor for tensor in recorded if tensor.dtype == torch.bfloat16}
        if len(tensors) != len(self._hidden):
            raise RefitError(f"{len(self._hidden)} bfloat16 weights in the network, {len(tensors)} given to it")
        for address, tensor in tensors.items():
            handle = self._trt.Weights(self._trt.DataType.BF16, address, tensor.numel())
            self.weights.append(Weight(handle, tensor.detach().clone().reshape(-1), "bfloat16 weight"))

    def _tensor(self, tensor: Any) -> Any:
        """A tensor by the order in which it appeared, with its dtype and shape."""
        if tensor is None:
            return None
        number = self._tensors.setdefault(tensor.name, len(self._tensors))
        try:
            shape = str(tuple(tensor.shape))
        except ValueError:  # unknown rank
            shape = "?"
        return [number, tensor.dtype.name, shape]
