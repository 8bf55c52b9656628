"""Proving which weights a plan may take: how each weight of the network follows from the model's, or why it does not.

What is computed from weights alone must move or cast them, by the operators of the graph. Then the graph is converted
twice, with the model's weights and with random ones, the *probe*. Whatever of the network is the same in both does not
depend on the weights; every weight that differs must be reproduced, byte for byte and in both networks, by exactly one
formula; and every weight of the model must be in a formula. Otherwise the plan serves its own weights only: a wrong
guess would answer wrongly later. See docs/decisions/0009-refit.md.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch

from ts_handlers.backends.export import PREFIX, live_placeholders
from ts_handlers.backends.tensorrt.refit.network_reader import NetworkReader, Weight
from ts_handlers.backends.tensorrt.refit.operators import refuse_functions
from ts_handlers.backends.tensorrt.weights import WeightFormula, compute, value_digest
from ts_handlers.errors import RefitError
from ts_handlers.model.archive_files import Tensors

_BATCH_NORMS = ("_native_batch_norm_legit_no_training", "batch_norm", "native_batch_norm", "cudnn_batch_norm")


@dataclasses.dataclass
class State:
    """The model's state as its exported graph uses it, by the names of the archive, on the CPU in the model's dtypes.

    `moving` are the values that a refit replaces; `fixed` those that it cannot (integers, truth values), and `tied`
    the names that share a tensor.
    """

    moving: Tensors
    fixed: Tensors
    tied: list[list[str]]

    def probe(self) -> Tensors:
        """Random values with zeros and both signs, the same for tied names. Running variances stay positive."""
        generator = torch.Generator().manual_seed(20)
        values: Tensors = {}
        for number, (name, tensor) in enumerate(self.moving.items()):
            value = torch.rand(tensor.shape, generator=generator) + 0.5
            if tensor.numel() == 1:
                value.fill_(0.5 + number % 128 / 256)  # different ones even in bfloat16
            elif "var" not in name.rpartition(".")[2]:
                value *= torch.where(torch.rand(tensor.shape, generator=generator) < 0.5, -1.0, 1.0)
                if tensor.numel() > 2:
                    value.view(-1)[tensor.numel() // 2] = 0.0
            values[name] = value.to(tensor.dtype)
        return self._retied(values)

    def perturbed(self) -> Tensors:
        """Values near the model's own, for which it still behaves like one."""
        generator = torch.Generator().manual_seed(21)
        values: Tensors = {}
        for name, tensor in self.moving.items():
            wide = tensor.float()
            step = 0.1 * float(wide.square().mean().sqrt()) if tensor.numel() else 0.0
            factor = 0.75 + 0.5 * torch.rand(tensor.shape, generator=generator)
            shift = (step or 0.1) * torch.rand(tensor.shape, generator=generator)
            values[name] = (wide * factor + shift).to(tensor.dtype)
        return self._retied(values)

    def _retied(self, values: Tensors) -> Tensors:
        for first, *others in self.tied:
            for other in others:
                values[other] = values[first]
        return values


def model_state(program: Any, archive: Tensors) -> State:
    """What of the archive's weights a decomposed program uses.

    Raises
    ------
    RefitError
        The model does not use its weights as they are in the archive, or decides something by them.
    """
    signature = program.graph_signature
    sources = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    used = {sources[name] for name in live_placeholders(program.graph) if name in sources}
    tensors = {fqn: tensor.detach() for fqn, tensor in program.state_dict.items() if isinstance(tensor, torch.Tensor)}
    # torch.export uses one of the names that share a tensor; the archive may have another value under the others.
    places = {fqn: _place(tensor) for fqn, tensor in tensors.items() if tensor.numel()}
    shared = {places[fqn] for fqn in used if fqn in places}
    state = State({}, {}, [])
    groups: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for fqn in sorted(tensors):
        name = fqn.removeprefix(PREFIX)
        if (fqn not in used and places.get(fqn) not in shared) or name not in archive:
            continue  # what is not among the weights does not change with them
        value = tensors[fqn].cpu().contiguous()
        if archive[name].shape != value.shape or not _same(archive[name].to(value.dtype), value):
            raise RefitError(
                f"the model changes {name!r} after it has loaded it, so the archive's value is not its own"
            )
        (state.moving if value.is_floating_point() else state.fixed)[name] = value
        if fqn in places:
            groups[places[fqn]].append(name)
    for place, names in groups.items():
        overlapping = [
            other for key, others in groups.items() if key[0] == place[0] and key != place for other in others
        ]
        if overlapping:
            raise RefitError(f"{names[0]!r} and {overlapping[0]!r} overlap in memory")
    state.tied = [names for names in groups.values() if len(names) > 1]
    refuse_functions(program, {PREFIX + name for name in state.moving})
    return state


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Where a tensor lies; the first element is its memory."""
    return tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def prove(
    trt: Any,
    network: Any,
    probed: Any,
    state: State,
    probe: Tensors,
) -> list[WeightFormula]:
    """Formulas for all weights of `network` that depend on the model's, which are named and marked refittable there.

    Parameters
    ----------
    network, probed:
        `ts_handlers.backends.tensorrt.network.Network` with the model's own weights, and with `probe`.

    Raises
    ------
    RefitError
        Something depends on the weights in a way that no formula covers.
    """
    own, other = (read_network(trt, each) for each in (network, probed))
    if own.structure != other.structure or len(own.weights) != len(other.weights):
        raise RefitError("the network itself, not only its weights, depends on the model's weights")
    candidates = _Candidates(network.graph, state)
    both = ({**state.moving, **state.fixed}, {**state.fixed, **probe})
    formulas: list[WeightFormula] = []
    for left, right in zip(own.weights, other.weights, strict=True):
        if _same(left.value, right.value):
            continue
        found = [each for each in candidates(left) if _reproduces(each, both, (left, right))]
        if len(found) != 1:
            how = "cannot be computed from the model's weights" if not found else "can be computed in several ways"
            raise RefitError(f"a weight of the network ({left.where}, {left.value.numel()} values) {how}")
        formula = {"name": f"ts_handlers.{len(formulas)}", **found[0], "dtype": str(left.value.dtype)[6:]}
        _mark(network.definition, left, formula["name"])
        formulas.append(formula)
    covered = {name for formula in formulas for name in formula["from"]}
    covered |= {name for group in state.tied if covered & set(group) for name in group}
    left_out = sorted(set(state.moving) - covered)
    if left_out:
        raise RefitError(f"these weights of the model are not seen in the plan: {', '.join(left_out[:5])}")
    return formulas


def read_network(trt: Any, network: Any) -> NetworkReader:
    """What a `ts_handlers.backends.tensorrt.network.Network` consists of."""
    # TensorRT warns of each attribute that a layer gets as an input.
    log = logging.getLogger("torch_tensorrt [TensorRT Conversion Context]")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        return NetworkReader(trt, network.definition, network.interpreter.ctx.cpu_weights_reference_holder)
    finally:
        log.setLevel(level)


def _mark(definition: Any, weight: Weight, name: str) -> None:
    if not definition.set_weights_name(weight.handle, name) or not definition.mark_weights_refittable(name):
        raise RefitError(f"TensorRT does not make a weight refittable ({weight.where})")


def _reproduces(formula: WeightFormula, states: tuple[Tensors, Tensors], weights: tuple[Weight, Weight]) -> bool:
    dtype = str(weights[0].value.dtype)[6:]
    with torch.no_grad():
        return all(
            _same(compute({**formula, "dtype": dtype}, state), weight.value)
            for state, weight in zip(states, weights, strict=True)
        )


def _same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors on the CPU have the same dtype, number of values and bytes."""
    if left.dtype != right.dtype or left.numel() != right.numel():
        return False
    if not left.numel():
        return True
    a, b = (tensor.detach().cpu().contiguous().view(-1).view(torch.uint8) for tensor in (left, right))
    return torch.equal(a, b)


class _Candidates:
    """The formulas that may give a weight: copies of weights of its size, and batch norms."""

    def __init__(self, graph: Any, state: State) -> None:
        aliases = {name for group in state.tied for name in group[1:]}
        self._by_size: dict[int, list[WeightFormula]] = defaultdict(list)
        for name, tensor in state.moving.items():
            if name in aliases:
                continue
            for transposed in (False, True)[: 1 + (tensor.dim() == 2 and min(tensor.shape) > 1)]:
                self._add(tensor.numel(), {"formula": "copy", "from": [name], "transposed": transposed})
        first = {name: group[0] for group in state.tied for name in group}
        for names, eps in _batch_norms(graph):
            known = [None if name is None else first.get(name, name) for name in names]
            if all(name is None or name in state.moving for name in known) and known[3] is not None:
                size = state.moving[known[3]].numel()
                weight, _, _, variance = known
                self._add(size, {"formula": "batch_norm_scale", "from": [weight, variance], "eps": eps})
                self._add(size, {"formula": "batch_norm_shift", "from": known, "eps": eps})

    def _add(self, size: int, formula: WeightFormula) -> None:
        if formula not in self._by_size[size]:
            self._by_size[size].append(formula)

    def __call__(self, weight: Weight) -> list[WeightFormula]:
        return self._by_size[weight.value.numel()]


def _batch_norms(graph: Any) -> Iterator[tuple[list[str | None], float]]:
    """(names of weight, bias, mean and variance, epsilon) of the batch norms whose state is the model's own."""
    for node in graph.graph.nodes:
        name = getattr(node.target, "__name__", "").partition(".")[0]
        if node.op != "call_function" or name not in _BATCH_NORMS:
            continue
        arguments = node.args[1:5]
        if any(argument is not None and argument.op != "get_attr" for argument in arguments):
            continue
        names = [None if argument is None else str(argument.target).removeprefix(PREFIX) for argument in arguments]
        yield names, float([value for value in node.args if isinstance(value, float)][-1])


def describe(state: State, formulas: list[WeightFormula], flags: tuple[str, ...]) -> dict[str, Any]:
    """The part ``refit`` of a plan's description; see `ts_handlers.backends.tensorrt.weights`."""
    return {
        "flags": list(flags),
        "weights": formulas,
        "state": {
            name: {"dtype": str(tensor.dtype)[6:], "shape": list(tensor.shape)} for name, tensor in state.moving.items()
        },
        "tied": state.tied,
        "fixed": {name: value_digest(tensor) for name, tensor in state.fixed.items()},
    }
