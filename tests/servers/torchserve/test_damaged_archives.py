"""Unpacking archives of anybody: damaged ones, bombs, and names that no file can have."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest

from ts_handlers.errors import ModelError
from ts_handlers.servers.torchserve import unpacking
from ts_handlers.servers.torchserve.unpacking import unpacked

pytest.importorskip("ts", reason="TorchServe is not installed")

MUTATIONS = int(os.environ.get("MUTATIONS", "300"))
FILES = {
    "MAR-INF/MANIFEST.json": json.dumps({"model": {"modelName": "model"}}).encode(),
    "model.py": b"import torch\n" * 20,
    "model.pt": bytes(range(256)) * 4,
}


def zip_of(compression: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in FILES.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tar_of(mode: str, format: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=format) as archive:
        for name, content in {**FILES, "long" * 40: b"x"}.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


ARCHIVES = {
    "stored": zip_of(zipfile.ZIP_STORED),
    "deflated": zip_of(zipfile.ZIP_DEFLATED),
    "bzip2": zip_of(zipfile.ZIP_BZIP2),
    "lzma": zip_of(zipfile.ZIP_LZMA),
    "tgz": tar_of("w:gz", tarfile.PAX_FORMAT),
    "tar": tar_of("w:", tarfile.GNU_FORMAT),
    "pax": tar_of("w:", tarfile.PAX_FORMAT),
}


def mutated(data: bytes, draw: random.Random) -> bytes:
    """Some bytes changed, or a part removed, doubled or cut off."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        place = draw.randrange(len(changed))
        match draw.randrange(6):
            case 0:
                changed[place] ^= 1 << draw.randrange(8)
            case 1:
                changed[place] = draw.choice((0, 0xFF, 0x80, ord("0"), ord("9")))
            case 2:
                del changed[place : place + draw.randrange(1, 64)]
            case 3:
                changed[place:place] = changed[place : place + draw.randrange(1, 64)]
            case 4:
                changed[place : place + 4] = draw.randbytes(4)
            case _:
                del changed[max(1, place) :]
        if not changed:
            return b"?"
    return bytes(changed)


@pytest.mark.parametrize("kind", ARCHIVES)
def test_a_damaged_archive_is_a_model_error(kind: str, tmp_path: Path) -> None:
    from ts_handlers.servers.torchserve.recipes import archive_recipe

    draw, refused = random.Random(kind), []
    for _ in range(MUTATIONS // len(ARCHIVES) + 1):
        (tmp_path / "model.mar").write_bytes(mutated(ARCHIVES[kind], draw))
        try:
            with unpacked(tmp_path / "model.mar") as directory:
                archive_recipe(directory, "cpu", None, None)
        except ModelError as error:
            refused.append(len(str(error)))
    assert 0 < max(refused) < 2000


def members(*infos: tuple[str, int]) -> bytes:
    """A compressed tar file of zeros."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, size in (("MAR-INF/MANIFEST.json", 0), *infos):
            info = tarfile.TarInfo(name)
            info.size = size
            archive.addfile(info, io.BytesIO(bytes(size)))
    return buffer.getvalue()


def sparse() -> bytes:
    """A tar file with a member of one hole: nothing in the archive, and 4 MiB when unpacked."""
    info = tarfile.TarInfo("hole")
    info.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    size = 4 << 20
    header[386:398], header[398:410] = b"%011o\0" % size, b"%011o\0" % 0  # one part without bytes, at the end
    header[483:495] = b"%011o\0" % size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + bytes(1024)


def bombs() -> dict[str, bytes]:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("MAR-INF/MANIFEST.json", "{}")
        archive.writestr("zeros", bytes(4 << 20))
    return {"zip": buffer.getvalue(), "tgz": members(("zeros", 4 << 20)), "sparse": sparse()}


@pytest.mark.parametrize("kind", ["zip", "tgz", "sparse"])
def test_a_bomb_is_bounded_by_the_archives_size_and_by_free_space(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.mar"
    path.write_bytes(bombs()[kind])
    monkeypatch.setattr(unpacking, "SMALL_BYTES", 1 << 20)
    with pytest.raises(ModelError, match=r"holds more than \d+ bytes, 100 times its own size"), unpacked(path):
        pass
    monkeypatch.undo()
    room = shutil.disk_usage(tmp_path)._replace(free=unpacking.RESERVE_BYTES + (1 << 20))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: room)
    with pytest.raises(ModelError, match=rf"does not fit into .* where {1 << 20} bytes can be used"), unpacked(path):
        pass


def test_a_header_that_claims_to_be_large_is_not_read_into_memory(tmp_path: Path) -> None:
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, 1 << 30
    (tmp_path / "model.tgz").write_bytes(gzip.compress(info.tobuf() + bytes(1 << 20)))
    with pytest.raises(ModelError), unpacked(tmp_path / "model.tgz"):
        pass


def test_there_are_not_more_files_than_stated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacking, "FILES_LIMIT", 3)
    (tmp_path / "model.tgz").write_bytes(members(*((f"file{index}", 0) for index in range(3))))
    with pytest.raises(ModelError, match="more than 3 files"), unpacked(tmp_path / "model.tgz"):
        pass


@pytest.mark.parametrize("name", ["n" * 300, "folder/" + "n" * 300])
def test_a_name_that_no_file_can_have_is_refused_in_a_short_message(name: str, tmp_path: Path) -> None:
    (tmp_path / "model.tgz").write_bytes(members((name, 0)))
    with pytest.raises(ModelError, match="a name of more than 255 bytes") as caught, unpacked(tmp_path / "model.tgz"):
        pass
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("verb", ["explain", "prewarm"])
def test_the_command_line_says_so_without_a_traceback(verb: str, tmp_path: Path) -> None:
    testing = pytest.importorskip("typer.testing", reason="typer is not installed")
    from ts_handlers.cli.app import make_app

    data = bytearray(ARCHIVES["deflated"])
    data[data.index(b"PK\x01\x02") + 10] = 97  # a compression method that nobody knows: NotImplementedError
    (tmp_path / "model.mar").write_bytes(data)
    (tmp_path / "store").mkdir()
    arguments = [verb, str(tmp_path / "model.mar"), "--store", str(tmp_path / "store")]
    result = testing.CliRunner().invoke(make_app(), arguments)
    assert (result.exit_code, "Traceback" in result.output + result.stderr) == (2, False), result.output
    assert "cannot be unpacked: NotImplementedError" in result.stderr
