"""The sections below ``handler: ts_handlers:`` that not every model needs, one struct each."""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class GuardSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Limits on loading an artifact, which is native code.

    Loading, or one call while it is checked and warmed up, that takes longer than `load_seconds` ends the process, and
    the entry is quarantined; ``auto`` is 120 s, or twice what the build took where that is longer, None sets no limit.
    `load_memory_mb` bounds what the process may allocate in the meantime, in MiB; None sets no bound.
    """

    load_seconds: float | Literal["auto"] | None = "auto"
    load_memory_mb: int | None = None


class BackgroundSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The child process that builds with ``on_miss: background``.

    `nice` is added to the process's niceness (0 to 19), `compile_threads` bounds the compiler's parallel jobs (None:
    half of the processors), `memory_mb` what it may allocate in MiB (None: no bound) and `seconds` its duration
    (None: no bound).
    """

    nice: int = 10
    compile_threads: int | None = None
    memory_mb: int | None = None
    seconds: float | None = None


class ObserveSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is noted of the calls of a model whose inputs nobody has declared: names, dtypes and shapes, no contents.

    A child process builds once `calls` calls were noted, or `seconds` after the first one; None leaves one of the two
    out, and without both nothing is built.
    """

    calls: int | None = 100
    seconds: float | None = 600.0


class RemoteSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A store shared by hosts, addressed by an fsspec URL (``file:///mnt/nfs/artifacts``, ``s3://bucket/prefix``).

    `options` are the storage options of fsspec's file system. `client` is the library that reaches S3, GCS and Azure:
    ``fsspec`` takes s3fs, gcsfs or adlfs, ``obstore`` takes obstore, whose import and connection cost a tenth; ``auto``
    takes obstore where it is installed and the options and the environment hold all that it needs.

    A start waits for the remote for `timeout_seconds` at most, all its answers together; after a failure the host goes
    on without it for a minute. `lease` says how hosts agree on one builder: ``auto`` (the object store's exclusive
    create), ``off``, or a ``redis://`` URL. A holder renews its lease four times in `heartbeat_seconds`; one that has
    not for 1.25 times as long has lost it.
    """

    url: str
    read_only: bool = False
    timeout_seconds: float = 10.0
    lease: str = "auto"
    heartbeat_seconds: float = 10.0
    client: Literal["auto", "obstore", "fsspec"] = "auto"
    options: dict[str, Any] = msgspec.field(default_factory=dict)


class TrustSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Ed25519 keys for what comes from another host.

    `public_keys` are paths of PEM files; with them, an entry from the remote store or a bundle is used
    only when one of these keys has signed it. `signing_key` is the path of the private key that signs what this host
    publishes. `folders` are folders above the store whose owner and mode are accepted as they are, such as a volume
    that only this container mounts.
    """

    public_keys: tuple[str, ...] | None = None
    signing_key: str | None = None
    folders: tuple[str, ...] = ()


class Quota(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Upper bounds; None is no bound. `bytes` is a number or a text such as ``20GiB``."""

    bytes: int | str | None = None
    entries: int | None = None
    inodes: int | None = None


class SpaceSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Quotas of the store as a whole and of each model in it; entries least recently used go first."""

    store: Quota = Quota()
    per_model: Quota = Quota()


class Range(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sizes of one dimension in one TensorRT profile: the smallest, the one to optimise for and the largest."""

    min: int
    opt: int
    max: int


class TensorRTSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The backend `tensorrt`.

    Attributes
    ----------
    flavour:
        ``tensorrt``, ``tensorrt_rtx`` or ``auto`` (the one that is installed; `tensorrt` when both are).
    precision:
        ``as_is`` keeps the dtypes of the model (see the setting `dtype`, which casts it); ``autocast`` lets
        Torch-TensorRT choose the layers that run in half precision. ``int8`` and ``fp8`` declare that the model is
        quantised already, which is checked; nothing is quantised here.
    tf32:
        Whether float32 products may run in TensorFloat-32.
    float32_accumulation:
        Sum the products of 16-bit layers in float32, which is more exact and slower; see
        `ts_handlers.backends.tensorrt.accumulation`.
    workspace_mb:
        Largest scratch memory that a layer may use while the plan is built, in MiB; None is TensorRT's default.
    optimization_level:
        0 (fast build) to 5 (fast plan); None is TensorRT's default.
    ranges:
        One optimization profile of the plan for each element, which maps dimension names to ``{min, opt, max}``; they
        share the plan's weights. Empty takes one for exactly each of the first four warm-up sizes and one for the
        declared dimensions.
    refit:
        Plans take their weights from the archive when they are loaded, so new weights need no new plan. A model for
        which that cannot be proven right gets plans of its own weights. Such plans may be slower.
    partial:
        What happens when not every operator converts: ``next`` takes the next backend, ``module`` keeps
        Torch-TensorRT's own module, whose remaining operators run in torch. The fraction in TensorRT is reported.
    options:
        Further fields of Torch-TensorRT's `CompilationSettings`, by name.
    """

    flavour: Literal["auto", "tensorrt", "tensorrt_rtx"] = "auto"
    precision: Literal["as_is", "autocast", "int8", "fp8"] = "as_is"
    tf32: bool = True
    float32_accumulation: bool = False
    workspace_mb: int | None = None
    optimization_level: int | None = None
    ranges: tuple[dict[str, Range], ...] = ()
    refit: bool = False
    partial: Literal["next", "module"] = "next"
    options: dict[str, Any] = msgspec.field(default_factory=dict)


class ContextSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How many calls of the model run at once in one worker, or in all of its workers together.

    Attributes
    ----------
    count:
        Execution contexts (TensorRT), runners (AOTInductor) or streams (compiled and eager modules) that share one set
        of weights.
    scratch:
        ``private`` gives each TensorRT context its own scratch memory, ``shared`` one buffer to all of them, whose uses
        follow one another on the GPU.
    wait_seconds:
        How long a call waits for a free context before it is refused with HTTP 503.
    cuda_graphs:
        Record each context's launches for the sizes of warm-up and check and replay them (`tensorrt`, and
        `aot_inductor` on a GPU); nothing is recorded once the model serves.
    silent_seconds:
        ``across_workers``: how long the model's process may show no sign of life before a worker ends it.
    call_seconds:
        ``across_workers``: how long one call may take before the model's process gives it up and ends.
    across_workers:
        One process holds the model, and all workers of the server that serve it on this device call it there; see
        `ts_handlers.model_process`.
    """

    count: int = 1
    scratch: Literal["private", "shared"] = "private"
    wait_seconds: float = 30.0
    silent_seconds: float = 30.0
    call_seconds: float = 600.0
    cuda_graphs: bool = False
    across_workers: bool = False


class SharedResultsSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A Redis server in which hosts share answers; a request waits for it for `timeout` at most."""

    url: str
    timeout: float | str = "250ms"


class ResultCacheSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Answers that are kept for equal requests; see docs/result-cache.md.

    Attributes
    ----------
    on:
        What must be equal: ``request`` takes a request as the server hands it over and its headers, and saves decoding;
        ``tensors`` takes the inputs of the model's calls.
    max_bytes:
        What the answers of a process may take, with their overhead: a number or a text such as ``256MiB``.
    ttl:
        How long an answer is kept: seconds or a text such as ``10min``.
    headers:
        Further headers that shape answers, beside ``Content-Type`` and ``Accept``.
    wait_seconds:
        How long a request waits for an equal one that is being answered.
    deterministic:
        Equal calls have equal answers but for the last digits. Without it they must be equal to the bit.
    redis:
        A server in which hosts share answers.
    """

    on: Literal["request", "tensors"] = "request"
    max_bytes: int | str = "256MiB"
    ttl: float | str = "10min"
    headers: tuple[str, ...] = ()
    wait_seconds: float = 30.0
    deterministic: bool = False
    redis: SharedResultsSettings | None = None
