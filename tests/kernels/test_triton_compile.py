"""What the compiler makes of the Triton kernels for each GPU of the table of tiles: no GPU is needed.

Registers, spills and shared memory decide whether a kernel can run, and how many of them at a time; instructions,
whether it multiplies integers on tensor cores, and whether operands reach them without detours.
"""

from __future__ import annotations

import re
from functools import cache

import pytest
import torch

from tests.kernels.interpreting import INTERPRETED

if INTERPRETED:
    pytest.skip("a process that interprets compiles nothing", allow_module_level=True)

pytest.importorskip("triton")

from masq.kernels.triton import ops
from masq.kernels.triton.tiles import SHARED_MEMORY, VERY_FEW_ROWS, Tile, num_splits_of_few, tiles_of
from tests.kernels.compiling import CUOBJDUMP, PROCESSORS, Compiled, for_gpu

pytestmark = pytest.mark.skipif(not CUOBJDUMP.exists(), reason="triton came without the tools for NVIDIA GPUs")

CAPABILITIES = sorted(SHARED_MEMORY)
MAX_REGISTERS = 255
REGISTERS, SHARED_OF_PROCESSOR = 65536, {80: 164 * 1024, 89: 100 * 1024, 90: 228 * 1024}
RESERVED = 1024
INNER, OUTPUTS, WIDTH = 3584, 37888, 96
MAX_ROWS = 4096


def lines() -> list:
    """Every line of every table, with corrections, coded ones and none.

    By default the first line without any, and of the last ones every pair of capability, width and kind of correction.
    """
    found, kinds = [], ((None, "plain"), (torch.bfloat16, "corrected"), (torch.int8, "coded"))
    for row, capability in enumerate(CAPABILITIES):
        for four in (False, True):
            tiles = tiles_of(capability, four)
            for tile in tiles:
                for column, (factors, kind) in enumerate(kinds):
                    paired = four == (row + column) % 2
                    usual = (tile is tiles[0] and factors is None) or (tile is tiles[-1] and paired)
                    name = f"{capability}-w{4 if four else 8}-{tile.max_rows}-{kind}"
                    marks = [] if usual else [pytest.mark.slow]
                    found.append(pytest.param(capability, four, tile, factors, id=name, marks=marks))
    return found


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@cache
def product(
    capability: int, four: bool, num_rows: int, factors: torch.dtype | None, num_outputs: int = OUTPUTS
) -> list[Compiled]:
    """All kernels of one product of bfloat16 rows, two modalities being corrected in three parts, or none.

    A few seconds each, so that tests share what they compile.
    """
    bfloat16, times = torch.bfloat16, 0 if factors is None else 2
    weight = torch.empty(num_outputs, INNER // 2 if four else INNER, dtype=torch.uint8 if four else torch.int8)
    with for_gpu(capability) as made:
        ops.multiply_codes(
            *(torch.empty(num_rows, INNER, dtype=torch.int8), torch.empty(num_rows, 1)),
            *(weight, torch.empty(num_outputs), torch.empty(num_outputs), None, None),
            times * [torch.empty(9, 3 * WIDTH, dtype=bfloat16)],
            times * [torch.empty(num_rows, dtype=torch.int32)],
            times * [torch.empty(num_outputs, WIDTH, dtype=factors)],
            times * [torch.empty(3, 4, dtype=torch.int32)],
            *(four, bfloat16),
        )
    return [Compiled.of(kernel) for kernel in made]


def check_limits(compiled: Compiled, capability: int) -> None:
    assert compiled.registers <= MAX_REGISTERS
    assert compiled.local == 0, "spilled"
    assert compiled.shared <= SHARED_MEMORY[capability]


def loops(sass: str) -> list[str]:
    """What lies between a branch back and where it goes."""
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+([^;]*);", sass)]
    back = [(int(to[1], 16), at) for at, text in lines if (to := re.search(r"BRA.*0x([0-9a-f]+)", text))]
    return ["\n".join(text for at, text in lines if to <= at <= end) for to, end in back if to < end]


@pytest.mark.parametrize(("capability", "four", "tile", "factors"), lines())
def test_a_product(capability: int, four: bool, tile: Tile, factors: torch.dtype | None, record_property):
    found = product(capability, four, tile.max_rows or MAX_ROWS, factors)
    (compiled,) = (one for one in found if one.name == "multiply")
    record_property("compiled", f"{compiled.registers} registers, {compiled.shared} bytes")
    check_limits(compiled, capability)
    instruction = "wgmma.mma_async.sync.aligned" if capability == 90 else "mma.sync.aligned.m16n8k32"
    integer = [line for line in compiled.ptx.splitlines() if instruction in line and ".s32.s8.s8" in line]
    floats = [line for line in compiled.ptx.splitlines() if "mma" in line and ".bf16.bf16" in line]
    assert integer
    assert bool(floats) == (factors is not None)
    assert "st.shared.b8" not in compiled.ptx
    assert ("cp.async.bulk.tensor" in compiled.ptx) == tile.described
    if four:
        # Unpacked in the registers that tensor cores read.
        integer_loops = [loop for loop in loops(compiled.sass) if "S8.S8" in loop]
        assert integer_loops
        assert not any(re.search(r"\bSTS", loop) for loop in integer_loops)
    if factors is None:
        # Neither unpacking nor loading ahead takes codes apart byte by byte; the epilogue packs pairs of bfloat16.
        assert compiled.sass.count("PRMT") <= 32
    # Factors are read eight numbers at a time and, of many rows, ahead of their product; without alignment one by one.
    assert "LDG.E.U16" not in compiled.sass
    if factors is not None and tile.rows >= 128:
        assert compiled.sass.count("LDGSTS.E.BYPASS.128") >= 2


@pytest.mark.parametrize("factors", [None, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize(("four", "num_rows"), [(True, MAX_ROWS), (False, 512)])
def test_two_programs_share_a_processor(four, num_rows, factors):
    """So that one multiplies while the other unpacks, or adds what comes after the product."""
    (compiled,) = product(90, four, num_rows, factors)
    (tile,) = (
        one for one in tiles_of(90, four) if one.max_rows in (None, 512) and (one.max_registers or one.warps == 4)
    )
    assert 2 * compiled.registers * 32 * tile.warps <= REGISTERS
    assert 2 * (compiled.shared + RESERVED) <= SHARED_OF_PROCESSOR[90]


@pytest.mark.parametrize("four", [False, True])
def test_few_rows_are_split_and_combined(four):
    found = product(90, four, 16, None, num_outputs=3584)
    assert [one.name for one in found] == ["multiply", "combine"]
    for compiled in found:
        check_limits(compiled, 90)
    wide = product(90, four, 16, None)
    assert [one.name for one in wide] == ["multiply"]


@pytest.mark.parametrize("four", [False, True])
@pytest.mark.parametrize("num_rows", [1, VERY_FEW_ROWS])
@pytest.mark.parametrize("capability", [80, 90])
def test_a_row_or_a_few_read_weights_straight_to_registers(capability, num_rows, four):
    """Sixteen bytes at a time, multiplied four codes at once, with no shared memory and nobody to wait for."""
    (compiled,) = product(capability, four, num_rows, None)
    assert compiled.name == "multiply_few"
    check_limits(compiled, capability)
    assert compiled.sass.count("IDP.4A") == 16 * num_rows * (2 if four else 1)
    assert compiled.sass.count("LDG.E.128") >= 4
    (loop,) = loops(compiled.sass)
    assert not any(name in loop for name in ("BAR", "LDS", "STS", "LDG.E.64", "LDG.E "))
    assert num_splits_of_few(3584, 18944 // 8, PROCESSORS[90]) > 1


@pytest.mark.parametrize(
    ("capability", "num_rows"),
    [
        pytest.param(capability, num_rows, marks=() if capability == 90 or paired else pytest.mark.slow)
        for row, capability in enumerate(CAPABILITIES)
        for num_rows, paired in ((1, row == 1), (300, row == 0))
    ],
)
def test_rows(capability, num_rows):
    """Of the widths of a model of 7 billion weights: the norm has its hidden size, SiLU the larger one."""
    hidden, wide = (torch.empty(num_rows, inner, dtype=torch.bfloat16) for inner in (INNER, 18944))
    vectors, places = torch.empty(num_rows, dtype=torch.int64), torch.empty(num_rows, dtype=torch.int32)
    take, ends = {"rows": vectors, "places": places}, (127, 127.0)
    smooth = {len(rows[0]): (torch.empty(3, len(rows[0])), vectors) for rows in (hidden, wide)}
    centred = {inner: (*given, given[0].bfloat16(), vectors) for inner, given in smooth.items()}
    with for_gpu(capability) as made:
        ops.smooth_quantize(hidden, *ends, *smooth[INNER])
        ops.smooth_quantize(wide, *ends, *smooth[18944])
        ops.norm_smooth_quantize(hidden, hidden, hidden[0], 1e-6, *ends, *smooth[INNER])
        ops.silu_mul_smooth_quantize(wide, wide, *ends, *smooth[18944])
        for rows in (hidden, wide):
            ops.smooth_quantize(rows, 7, 8.75, *centred[len(rows[0])], **take)
        ops.norm_smooth_quantize(hidden, None, hidden[0], 1e-6, *ends, *centred[INNER], **take)
        ops.silu_mul_smooth_quantize(wide, wide, *ends, *centred[18944], **take)
    found = [Compiled.of(kernel) for kernel in made]
    names = ["quantize_rows", "quantize_wide_rows"]
    assert [one.name for one in found] == names * 4
    for compiled in found:
        check_limits(compiled, capability)
    # The quotient by the scale is exact, as that of the reference, and takes no branches for every value.
    assert not any("div.full" in one.ptx for one in found)
    assert all(one.ptx.count("fma.rn.f32") > 4 * one.ptx.count("div.rn.f32") > 0 for one in found)


def test_every_gpu_of_the_table_has_a_test():
    assert sorted(PROCESSORS) == CAPABILITIES
