"""Which lane holds which element: whole products in an emulated program of threads, right or noticed.

The emulator takes the fragments of matrix instructions from the PTX ISA and the kernels take them from ``layout.h``;
a product is right if both agree. That a wrong index does not pass is shown by changing each in turn.
"""

from __future__ import annotations

import shutil

import pytest
import torch

from masq.errors import NumericalError
from masq.kernels.base import LowRank, Selection
from masq.kernels.cuda import build, launch
from masq.kernels.cuda.kernel import CudaKernel
from masq.kernels.cuda.tiles import TILES
from masq.numerics.scheme import TensorFormat
from tests.kernels import cases
from tests.kernels.emulating import compile_emulator, emulated_kernel, functions

ACTIVATION = cases.per_token(4)

CHANGES = {
    "chunks that do not change places": ("(chunk ^ (line >> 1 & 3))", "chunk"),
    "a line of the left operand": ("return lane & 15;", "return lane & 15 ^ 8;"),
    "a chunk of the left operand": ("return lane >> 4;", "return 1 - (lane >> 4);"),
    "a line of the right operand": (
        "(lane & 7) + (lane >> 4) * kRightRows",
        "(lane & 7) + (lane >> 3 & 1) * kRightRows",
    ),
    "a chunk of the right operand": ("return lane >> 3 & 1;", "return lane >> 4;"),
    "a row of a sum": ("(lane >> 2) + (index >> 1) * 8", "(lane >> 2) * 2 + (index >> 1)"),
    "an output of a sum": ("(lane & 3) * 2 + (index & 1)", "(lane & 3) + (index & 1) * 4"),
    "the first row of a warp": ("return warp / WARPS_N *", "return warp % WARPS_N *"),
    "the first output of a warp": ("return warp % WARPS_N *", "return 0 *"),
    "the place of a program": ("within % size)", "within % size + 1)"),
    "the beginning of a slice": ("return lines * slice / slices;", "return (lines * slice + 1) / slices;"),
}
USUAL = ("a line of the left operand", "a chunk of the right operand", "an output of a sum")


def product_is_exact(kernel: CudaKernel, count: int, inner: int, out: int) -> bool:
    """Of random codes against int64, and of a correction against float64."""
    x, packed = cases.rows(count, inner, torch.float32), cases.weight(out, inner, TensorFormat(4))
    wanted = cases.exact(x, packed, ACTIVATION)
    held, quantized = kernel.prepare(packed, ACTIVATION), kernel.quantize(x, ACTIVATION, None)
    given = {"bias": None, "addend": None, "dtype": torch.float32}
    found = kernel.gemm(quantized, held, **given)
    plain = bool(((found.double() - wanted).abs() <= wanted.abs() * 2**-22).all())
    u, right = torch.randint(-4, 5, (count, 40)).bfloat16(), torch.randint(-4, 5, (40, out)).bfloat16()
    factors = kernel.prepare_factors([right], [out], ACTIVATION)
    assert factors is not None
    zeros = kernel.quantize(torch.zeros(count, inner), ACTIVATION, None)
    corrected = kernel.gemm(
        zeros, held, **given, low_rank=[LowRank(Selection.of(torch.arange(count), count), factors.widened(u), factors)]
    )
    return plain and torch.equal(corrected, u.float() @ right.float())


@pytest.mark.parametrize("last_first", [False, True])
@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("tile", range(len(TILES)))
def test_products_are_exact_whatever_the_order_of_threads_and_copies(monkeypatch, tile, eager, last_first):
    kernel = emulated_kernel()
    monkeypatch.setattr(launch, "choose", lambda *_: tile)
    functions(kernel).masq_emulate(int(last_first), int(eager))
    try:
        assert product_is_exact(kernel, TILES[tile].rows + 3, 1100, TILES[tile].outputs + 9)
        assert functions(kernel).masq_emulated_conflicts() == 0, "lines of a matrix load lie in the same banks"
    finally:
        functions(kernel).masq_emulate(0, 0)


@pytest.mark.parametrize("name", [n if n in USUAL else pytest.param(n, marks=pytest.mark.slow) for n in CHANGES])
def test_a_wrong_index_is_noticed(tmp_path, name, monkeypatch):
    """By a wrong product or, where lines are not told apart, by conflicts of banks."""
    shutil.copytree(build.FOLDER, tmp_path / "csrc")
    layout = tmp_path / "csrc" / "layout.h"
    before, after = CHANGES[name]
    text = layout.read_text()
    assert text.count(before) == 1
    layout.write_text(text.replace(before, after))
    compile_emulator(tmp_path / "changed.so", tmp_path / "csrc", "-O0")
    kernel = CudaKernel(tmp_path / "changed.so")
    functions(kernel).masq_emulated_conflicts()
    monkeypatch.setattr(launch, "choose", lambda *_: 1)
    monkeypatch.setattr(launch, "num_slices", lambda *_: 2)
    try:
        exact = product_is_exact(kernel, 70, 300, 90)
    except (RuntimeError, NumericalError):
        exact = False
    conflicts = functions(kernel).masq_emulated_conflicts()
    assert not exact or conflicts
    assert exact == (name == "chunks that do not change places")
