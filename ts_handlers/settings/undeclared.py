"""Checks of the settings that tell what a model takes where nobody declares it: `samples` and `observe`."""

from __future__ import annotations

from ts_handlers.errors import SettingsError
from ts_handlers.settings.model import SECTION, Settings

LONGEST_SECONDS = 7 * 24 * 3600
MAX_SAMPLES = 64


def check_samples(settings: Settings) -> None:
    """Check the list of `samples`."""
    where = f"{SECTION}.samples"
    if len(settings.samples) > MAX_SAMPLES:
        raise SettingsError(
            f"{where}: expected at most {MAX_SAMPLES} files, found {len(settings.samples)}; two of different sizes "
            "already tell which dimensions vary"
        )
    for index, sample in enumerate(settings.samples):
        paths = [sample] if isinstance(sample, str) else list(sample.values())
        if not paths or not all(path and "\0" not in path for path in paths):
            raise SettingsError(
                f"{where}[{index}]: expected the path of a file with a request's body, or a mapping of a request's "
                f"fields to such paths, found {sample!r}"
            )


def check_observe(settings: Settings) -> None:
    """Check the section `observe`, and that `warmup` may follow it."""
    observe = settings.observing
    if observe is None:
        if settings.warmup == "observed":
            raise SettingsError(
                f"{SECTION}.warmup: 'observed' needs {SECTION}.observe, which is false; remove one of them"
            )
        return
    where = f"{SECTION}.observe"
    if observe.calls is not None and observe.calls < 1:
        raise SettingsError(f"{where}.calls: expected at least 1, found {observe.calls}; null leaves it out")
    if observe.seconds is not None and not 0 < observe.seconds <= LONGEST_SECONDS:
        raise SettingsError(
            f"{where}.seconds: expected seconds above 0 and up to {LONGEST_SECONDS}, found {observe.seconds}; null "
            "leaves it out"
        )
