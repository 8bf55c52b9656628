"""Building a plan that takes its weights from the archive.

What `ts_handlers.backends.tensorrt.refit.proof` proves about the network is tried with the plan as well: it is
refitted with weights near the model's own and compared with eager. Flavours and versions differ in which kinds of
refittable plans they have, so the kinds are tried in order.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from ts_handlers.backends.base import Built, Description, Target, Workspace
from ts_handlers.backends.export import PREFIX
from ts_handlers.backends.tensorrt import library as tensorrt_library
from ts_handlers.backends.tensorrt.plan import verify, write_plan
from ts_handlers.backends.tensorrt.refit.proof import describe, model_state, prove
from ts_handlers.errors import RefitError

logger = logging.getLogger(__name__)

# By the names of TensorRT's BuilderFlag. First: only the weights that were proven are refittable, and the plan holds no
# values for them where the flavour strips them (TensorRT for RTX 1.4 does not).
KINDS = (("REFIT_INDIVIDUAL", "STRIP_PLAN"), ("REFIT_INDIVIDUAL",), ("REFIT",))


def build_refittable(
    target: Target,
    workspace: Workspace,
    conversion: Any,
    flat: torch.nn.Module,
    timing_cache: Path | None,
    description: Description,
) -> Built:
    """Prove, build and check; see `ts_handlers.backends.tensorrt.backend.TensorRTBackend.build`.

    Parameters
    ----------
    conversion:
        A `ts_handlers.backends.tensorrt.network.Conversion` of `flat`, the model with flat tensors in and out.

    Raises
    ------
    RefitError
        There is no such plan for this model, with the reason; the workspace and `description` are as before.
    """
    with workspace.phase("prove"), torch.no_grad():
        state = model_state(conversion.program, target.source.weights())
        probe = state.probe()
        try:
            probed = conversion.with_state({PREFIX + name: value.to(target.device) for name, value in probe.items()})
        except Exception as error:
            raise RefitError(f"the model does not convert with other weights: {error}") from error
        trt = tensorrt_library.import_tensorrt(tensorrt_library.builder_flavour())
        formulas = prove(trt, conversion.network, probed, state, probe)
        del probed, probe
    perturbed = {**state.moving, **state.perturbed()}
    on_device = {PREFIX + name: value.to(target.device) for name, value in perturbed.items()}

    def eager(tensors: list[torch.Tensor]) -> Any:
        with torch.no_grad():
            return torch.func.functional_call(flat, on_device, tuple(tensors))

    reasons = []
    for flags in KINDS:
        attempt = {**description, "refit": describe(state, formulas, flags)}
        try:
            with workspace.phase("convert"):
                plan = conversion.network.build(timing_cache, flags)
            write_plan(plan, workspace.directory, attempt)
            with workspace.phase("verify"):
                verify(target, workspace.directory, attempt, eager, perturbed)
                return Built(attempt, verify(target, workspace.directory, attempt))
        except Exception as error:
            reasons.append(f"{'+'.join(flags)}: {type(error).__name__}: {error}")
            logger.info("%s: no plan with %s", target.source.name, reasons[-1])
            for path in workspace.directory.iterdir():
                path.unlink()
    raise RefitError("TensorRT makes no refittable plan that passes: " + "; ".join(reasons))
