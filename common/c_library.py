"""Libraries in C, built with the machine's compiler on first use and kept in the user's cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

MAX_BUILD_S = 60.0
_ABANDONED_S = 3600.0
"""A folder of a build that is so much older than the newest was left by a process that was killed."""

logger = logging.getLogger(__name__)


def build_library(source: Path, flags: Sequence[str], link_flags: Sequence[str]) -> Path:
    """The path of the library, which is built for this very processor unless it was before. Raises `OSError` or
    `subprocess.SubprocessError`."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        raise FileNotFoundError("no C compiler (cc, gcc or clang)")
    command = [compiler, "-O3", "-march=native", "-std=gnu11", *flags, "-fPIC"]
    digest = hashlib.sha256(source.read_bytes())
    digest.update(repr((command, list(link_flags), _processor())).encode())
    library = _cache_folder() / f"{source.stem}-{digest.hexdigest()[:24]}.so"
    if library.exists():
        return library
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        _sweep(library.parent, Path(folder).stat().st_mtime - _ABANDONED_S)
        compiled, linked = f"{folder}/compiled.o", f"{folder}/linked.so"
        _run([*command, "-c", str(source), "-o", compiled], folder)
        _run([compiler, "-shared", compiled, "-o", linked, *link_flags], folder)
        # another process may build the same: the last one wins, and both are whole
        os.replace(linked, library)
    return library


def _sweep(cache: Path, oldest_mtime: float) -> None:
    """Deletes folders of builds that nobody will finish."""
    for folder in cache.iterdir():
        with contextlib.suppress(OSError):  # another process may do the same
            if folder.is_dir() and folder.stat().st_mtime < oldest_mtime:
                shutil.rmtree(folder, ignore_errors=True)


def _run(command: list[str], folder: str) -> None:
    """The compiler's own files lie in `folder`, too: it cannot delete them when it is killed."""
    done = subprocess.run(
        command,
        env=os.environ | {"TMPDIR": folder},
        capture_output=True,
        text=True,
        timeout=MAX_BUILD_S,
        check=False,
    )
    if done.returncode != 0:
        raise OSError(f"{command[0]} failed: {done.stderr.strip()[-500:]}")


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def _cache_folder() -> Path:
    """A folder that nobody else can write: code is loaded from it."""
    folder = Path.home() / ".cache" / "dejavu"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = folder.stat()
        if facts.st_uid == os.getuid() and not facts.st_mode & 0o022 and os.access(folder, os.W_OK):
            return folder
    except OSError:
        logger.info("%s cannot be used", folder)
    return Path(tempfile.mkdtemp(prefix="dejavu-kernels-"))
