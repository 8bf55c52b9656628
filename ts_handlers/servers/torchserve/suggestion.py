"""What model-config.yaml could declare for an archive, and why: declared, told by samples or calls, or guessed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ts_handlers.errors import BuildError, ModelError, one_line
from ts_handlers.model.declaration import Declaration, as_yaml, declare
from ts_handlers.model.proposal import guess_declaration
from ts_handlers.model.recipes import Made, make_source
from ts_handlers.servers.torchserve.recipes import archive_recipe
from ts_handlers.servers.torchserve.unpacking import unpacked
from ts_handlers.settings import SECTION
from ts_handlers.startup.observation import identity_of
from ts_handlers.startup.target import new_target
from ts_handlers.store.base import Store

Origin = Literal["declared", "exported program", "samples", "calls", "guess", "nothing"]


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """What a start would take, or somebody could declare.

    Attributes
    ----------
    model:
        The model's name.
    origin:
        Where it is from.
    why:
        The same as a sentence.
    yaml:
        For model-config.yaml; empty where there is nothing to declare.
    notes:
        What else was found, such as samples that told nothing.
    """

    model: str
    origin: Origin
    why: str
    yaml: str
    notes: tuple[str, ...] = ()


def suggest(
    archive: str | Path,
    store: Store,
    *,
    device: str | None = None,
    config: Mapping[str, Any] | str | Path | None = None,
    model_name: str | None = None,
) -> Suggestion:
    """What an archive's model takes, as far as this machine knows it.

    The archive's handler is imported into this process and run until it starts its model; where it has samples, it
    answers them. The parameters are those of `ts_handlers.servers.torchserve.archive_keys.archive_keys`.

    Raises
    ------
    ModelError, SettingsError
        It is no model archive, or its handler starts no model.
    """
    with unpacked(archive) as directory:
        made = make_source(archive_recipe(directory, device, config, model_name))
        if made.settings is None or made.device is None:
            raise ModelError(f"{archive}: its handler starts no model")
        origin, why, declaration = _find(made, store)
        shown = "" if declaration is None else _yaml(declaration, why, outside=origin not in ("declared", "guess"))
        notes = tuple(note for note in made.source.notes if note.startswith(f"{SECTION}.samples"))
        return Suggestion(made.source.name, origin, why, shown, notes)


def _find(made: Made, store: Store) -> tuple[Origin, str, Declaration | None]:
    source, settings = made.source, made.settings
    assert settings is not None
    assert made.device is not None
    if settings.inputs:
        found = Declaration(settings.inputs, settings.dimensions, settings.warmup_sizes)
        if made.told_by_samples:
            return (
                "samples",
                f"told by the samples {', '.join(settings.sample_files)[:300]}, answered by the handler",
                found,
            )
        return "declared", "declared in model-config.yaml", found
    if not source.weights_by_name:
        return "exported program", "the exported program brings its own inputs; nothing need be declared", None
    identity = identity_of(new_target(source, settings, made.device))
    declaration = None if identity is None else store.read_declaration(identity)
    record = None if identity is None else store.read_calls(identity)
    if declaration is not None:
        return "calls", "told by earlier calls; the next start takes it by itself", declaration
    if record is not None:
        try:
            count = record.calls.count
            return "calls", f"told by {count} earlier calls; nothing was built for them yet", declare(record.calls)
        except BuildError as error:
            source.notes.append(f"{SECTION}.samples: none; of calls: {one_line(error, 300)}")
    module = source.eager()
    guess = guess_declaration(module)
    if guess is None:
        return "nothing", f"forward of {type(module).__name__} does not say what it takes; add samples", None
    return (
        "guess",
        f"guessed from the parameters of forward of {type(module).__name__} and its first layer: check dtypes, sizes "
        "and ranges, or add samples",
        guess,
    )


def _yaml(declaration: Declaration, why: str, *, outside: bool) -> str:
    lines = f"# {why}\nhandler:\n  ts_handlers:\n{as_yaml(declaration)}"
    return f"{lines}    outside: eager\n" if outside else lines
