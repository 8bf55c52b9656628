"""Causal language models: their caches, and `generate` with compiled decode steps.

Models are of transformers, small and with random weights that a seed draws.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("ts", reason="TorchServe is not installed")
from ts.torch_handler.base_handler import BaseHandler

from tests.support.handlers import make_context
from ts_handlers import CompiledHandlerMixin
from ts_handlers.errors import BuildError
from ts_handlers.model.decode_steps import record_decode_call
from ts_handlers.settings.model import Dimension, GenerateSettings

transformers = pytest.importorskip("transformers")

LENGTH = 32
TINY: dict[str, Any] = {"vocab_size": 96, "eos_token_id": None, "bos_token_id": 1, "initializer_range": 0.3}


def make_model(kind: str) -> Any:
    """A model that continues different prompts with different tokens."""
    torch.manual_seed(3)
    if kind == "gpt2":
        config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=64, **TINY)
        model = transformers.GPT2LMHeadModel(config)
    elif kind == "mistral":
        small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = transformers.MistralConfig(num_key_value_heads=1, sliding_window=8, **small, **TINY)
        model = transformers.MistralForCausalLM(config)
    else:
        small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = transformers.LlamaConfig(num_key_value_heads=1, max_position_embeddings=64, **small, **TINY)
        model = transformers.LlamaForCausalLM(config)
    model.generation_config.pad_token_id = 0
    return model.eval()


class Generates(BaseHandler):  # type: ignore[misc]
    """As TorchServe's handlers of language models: `generate` in `inference`."""

    kind = "llama"

    def initialize(self, context: Any) -> None:
        self.model = make_model(self.kind)
        self.initialized = True

    def preprocess(self, data: Any) -> Any:
        rows = [row["body"] for row in data]
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        return ids, (ids != 0).long()

    def inference(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        ids, mask = data
        return self.model.generate(ids, attention_mask=mask, max_new_tokens=kwargs.get("more", 12), do_sample=False)

    def postprocess(self, data: Any) -> Any:
        return data.tolist()


class Handler(CompiledHandlerMixin, Generates):
    pass


class OfGpt2(CompiledHandlerMixin, Generates):
    kind = "gpt2"


def start(tmp_path: Path, kind: type = Handler, **section: Any) -> Any:
    models = {"lm": {"path": "model", "generate": {"length": LENGTH, "batch": {"min": 1, "max": 3}}}}
    backends = ["aot_inductor", "eager"]
    section = {"inputs": [], "dimensions": {}, "warmup": [], "models": models, "backends": backends, **section}
    handler = kind()
    handler.initialize(make_context(tmp_path, tmp_path / "store", {}, section=section))
    return handler


PROMPTS = [[[5, 9, 2]], [[7], [8]], [[1, 2, 3, 4, 5], [6, 7], [9]]]


@pytest.mark.compile
@pytest.mark.parametrize("kind", [Handler, OfGpt2])
def test_generate_runs_compiled_decode_steps_with_equal_tokens(kind: Any, tmp_path: Path) -> None:
    plain = Generates()
    plain.kind = kind.kind
    plain.initialize(None)
    handler = start(tmp_path, kind)
    assert handler.describe_handle()["models"]["lm"]["result"] == "built"
    handler = start(tmp_path, kind)
    row = handler.describe_handle()["models"]["lm"]
    assert (row["backend"], row["result"], row["reason"]) == ("aot_inductor", "hit", None), row
    answers = []
    for prompts in PROMPTS:
        data = [{"body": prompt} for prompt in prompts]
        before = handler.describe_handle()["models"]["lm"]["contexts"]["lent"]
        answers.append(handler.inference(handler.preprocess(data)))
        assert torch.equal(answers[-1], plain.inference(plain.preprocess(data)))
        row = handler.describe_handle()["models"]["lm"]
        assert row["contexts"]["lent"] - before == 11  # of 12 tokens, the prompt gives the first
    assert len({tuple(row) for answer in answers for row in answer[:, -12:].tolist()}) == 6
    assert row["counters"]["outside_eager"] == row["counters"]["build"] == row["counters"]["compile_after_ready"] == 0

    # A request that does not fit the cache is answered eagerly, and leaves nothing behind for the next ones.
    long = [{"body": [5, 9, 2]}]
    wanted = plain.inference(plain.preprocess(long), more=LENGTH)
    assert torch.equal(handler.inference(handler.preprocess(long), more=LENGTH), wanted)
    outside = handler.describe_handle()["models"]["lm"]["counters"]["outside_eager"]
    assert outside == LENGTH - 1
    assert torch.equal(handler.inference(handler.preprocess(long)), plain.inference(plain.preprocess(long)))
    assert handler.describe_handle()["models"]["lm"]["counters"]["outside_eager"] == outside

    # Sampling and beams take the same steps.
    ids = torch.tensor([[5, 9, 2]])
    for more in ({"do_sample": True, "top_k": 5}, {"num_beams": 3}, {"return_dict_in_generate": True}):
        found = []
        for model in (plain.model, handler.model):
            torch.manual_seed(0)
            answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, **more)
            found.append(answer if isinstance(answer, torch.Tensor) else answer.sequences)
        assert torch.equal(*found)
    assert handler.describe_handle()["models"]["lm"]["counters"]["outside_eager"] == outside


@pytest.mark.compile
def test_a_models_own_loop_gets_its_cache_from_the_artifact(tmp_path: Path) -> None:
    """A causal LM returns a cache from `forward`, which is no reason not to compile it."""

    class Loops(Generates):
        def inference(self, data: Any, *args: Any, **kwargs: Any) -> Any:
            ids, cache, found = data[0], {}, []
            for _ in range(6):
                with torch.no_grad():
                    out = self.model(ids, **cache)
                cache = {name: out[name] for name in ("cache", "past_key_values") if name in out}
                assert cache
                ids = out.logits[:, -1:].argmax(-1)
                found.append(ids)
            return torch.cat(found, 1)

    class Ours(CompiledHandlerMixin, Loops):
        pass

    plain = Loops()
    plain.initialize(None)
    ids = {"name": "input_ids", "dtype": "int64", "shape": ["batch", "length"], "limits": [0, 96]}
    dimensions = {"batch": {"min": 1, "max": 4}, "length": {"min": 2, "max": 16}}
    for result in ("built", "hit"):
        handler = start(tmp_path, Ours, models={}, inputs=[ids], dimensions=dimensions)
        assert (handler.model.outcome.backend, handler.model.outcome.result) == ("aot_inductor", result)
        for prompts in (PROMPTS[0], PROMPTS[2]):
            data = [{"body": prompt} for prompt in prompts]
            assert torch.equal(handler.inference(handler.preprocess(data)), plain.inference(plain.preprocess(data)))
        assert handler.model.metrics.counters["outside_eager"] == 10  # with a cache: all but the first of each loop


def test_what_does_not_generate_with_a_static_cache_says_so(tmp_path: Path) -> None:
    settings = GenerateSettings(LENGTH, Dimension(1, 2))
    with pytest.raises(BuildError, match="Linear has no generate of transformers"):
        record_decode_call(torch.nn.Linear(2, 2), settings)
    with pytest.raises(BuildError, match="its cache has a StaticSlidingWindowLayer"):
        record_decode_call(make_model("mistral"), settings)

    class OfMistral(Handler):
        kind = "mistral"

    handler = start(tmp_path, OfMistral)
    row = handler.describe_handle()["models"]["lm"]
    assert row["backend"] == "eager"
    assert "StaticSlidingWindowLayer" in row["reason"]
    assert handler.model.generation_config.cache_implementation is None  # as plain


def test_recording_leaves_the_model_as_it_was() -> None:
    model = make_model("gpt2")
    before = dict(vars(model))
    state = torch.random.get_rng_state()
    call = record_decode_call(model, GenerateSettings(LENGTH, Dimension(1, 2)))
    assert vars(model) == before
    assert torch.equal(torch.random.get_rng_state(), state)
    assert set(call.tensors) >= {"input_ids", "attention_mask"}
    assert call.tensors["input_ids"].shape == (2, 1)
    assert all(layer.keys.is_meta for layer in call.cache.layers)
