"""What a TorchServe user writes today: `BaseHandler` with its own request format, eager or with `pt2: compile:`.

Takes and gives what the handlers of examples/ take and give, so that a request costs the same in every row of the
benchmark: a `.npy` file, or JSON `{input name: nested list}`; nested lists out.
"""

import io
import json
import os
import sys

import numpy
import torch
from ts.torch_handler.base_handler import BaseHandler

NPY_MAGIC = b"\x93NUMPY"


class Handler(BaseHandler):
    """One request per batch (`batchSize: 1`)."""

    def preprocess(self, data):
        """The request's tensors: one by position for `.npy`, several by name for JSON."""
        body = data[0].get("data", data[0].get("body"))
        if isinstance(body, (bytes, bytearray)) and body.startswith(NPY_MAGIC):
            return torch.from_numpy(numpy.load(io.BytesIO(body), allow_pickle=False))
        if isinstance(body, (bytes, bytearray, str)):
            body = json.loads(body)
        return {name: torch.tensor(value) for name, value in body.items()}

    def inference(self, data):
        """Call the model as `BaseHandler` does, with names where the request has them."""
        with torch.inference_mode():
            if isinstance(data, dict):
                return self.model(**{name: tensor.to(self.device) for name, tensor in data.items()})
            return self.model(data.to(self.device))

    def postprocess(self, data):
        """The answer of the only request."""
        return [data.tolist()]

    def describe_handle(self):
        """What the compiler's caches did, for the benchmark's checks; imports nothing."""
        utils = sys.modules.get("torch._dynamo.utils")
        counters = utils.counters if utils is not None else {}
        inductor, autograd = counters.get("inductor", {}), counters.get("aot_autograd", {})
        return {
            "backend": "torch.compile" if "_orig_mod" in self.model._modules else "eager",
            "graphs": counters.get("stats", {}).get("unique_graphs", 0),
            "fxgraph_cache_hit": inductor.get("fxgraph_cache_hit", 0),
            "fxgraph_cache_miss": inductor.get("fxgraph_cache_miss", 0),
            "autograd_cache_hit": autograd.get("autograd_cache_hit", 0),
            "autograd_cache_miss": autograd.get("autograd_cache_miss", 0),
            "pid": os.getpid(),
        }
