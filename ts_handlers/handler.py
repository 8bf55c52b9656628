"""TorchServe's lifecycle: `CompiledHandler`, and a mixin that turns any handler class into one.

The mixin takes the place of the two moments at which TorchServe's `BaseHandler` turns an archive into a model: it
answers `_load_pickled_model` with a model that comes from the store, and it hides the ``pt2`` section while
`BaseHandler.initialize` runs, since the compilation is ours then. Everything else stays the base class's.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ts_handlers.compiled_model import CompiledModel
from ts_handlers.errors import InputError, ModelError, SettingsError
from ts_handlers.model_source import ArchiveSource, ExportedSource, ModelSource, ModuleSource
from ts_handlers.settings import SECTION, Settings, parse_settings
from ts_handlers.startup import start_model
from ts_handlers.store.opening import weights_digester


def _base_handler() -> Any:
    """Import TorchServe's base handler without its optional compilers.

    It imports torch_tensorrt when that is installed, which takes seconds and, when the installation is broken, raises
    exceptions that the base handler does not expect, so that every worker dies. The entry None in `sys.modules` makes
    that import an ordinary ImportError; it is removed afterwards.
    """
    blocked = [name for name in ("torch_tensorrt",) if name not in sys.modules]
    for name in blocked:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        from ts.torch_handler.base_handler import BaseHandler
    finally:
        for name in blocked:
            sys.modules.pop(name, None)
    return BaseHandler


BaseHandler: Any = _base_handler()

logger = logging.getLogger(__name__)

DEFAULT_STARTUP_TIMEOUT_SECONDS = 120
_EXPORTED = "exported program"


class CompiledHandlerMixin:
    """Serves the model from the artifact store. Put it before the handler class it turns into a compiled one::

        class Handler(CompiledHandlerMixin, TheirHandler):
            pass

    `preprocess`, `inference`, `postprocess`, `initialize` and `handle` can be overridden as before. `load_model` can be
    overridden to build the eager model in another way than from the archive's model file.
    """

    model: Any
    context: Any

    def initialize(self, context: Any) -> None:
        """Make the model ready: from the store, or by building and publishing it.

        Raises
        ------
        SettingsError, ModelError
            With what was expected, what was found and what to do; TorchServe logs it and serves its other models.
        """
        config = getattr(context, "model_yaml_config", None) or {}
        self.settings: Settings = parse_settings(config)
        self._context = context
        self._config = config
        manifest = context.manifest["model"]
        serialized = manifest.get("serializedFile", "")
        without_model_file = not manifest.get("modelFile")
        if without_model_file and serialized.endswith((".pth", ".safetensors")):
            raise ModelError(
                f"the archive holds weights ({serialized}) but no model file; name the file of its class with "
                "--model-file when the archive is built"
            )
        if without_model_file and serialized.endswith(".pt2"):
            manifest["modelFile"] = _EXPORTED  # sends BaseHandler to _load_pickled_model
        if torch.cuda.is_available() and context.system_properties.get("gpu_id") is not None:
            torch.cuda.set_device(int(context.system_properties["gpu_id"]))
        context.model_yaml_config = {key: value for key, value in config.items() if key != "pt2"}
        try:
            super().initialize(context)  # type: ignore[misc]
        finally:
            context.model_yaml_config = config
            self.model_yaml_config = config
            if manifest.get("modelFile") == _EXPORTED:
                del manifest["modelFile"]
        model = self.model
        if isinstance(model, torch.nn.Module) and not isinstance(model, torch.jit.ScriptModule):
            # The handler below built the model in a way of its own.
            self.model = self._start(ModuleSource(context.model_name, model.eval()))
        if isinstance(self.model, CompiledModel):
            self._check_startup_timeout()
            self.model.metrics.emit(getattr(context, "metrics", None))

    def _start(self, source: ModelSource) -> CompiledModel:
        return start_model(source, self.settings, self.device)  # type: ignore[attr-defined]

    def _load_pickled_model(self, model_dir: str, model_file: str, model_pt_path: str | None) -> Any:
        """Answer `BaseHandler.initialize` with a model from the store."""
        name = self._context.model_name
        if model_file == _EXPORTED:
            assert model_pt_path is not None
            return self._start(ExportedSource(name, model_pt_path, digest_file=weights_digester(self.settings)))
        directory = Path(model_dir)
        weights = None if model_pt_path is None else os.path.relpath(model_pt_path, model_dir)
        build, extra = self._custom_build(model_dir, model_file, model_pt_path)
        handler_file = self._handler_file(directory)
        ignored = [*self.settings.key_files_ignored]
        if handler_file is not None and not extra:
            ignored.append(handler_file)
        source = ArchiveSource(
            name,
            directory,
            model_file,
            weights,
            build=build,
            ignored_files=ignored,
            mmap=self._may_map(directory),
            digest_file=weights_digester(self.settings),
        )
        return self._start(source)

    def load_model(self, model_dir: str, model_file: str, weights_path: str | None) -> torch.nn.Module:
        """Build the eager model. Override to build it in another way; called only when an artifact is built or checked.

        Parameters
        ----------
        model_dir, model_file, weights_path:
            The unpacked archive, the name of its model file, and the path of its weights or None.

        Returns
        -------
        The module with its weights loaded.
        """
        raise NotImplementedError

    def _custom_build(self, model_dir: str, model_file: str, weights_path: str | None) -> tuple[Any, bool]:
        """The user's way of building the model, if there is one, and whether the handler file shapes the model."""
        if type(self).load_model is not CompiledHandlerMixin.load_model:
            return lambda: self.load_model(model_dir, model_file, weights_path), True
        below: Any = super()
        if below._load_pickled_model.__func__ is not BaseHandler._load_pickled_model:
            return lambda: below._load_pickled_model(model_dir, model_file, weights_path), True
        return None, False

    def _handler_file(self, directory: Path) -> str | None:
        """The archive's handler file: the one that defines this class."""
        file = getattr(sys.modules.get(type(self).__module__), "__file__", None)
        if file is None:
            return None
        path = Path(os.path.realpath(file))
        root = Path(os.path.realpath(directory))
        return path.relative_to(root).as_posix() if path.is_relative_to(root) else None

    def _may_map(self, directory: Path) -> bool:
        if self.settings.mmap != "auto":
            return self.settings.mmap == "always"
        # With a no-archive model TorchServe links the user's own folder: a file overwritten in place would change
        # under the mapping.
        return not os.path.islink(str(directory).rstrip("/"))

    def _check_startup_timeout(self) -> None:
        """Warn when building takes longer than TorchServe waits for a worker."""
        limit = self._config.get("startupTimeout", DEFAULT_STARTUP_TIMEOUT_SECONDS)
        took = sum(self.model.metrics.build_ms.values()) / 1000
        if isinstance(limit, (int, float)) and took > 0.8 * limit:
            logger.warning(
                "building took %.0f s of the %s s that TorchServe waits for a worker (startupTimeout); set "
                "startupTimeout: %d in model-config.yaml",
                took,
                limit,
                int(took * 3) + 60,
            )

    def preprocess(self, data: Any) -> Any:
        """The wrapped handler's preprocess; a ValueError in it refuses the request."""
        return super().preprocess(data)  # type: ignore[misc]

    def inference(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the model: a tensor or a tuple of tensors by position, a dict by name."""
        if not isinstance(self.model, CompiledModel):
            return super().inference(data, *args, **kwargs)  # type: ignore[misc]
        if isinstance(data, dict):
            return self.model(*args, **data, **kwargs)
        if isinstance(data, (tuple, list)):
            return self.model(*data, *args, **kwargs)
        return self.model(data, *args, **kwargs)

    def handle(self, data: Any, context: Any) -> Any:
        """Answer a batch; a request that the model cannot answer gets HTTP 400 and leaves the others alone."""
        try:
            return self._handle_below(data, context)
        except InputError as error:
            if data is None or len(data) == 1:
                return [_refuse(context, 0, error)]
        return self._handle_one_by_one(data, context)

    def _handle_below(self, data: Any, context: Any) -> Any:
        return super().handle(data, context)  # type: ignore[misc]

    def _handle_one_by_one(self, data: Sequence[Any], context: Any) -> list[Any]:
        """Answer each request of a batch alone, so that only the bad ones are refused."""
        answers: list[Any] = []
        for index, row in enumerate(data):
            try:
                answers.extend(self._handle_below([row], context))
            except InputError as error:
                answers.append(_refuse(context, index, error))
        return answers

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "preprocess" in cls.__dict__:
            cls.preprocess = _refusing(cls.__dict__["preprocess"])  # type: ignore[method-assign]

    def request_body(self, row: Any) -> Any:
        """The body of one request: bytes, text or what TorchServe parsed from JSON.

        Raises
        ------
        InputError
            There is no body, or it is empty.
        """
        body = row.get("data", row.get("body")) if isinstance(row, dict) else row
        if body is None or (isinstance(body, (bytes, bytearray, str)) and not body):
            raise InputError(
                "the request has no body; send one with a Content-Type that TorchServe passes on, such as "
                "application/json or application/octet-stream"
            )
        return body

    def describe_handle(self) -> dict[str, Any]:
        """What TorchServe's describe API shows as ``customizedMetadata``."""
        if isinstance(self.model, CompiledModel):
            facts = self.model.describe()
        else:
            facts = {"backend": "torchscript" if isinstance(self.model, torch.jit.ScriptModule) else "other"}
        facts["pid"] = os.getpid()
        return facts


def _refusing(preprocess: Any) -> Any:
    """Make every ValueError of a preprocess (broken JSON, bad text, a wrong shape) a refusal of the request."""

    @functools.wraps(preprocess)
    def wrapped(self: Any, data: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return preprocess(self, data, *args, **kwargs)
        except InputError:
            raise
        except ValueError as error:
            raise InputError(f"the request cannot be read: {error}") from error

    return wrapped


def _refuse(context: Any, index: int, error: InputError) -> str:
    context.set_response_status(400, "Bad Request", index)
    context.set_response_header(index, "content-type", "application/json")
    return json.dumps({"code": 400, "type": "InputError", "message": str(error)})


CompiledHandlerMixin.preprocess = _refusing(CompiledHandlerMixin.preprocess)  # type: ignore[method-assign]


class CompiledHandler(CompiledHandlerMixin, BaseHandler):  # type: ignore[misc]
    """A TorchServe handler for tensors as JSON.

    A request is ``{input name: nested list}`` with the batch dimension included, or the bare nested list when the model
    has one input. Requests are concatenated along the first dimension and the answers split again; an answer has the
    structure of the model's output with tensors as nested lists.
    """

    def preprocess(self, data: Any) -> Any:
        """JSON bodies to input tensors, concatenated along dimension 0."""
        specs = self.settings.inputs
        if not specs:
            raise SettingsError(f"{SECTION}.inputs: needed by the default preprocess; declare them or override it")
        rows = [self._read(self.request_body(row), specs) for row in data]
        self._counts = [row[specs[0].name].shape[0] if row[specs[0].name].dim() else 1 for row in rows]
        if len(rows) == 1:
            return rows[0]
        shapes = {tuple(tensor.shape[1:] for tensor in row.values()) for row in rows}
        if len(shapes) > 1:
            raise InputError("the requests of this batch have different shapes")  # each is then answered alone
        return {spec.name: torch.cat([row[spec.name] for row in rows]) for spec in specs}

    def _read(self, body: Any, specs: Sequence[Any]) -> dict[str, torch.Tensor]:
        if isinstance(body, (bytes, bytearray, str)):
            try:
                body = json.loads(body)
            except RecursionError as error:
                raise InputError("the request is nested too deeply") from error
        if not isinstance(body, dict):
            if len(specs) != 1:
                names = ", ".join(spec.name for spec in specs)
                raise InputError(f"expected a JSON object with the inputs {names}, found {type(body).__name__}")
            body = {specs[0].name: body}
        unknown = sorted(set(body) - {spec.name for spec in specs})
        if unknown:
            raise InputError(f"unknown input {unknown[0]!r}; expected {', '.join(spec.name for spec in specs)}")
        row = {}
        for spec in specs:
            if spec.name not in body:
                raise InputError(f"input {spec.name!r} is missing")
            dtype = getattr(torch, spec.dtype)
            value = body[spec.name]
            try:
                tensor = value if isinstance(value, torch.Tensor) else torch.tensor(value)
            except (TypeError, ValueError, RuntimeError) as error:
                raise InputError(f"input {spec.name!r} is not a nested list of numbers: {error}") from error
            if tensor.is_floating_point() and not dtype.is_floating_point and tensor.numel():
                raise InputError(f"input {spec.name!r}: expected {spec.dtype} values, found fractions")
            row[spec.name] = tensor.to(dtype)
            if not dtype.is_floating_point and not torch.equal(row[spec.name].to(tensor.dtype), tensor):
                raise InputError(f"input {spec.name!r}: a value does not fit {spec.dtype}")
        return row

    def postprocess(self, data: Any) -> list[Any]:
        """One answer per request: the model's output for its rows, tensors as nested lists."""
        answers, start = [], 0
        for count in self._counts:
            answers.append(_rows(data, start, start + count))
            start += count
        return answers


def _rows(value: Any, start: int, stop: int) -> Any:
    if isinstance(value, torch.Tensor):
        return value[start:stop].tolist() if value.dim() else value.tolist()
    if hasattr(value, "keys"):
        return {key: _rows(value[key], start, stop) for key in value}
    if isinstance(value, (tuple, list)):
        return [_rows(item, start, stop) for item in value]
    return value
