"""Libraries in C, built with the machine's compiler on first use and kept in the user's cache folder.

Many processes start at once and want the same: one builds, the others wait for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

MAX_BUILD_S = 60.0
MAX_WAIT_S = 60.0
"""For another process that builds the same. Beyond that it may be stopped, and we build it ourselves."""
STOP_LIMIT_S = 1.0
_POLL_S = 0.05
_ABANDONED_S = 3600.0
"""A folder of a build that is so much older than the newest was left by a process that was killed."""

logger = logging.getLogger(__name__)

_is_over = threading.Event()
_building = threading.Lock()
_compilers: set[subprocess.Popen[bytes]] = set()


def build_library(source: Path, flags: Sequence[str], link_flags: Sequence[str]) -> Path:
    """The path of the library, which is built for this very processor unless it was before. Raises `OSError` or
    `subprocess.SubprocessError`."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        raise FileNotFoundError("no C compiler (cc, gcc or clang)")
    command = [compiler, "-O3", "-march=native", "-std=gnu11", *flags, "-fPIC"]
    digest = hashlib.sha256(source.read_bytes())
    digest.update(repr((command, list(link_flags), _processor())).encode())
    name = f"{source.stem}-{digest.hexdigest()[:24]}.so"
    for folder in _cache_folders():
        if _is_ours(folder) and (folder / name).exists():
            return folder / name
    library = _writable_folder() / name
    with source.open("rb") as file, _building:
        if _has_turn(file, library):
            logger.info("compiling %s for this processor, once: it takes some seconds", source.name)
            _build(command, source, library, link_flags)
    return library


def stop_building() -> None:
    """For a process that is about to end: returns when the compiler that it runs, if any, has ended and its folder is
    gone, after `STOP_LIMIT_S` at the latest. No other build begins."""
    _is_over.set()
    for compiler in list(_compilers):
        compiler.terminate()
    if _building.acquire(timeout=STOP_LIMIT_S):
        _building.release()


def _has_turn(source: BinaryIO, library: Path) -> bool:
    """Whether the library is for us to build; waits while another process does. Whoever builds holds the source file:
    such a lock ends with its holder, however that dies, and needs no file of its own."""
    deadline_s = time.monotonic() + MAX_WAIT_S
    has_told = False
    while not _lock(source):
        if not has_told:
            logger.info("waiting for another process that compiles %s", Path(source.name).name)
            has_told = True
        if time.monotonic() > deadline_s:
            logger.warning("%s has been compiled for %g s by another process", Path(source.name).name, MAX_WAIT_S)
            break
        if _is_over.wait(_POLL_S):
            raise RuntimeError("this process is about to end")
    return not library.exists()


def _lock(file: BinaryIO) -> bool:
    """False while another process holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # not every file system has locks; two builds of the same do no harm
        logger.info("%s cannot be locked: %s", file.name, error)
    return True


def _build(command: list[str], source: Path, library: Path, link_flags: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        _sweep(library.parent, Path(folder).stat().st_mtime - _ABANDONED_S)
        compiled, linked = f"{folder}/compiled.o", f"{folder}/linked.so"
        _run([*command, "-c", str(source), "-o", compiled], folder)
        _run([command[0], "-shared", compiled, "-o", linked, *link_flags], folder)
        # another process may have built the same: the last one wins, and both are whole
        os.replace(linked, library)


def _sweep(cache: Path, oldest_mtime: float) -> None:
    """Deletes folders of builds that nobody will finish."""
    for folder in cache.iterdir():
        with contextlib.suppress(OSError):  # another process may do the same
            if folder.is_dir() and folder.stat().st_mtime < oldest_mtime:
                shutil.rmtree(folder, ignore_errors=True)


def _run(command: list[str], folder: str) -> None:
    """The compiler's own files lie in `folder`, too: it cannot delete them when it is killed."""
    said = Path(folder, "said")
    with said.open("wb") as errors:  # not a pipe, which its own children may hold open when it has been killed
        compiler = subprocess.Popen(
            command,
            env=os.environ | {"TMPDIR": folder},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
    _compilers.add(compiler)
    try:
        if _is_over.is_set():
            compiler.terminate()
        code = compiler.wait(MAX_BUILD_S)
    finally:
        compiler.kill()
        compiler.wait()
        _compilers.discard(compiler)
    if _is_over.is_set():
        raise RuntimeError("this process is about to end")
    if code != 0:
        raise OSError(f"{command[0]} failed ({code}): {said.read_text(errors='replace').strip()[-500:]}")


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def _cache_folders() -> tuple[Path, Path]:
    """Where libraries are looked for, and built: the second where the first cannot be written."""
    return (Path.home() / ".cache" / "dejavu").resolve(), Path(tempfile.gettempdir(), f"dejavu-kernels-{os.getuid()}")


def _writable_folder() -> Path:
    for folder in _cache_folders():
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            logger.info("%s cannot be made", folder)
        if _is_ours(folder) and os.access(folder, os.W_OK):
            return folder
    return Path(tempfile.mkdtemp(prefix="dejavu-kernels-"))


def _is_ours(folder: Path) -> bool:
    """Whether nobody else can write it: code is loaded from it, and what is old in it deleted."""
    try:
        facts = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid() and not facts.st_mode & 0o022
