"""What nvcc makes of the CUDA kernels, and where libraries are kept; no GPU is needed.

Registers, spills and shared memory decide whether a kernel can run, and how many of them at a time; instructions,
whether tensor cores multiply 4-bit codes.
"""

from __future__ import annotations

import ctypes
import dataclasses
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from masq.kernels.base import LinearSpec
from masq.kernels.build import BuildError
from masq.kernels.cuda import build
from masq.kernels.cuda import kernel as module
from masq.kernels.cuda.kernel import MAX_INPUTS, CudaKernel
from masq.kernels.cuda.tiles import SHARED_MEMORY, TILES
from masq.numerics.scheme import LinearFormat, TensorFormat
from tests.kernels import cases
from tests.kernels.emulating import compile_emulator, emulated_kernel, functions

NVCC = build.find_compiler()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc on the path")
# Those that have the instruction; later ones emulate it, at the cost of registers.
NATIVE = (80, 86, 89)
CAPABILITIES = [80, *(pytest.param(one, marks=pytest.mark.slow) for one in (86, 89, 90))]
REGISTERS = 65536
SHARED_OF_PROCESSOR = {80: 164 * 1024, 86: 100 * 1024, 89: 100 * 1024}
RESERVED = 1024
RESIDENT = (3, 3, 2, 1)
"""Programs of each tile to a multiprocessor, as ``csrc/entry.h`` asks for."""


def disassembler() -> str | None:
    """cuobjdump on the path, or the one that Triton brings."""
    found = shutil.which("cuobjdump")
    spec = None if found else find_spec("triton")
    if spec is None or spec.origin is None:
        return found
    brought = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"
    return str(brought) if brought.exists() else None


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Library and report of ptxas by capability, made once."""
    made: dict[int, tuple[Path, str]] = {}

    def get(capability: int) -> tuple[Path, str]:
        if capability not in made:
            target = tmp_path_factory.mktemp("cuda") / build.file_name(capability)
            try:
                report = build.compile_sources(str(NVCC), capability, target, ("-Xptxas=-v",))
            except BuildError as error:
                if "No such file" in str(error) or "not found" in str(error):
                    pytest.skip(f"nvcc lacks parts of the toolkit: {error}")
                raise
            made[capability] = target, report
        return made[capability]

    return get


def usage(report: str) -> dict[str, tuple[int, int, int]]:
    """Registers, bytes spilled and bytes of stack of every kernel, by its mangled name."""
    found = {}
    for part in report.split("Compiling entry function '")[1:]:
        numbers = [re.search(rf"(\d+) {what}|Used (\d+) {what}", part) for what in ("registers", "bytes spill stores")]
        stack = re.search(r"(\d+) bytes stack frame", part)
        assert all(numbers)
        assert stack
        registers, spilled = (int(number[1] or number[2]) for number in numbers if number)
        found[part.split("'")[0]] = registers, spilled, int(stack[1])
    return found


@needs_nvcc
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_keep_within_the_limits_of_their_gpu(compiled, capability, record_property):
    path, report = compiled(capability)
    kernels, four = usage(report), (ctypes.c_int32 * 4)()
    library = build.load(path)
    assert len(kernels) == len(TILES) + 2
    for index, tile in enumerate(TILES):
        [name] = [one for one in kernels if f"TileILi{tile.rows}ELi{tile.outputs}E" in one]
        assert library.masq_cuda_tile(index, four) == 0
        registers, spilled, stack = kernels[name]
        _, _, threads, shared = four
        record_property(f"{tile.rows}x{tile.outputs}", f"{registers} registers, {shared} bytes")
        assert shared <= SHARED_MEMORY[capability]
        assert registers <= 255
        if capability in NATIVE:
            assert (spilled, stack) == (0, 0)
            assert registers * threads * RESIDENT[index] <= REGISTERS
            assert (shared + RESERVED) * RESIDENT[index] <= SHARED_OF_PROCESSOR[capability]
    for name, (_, spilled, stack) in kernels.items():
        assert "Tile" in name or (spilled, stack) == (0, 0)


@needs_nvcc
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_tensor_cores_multiply_codes_of_four_bits(compiled, capability):
    tool = disassembler()
    if tool is None:
        pytest.skip("no cuobjdump on the path, and none with triton")
    text = subprocess.run([tool, "-sass", compiled(capability)[0]], capture_output=True, text=True, check=True).stdout
    functions_of = {part.split("\n")[0]: part for part in text.split("Function : ")[1:]}
    for tile in TILES:
        [sass] = [part for name, part in functions_of.items() if f"TileILi{tile.rows}ELi{tile.outputs}E" in name]
        assert ("IMMA.16864.S4.S4" in sass) == (capability in NATIVE)
        assert ("IMMA.16832.S8.S8" in sass) == (capability not in NATIVE)
        for instruction in ("HMMA.16816.F32.BF16", "LDSM.16.M88.4", "LDGSTS.E.BYPASS.128"):
            assert instruction in sass
    # In a scaled sum a product is rounded before another is taken: no fused multiply-add.
    assert not [part for name, part in functions_of.items() if "combine" in name and " FFMA " in part]


def test_a_library_of_other_sources_is_refused(tmp_path, monkeypatch):
    compile_emulator(tmp_path / "other.so", optimize="-O0")
    monkeypatch.setattr(build, "source_key", lambda: "other")
    with pytest.raises(BuildError, match=r"built from other sources.*build it again"):
        build.load(tmp_path / "other.so")
    (tmp_path / "none.so").write_text("nothing")
    with pytest.raises(BuildError, match="no library of CUDA kernels"):
        build.load(tmp_path / "none.so")


def test_other_sources_and_flags_make_another_library(tmp_path, monkeypatch):
    before = build.file_name(80)
    assert build.file_name(89) != before
    changed = tmp_path / "masq.cu"
    changed.write_bytes(build.SOURCES[0].read_bytes() + b"\n")
    monkeypatch.setattr(build, "SOURCES", (changed,))
    after = build.file_name(80)
    monkeypatch.setattr(build, "FLAGS", ("-O1",))
    assert len({before, after, build.file_name(80)}) == 3


def test_without_nvcc_it_says_what_to_do_and_takes_what_another_machine_has_built(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BuildError, match=r"no nvcc on the path.*masq\.kernels\.cuda\.build 80 --to FOLDER"):
        build.library.__wrapped__(80)
    built = emulated_kernel()._path
    (tmp_path / "masq" / "kernels").mkdir(parents=True)
    shutil.copy(built, tmp_path / "masq" / "kernels" / build.file_name(80))
    assert build.library.__wrapped__(80).masq_cuda_key().decode() == build.source_key()


@needs_nvcc
def test_what_does_not_compile_leaves_nothing_behind(tmp_path, monkeypatch):
    broken = tmp_path / "broken.cu"
    broken.write_text("int f( {")
    monkeypatch.setattr(build, "SOURCES", (broken,))
    with pytest.raises(BuildError, match=r"does not compile the kernels for compute capability 8\.0: .*error"):
        build.build(80, tmp_path / "made")
    assert not list((tmp_path / "made").iterdir())


@needs_nvcc
@pytest.mark.slow
def test_libraries_for_other_machines_are_built_by_a_command(tmp_path):
    build.main(["80", "89", "--to", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == [build.file_name(80), build.file_name(89)]


ACTIVATION = cases.per_token(4)
FOUR = TensorFormat(4)
SPEC = LinearSpec(64, 48, LinearFormat(FOUR, ACTIVATION), "cuda")
GROUPED = TensorFormat(4, granularity="per_group", group_size=32)


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU of this capability, as far as torch tells."""
    seen = SimpleNamespace(capability=(8, 9), there=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: seen.there)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device=None: seen.capability)
    return seen


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"device": "cpu"}, "tensors on cpu"),
        ({"format": LinearFormat(GROUPED, ACTIVATION)}, "one scale an output channel"),
        ({"format": LinearFormat(TensorFormat(4, symmetric=False), ACTIVATION)}, "weights must be symmetric"),
        ({"format": LinearFormat(TensorFormat(8), ACTIVATION)}, "weights of 8 bits"),
        ({"format": LinearFormat(FOUR, cases.per_token(8))}, "inputs of 8 bits"),
        ({"format": LinearFormat(FOUR, None)}, "not quantized"),
        ({"format": LinearFormat(FOUR, TensorFormat(4, False, "per_token"))}, "inputs must be symmetric"),
        ({"in_features": MAX_INPUTS + 1}, "overflow"),
    ],
)
def test_reasons(gpu, changes, reason):
    reasons = CudaKernel(emulated_kernel()._path).not_supported_reasons(dataclasses.replace(SPEC, **changes))
    assert len(reasons) == (reason is not None)
    assert reason is None or reason in reasons[0]


def test_reasons_of_machines(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(module.build, "find_compiler", lambda: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    [reason] = CudaKernel().not_supported_reasons(SPEC)
    assert "no nvcc on the path and no masq-cuda-" in reason
    assert "no nvcc on the path" in CudaKernel().not_supported_reasons(dataclasses.replace(SPEC, device="cpu"))[1]
    gpu.capability = (7, 5)
    assert CudaKernel().not_supported_reasons(SPEC) == ["compute capability 7.5, 8.0 is needed"]
    gpu.there = False
    assert CudaKernel().not_supported_reasons(SPEC) == ["torch finds no NVIDIA GPU"]


def test_the_emulator_is_a_library_of_these_sources():
    assert functions(emulated_kernel()).masq_cuda_key().decode() == build.source_key()
