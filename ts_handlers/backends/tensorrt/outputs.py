"""Which of a network's tensors are a model's outputs; imported on a build only, but for `take`.

A tensor can be an output of a network once, and an input of it never. A model may return one tensor several times, or
an input as it came; and where a conversion changes nothing (a copy, a cast to the same dtype), two of its outputs are
one tensor of the network. So each tensor is marked once, and a plan's description says where the model's outputs are::

    [["output", 0], ["input", 1], ["output", 0]]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ts_handlers.errors import BuildError

Place = tuple[str, int]
"""``output`` or ``input``, and its number among those of the plan."""


class OutputMarker:
    """Marks the outputs of the network that an interpreter makes.

    Torch-TensorRT leaves out tensors that it has marked before without saying which these were, and renames an input
    that is an output, so that the network has neither.

    Parameters
    ----------
    interpreter:
        A ``TRTInterpreter`` that has not run.

    Attributes
    ----------
    places:
        Where every output of the model is, once it has run.
    """

    def __init__(self, interpreter: Any) -> None:
        self.places: tuple[Place, ...] = ()
        self._interpreter = interpreter
        self._mark = interpreter.output
        interpreter.output = self._output  # called for the node of that name

    def _output(self, target: Any, args: Any, kwargs: Any) -> Any:
        tensors = args[0] if isinstance(args[0], (tuple, list)) else (args[0],)
        network, names = self._interpreter.ctx.net, list(self._interpreter._input_names)
        wanted = self._interpreter.output_dtypes
        kept: list[tuple[Any, Any]] = []
        places: list[Place] = []
        known: dict[tuple[int, Any], Place] = {}
        for tensor, dtype in zip(tensors, wanted, strict=True):
            if not hasattr(tensor, "is_network_input"):  # a constant, which is made a tensor of its own
                places.append(("output", len(kept)))
                kept.append((tensor, dtype))
                continue
            kind = dtype.to(type(tensor.dtype), use_default=True)
            place = known.get((id(tensor), kind))
            if place is None and tensor.is_network_input and tensor.dtype == kind:
                place = "input", names.index(tensor.name)
            elif place is None:
                place = "output", len(kept)
                # Cast here already: one tensor in two dtypes would be left out as one that is marked.
                kept.append((tensor if tensor.dtype == kind else network.add_cast(tensor, kind).get_output(0), dtype))
            known[id(tensor), kind] = place
            places.append(place)
        if not kept:
            raise BuildError("the model returns its inputs and computes nothing, so there is nothing to plan")
        self._interpreter.output_dtypes = [dtype for _, dtype in kept]
        answers = self._mark(target, (tuple(tensor for tensor, _ in kept),), kwargs)
        marked = len(self._interpreter._output_names)
        if marked != len(kept):
            raise BuildError(f"Torch-TensorRT marked {marked} of {len(kept)} different outputs")
        self.places = tuple(places)
        return [
            answers[number] if kind == "output" else tensor
            for (kind, number), tensor in zip(places, tensors, strict=True)
        ]


def take(places: Sequence[Sequence[Any]], outputs: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
    """The model's outputs from those of a plan and its inputs; one that a model returns twice is one tensor.

    Examples
    --------
    >>> take([["output", 0], ["input", 1], ["output", 0]], ["y"], ["x", "mask"])
    ['y', 'mask', 'y']
    """
    return [outputs[number] if kind == "output" else inputs[number] for kind, number in places]
