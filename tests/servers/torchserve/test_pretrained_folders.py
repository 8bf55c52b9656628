"""Models that their handler loads with `from_pretrained(model_dir)`: the folder and the process are no part of the key.

diffusers is not installed where these tests run; `Unet` has the dict that its models keep.
"""

from __future__ import annotations

import json
import shutil
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.subprocesses import run_python

pytest.importorskip("ts", reason="TorchServe is not installed")

from ts_handlers import ModuleSource
from ts_handlers.model.module_identity import module_facts

HANDLER = """
import collections
from pathlib import Path

import torch
from ts.torch_handler.base_handler import BaseHandler

from ts_handlers import CompiledHandlerMixin


class FrozenDict(collections.OrderedDict):
    pass


class Unet(torch.nn.Module):
    def __init__(self, folder):
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)
        self._internal_dict = FrozenDict(width=4, _class_name="Unet", _name_or_path=folder)
        self.path = Path(folder) / "config.json"
        self._object_hash = hash(folder) | 1 << 62
        self.load_state_dict(torch.load(Path(folder) / "model.pt"))

    def forward(self, x):
        return self.layer(x)


class Theirs(BaseHandler):
    def initialize(self, context):
        folder = context.system_properties["model_dir"]
        kind = context.model_yaml_config["kind"]
        if kind == "unet":
            self.model = Unet(folder)
        else:
            import transformers

            self.model = getattr(transformers, kind).from_pretrained(folder)
        self.initialized = True


class Handler(CompiledHandlerMixin, Theirs):
    pass
"""

START = """
    import json, sys
    from pathlib import Path
    from tests.support.file_backend import use_file_backend
    from tests.support.handlers import make_context
    use_file_backend()
    folder, store, config = sys.argv[1:4]
    sys.path.insert(0, folder)
    import their
    handler = their.Handler()
    handler.initialize(make_context(Path(folder), Path(store), {}, **json.loads(config)))
    facts = handler.model.describe()
    facts["digest"] = handler.model._target.model_digest
    facts["left_out"] = handler.model._target.source.left_out
    print("\\n" + json.dumps(facts))
"""


def section_for(*names: str) -> dict[str, Any]:
    return {
        "inputs": [{"name": name, "dtype": "int64", "shape": ["batch", "length"]} for name in names],
        "dimensions": {"batch": {"min": 1, "max": 4}, "length": {"min": 1, "max": 8}},
    }


def start(folder: Path, store: Path, seed: int, config: dict[str, Any], **env: str) -> dict[str, Any]:
    """A worker's start in a process of its own, with hashes of its own."""
    config = {"section": {}, **config}
    text = run_python(START, folder, store, json.dumps(config), fresh=True, PYTHONHASHSEED=str(seed), **env)
    facts: dict[str, Any] = json.loads(text.splitlines()[-1])
    return facts


def unpacked(tmp_path: Path, write: Any) -> list[Path]:
    """An archive unpacked into two folders of random names, the second one behind a link."""
    first = tmp_path / "5f0c2b"
    first.mkdir()
    write(first)
    (first / "their.py").write_text(textwrap.dedent(HANDLER))
    real = tmp_path / "real" / "a91d"
    shutil.copytree(first, real)
    link = tmp_path / "a91d"
    link.symlink_to(real)
    return [first, link]


def write_unet(folder: Path) -> None:
    torch.save({"layer.weight": torch.ones(3, 4), "layer.bias": torch.zeros(3)}, folder / "model.pt")


def write_pretrained(kind: str) -> Any:
    transformers = pytest.importorskip("transformers")

    def write(folder: Path) -> None:
        torch.manual_seed(0)
        if kind == "BertForSequenceClassification":
            config = transformers.BertConfig(
                hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=50
            )
        elif kind == "GPT2LMHeadModel":
            config = transformers.GPT2Config(
                n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=32, bos_token_id=1, eos_token_id=1
            )
        else:
            config = transformers.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=50)
        getattr(transformers, kind)(config).save_pretrained(folder)

    return write


@pytest.mark.processes
def test_second_start_from_another_folder_is_a_hit(tmp_path: Path) -> None:
    log = tmp_path / "log"
    results = [
        start(folder, tmp_path / "store", seed, {"kind": "unet"}, BUILD_LOG=str(log))
        for seed, folder in enumerate(unpacked(tmp_path, write_unet), 1)
    ]
    assert [facts["result"] for facts in results] == ["built", "hit"], [facts["fallbacks"] for facts in results]
    assert [facts["counters"]["build"] for facts in results] == [1, 0]
    assert log.read_text().count("begin") == 1
    assert results[1]["left_out"] == ["Unet._object_hash"]


@pytest.mark.processes
@pytest.mark.parametrize(
    ("kind", "left_out"),
    [
        ("BertForSequenceClassification", []),
        ("GPT2LMHeadModel", ["GenerationConfig._original_object_hash"]),
        ("T5ForConditionalGeneration", ["GenerationConfig._original_object_hash"]),
    ],
)
def test_facts_of_a_pretrained_model_are_equal_and_a_failed_build_is_remembered(
    kind: str, left_out: list[str], tmp_path: Path
) -> None:
    decoder = ("decoder_input_ids",) if kind.startswith("T5") else ()
    config = {"kind": kind, "section": section_for("input_ids", "attention_mask", *decoder)}
    results = [
        start(folder, tmp_path / "store", seed, config, BUILD_ERROR="cannot be exported", HF_HUB_OFFLINE="1")
        for seed, folder in enumerate(unpacked(tmp_path, write_pretrained(kind)), 1)
    ]
    assert results[0]["digest"] == results[1]["digest"]
    assert [facts["left_out"] for facts in results] == [left_out] * 2
    assert [facts["counters"]["build_failed"] for facts in results] == [1, 0]
    assert [facts["counters"]["build_skipped"] for facts in results] == [0, 1]


class Layer(torch.nn.Module):
    def __init__(self, **values: Any) -> None:
        super().__init__()
        vars(self).update(values)


def same(left: Any, right: Any) -> bool:
    """Whether modules with these values, from the folders /a/one and /b/two, are told apart."""
    digests = {
        ModuleSource("m", Layer(**value), folder=folder).digest()
        for value, folder in ((left, "/a/one"), (right, "/b/two"))
    }
    return len(digests) == 1


def test_only_the_folder_itself_is_taken_for_the_folder() -> None:
    assert same({"path": "/a/one"}, {"path": "/b/two"})
    assert same({"path": "/a/one/x"}, {"path": "/b/two/x"})
    assert same({"path": "file:///a/one/"}, {"path": "file:///b/two/"})
    assert same({"path": Path("/a/one/x")}, {"path": Path("/b/two/x")})
    assert same({"path": {"/a/one": [b"/a/one"]}}, {"path": {"/b/two": [b"/b/two"]}})
    assert not same({"path": "/a/one/x"}, {"path": "/b/two/y"})
    assert not same({"path": "/a/one-more"}, {"path": "/b/two-more"})
    assert not same({"path": "/x/a/one"}, {"path": "/x/b/two"})
    assert not same({"path": "/a"}, {"path": "/b"})


def test_what_shapes_a_model_is_not_left_out() -> None:
    big = 1 << 40
    for name in ("_hash_size", "_num_hashes", "_seed", "hash"):
        assert not same({name: big}, {name: big + 1})
    assert not same({"_table_hash": 1000}, {"_table_hash": 1001})
    assert not same({"_table_hash": "a"}, {"_table_hash": "b"})
    assert same({"_table_hash": big}, {"_table_hash": -big - 1})
    assert module_facts(Layer(_table_hash=big)).left_out == ("Layer._table_hash",)


def test_module_without_a_folder_has_the_key_that_it_had() -> None:
    plain = torch.nn.Sequential(Layer(path="/a/one", size=3), torch.nn.Linear(2, 2))
    assert module_facts(plain).lines == module_facts(plain, "/somewhere/else").lines
