"""The package without TorchServe: a model that starts warm in any Python program.

python examples/plain_server.py     # the first run compiles, every later one loads
"""

import tempfile
from pathlib import Path

import torch

from ts_handlers import ArchiveSource, parse_settings, start_model

MODEL = """
import torch
class Net(torch.nn.Sequential):
    def __init__(self):
        super().__init__(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
"""
INPUTS = [{"name": "input", "dtype": "float32", "shape": ["batch", 16]}]
CONFIG = {"handler": {"ts_handlers": {"inputs": INPUTS, "dimensions": {"batch": {"min": 1, "max": 64}}}}}

with tempfile.TemporaryDirectory() as folder:
    Path(folder, "model.py").write_text(MODEL)
    torch.manual_seed(0)
    state = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4)).state_dict()
    torch.save(state, Path(folder, "model.pt"))
    model = start_model(ArchiveSource("net", folder, "model.py", "model.pt"), parse_settings(CONFIG))
    print(model.outcome.backend, model.outcome.result, model(torch.ones(1, 16)).tolist())
