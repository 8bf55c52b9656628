"""A proposal for the section ``inputs``, from what a module says of itself; imported only when nothing is declared."""

from __future__ import annotations

import inspect

import torch

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
    names = _names(module)
    if not names:
        return None
    inputs = [_input(module, name) for name in names[:_MOST]]
    dimensions = "batch: {min: 1, max: 16}"
    if any("length" in shape for _, _, shape in inputs):
        dimensions += ", length: {min: 1, max: " + str(_longest(module)) + "}"
    listed = ", ".join(f"{{name: {name}, dtype: {dtype}, shape: [{shape}]}}" for name, dtype, shape in inputs)
    return f"inputs: [{listed}], dimensions: {{{dimensions}}}"


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


def _input(module: torch.nn.Module, name: str) -> tuple[str, str, str]:
    """Name, dtype and shape of an input."""
    if name.endswith(("ids", "mask", "tokens", "labels")):
        return name, "int64", "batch, length"
    layer = _first_layer(module)
    if isinstance(layer, (torch.nn.Embedding, torch.nn.EmbeddingBag)):
        return name, "int64", "batch, length"
    channels = getattr(layer, "in_channels", None)
    if channels is not None:
        sizes = {"Conv1d": "length", "Conv3d": "16, 112, 112"}.get(type(layer).__name__, "224, 224")
        return name, "float32", f"batch, {channels}, {sizes}"
    if isinstance(layer, torch.nn.Linear):
        return name, "float32", f"batch, {layer.in_features}"
    return name, "float32", "batch, 3, 224, 224"


def _first_layer(module: torch.nn.Module) -> torch.nn.Module | None:
    """The first submodule that has parameters of its own, in the order in which they were made."""
    return next((child for child in module.modules() if child._parameters), None)


def _longest(module: torch.nn.Module) -> int:
    longest = getattr(getattr(module, "config", None), "max_position_embeddings", None)
    return longest if isinstance(longest, int) else 128
