"""The C++ of the SIMD kernel: built once, by whoever comes first, and by nobody who does not need it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import check_compiler_is_gcc

from lightning_prune.commands.calibrate import refusals
from lightning_prune.kernels import SIMD, Workload, native
from lightning_prune.latency.machine import Machine

SOURCES = Path(native.__file__).parent
COMPILER = shutil.which(os.environ.get("CXX", "c++"))


def launch(code: str, **environment: str) -> subprocess.Popen[str]:
    root = str(Path(__file__).parents[2])
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": root, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output(process: subprocess.Popen[str]) -> str:
    out, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return out


def test_importing_builds_nothing(tmp_path: Path) -> None:
    code = "import lightning_prune.kernels, lightning_prune.runtime; lightning_prune.kernels.SIMD()"
    output(launch(code, TORCH_EXTENSIONS_DIR=str(tmp_path / "cache")))
    assert not (tmp_path / "cache").exists()


WITHOUT = """if True:
    import torch
    from torch import nn
    from lightning_prune import accelerate
    from lightning_prune.kernels import SIMD, Workload, native
    reason = SIMD().refuses(Workload("linear", 1, 8, 8), torch.float32, torch.device("cpu"))
    assert reason == native.unavailable()
    print(reason)
    try:
        native.library()
    except RuntimeError as error:
        assert str(error) == reason
    else:
        raise SystemExit("there is a library")
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    model[0].weight.data[1:] = 0.0
    fast = accelerate(model, torch.ones(2, 8), rounds=1)
    assert "simd" not in str(fast.kernel_report())
    print(torch.allclose(fast(torch.ones(2, 8)), model(torch.ones(2, 8))))
"""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("lacking", ["compiler", "folder"])
def test_where_it_cannot_be_built_everything_else_goes_on(lacking: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache = str(tmp_path / ("file" if lacking == "folder" else "cache"))
    process = launch(WITHOUT, TORCH_EXTENSIONS_DIR=cache, CXX="/nowhere/c++", PATH="/nowhere")
    reason, same = output(process).splitlines()
    assert reason.startswith("the SIMD kernels could not be built: ")
    assert reason.endswith("install a C++ compiler (g++ or clang++) and ninja, or go on without them")
    assert ("/nowhere/c++" in reason) if lacking == "compiler" else ("file" in reason)
    assert same == "True"


BUILD = """if True:
    import logging, sys, torch
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    from lightning_prune.kernels import native
    native._FLAGS = ("-O0", "-Wno-psabi")  # which takes less time
    from pathlib import Path
    build = Path(sys.argv[1], f"lightning_prune_{native._key()}", "build")
    build.mkdir(parents=True, exist_ok=True)
    (build / "lock").touch()  # as a build leaves that was killed
    native.library()
    from lightning_prune.kernels import SIMD
    layer = torch.nn.Linear(4, 3).requires_grad_(False)
    print(torch.allclose(SIMD().build(layer)(torch.ones(2, 4)), layer(torch.ones(2, 4))))
"""


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_of_two_processes_one_builds_and_a_killed_build_blocks_nobody(tmp_path: Path) -> None:
    code = BUILD.replace("sys.argv[1]", repr(str(tmp_path)))
    both = [launch(code, TORCH_EXTENSIONS_DIR=str(tmp_path)) for _ in range(2)]
    lines = [output(process).splitlines() for process in both]
    assert [shown[-1] for shown in lines] == ["True", "True"]
    said = [line for shown in lines for line in shown if "Building the sparse CPU kernels" in line]
    assert len(said) == 1
    assert "half a minute" in said[0]
    (folder,) = tmp_path.iterdir()
    assert (folder / f"{folder.name}.so").exists()


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    program = tmp_path / "check"
    flags = ["-std=c++17", "-O0", "-march=native", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", f"-I{SOURCES}"]
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    sources = [str(Path(__file__).parents[1] / "native" / "check.cpp"), str(SOURCES / "sparse.cpp")]
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() {}")
    if subprocess.run([str(COMPILER), *sanitizers, str(probe), "-o", str(program)], capture_output=True).returncode:
        pytest.skip("the compiler has no sanitizers")
    built = subprocess.run(
        [str(COMPILER), *flags, *sanitizers, *sources, "-o", str(program)], capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    run = subprocess.run([str(program), "700", "0"], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "all right\n", "")


def test_the_key_follows_what_the_binary_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    before = native._key()
    assert native._key() == before
    monkeypatch.setattr(native, "_FLAGS", ("-O1",))
    assert native._key() != before


def test_windows_has_no_compiler_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert "on Windows" in str(native._loaded.__wrapped__())


def test_calibrate_says_why_it_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    works = {"fc": (Workload("linear", 1, 8, 8),), "head": (Workload("linear", 1, 8, 2),)}
    machine = Machine.here(torch.device("cpu"), torch.float32)
    monkeypatch.setattr(native, "_loaded", lambda: "the SIMD kernels could not be built: no compiler")
    assert refusals(SIMD(), works, machine) == {"the SIMD kernels could not be built: no compiler": 2}
    monkeypatch.setattr(native, "_loaded", lambda: sys)
    assert not refusals(SIMD(), works, machine)


@pytest.mark.skipif(COMPILER is None or not check_compiler_is_gcc(COMPILER), reason="PyTorch brings GCC's OpenMP alone")
def test_the_library_runs_on_several_threads() -> None:
    """Without OpenMP, `at::parallel_for` compiles just as well and calls nothing."""
    path = native.library().__file__
    assert path is not None
    assert b"GOMP_parallel" in Path(path).read_bytes()
