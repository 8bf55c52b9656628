"""A proposal for the section ``inputs``, from what a module says of itself; imported only when nothing is declared."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable

import torch

from ts_handlers.model.declaration import Declaration, as_line
from ts_handlers.settings import Dimension, InputSpec
from ts_handlers.settings.dtypes import DtypeName

_MOST = 8
"""Inputs that a proposal names."""


def propose_inputs(module: torch.nn.Module) -> str | None:
    """The lines that model-config.yaml may need, as one YAML flow line; None when forward's parameters are not known.

    Names are those of forward's parameters. dtypes and shapes are guessed from the names and the first layer, so
    somebody has to look at them.

    Examples
    --------
    >>> propose_inputs(torch.nn.Conv2d(3, 8, 3))
    'inputs: [{name: input, dtype: float32, shape: [batch, 3, 224, 224]}], dimensions: {batch: {min: 1, max: 16}}'
    """
    declaration = guess_declaration(module)
    return None if declaration is None else as_line(declaration)


def proposal_text(make_module: Callable[[], torch.nn.Module]) -> str:
    """What a message that asks for `inputs` ends with: the proposal, or how to get one.

    Parameters
    ----------
    make_module:
        Returns the eager module; what it raises is none of the message's business.
    """
    with contextlib.suppress(Exception):
        ending = declare_as(make_module())
        if ending is not None:
            return f"{ending}, or name samples"
    return "; name a request's body in samples, or declare them, as `ts-handlers suggest ARCHIVE` proposes"


def declare_as(module: torch.nn.Module) -> str | None:
    """The proposal as the end of a message; None where there is none."""
    proposal = propose_inputs(module)
    if proposal is None:
        return None
    return f"; declare them, as `{proposal}` (names are those of forward, check dtypes and sizes)"


def guess_declaration(module: torch.nn.Module) -> Declaration | None:
    """A guess of what a module takes, see `propose_inputs`; None when forward's parameters are not known."""
    names = _names(module)
    if not names:
        return None
    inputs = tuple(_input(module, name) for name in names[:_MOST])
    dimensions = {"batch": Dimension(1, 16)}
    if any("length" in spec.shape for spec in inputs):
        dimensions["length"] = Dimension(1, _longest(module))
    return Declaration(inputs, dimensions)


def _names(module: torch.nn.Module) -> list[str]:
    """Forward's parameters without a default; where all have one, the main input and the mask that goes with it."""
    try:
        parameters = inspect.signature(module.forward).parameters
    except (TypeError, ValueError):
        return []
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = {name: item for name, item in parameters.items() if item.kind in kinds}
    required = [name for name, item in named.items() if item.default is inspect.Parameter.empty]
    if required or not named:
        return required
    main = getattr(module, "main_input_name", None)  # of transformers' models
    first = main if main in named else next(iter(named))
    return [first, *(name for name in ("attention_mask",) if name in named and first != name)]


def _input(module: torch.nn.Module, name: str) -> InputSpec:
    dtype, shape = _dtype_and_shape(module, name)
    return InputSpec(name, dtype, ("batch", *shape))


def _dtype_and_shape(module: torch.nn.Module, name: str) -> tuple[DtypeName, tuple[int | str, ...]]:
    """dtype of an input, and its shape behind the batch."""
    if name.endswith(("ids", "mask", "tokens", "labels")):
        return "int64", ("length",)
    layer = _first_layer(module)
    if isinstance(layer, (torch.nn.Embedding, torch.nn.EmbeddingBag)):
        return "int64", ("length",)
    channels = getattr(layer, "in_channels", None)
    if isinstance(channels, int):
        sizes: dict[str, tuple[int | str, ...]] = {"Conv1d": ("length",), "Conv3d": (16, 112, 112)}
        return "float32", (channels, *sizes.get(type(layer).__name__, (224, 224)))
    if isinstance(layer, torch.nn.Linear):
        return "float32", (layer.in_features,)
    return "float32", (3, 224, 224)


def _first_layer(module: torch.nn.Module) -> torch.nn.Module | None:
    """The first submodule that has parameters of its own, in the order in which they were made."""
    return next((child for child in module.modules() if child._parameters), None)


def _longest(module: torch.nn.Module) -> int:
    longest = getattr(getattr(module, "config", None), "max_position_embeddings", None)
    return longest if isinstance(longest, int) else 128
