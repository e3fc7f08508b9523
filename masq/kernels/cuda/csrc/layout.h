// Where everything lies: shared by the kernels and by the emulator that proves it without a GPU (tests/kernels).
//
// A line is 64 bytes of one row of a tile in shared memory: 128 codes of 4 bits, or 32 numbers of 16 bits. One
// instruction of a tensor core takes half a line of 16 rows (left) and of 8 outputs (right): 64 codes, or 16 numbers.
// Codes are multiplied as they are stored, the even input in the lower half of a byte: eight of them are one register.

#ifndef MASQ_CUDA_LAYOUT_H
#define MASQ_CUDA_LAYOUT_H

#include <stdint.h>

#ifdef __CUDACC__
#define MASQ_BOTH __host__ __device__ __forceinline__
#else
#define MASQ_BOTH inline
#endif

constexpr int kLine = 64, kChunk = 16, kChunks = kLine / kChunk, kSteps = 2;
constexpr int kWarp = 32, kLeftRows = 16, kRightRows = 8;
constexpr int kRanks = kLine / 2;  // Ranks of a correction that a line holds.
constexpr int kGroup = 8;          // Tiles of rows that share a column of weights while the second cache has it.

// Byte of a chunk of a line within a tile. Chunks change places by pairs of lines, so that any eight lines that one
// phase of a matrix load reads at the same chunk lie in different banks.
MASQ_BOTH int place_of(int line, int chunk) { return line * kLine + ((chunk ^ (line >> 1 & 3)) * kChunk); }

// The line and the chunk whose address a lane gives when four 8 x 16-byte matrices are loaded at once. Left: lines 0-7
// and 8-15 of the first chunk, then of the second, in the order of the registers of an operand of 16 rows.
MASQ_BOTH int left_line(int lane) { return lane & 15; }
MASQ_BOTH int left_chunk(int lane) { return lane >> 4; }

// Right: two operands of 8 outputs, the first and the second chunk of one, then of the other.
MASQ_BOTH int right_line(int lane) { return (lane & 7) + (lane >> 4) * kRightRows; }
MASQ_BOTH int right_chunk(int lane) { return lane >> 3 & 1; }

// Row and output of the four sums that a lane holds of a product of 16 by 8.
MASQ_BOTH int sum_row(int lane, int index) { return (lane >> 2) + (index >> 1) * 8; }
MASQ_BOTH int sum_output(int lane, int index) { return (lane & 3) * 2 + (index & 1); }

// A tile of ROWS by OUTPUTS, computed by WARPS_M by WARPS_N warps from STAGES pieces of K in shared memory, RESIDENT
// programs to a multiprocessor.
template <int ROWS, int OUTPUTS, int WARPS_M, int WARPS_N, int STAGES, int RESIDENT>
struct Tile {
  static constexpr int kRows = ROWS, kOutputs = OUTPUTS, kStages = STAGES, kResident = RESIDENT;
  static constexpr int kThreads = WARPS_M * WARPS_N * kWarp;
  static constexpr int kLeft = ROWS / WARPS_M / kLeftRows, kRight = OUTPUTS / WARPS_N / kRightRows;
  static constexpr int kLines = ROWS + OUTPUTS, kStage = kLines * kLine, kShared = STAGES * kStage;
  static constexpr int kCopies = (kLines * kChunks + kThreads - 1) / kThreads;  // Chunks that a thread copies.
  static_assert(kLeft * WARPS_M * kLeftRows == ROWS && kRight * WARPS_N * kRightRows == OUTPUTS && kRight % 2 == 0, "");
  static_assert(STAGES > 1 && ROWS * (int)sizeof(int32_t) <= kStage, "the second stage holds places of rows");

  // First row and output of a warp within the tile.
  static MASQ_BOTH int warp_row(int warp) { return warp / WARPS_N * kLeft * kLeftRows; }
  static MASQ_BOTH int warp_output(int warp) { return warp % WARPS_N * kRight * kRightRows; }
};

struct TilePlace {
  int64_t row, output;
};

// First row and output of a program: kGroup tiles of rows beside each other, then the next outputs.
template <class T>
MASQ_BOTH TilePlace tile_place(int64_t program, int64_t rows, int64_t outputs) {
  int64_t tiles_m = (rows + T::kRows - 1) / T::kRows, tiles_n = (outputs + T::kOutputs - 1) / T::kOutputs;
  int64_t group = program / (kGroup * tiles_n), within = program % (kGroup * tiles_n);
  int64_t size = tiles_m - group * kGroup < kGroup ? tiles_m - group * kGroup : kGroup;
  return {(group * kGroup + within % size) * T::kRows, within / size * T::kOutputs};
}

// First line of a slice of K; that of the next slice is its end.
MASQ_BOTH int64_t slice_begin(int64_t lines, int slice, int slices) { return lines * slice / slices; }

#endif
