"""An adapter to a server of one's own: HTTP by Python's standard library, no TorchServe.

python examples/plain_server.py           # the first run compiles, every later one loads; asks itself once and ends
python examples/plain_server.py --serve   # goes on: curl -d '{"input": [[1, 2, 3, 4]]}' localhost:8000

It uses what every adapter uses: `start_model`, and for JSON `ts_handlers.servers.json_tensors`.
"""

import json
import sys
import tempfile
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

from ts_handlers import ArchiveSource, parse_settings, start_model
from ts_handlers.errors import BusyError, InputError
from ts_handlers.servers.json_tensors import read_tensors, rows_of

MODEL = """
import torch
class Net(torch.nn.Sequential):
    def __init__(self):
        super().__init__(torch.nn.Linear(4, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
"""
INPUTS = [{"name": "input", "dtype": "float32", "shape": ["batch", 4]}]
CONFIG = {"handler": {"ts_handlers": {"inputs": INPUTS, "dimensions": {"batch": {"min": 1, "max": 64}}}}}


def write_model(folder: str) -> ArchiveSource:
    """Write a model file and its weights, as a training job would."""
    Path(folder, "model.py").write_text(MODEL)
    torch.manual_seed(0)
    state = torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2)).state_dict()
    torch.save(state, Path(folder, "model.pt"))
    return ArchiveSource("net", folder, "model.py", "model.pt")


def answer(model: object, settings: object, body: bytes) -> tuple[int, object]:
    """HTTP status and answer of one request."""
    try:
        return 200, rows_of(model(**read_tensors(body, settings.inputs)))
    except (InputError, ValueError) as error:
        return 400, str(error)
    except BusyError as error:
        return 503, str(error)


with tempfile.TemporaryDirectory() as folder:
    settings = parse_settings(CONFIG)
    model = start_model(write_model(folder), settings)
    print(model.outcome.backend, model.outcome.result)

    class Handler(BaseHTTPRequestHandler):
        """Requests to this model."""

        def do_POST(self) -> None:
            """Answer one request."""
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status, text = answer(model, settings, body)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(text).encode())

    serve = "--serve" in sys.argv
    server = ThreadingHTTPServer(("127.0.0.1", 8000 if serve else 0), Handler)
    if serve:
        server.serve_forever()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    print(opener.open(url, json.dumps({"input": [[1, 1, 1, 1]]}).encode()).read().decode())
    server.shutdown()
