"""Settings: every mistake is named with its path, its value and the remedy."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.marks import needs_root
from tests.support.subprocesses import open_to_others, run_python
from ts_handlers.errors import SettingsError
from ts_handlers.settings import Settings, default_store_root, parse_settings

INPUT = {"name": "x", "dtype": "float32", "shape": ["batch", 4]}
DIMENSIONS = {"batch": {"min": 1, "max": 8}}
SECTION: dict[str, Any] = {"inputs": [INPUT], "dimensions": DIMENSIONS}


def parse(section: Any, **config: Any) -> Settings:
    return parse_settings({"handler": {"ts_handlers": section}, **config})


def ids(values: Any = None, limits: Any = None) -> dict[str, Any]:
    return {"name": "ids", "dtype": "int64", "shape": [4], "values": values, "limits": limits}


def message(section: Any, **config: Any) -> str:
    with pytest.raises(SettingsError) as caught:
        parse(section, **config)
    return str(caught.value)


@pytest.mark.parametrize("section", [{"\ud800": 1}, {"dimensions": {"a": {"\ud800": 1}}}])
def test_half_of_a_surrogate_pair_is_a_mistake(section: dict[str, Any]) -> None:
    assert "surrogate" in message(section)


def test_nothing_gives_the_defaults() -> None:
    assert parse_settings(None) == parse_settings({}) == parse_settings({"handler": {}}) == Settings()
    assert parse_settings({"handler": {"ts_handlers": None}}) == Settings()
    assert parse_settings({"minWorkers": 2, "handler": {"profile": True}}) == Settings()


@pytest.mark.parametrize(
    ("section", "parts"),
    [
        ({"bakends": ["eager"]}, ["handler.ts_handlers.bakends", "['eager']", "did you mean 'backends'?"]),
        ({"quux": 17}, ["handler.ts_handlers.quux", "17", "known keys: store, backends"]),
        ({"inputs": [{**INPUT, "nmae": "y"}]}, ["handler.ts_handlers.inputs[0].nmae", "'y'", "did you mean 'name'?"]),
        (
            {"inputs": [INPUT, {**INPUT, "zz": 5}]},
            ["handler.ts_handlers.inputs[1].zz", "5", "known keys: name, dtype, shape, values"],
        ),
        (
            {"dimensions": {"a": {"min": 1, "max": 2}, "b": {"min": 1, "mxa": 3}}},
            ["handler.ts_handlers.dimensions.b.mxa", "3", "did you mean 'max'?"],
        ),
        ({"canary": {"tolerence": 0.5}}, ["handler.ts_handlers.canary.tolerence", "0.5", "did you mean 'tolerance'?"]),
    ],
)
def test_unknown_keys_are_named_at_every_level(section: dict[str, Any], parts: list[str]) -> None:
    text = message(section)
    assert "unknown key" in text
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    ("section", "parts"),
    [
        ([1], ["handler.ts_handlers:", "object", "[1]"]),
        ("eager", ["handler.ts_handlers:", "object", "'eager'"]),
        ({"strict": "yes"}, ["handler.ts_handlers.strict", "bool", "'yes'"]),
        ({"backends": "eager"}, ["handler.ts_handlers.backends", "array", "'eager'"]),
        ({"backends": ["tensorflow"]}, ["handler.ts_handlers.backends[0]", "'tensorflow'", "aot_inductor, inductor"]),
        ({"on_miss": "ignore"}, ["handler.ts_handlers.on_miss", "'ignore'", "compile, background, fail, eager"]),
        ({"inputs": [{**INPUT, "dtype": "float31"}]}, ["handler.ts_handlers.inputs[0].dtype", "'float31'", "bfloat16"]),
        ({"inputs": [{**INPUT, "shape": [1.5]}]}, ["handler.ts_handlers.inputs[0].shape[0]", "1.5"]),
        (
            {"inputs": [{**INPUT, "shape": [4], "limits": [1]}]},
            ["handler.ts_handlers.inputs[0].limits", "two numbers", "[1]"],
        ),
        ({"inputs": [{**INPUT, "limits": [0, "x"]}]}, ["handler.ts_handlers.inputs[0].limits[1]", "'x'"]),
        ({"inputs": [{"name": "x", "dtype": "int64"}]}, ["handler.ts_handlers.inputs[0]", "shape"]),
        ({"dimensions": {"batch": 3}}, ["handler.ts_handlers.dimensions.batch", "object", "3"]),
        ({"dimensions": {"batch": {"min": "1", "max": 8}}}, ["handler.ts_handlers.dimensions.batch.min", "'1'"]),
        ({"warmup": {"batch": 1}}, ["handler.ts_handlers.warmup", "array"]),
        ({"guard": {"load_seconds": "soon"}}, ["guard.load_seconds", "'soon'", "auto"]),
        ({"dtype": "int8"}, ["handler.ts_handlers.dtype", "'int8'", "float16"]),
        ({"compile": {"mode": "default"}}, ["handler.ts_handlers.compile", "pt2: {compile:"]),
    ],
)
def test_wrong_types_and_values_are_named(section: Any, parts: list[str]) -> None:
    text = message(section)
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    ("section", "parts"),
    [
        ({"backends": []}, ["backends", "empty", "name at least one"]),
        ({"backends": ["eager", "eager"]}, ["backends", "twice"]),
        ({"backends": ["eager", "inductor"]}, ["backends", "never reached", "put it last"]),
        ({"on_miss": "eager", "strict": True}, ["on_miss", "strict"]),
        ({"on_miss": "background", "strict": True}, ["on_miss", "strict", "on_miss: compile"]),
        ({"background": {"nice": 20}}, ["handler.ts_handlers.background.nice", "0 to 19", "20"]),
        ({"background": {"nice": -1}}, ["background.nice", "-1"]),
        ({"background": {"memory_mb": 0}}, ["background.memory_mb", "above 0", "found 0"]),
        ({"background": {"compile_threads": -2}}, ["background.compile_threads", "-2"]),
        ({"background": {"seconds": 0.0}}, ["background.seconds", "found 0.0"]),
        ({"background": {"secnds": 1}}, ["background.secnds", "did you mean 'seconds'?"]),
        ({"canary": {"tolerance": -1}}, ["canary.tolerance", "-1"]),
        ({"guard": {"load_seconds": 0}}, ["guard.load_seconds", "0", "null for no limit"]),
        ({"guard": {"load_seconds": math.inf}}, ["guard.load_seconds", "inf"]),
        ({"guard": {"load_memory_mb": 0}}, ["guard.load_memory_mb", "found 0"]),
        ({"contexts": {"count": 0}}, ["contexts.count", "1 to 1024", "0"]),
        ({"result_cache": {"on": "images"}}, ["result_cache.on", "images", "request, tensors"]),
        ({"result_cache": {"max_bytes": "1KiB"}}, ["result_cache.max_bytes", "65536", "'1KiB'", "remove the section"]),
        ({"result_cache": {"max_bytes": "many"}}, ["result_cache.max_bytes", "'many'", "500MB"]),
        ({"result_cache": {"ttl": "0s"}}, ["result_cache.ttl", "above 0", "'0s'"]),
        ({"result_cache": {"ttl": "ten minutes"}}, ["result_cache.ttl", "'ten minutes'", "10min"]),
        ({"result_cache": {"wait_seconds": -1}}, ["result_cache.wait_seconds", "from 0", "-1"]),
        ({"result_cache": {"headers": ["a b"]}}, ["result_cache.headers[0]", "'a b'"]),
        ({"result_cache": {"headers": ["Cache-Control"]}}, ["result_cache.headers[0]", "each request"]),
        ({"result_cache": {"on": "tensors", "headers": ["A"]}}, ["result_cache.headers", "on: request"]),
        ({"result_cache": {"on": "tensors", "redis": {"url": "redis://h"}}}, ["result_cache.redis", "on: request"]),
        ({"result_cache": {"redis": {"url": "http://h"}}}, ["result_cache.redis.url", "redis://", "'http'"]),
        ({"result_cache": {"redis": {"url": "redis://h", "timeout": 0}}}, ["result_cache.redis.timeout", "above 0"]),
        ({"result_cache": {"redis": {"urls": "redis://h"}}}, ["result_cache.redis.urls", "not shown", "'url'"]),
        ({"contexts": {"wait_seconds": -1}}, ["contexts.wait_seconds", "-1", "503"]),
        ({"contexts": {"silent_seconds": 1}}, ["contexts.silent_seconds", "from 2", "found 1"]),
        ({"contexts": {"call_seconds": float("inf")}}, ["contexts.call_seconds", "from 1", "found inf"]),
        ({"dimensions": {"batch": {"min": 0, "max": 8}}, "inputs": [INPUT]}, ["dimensions.batch.min", "0"]),
        ({"dimensions": {"batch": {"min": 9, "max": 8}}, "inputs": [INPUT]}, ["dimensions.batch", "9", "8"]),
        ({"dimensions": DIMENSIONS}, ["dimensions.batch", "no input uses"]),
        ({"inputs": [INPUT]}, ["inputs[0].shape[0]", "'batch'", "not declared"]),
        ({**SECTION, "inputs": [INPUT, INPUT]}, ["inputs[0].name", "twice"]),
        ({**SECTION, "inputs": [{**INPUT, "name": "a-b"}]}, ["inputs[0].name", "identifier"]),
        ({"inputs": [{**INPUT, "shape": [0]}]}, ["inputs[0].shape[0]", "at least 1", "0"]),
        ({"inputs": [{**INPUT, "shape": [1], "values": [2, 2]}]}, ["inputs[0].values", "[2.0, 2.0]"]),
        (
            {"inputs": [{"name": "i", "dtype": "int64", "shape": [1], "values": [0.2, 0.7]}]},
            ["inputs[0].values", "int64"],
        ),
        ({"inputs": [ids([0, 9], limits=[0, 8])]}, ["inputs[0].values", "[0.0, 9.0]", "limits [0, 8]", "warm-up"]),
        ({"inputs": [ids([-1, 9], limits=[0, None])]}, ["inputs[0].values", "[-1.0, 9.0]", "limits [0, None]"]),
        ({"inputs": [ids(limits=[3, 3])]}, ["inputs[0].limits", "[3, 3]", "holds no int64", "low below high"]),
        ({"inputs": [ids(limits=[0.2, 0.7])]}, ["inputs[0].limits", "holds no int64"]),
        ({"inputs": [{**ids(limits=[128, None]), "dtype": "int8"}]}, ["inputs[0].limits", "holds no int8"]),
        ({"inputs": [{**ids(limits=[7e4, 8e4]), "dtype": "float16"}]}, ["inputs[0].limits", "holds no float16"]),
        ({"inputs": [ids(limits=[None, None])]}, ["inputs[0].limits", "null for an open end", "remove it"]),
        ({"inputs": [ids(limits=[0, math.inf])]}, ["inputs[0].limits", "null for an open end", "inf"]),
        ({"inputs": [ids(limits=[math.nan, 3])]}, ["inputs[0].limits", "nan"]),
        ({"inputs": [ids(limits=[10**400, None])]}, ["inputs[0].limits", "holds no int64"]),
        ({**SECTION, "warmup": [{"batch": 9}]}, ["warmup[0].batch", "9", "1..8"]),
        ({**SECTION, "warmup": [{"batch": 1}, {"length": 9}]}, ["warmup[1].length", "unknown dimension", "batch"]),
    ],
)
def test_impossible_combinations_are_refused(section: dict[str, Any], parts: list[str]) -> None:
    text = message(section)
    for part in parts:
        assert part in text


@pytest.mark.parametrize("limits", [[0, 30522], [0, None], [None, 2**62 + 1], [-0.5, 2.5], None])
def test_limits_are_numbers_or_open(limits: Any) -> None:
    (spec,) = parse({"inputs": [ids(limits=limits)]}).inputs
    assert spec.limits == (None if limits is None else tuple(limits))
    assert spec.values is None


def test_the_file_itself_must_be_a_mapping() -> None:
    for config in ([1], "text"):
        with pytest.raises(SettingsError, match=r"model-config\.yaml"):
            parse_settings(config)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="handler: expected a mapping"):
        parse_settings({"handler": [1]})


@pytest.mark.parametrize(
    ("pt2", "order"),
    [
        ("inductor", ("inductor", "eager")),
        ("eager", ("eager",)),
        ({"backend": "inductor"}, ("inductor", "eager")),
        ({"compile": {"enable": True}}, ("inductor", "eager")),
        ({"compile": {"enable": True, "backend": "inductor", "mode": "max-autotune"}}, ("inductor", "eager")),
        ({"compile": {"enable": False}}, ("eager",)),
        ({"compile": {"enable": True, "backend": "eager"}}, ("eager",)),
        ("torch_tensorrt", ("tensorrt", "torch_tensorrt", "eager")),
        ({"compile": {"enable": True, "backend": "tensorrt"}}, ("tensorrt", "torch_tensorrt", "eager")),
        ({"compile": {"enable": False, "backend": "torch_tensorrt"}}, ("eager",)),
        ({"export": {"aot_compile": True}}, ("aot_inductor", "inductor", "eager")),
        (None, ("aot_inductor", "inductor", "eager")),
    ],
)
def test_pt2_section_sets_the_fallback_order(pt2: Any, order: tuple[str, ...]) -> None:
    assert parse({}, pt2=pt2).backends == order


def test_explicit_backends_win_over_pt2_and_keep_its_arguments() -> None:
    settings = parse({"backends": ["aot_inductor"]}, pt2={"compile": {"options": {"max_autotune": True}}})
    assert settings.backends == ("aot_inductor",)
    assert settings.compile.options == {"max_autotune": True}


def tensorrt_pt2(**options: Any) -> dict[str, Any]:
    return {"compile": {"enable": True, "backend": "torch_tensorrt", "options": options}}


def test_options_of_torch_tensorrt_go_to_the_section_tensorrt() -> None:
    options = {
        "min_block_size": 1,
        "torch_executed_ops": ["torch.ops.aten.erf.default"],
        "optimization_level": 5,
        "hardware_compatible": False,
        "disable_tf32": True,
        "enable_autocast": True,
        "workspace_size": (1 << 30) + 1,
    }
    section = {"tensorrt": {"flavour": "tensorrt_rtx", "options": {"use_fp32_acc": True, "min_block_size": 1}}}
    settings = parse(section, pt2=tensorrt_pt2(**options))
    assert settings.compile.options == {}  # they are not Inductor's
    tensorrt = settings.tensorrt
    assert tensorrt.options == {
        "use_fp32_acc": True,
        "min_block_size": 1,
        "torch_executed_ops": ["torch.ops.aten.erf.default"],
    }
    assert (tensorrt.optimization_level, tensorrt.tf32) == (5, False)
    assert (tensorrt.precision, tensorrt.workspace_mb, tensorrt.flavour) == ("autocast", 1025, "tensorrt_rtx")
    assert parse({}, pt2=tensorrt_pt2(workspace_size=0)).tensorrt.workspace_mb is None


def test_a_removed_setting_is_accepted_only_as_it_was_by_default() -> None:
    assert parse({"tensorrt": {"hardware_compatible": False}}) == parse({})
    for value in (True, 1, "yes", None):
        with pytest.raises(
            SettingsError, match=r"tensorrt\.hardware_compatible: this setting was removed .*by the name"
        ):
            parse({"tensorrt": {"hardware_compatible": value}})
    with pytest.raises(SettingsError, match=r"pt2\.compile\.options\.hardware_compatible: this setting was removed"):
        parse({}, pt2=tensorrt_pt2(hardware_compatible=True))


def test_a_named_ladder_keeps_the_options_of_torch_tensorrt() -> None:
    settings = parse({"backends": ["torch_tensorrt", "inductor", "eager"]}, pt2=tensorrt_pt2(min_block_size=2))
    assert settings.backends == ("torch_tensorrt", "inductor", "eager")
    assert (settings.compile.options, settings.tensorrt.options) == ({}, {"min_block_size": 2})


@pytest.mark.parametrize(
    ("section", "pt2", "parts"),
    [
        (
            {"tf32": True},
            tensorrt_pt2(disable_tf32=True),
            ["options.disable_tf32", "tensorrt.tf32: True", "remove one"],
        ),
        (
            {"options": {"min_block_size": 3}},
            tensorrt_pt2(min_block_size=2),
            ["pt2.compile.options.min_block_size: 2", "tensorrt.options.min_block_size: 3"],
        ),
        ({}, tensorrt_pt2(optimization_level="5"), ["pt2.compile.options.optimization_level", "int", "'5'"]),
        ({}, tensorrt_pt2(disable_tf32=1), ["pt2.compile.options.disable_tf32", "bool", "1"]),
        ({}, tensorrt_pt2(optimization_level=6), ["optimization_level", "0 to 5", "6"]),
        ({}, {"compile": {"backend": "tensorrt", "mode": "max-autotune"}}, ["pt2.compile.mode", "'max-autotune'"]),
    ],
)
def test_contradictions_with_the_section_tensorrt_are_named(
    section: dict[str, Any], pt2: dict[str, Any], parts: list[str]
) -> None:
    text = message({"tensorrt": section}, pt2=pt2)
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    ("pt2", "parts"),
    [
        (3, ["pt2:", "int (3)", "write `pt2: {compile:"]),
        ({"compile": [1]}, ["pt2.compile:", "[1]"]),
        ({"compile": {"modee": "x"}}, ["pt2.compile.modee", "'x'", "did you mean 'mode'?"]),
        ({"compile": {"fullgraph": "no"}}, ["pt2.compile.fullgraph", "bool", "'no'"]),
        ({"compile": {"mode": "default", "options": {"a": 1}}}, ["pt2.compile", "not both"]),
        ("openxla", ["pt2.compile.backend", "'openxla'", "handler.ts_handlers.backends"]),
    ],
)
def test_pt2_mistakes_are_named(pt2: Any, parts: list[str]) -> None:
    text = message({}, pt2=pt2)
    for part in parts:
        assert part in text


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
keys = st.sampled_from([*Settings.__struct_fields__, "typo"])


@given(st.dictionaries(keys, json_values, max_size=4), json_values)
def test_any_yaml_gives_settings_or_a_settings_error(section: dict[str, Any], pt2: Any) -> None:
    try:
        text = str(parse(section, pt2=pt2))
    except SettingsError as error:
        text = str(error)
    assert "handler.ts_handlers" in text or "pt2" in text or "Settings(" in text


def test_store_root_comes_from_the_environment_in_this_order(tmp_path: Any) -> None:
    home = {"HOME": str(tmp_path)}
    xdg = {**home, "XDG_CACHE_HOME": "/xdg"}
    assert default_store_root({**xdg, "TS_HANDLERS_CACHE": "/cache"}) == "/cache"
    assert default_store_root({**xdg, "TS_HANDLERS_CACHE": ""}) == "/xdg/ts_handlers"
    assert default_store_root(home) == str(tmp_path / ".cache" / "ts_handlers")
    assert default_store_root({"HOME": "/"}).endswith(f"ts_handlers-{os.getuid()}")


@needs_root
@pytest.mark.processes
def test_uid_without_passwd_entry_and_home_gets_a_usable_store(tmp_path: Any) -> None:
    open_to_others(tmp_path)
    tmp_path.chmod(0o1777)  # as /tmp
    out = run_python(
        """
        import getpass, os  # everything is imported first: the interpreter may lie in a folder closed to others
        from ts_handlers.backends.working_directory import make_working_directory, use_cache
        from ts_handlers.settings import default_store_root
        from ts_handlers.store.local.store import LocalStore

        os.setgid(54321), os.setuid(54321)
        use_cache(make_working_directory())
        getpass.getuser()  # what the compiler asks for
        store = LocalStore(default_store_root())
        print(store.root, store.root.stat().st_uid, oct(store.root.stat().st_mode & 0o777), sep="\\n")
        """,
        HOME=None,
        USER=None,
        LOGNAME=None,
        TMPDIR=str(tmp_path),
    )
    assert out.splitlines() == [str(tmp_path / "ts_handlers-54321"), "54321", "0o700"]


def test_disabling_compilation_contradicts_a_ladder() -> None:
    config = {"pt2": {"compile": {"enable": False}}, "handler": {"ts_handlers": {"backends": ["inductor", "eager"]}}}
    with pytest.raises(SettingsError, match=r"pt2\.compile\.enable: false contradicts"):
        parse_settings(config)


@pytest.mark.parametrize(
    ("section", "parts"),
    [
        ({"remote": {"url": "models/artifacts"}}, ["remote.url", "an absolute folder or a URL", "'models/artifacts'"]),
        ({"remote": {"url": "s3://"}}, ["remote.url", "'s3://'"]),
        (
            {"remote": {"url": "/mnt/x", "lease": "reddis://host"}},
            ["remote.lease", "auto, off or a URL such as redis://"],
        ),
        ({"remote": {"url": "/mnt/x", "timeout_seconds": 0}}, ["remote.timeout_seconds", "above 0, found 0"]),
        ({"remote": {"url": "/mnt/x", "heartbeat_seconds": -1}}, ["remote.heartbeat_seconds", "found -1"]),
        ({"trust": {"public_keys": ["/no/such.pub"]}}, ["trust.public_keys[0]", "PEM file", "/no/such.pub"]),
        ({"trust": {"signing_key": "/no/such.key"}}, ["trust.signing_key", "PEM file", "/no/such.key"]),
        ({"trust": {"folders": ["cache"]}}, ["trust.folders[0]", "absolute path", "'cache'"]),
    ],
)
def test_remote_and_trust(section: dict[str, Any], parts: list[str]) -> None:
    text = message({**SECTION, **section})
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    "url", ["file:///mnt/x", "/mnt/x", "s3://bucket", "s3://bucket/a/b", "gs://b/c", "abfs://c@a/x"]
)
@pytest.mark.parametrize(
    "lease", ["auto", "off", "redis://:pass@host:6379/0", "rediss://host", "unix:///run/redis.sock"]
)
def test_addresses_of_remote_stores_and_leases(url: str, lease: str) -> None:
    settings = parse({**SECTION, "remote": {"url": url, "lease": lease}})
    assert settings.remote is not None
    assert (settings.remote.url, settings.remote.lease) == (url, lease)


@pytest.mark.parametrize(
    "remote",
    [
        "s3://user:hunter2@host/x",
        {"url": "/mnt/x", "password": "hunter2"},
        {"url": ["hunter2"]},
        {"url": "user:hunter2@host"},
        {"url": "/mnt/x", "lease": "user:hunter2@host"},
        {"url": "/mnt/x", "options": "secret=hunter2"},
    ],
)
def test_secrets_of_the_remote_store_are_not_repeated(remote: Any) -> None:
    text = message({**SECTION, "remote": remote})
    assert "remote" in text
    assert "hunter2" not in text


@pytest.mark.parametrize(
    ("config", "place"),
    [
        ({"handler": {"ts_handler": {}}}, "handler.ts_handler"),
        ({"handler": {"ts-handlers": {}}}, "handler.ts-handlers"),
        ({"handler": {"TsHandlers": {}}}, "handler.TsHandlers"),
        ({"ts_handlers": {}}, "ts_handlers"),
        ({"handlers": {"ts_handlers": {}}}, "handlers.ts_handlers"),
    ],
)
def test_a_misspelt_section_is_noticed(config: Any, place: str, caplog: pytest.LogCaptureFixture) -> None:
    parse_settings(config)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message == (
        f"model-config.yaml: the section {place} is not read; settings of ts_handlers stand in handler.ts_handlers"
    )


def test_sections_of_others_are_not_mistaken(caplog: pytest.LogCaptureFixture) -> None:
    parse_settings({"handler": {"ts_handlers": {}, "handlers": 1, "profile": {}, 3: 4}, "minWorkers": 1, "ts": {}})
    assert caplog.records == []
