"""One decode step of transformers' ``generate`` with a static cache, as a model that takes and gives tensors.

``generate`` calls ``forward`` with one token for each sequence and a cache object, which ``forward`` changes in place.
Here the tensors of the cache are inputs, and what a step adds to them is an output; `DecodeForm.answer` writes that
into the cache. Names and kinds of the other arguments are recorded from a ``generate`` of three tokens, so they are
those of the installed transformers.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ts_handlers.errors import BuildError, one_line
from ts_handlers.model.methods import CallForm
from ts_handlers.settings import Dimension, InputSpec
from ts_handlers.settings.model import GenerateSettings

LENGTH = "cache_length"
"""The input that holds how many tokens are in the cache."""
_PROMPT = 2
_MOST_LAYERS = 512
_BATCH = "batch"
_LONGEST = "_previous_max_cache_length"
"""Where transformers keeps the length of the longest cache that a model has had."""


@dataclasses.dataclass(frozen=True)
class DecodeCall:
    """How ``forward`` is called for a decode step.

    Attributes
    ----------
    tensors:
        The arguments that are tensors, as they were in the recorded call.
    constants:
        The other arguments except the cache.
    cache_name, cache:
        The argument that is the cache, and the recorded one.
    """

    tensors: dict[str, torch.Tensor]
    constants: dict[str, Any]
    cache_name: str
    cache: Any

    def inputs(self, settings: GenerateSettings, on_gpu: bool) -> tuple[list[InputSpec], dict[str, Dimension]]:
        """The declared inputs of a step, and their dimensions."""
        batch: int | str = _BATCH if settings.batch.min < settings.batch.max else settings.batch.min
        specs = []
        for name, tensor in self.tensors.items():
            by_sequence = tensor.dim() > 0 and tensor.shape[0] == settings.batch.max
            shape = (batch, *tensor.shape[1:]) if by_sequence else tuple(tensor.shape)
            specs.append(InputSpec(name, _dtype(tensor), shape))
        # On a GPU a check of values would wait for it in each step, and the plain model makes none either.
        whole = (0, settings.length)
        if self.has_length:
            dtype = _dtype(self.cache.layers[0].cumulative_length)
            specs.append(InputSpec(LENGTH, dtype, (), values=whole, limits=None if on_gpu else whole))
        for name, tensor in _cache_tensors(self.cache).items():
            specs.append(InputSpec(name, _dtype(tensor), (batch, *tensor.shape[1:])))
        return specs, {_BATCH: settings.batch} if batch == _BATCH else {}

    @property
    def has_length(self) -> bool:
        """Whether the cache itself knows how many tokens are in it; otherwise an argument says where to write."""
        return hasattr(self.cache.layers[0], "cumulative_length")

    def lines(self) -> list[str]:
        """What identifies the call beside the module."""
        kinds = sorted({f"{type(layer).__module__}.{type(layer).__qualname__}" for layer in self.cache.layers})
        return [f"decode step cache={self.cache_name} layers={len(self.cache.layers)} {kinds}", repr(self.constants)]


class DecodeModule(torch.nn.Module):
    """A decode step of a causal language model.

    Takes the inputs of `DecodeCall.inputs`, in their order or by name. Returns a dict: ``output`` is the model's output
    without the cache, ``keys`` and ``values`` are lists of what the step adds to each layer of the cache, of the shape
    (batch, heads, 1, size of a head).
    """

    def __init__(self, inner: torch.nn.Module, call: DecodeCall, names: Sequence[str]) -> None:
        super().__init__()
        self.inner = inner
        self.method = "forward"
        self.names = tuple(names)
        self._decode = call
        self._function = type(inner).forward

    def lines(self) -> list[str]:
        """What identifies the step beside the module."""
        return self._decode.lines()

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Call ``forward`` of the class with any arguments."""
        return self._function(self.inner, *args, **kwargs)

    def forward(self, *_in_order: torch.Tensor, **_by_name: torch.Tensor) -> Any:
        inputs = {**dict(zip(self.names, _in_order, strict=False)), **_by_name}
        call = self._decode
        cache = _cache_of(call.cache, inputs)
        arguments = {name: inputs[name] for name in call.tensors}
        where = inputs[LENGTH] if call.has_length else inputs["cache_position"]
        where = where.reshape(1).clone()
        output = self._function(self.inner, **arguments, **call.constants, **{call.cache_name: cache})
        return {
            "output": type(output)(**{name: value for name, value in output.items() if name != call.cache_name}),
            "keys": [layer.keys.index_select(2, where) for layer in cache.layers],
            "values": [layer.values.index_select(2, where) for layer in cache.layers],
        }


class DecodeForm(CallForm):
    """Which calls of ``forward`` are decode steps that the artifact can answer.

    Parameters
    ----------
    module:
        The model.
    call:
        The recorded call.
    settings:
        What was compiled.
    """

    def __init__(self, module: Any, call: DecodeCall, settings: GenerateSettings) -> None:
        super().__init__(module.forward, list(call.tensors), {})
        self._module = module
        self._call = call
        self._settings = settings
        self._layers = [tuple(layer.keys.shape[1:]) for layer in call.cache.layers]
        self._expected = {*call.tensors, *call.constants, call.cache_name}

    def inputs(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any] | str | None:
        """The inputs of a decode step by name; None for a call that is none, or in what it differs."""
        call = self._call
        cache: Any = kwargs.get(call.cache_name)
        if vars(self._module).get(_LONGEST, 0) > self._settings.length:
            # A longer request has left its length behind, which would be that of all later caches.
            object.__setattr__(self._module, _LONGEST, -1)
        if args or type(cache) is not type(call.cache) or not all(layer.is_initialized for layer in cache.layers):
            return None
        ids = kwargs.get("input_ids")
        if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.shape[1] != 1:
            return None  # the prompt
        if kwargs.keys() != self._expected:
            different = sorted(kwargs.keys() ^ self._expected)
            return one_line(f"a decode step with other arguments: {', '.join(different)}", 200)
        for name, value in call.constants.items():
            if kwargs[name] is not value and kwargs[name] != value:
                return one_line(f"a decode step with another {name}", 200)
        if [tuple(layer.keys.shape[1:]) for layer in cache.layers] != self._layers:
            return f"a decode step with a cache that has not {self._settings.length} tokens"
        if not self._settings.batch.min <= ids.shape[0] <= self._settings.batch.max:
            return "a decode step of a number of sequences that is not compiled"
        found = {name: kwargs[name] for name in call.tensors}
        if call.has_length:
            found[LENGTH] = cache.layers[0].cumulative_length
        return {**found, **_cache_tensors(cache)}

    def prepare(self) -> None:
        """Let ``generate`` take a static cache of the compiled length, unless the model has another one declared."""
        config = self._module.generation_config
        if config.cache_implementation in (None, "static"):
            config.cache_implementation = "static"
            config.disable_compile = True  # transformers would compile what is compiled
            if hasattr(config, "max_cache_len"):
                config.max_cache_len = max(config.max_cache_len or 0, self._settings.length)

    def answer(self, answer: Any, kwargs: Mapping[str, Any]) -> Any:
        """The output with the call's cache, into which what the step has added is written."""
        call, cache = self._call, kwargs[self._call.cache_name]
        where = cache.layers[0].cumulative_length if call.has_length else kwargs["cache_position"]
        where = where.reshape(1).clone()
        for layer, key, value in zip(cache.layers, answer["keys"], answer["values"], strict=True):
            layer.keys.index_copy_(2, where, key)
            layer.values.index_copy_(2, where, value)
            if call.has_length:
                layer.cumulative_length.add_(1)
        output = answer["output"]
        output[call.cache_name] = cache
        return output


def record_decode_call(module: Any, settings: GenerateSettings) -> DecodeCall:
    """Let a model generate three tokens with a static cache, and record how it calls ``forward`` for a decode step.

    The module is afterwards as it was before.

    Raises
    ------
    BuildError
        It does not generate, or not with a static cache of plain layers.
    """
    name = type(module).__name__
    if not callable(getattr(module, "generate", None)) or not hasattr(module, "generation_config"):
        raise BuildError(f"{name} has no generate of transformers")
    calls: list[dict[str, Any]] = []
    with _recorded(module, calls):
        try:
            _generate(module, settings)
        except Exception as error:
            raise BuildError(f"{name} does not generate with a static cache: {one_line(error, 300)}") from error
    for kwargs in calls[1:]:
        caches = {name: value for name, value in kwargs.items() if getattr(value, "is_compileable", False)}
        if len(caches) == 1:
            break
    else:
        raise BuildError(f"{name} generates without a static cache")
    (cache_name, cache), *_ = caches.items()
    wrong = _reason_against_cache(cache, settings.length)
    if wrong is not None:
        raise BuildError(f"{name}: {wrong}")
    tensors = {name: value for name, value in kwargs.items() if isinstance(value, torch.Tensor)}
    others = {name: value for name, value in kwargs.items() if name not in tensors and name != cache_name}
    strange = [name for name, value in others.items() if not isinstance(value, (bool, int, float, str, type(None)))]
    if strange or "input_ids" not in tensors:
        raise BuildError(f"{name}: a decode step is called with {', '.join(strange) or 'no input_ids'}")
    for layer in cache.layers:  # of which the shapes are wanted
        layer.keys, layer.values = layer.keys.to("meta"), layer.values.to("meta")
    return DecodeCall(tensors, others, cache_name, cache)


@contextlib.contextmanager
def _recorded(module: torch.nn.Module, calls: list[dict[str, Any]]) -> Iterator[None]:
    """Inside the block, the keyword arguments of calls of ``forward`` are recorded; then attributes are restored."""
    before = dict(vars(module))
    function = type(module).forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(dict(kwargs) if not args else {})
        return function(module, *args, **kwargs)

    vars(forward)["__signature__"] = inspect.signature(module.forward)  # what generate asks for decides what it passes
    object.__setattr__(module, "forward", forward)
    try:
        yield
    finally:
        for name in vars(module).keys() - before.keys():
            del vars(module)[name]
        vars(module).update(before)


def _generate(module: Any, settings: GenerateSettings) -> None:
    count = settings.batch.max
    device = next(module.parameters()).device
    config = copy.deepcopy(module.generation_config)
    chosen = {
        "do_sample": False,
        "num_beams": 1,
        "num_return_sequences": 1,
        "max_length": settings.length,
        "max_cache_len": settings.length,
        "max_new_tokens": None,
        "cache_implementation": "static",
        "use_cache": True,
        "eos_token_id": None,
        "pad_token_id": 0,
        "disable_compile": True,
        "return_dict_in_generate": False,
    }
    for name, value in chosen.items():
        setattr(config, name, value)

    def enough(ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
        return torch.full((len(ids),), ids.shape[1] >= _PROMPT + 3, device=ids.device)

    ids = torch.ones(count, _PROMPT, dtype=torch.long, device=device)
    module.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, stopping_criteria=[enough])


def _reason_against_cache(cache: Any, length: int) -> str | None:
    layers = getattr(cache, "layers", None)
    if not isinstance(layers, list) or not 0 < len(layers) <= _MOST_LAYERS:
        return f"its cache is a {type(cache).__name__} without layers"
    for layer in layers:
        if type(layer).__name__ != "StaticLayer":
            return f"its cache has a {type(layer).__name__}; compiled are plain static layers"
        if layer.keys.dim() != 4 or layer.keys.shape[2] != length or layer.values.shape[2] != length:
            return f"its cache has the shape {tuple(layer.keys.shape)}; expected {length} tokens in dimension 2"
    return None


def _cache_tensors(cache: Any) -> dict[str, torch.Tensor]:
    found = {}
    for index, layer in enumerate(cache.layers):
        found[f"key_{index}"] = layer.keys
        found[f"value_{index}"] = layer.values
    return found


def _cache_of(template: Any, inputs: Mapping[str, torch.Tensor]) -> Any:
    """A cache like `template` on copies of tensors: a step changes them, and an artifact must not change its inputs."""
    cache = copy.copy(template)
    cache.layers = []
    for index, each in enumerate(template.layers):
        layer = copy.copy(each)
        layer.keys, layer.values = inputs[f"key_{index}"].clone(), inputs[f"value_{index}"].clone()
        layer.device = layer.keys.device
        layer.batch_size = layer.keys.shape[0]
        if LENGTH in inputs:
            layer.cumulative_length = inputs[LENGTH].clone()
        cache.layers.append(layer)
    return cache


def _dtype(tensor: torch.Tensor) -> Any:
    return str(tensor.dtype)[6:]
