"""The options of `ts-handlers serve`, and what the workers' fork server imports."""

from __future__ import annotations

import glob
from pathlib import Path

import pytest

from ts_handlers.errors import SettingsError
from ts_handlers.servers.torchserve.launch import parse, read_properties
from ts_handlers.servers.torchserve.workers import environment_of_workers, preloaded_modules

HANDLER = "ts_handlers.servers.torchserve.compiled_handler"


def test_options_are_ours_and_all_others_torchserves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TS_HANDLERS_FORK_SERVER_PRELOAD", "json, csv")
    ours, theirs = parse(
        ["--start", "--models", "a=a.mar", "b=b.mar", "--fork-server", "off", "--ncs", "--ts-config=x"]
    )
    assert (ours.fork_server, ours.preload, ours.fork_server_socket) == ("off", ["json", "csv"], None)
    assert theirs == ["--start", "--models", "a=a.mar", "b=b.mar", "--ncs", "--ts-config=x"]
    assert parse(["--preload", "a,b", "--preload", "c"])[0].preload == ["a", "b", "c"]


def test_a_wrong_variable_is_a_settings_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TS_HANDLERS_FORK_SERVER", "perhaps")
    with pytest.raises(SettingsError, match=r"TS_HANDLERS_FORK_SERVER: expected auto, on or off, found 'perhaps'"):
        parse([])


def test_workers_have_the_variables_of_the_configuration(tmp_path: Path) -> None:
    pytest.importorskip("ts", reason="TorchServe is not installed")
    config = tmp_path / "config.properties"
    config.write_text("decode_input_request=false\nload_models=all\n")
    assert environment_of_workers({}, read_properties(config)) == {
        "TS_DECODE_INPUT_REQUEST": "false",
        "TS_IPEX_ENABLE": "false",
        "TS_IPEX_GPU_ENABLE": "false",
    }
    assert read_properties(None) == read_properties(tmp_path / "missing") == {}


def test_the_base_handler_is_not_preloaded_where_it_would_initialise_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(glob, "glob", lambda _: [])
    assert preloaded_modules(["json", "torch"])[-2:] == [HANDLER, "json"]
    monkeypatch.setattr(glob, "glob", lambda _: ["/dev/nvidia0"])
    assert HANDLER not in preloaded_modules(["json"])
