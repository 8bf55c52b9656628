"""Samples: request bodies that lie in the archive, run through the handler's own code, tell what its model takes.

The first start with new samples makes the eager module, lets the handler answer each sample alone and all together,
and looks at the calls of the model. Names, dtypes and sizes become `inputs` and `dimensions`; the tensors are canary
inputs. The store keeps the result, so that later starts run no sample.
"""

from __future__ import annotations

import copy
import inspect
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch

from ts_handlers.backends.base import KeptState
from ts_handlers.compiled_model import CompiledModel, ServedModel
from ts_handlers.errors import BuildError, SettingsError, one_line
from ts_handlers.key.digests import digest_file
from ts_handlers.metrics import Metrics
from ts_handlers.model.archive import files_of_model
from ts_handlers.model.base import ModelSource
from ts_handlers.model.declaration import Declaration, as_line, declare, why_none
from ts_handlers.model.observed_calls import ObservedCalls, call_kind, named_arguments
from ts_handlers.servers.torchserve.request_batch import RequestBatch
from ts_handlers.settings import SECTION, Settings
from ts_handlers.settings.dtypes import INTEGERS
from ts_handlers.start import Observed, start_model
from ts_handlers.startup.fallback import start_here
from ts_handlers.startup.observation import calls_identity
from ts_handlers.store.base import Store
from ts_handlers.store.opening import open_store

logger = logging.getLogger(__name__)

LARGEST_BODY = 64 << 20
"""Bytes of a sample."""
_HASHED_BYTES = 8 << 20
"""Larger files of an archive are known by their size: a tokenizer is smaller, weights have a digest of their own."""
_IGNORED = ("MAR-INF/*", "*.pyc", "*.log", "core.[0-9]*", "__pycache__/*", "*/__pycache__/*")
_FORM = "multipart/form-data"
_CANARIES = 4
"""Calls whose tensors become canary inputs."""

Answer = Callable[[RequestBatch], Any]


class _Waiting(NamedTuple):
    """A model that answers eagerly until the samples were run."""

    source: ModelSource
    device: torch.device
    model: CompiledModel
    calls: SampleCalls
    identity: str | None


class SampledStart:
    """Starts the model of a handler whose settings may have samples in the place of inputs.

    Parameters
    ----------
    settings:
        The handler's.
    kind:
        The handler's class.
    context:
        What TorchServe gave it.
    config:
        The parsed model-config.yaml, whose ``batchSize`` is the largest batch that TorchServe forms.
    """

    def __init__(self, settings: Settings, kind: type, context: Any, config: Mapping[str, Any]) -> None:
        self._settings = settings
        self._kind = kind
        self._context = context
        self._directory = Path(context.system_properties.get("model_dir") or ".")
        rows = config.get("batchSize")
        self._rows = rows if isinstance(rows, int) and not isinstance(rows, bool) and rows > 0 else 1
        self._waiting: _Waiting | None = None

    def start(self, source: ModelSource, device: torch.device) -> ServedModel:
        """The model; one that answers eagerly, and that `finish` replaces, where samples must be run first."""
        settings = self._settings
        if settings.inputs or not settings.samples or not source.weights_by_name or settings.backends == ("eager",):
            return start_model(source, settings, device)
        identity = self._identity(source)
        declaration = None if identity is None else self._store().read_declaration(identity)
        if identity is not None and declaration is not None:
            source.notes.append(f"inputs as samples and calls have told them: {as_line(declaration)}")
            return start_model(
                source, declaration.applied_to(settings), device, observed=Observed(identity, declaration)
            )
        here = torch.device("cpu") if settings.contexts.across_workers else device
        eager = msgspec.structs.replace(settings, backends=("eager",), samples=())
        model = start_here(source, eager, here, event="samples")
        calls = SampleCalls(source)
        model.observe(calls)
        self._waiting = _Waiting(source, device, model, calls, identity)
        return model

    def finish(self, served: Any, answer: Answer) -> Any:
        """Run the samples and start the model for what they have told.

        Parameters
        ----------
        served:
            The handler's ``self.model`` now.
        answer:
            Lets the handler answer a batch, with `preprocess` and all that follows.

        Returns
        -------
        The model; `served` where nothing waits for samples, or the handler has put something else in its place.
        """
        if self._waiting is None or served is not self._waiting.model:
            return served
        source, device, model, calls, identity = self._waiting
        self._waiting = None
        kept = KeptState()
        kept.keep(source.eager())
        problems = self._run(answer)
        model.observe(None)
        kept.put_back(source.weights)
        source.release()
        try:
            declaration = declare(calls.seen, self._rows, calls.values)
        except BuildError:
            problems.append(why_none(calls.seen))
            reason = one_line(f"{SECTION}.samples tell no inputs: {'; '.join(problems)}", 600)
            logger.warning("%s: %s", source.name, reason)
            source.notes.append(reason)
            return start_model(source, self._settings, device)
        source.samples = calls.tensors
        source.notes.append(f"inputs as samples have told them: {as_line(declaration)}")
        observed = None if identity is None else Observed(identity, declaration)
        started = start_model(source, declaration.applied_to(self._settings), device, observed=observed)
        if identity is not None:
            self._keep(identity, declaration, started)
        return started

    def _keep(self, identity: str, declaration: Declaration, started: ServedModel) -> None:
        def keep() -> None:
            self._store().write_declaration(identity, declaration)

        if started.background is None:
            keep()
        else:  # the child that builds runs the samples too, for its canary
            started.background.when_done(keep)

    def _store(self) -> Store:
        return open_store(msgspec.structs.replace(self._settings, remote=None), Metrics())[0]

    def _identity(self, source: ModelSource) -> str | None:
        """Under which name the store keeps what the samples have told; None where the model has no identity."""
        import ts

        try:
            digest = source.digest()
        except BuildError:
            return None
        facts = ["samples", digest, ts.__version__, str(self._rows), *map(str, self._settings.samples)]
        return calls_identity(source.name, *facts, *self._files())

    def _files(self) -> Iterator[str]:
        """What shapes the requests: the archive's files, the samples, and the sources of the handler's classes."""
        for path in files_of_model(self._directory, _IGNORED):
            yield _fact(path.relative_to(self._directory).as_posix(), path)
        for name in self._settings.sample_files:
            yield _fact(name, self._directory / name)
        for kind in self._kind.__mro__:
            file = getattr(sys.modules.get(kind.__module__), "__file__", None)
            if file is not None and not kind.__module__.startswith("ts_handlers."):
                yield _fact(f"{kind.__module__}.{kind.__qualname__}", Path(file))

    def _run(self, answer: Answer) -> list[str]:
        """Let the handler answer each sample alone, and several together; returns what went wrong."""
        problems: list[str] = []
        requests = []
        for sample in self._settings.samples:
            try:
                requests.append(read_sample(self._directory, sample))
                self._ask(answer, requests[-1:])
            except Exception as error:
                name = sample if isinstance(sample, str) else ", ".join(sample.values())
                problems.append(f"{name}: {type(error).__name__}: {one_line(error, 200)}")
        # Whether rows vary is seen where the handler joins requests; one that does not, or cannot, is asked in vain.
        for batch in (requests, requests[:1] * 2):
            if len(batch) > 1:
                try:
                    self._ask(answer, batch)
                except Exception as error:
                    logger.debug("samples that are joined: %s", error, exc_info=error)
                else:
                    break
        return problems

    def _ask(self, answer: Answer, requests: Sequence[Sample]) -> None:
        from ts.context import RequestProcessor

        context = copy.copy(self._context)
        context.request_processor = [RequestProcessor(dict(request.headers)) for request in requests]
        context.request_ids = {index: f"sample-{index}" for index in range(len(requests))}
        rows = [copy.deepcopy(request.fields) for request in requests]
        answers = answer(RequestBatch(rows, context))
        if inspect.iscoroutine(answers):
            answers.close()
            raise BuildError("the handler's handle is asynchronous, so samples are not run through it")


class Sample(NamedTuple):
    """A request as TorchServe hands it over: its fields, and its headers."""

    fields: dict[str, Any]
    headers: dict[str, Any]


def read_sample(directory: Path, sample: str | Mapping[str, str]) -> Sample:
    """A sample as TorchServe would hand it over: JSON and text by the files' endings, everything else as bytes.

    Parameters
    ----------
    directory:
        The model's folder.
    sample:
        The file of a body, or a file for each field of a form.

    Raises
    ------
    SettingsError
        There is no such file, it is too large, or its JSON or text is none.
    """
    if isinstance(sample, str):
        body, kind = _read_field(directory, sample)
        return Sample({"body": body}, {"body": {"content-type": kind}, "content-type": kind})
    fields = {name: _read_field(directory, file) for name, file in sample.items()}
    headers = {name: {"content-type": kind} for name, (_, kind) in fields.items()}
    return Sample({name: value for name, (value, _) in fields.items()}, {**headers, "content-type": _FORM})


def _read_field(directory: Path, name: str) -> tuple[Any, str]:
    """A field's value and content type."""
    path = directory / name
    try:
        if path.stat().st_size > LARGEST_BODY:
            raise SettingsError(f"{SECTION}.samples: {name} is larger than {LARGEST_BODY} bytes")
        data = path.read_bytes()
        if path.suffix == ".json":
            return json.loads(data), "application/json"
        if path.suffix == ".txt":
            return data.decode(), "text/plain"
    except OSError as error:
        raise SettingsError(
            f"{SECTION}.samples: expected a file {name} in the model's folder, found none ({error.strerror}); add it "
            "with --extra-files when the archive is built"
        ) from error
    except SettingsError:
        raise
    except ValueError as error:
        raise SettingsError(f"{SECTION}.samples: {name} cannot be read: {one_line(error, 200)}") from error
    return bytearray(data), "application/octet-stream"


class SampleCalls:
    """Notes the calls of a model that samples lead to, with their tensors.

    Attributes
    ----------
    seen:
        Names, dtypes and shapes.
    tensors:
        The tensors of a few calls, by name, on the CPU.
    values:
        For integer inputs, the range ``[low, high)`` of their elements.
    """

    refuses_changes = True

    def __init__(self, source: ModelSource) -> None:
        self._source = source
        self.seen = ObservedCalls()
        self.tensors: list[dict[str, torch.Tensor]] = []
        self.values: dict[str, tuple[float, float]] = {}

    def note(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Note a call that was answered; what it cannot describe is left out."""
        try:
            module = self._source.eager()
            kind, shapes = call_kind(module, args, kwargs)
            news = self.seen.add(kind, shapes)
            if not kind.other:
                given = dict(named_arguments(module, args, kwargs))
                self._note_values(given)
                if news and len(self.tensors) < _CANARIES:
                    self.tensors.append({name: value.detach().cpu().clone() for name, value in given.items()})
        except Exception as error:
            logger.warning("%s: a call cannot be noted: %s", self._source.name, error)

    def give_way(self) -> None:
        """None: what is built next would not follow the change."""

    def describe(self) -> dict[str, Any]:
        """How many calls were noted."""
        return {"state": "samples", "calls": self.seen.count, "reason": None}

    def _note_values(self, given: Mapping[str, torch.Tensor]) -> None:
        for name, value in given.items():
            dtype = str(value.dtype)[6:]
            if dtype in INTEGERS and dtype != "bool":
                low, high = (int(end) for end in value.aminmax())
                before = self.values.get(name, (low, high + 1))
                self.values[name] = (min(before[0], low), max(before[1], high + 1))


def _fact(name: str, path: Path) -> str:
    try:
        size = path.stat().st_size
        return f"{name}={size if size > _HASHED_BYTES else digest_file(path)}"
    except OSError:
        return f"{name}=missing"
