"""Text to sentence embeddings; tokenised without transformers, so that a warm start need not import it."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer

from ts_handlers import CompiledHandler, InputError

MAX_TOKENS = 256  # What the model was trained for.
MAX_ROWS = 64  # Upper end of `dimensions: batch` in model-config.yaml.


class Handler(CompiledHandler):
    """`text/plain`, or JSON: `{"text": ...}` or a list of strings. Answers a vector, or a list of vectors."""

    def initialize(self, context):
        super().initialize(context)
        folder = Path(context.system_properties["model_dir"])
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_truncation(MAX_TOKENS)
        self.tokenizer.enable_padding()

    def preprocess(self, data):
        """Requests to one padded batch; `batch_state` remembers how many rows each request has."""
        requests = [read_texts(self.request_body(row)) for row in data]
        self.batch_state.rows = [(len(texts), many) for texts, many in requests]
        encodings = self.tokenizer.encode_batch([text for texts, _ in requests for text in texts])
        return {
            "input_ids": torch.tensor([e.ids for e in encodings], device=self.device),
            "attention_mask": torch.tensor([e.attention_mask for e in encodings], device=self.device),
        }

    def inference(self, data, *args, **kwargs):
        """Any number of rows, `MAX_ROWS` at a time."""
        parts = zip(data["input_ids"].split(MAX_ROWS), data["attention_mask"].split(MAX_ROWS), strict=True)
        return torch.cat([super(Handler, self).inference({"input_ids": i, "attention_mask": m}) for i, m in parts])

    def postprocess(self, data):
        vectors = iter(data.float().cpu().tolist())
        answers = [[next(vectors) for _ in range(count)] for count, _ in self.batch_state.rows]
        return [answer if many else answer[0] for answer, (_, many) in zip(answers, self.batch_state.rows, strict=True)]


def read_texts(body):
    """Texts of one request, and whether it asked for a list."""
    if isinstance(body, (bytes, bytearray)):
        body = bytes(body).decode("utf-8")
        if body.lstrip()[:1] in ("{", "["):
            body = json.loads(body)
    if isinstance(body, dict):
        body = body.get("text")
    texts = body if isinstance(body, list) else [body]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise InputError('expected text/plain, or JSON {"text": "..."} or ["...", ...]')
    return texts, isinstance(body, list)
