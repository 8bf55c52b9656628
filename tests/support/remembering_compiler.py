"""A C++ compiler that remembers, for the tests: what a test run has compiled once, it copies.

    python remembering_compiler.py OBJECTS ARGUMENTS...

`install` puts it before the real `g++` on the tests' PATH. Only a compilation of one source to one object is
remembered, in the folder OBJECTS, by the arguments, the bytes of the source and the real compiler; the names of the
folders of source and object do not count. Headers do not change while the tests run. All else, and every failure, is
the real compiler's. Starts without the site's packages, so that a copy takes hundredths of a second.

What it does compile begins with torch's headers, which take most of the time. At the third source that begins with the
same ones, with the same options, it precompiles them, as GCC's manual describes under "Using Precompiled Headers". The
object is the same: GCC takes such a file in place of the header only where every option and macro agrees.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile

PREFIX = "ts_handlers-compiler-"
"""How the name of the folder of a test run begins."""
USES_BEFORE_PRECOMPILING = 3
"""Precompiling takes as long as what it saves three or four compilations."""


def install(folder: str) -> None:
    """Make `folder`, with a ``g++`` and what it remembers, the first of this process's PATH."""
    compiler = shutil.which("g++")
    if compiler is None:
        return
    objects = os.path.join(folder, "objects")
    os.makedirs(objects)
    path = os.path.join(folder, "g++")
    words = shlex.join([sys.executable, "-ISs", os.path.abspath(__file__), objects, compiler])
    with open(path, "w", encoding="utf-8") as file:
        file.write(f'#!/bin/sh\nexec {words} "$@"\n')
    os.chmod(path, 0o755)
    os.environ["PATH"] = os.pathsep.join([folder, os.environ.get("PATH", os.defpath)])


def plan(arguments: list[str]) -> tuple[str, str] | None:
    """The source and the output of what can be remembered, otherwise None.

    That is a compilation of one source to an object or, without other objects, to a library.
    """
    if not {"-c", "-shared"} & set(arguments) or arguments.count("-o") != 1:
        return None
    target = arguments[arguments.index("-o") + 1 :][:1]
    inputs = [each for each in arguments if not each.startswith("-") and each not in target]
    sources = [each for each in inputs if each.endswith((".cpp", ".cc", ".S", ".s"))]
    others = [each for each in inputs if each.endswith((".o", ".a", ".so")) or each.startswith("@")]
    return (sources[0], target[0]) if len(sources) == 1 and target and not others else None


def digest(compiler: str, arguments: list[str], source: str, target: str) -> str:
    """What a compilation depends on."""
    status = os.stat(os.path.realpath(compiler))
    known = hashlib.sha256(f"{compiler}:{status.st_size}:{status.st_mtime_ns}".encode())
    folders = {os.path.dirname(source): "<source>", os.path.dirname(target): "<target>", os.getcwd(): "<here>"}
    with open(source, "rb") as file:
        content = file.read()
    for text in arguments:
        for folder, token in folders.items():
            if folder:
                text = text.replace(folder, token)
        known.update(text.encode() + b"\0")
    for folder in folders:
        if folder:
            content = content.replace(os.fsencode(folder), b"<folder>")
    for name in sorted(name for name in os.environ if name.startswith(("CPATH", "CPLUS", "C_INCLUDE", "GCC_"))):
        known.update(f"{name}={os.environ[name]}\0".encode())
    known.update(content)
    return known.hexdigest()


def copy(source: str, target: str) -> bool:
    """By a new file that is renamed; False where it is not there."""
    try:
        with open(source, "rb") as file:
            content = file.read()
    except FileNotFoundError:
        return False
    descriptor, path = tempfile.mkstemp(dir=os.path.dirname(os.path.abspath(target)))
    with open(descriptor, "wb") as file:
        file.write(content)
    os.chmod(path, 0o644)
    os.replace(path, target)
    return True


def first_includes(source: str) -> list[str]:
    """The headers that a source begins with, nothing but comments before and between them."""
    names: list[str] = []
    with open(source, encoding="utf-8", errors="replace") as file:
        for line in map(str.strip, file):
            if line.startswith("#include <") and line.endswith(">"):
                names.append(line[len("#include <") : -1])
            elif line and not line.startswith("//"):
                break
    return names


def precompiled(folder: str, compiler: str, arguments: list[str], source: str, target: str) -> list[str]:
    """The option by which the compiler finds the headers of a source precompiled; none where they are not.

    Parameters
    ----------
    folder:
        Holds one folder for each set of headers and options.
    """
    names = first_includes(source)
    if not names or "torch/" not in names[0]:
        return []
    left_out = {source, target, "-c", "-shared", "-o"}
    options = [each for each in arguments if each not in left_out and not each.startswith(("-l", "-L", "-Wl"))]
    known = hashlib.sha256("\0".join([compiler, *options, *names]).encode()).hexdigest()[:16]
    place = os.path.join(folder, known)
    header = os.path.join(place, names[0])
    if os.path.exists(f"{header}.gch"):
        return [f"-I{place}"]
    os.makedirs(place, exist_ok=True)
    with open(os.path.join(place, "uses"), "ab") as counted:
        counted.write(b".")
        uses = counted.tell()
    if uses != USES_BEFORE_PRECOMPILING:  # one makes them, and the others do without meanwhile
        return []
    every = os.path.join(place, "all.h")
    with open(every, "w", encoding="utf-8") as file:
        file.writelines(f"#include <{name}>\n" for name in names)
    made = os.path.join(place, "made.gch")
    command = [compiler, *options, "-w", "-x", "c++-header", every, "-o", made]
    if subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode != 0:
        return []
    os.makedirs(os.path.dirname(header), exist_ok=True)
    with open(header, "w", encoding="utf-8") as file:  # for a source that includes it once more
        file.write(f"#include_next <{names[0]}>\n")
    os.replace(made, f"{header}.gch")
    return [f"-I{place}"]


def main(objects: str, compiler: str, arguments: list[str]) -> int:
    """Run the compiler, or copy what it made before."""
    planned = plan(arguments)
    if planned is not None:
        source, target = planned
        try:
            kept = os.path.join(objects, digest(compiler, arguments, source, target))
            if copy(kept, target):
                return 0
        except OSError:
            planned = None
    if planned is None:
        os.execv(compiler, [compiler, *arguments])
    headers: list[str] = []
    with contextlib.suppress(OSError):
        headers = precompiled(os.path.join(os.path.dirname(objects), "headers"), compiler, arguments, source, target)
    status = subprocess.run([compiler, *headers, *arguments], check=False).returncode
    if status == 0:
        with contextlib.suppress(OSError):
            copy(target, kept)
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
