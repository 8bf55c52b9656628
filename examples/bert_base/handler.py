"""JSON `{"input_ids": [[...]], "attention_mask": [[...]]}` to pooled outputs, by the default methods."""

from ts_handlers import CompiledHandler


class Handler(CompiledHandler):
    pass
