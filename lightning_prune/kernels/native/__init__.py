"""Builds the C++ of the sparse kernels for the machine at hand, once."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import logging
import os
import platform
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch

_HERE = Path(__file__).parent
_SOURCES = ("sparse.cpp", "binding.cpp")
_FLAGS = ("-O3", "-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi")
_THREADS = "-fopenmp"
"""Without it `at::parallel_for` runs on one thread. Nothing is linked for it: PyTorch has loaded GCC's OpenMP."""

_LOG = logging.getLogger(__name__)
_TURN = threading.Lock()


def library() -> ModuleType:
    """The compiled module: built on the first call, about half a minute, and kept in torch's extension cache.

    Several processes may call it at once: one builds, the others wait. `TORCH_EXTENSIONS_DIR` moves the cache.

    Raises:
        RuntimeError: it cannot be built here; the message says why and what helps.
    """
    with _TURN:
        found = _loaded()
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


def unavailable() -> str | None:
    """Why the module cannot be had on this machine, or None; builds it if need be."""
    with _TURN:
        found = _loaded()
    return found if isinstance(found, str) else None


@functools.lru_cache(maxsize=1)
def _loaded() -> ModuleType | str:
    """The module, or why there is none: neither is tried twice."""
    if sys.platform == "win32":
        return "the SIMD kernels need GCC or Clang, which PyTorch does not build extensions with on Windows"
    try:
        name = f"lightning_prune_{_key()}"
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or caches / "torch_extensions") / name
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder / "building"):
            built = folder / f"{name}.so"
            if not built.exists():
                _build(name, folder)
            return _imported(name, built)
    except (OSError, RuntimeError, ImportError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return (
            f"the SIMD kernels could not be built: {reason[0]}; install a C++ compiler (g++ or clang++) and ninja, or "
            "go on without them"
        )


def _build(name: str, folder: Path) -> None:
    from torch.utils import cpp_extension

    _LOG.warning("Building the sparse CPU kernels for this machine, once; this takes about half a minute.")
    work = folder / "build"
    work.mkdir(exist_ok=True)
    (work / "lock").unlink(missing_ok=True)  # of a build that was killed: torch would wait for it for ever
    native = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    gcc = cpp_extension.check_compiler_is_gcc(cpp_extension.get_cxx_compiler())  # others' OpenMP PyTorch does not bring
    path = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([path, str(Path(sys.executable).parent)])  # where pip puts ninja
    try:
        cpp_extension.load(
            name,
            [str(_HERE / source) for source in _SOURCES],
            extra_cflags=[*_FLAGS, native, *([_THREADS] if gcc else [])],
            build_directory=str(work),
            is_python_module=False,
        )
    finally:
        os.environ["PATH"] = path
    (work / f"{name}.so").replace(folder / f"{name}.so")


def _imported(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _key() -> str:
    """Changes with everything that the binary depends on: sources, PyTorch, Python and the processor."""
    parts = [torch.__version__, sys.version, platform.machine(), *_FLAGS, _THREADS]
    parts += [(_HERE / name).read_text(encoding="utf-8") for name in (*_SOURCES, "sparse.h")]
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        parts += sorted({line for line in lines if line.lower().startswith(("flags", "features", "model name"))})
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a file's lock, which the system takes back should this process die."""
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
