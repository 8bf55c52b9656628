"""Adapters to model servers, one folder each; `torchserve` is one.

An adapter turns what its server hands it (a folder or a module, settings, a device) into a call of
`ts_handlers.start.start_model`, and requests into calls of the model that it returns. It needs two modules and nothing
below them:

- `ts_handlers.start`: `start_model` makes the model ready, here or in the process that all workers share. Its
  arguments are a `ts_handlers.model.base.ModelSource`, `ts_handlers.settings.Settings` and a device; its result is a
  `ts_handlers.compiled_model.ServedModel`. `captured_start` tells another process what an adapter would start.
- `ts_handlers.servers.json_tensors`: tensors from and to JSON, requests joined into a batch and split again. Only for
  servers whose requests are JSON.

The errors of a call are the answers of a request: `ts_handlers.errors.InputError` says that the request is wrong (HTTP
400), `ts_handlers.errors.BusyError` that no execution context came free (HTTP 503). A model whose process lives for a
long time and whose `background` is not None changes once, from eager to compiled, between two calls.

Only an adapter's own folder imports its server. ``examples/plain_server.py`` is the smallest one.
"""
