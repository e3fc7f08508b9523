// Products of 4-bit codes on tensor cores, and all that is added to them before the one rounding at the end.
//
// A program computes a tile of Y. Pieces of K come into shared memory some steps ahead; each warp loads operands from
// there and keeps its sums, int32 and exact in any order, in registers. There they become float32, are scaled, and are
// corrected: U times the second factors is a product of bfloat16 on the same lines, chunks and registers.

#ifndef MASQ_CUDA_PRODUCT_H
#define MASQ_CUDA_PRODUCT_H

#include "layout.h"
#include "numbers.h"

// Where the chunks of a thread come from; rows and outputs behind the end read the last one, and are not stored.
template <class T>
struct Sources {
  const uint8_t* from[T::kCopies];

  MASQ_DEVICE Sources(const Product& given, TilePlace tile, int64_t first_line) {
#pragma unroll
    for (int i = 0; i < T::kCopies; ++i) {
      int at = thread_index() + i * T::kThreads, line = at / kChunks;
      bool left = line < T::kRows;
      int64_t index = left ? tile.row + line : tile.output + (line - T::kRows), last = left ? given.rows : given.outputs;
      index = index < last ? index : last - 1;
      from[i] = (left ? given.x : given.w) + index * given.line + first_line * kLine + at % kChunks * kChunk;
    }
  }

  // One piece of K into a stage; the next call copies the next.
  MASQ_DEVICE void copy(uint8_t* stage) {
#pragma unroll
    for (int i = 0; i < T::kCopies; ++i) {
      int at = thread_index() + i * T::kThreads;
      if (T::kLines * kChunks % T::kThreads == 0 || at < T::kLines * kChunks)
        copy_async(stage + place_of(at / kChunks, at % kChunks), from[i]);
      from[i] += kLine;
    }
  }
};

// Add the product of the lines of one stage to the sums of a warp: codes to int32, or bfloat16 to float32.
template <class T, class Sum>
MASQ_DEVICE void multiply_lines(Sum (&sums)[T::kLeft][T::kRight][4], const uint8_t* stage) {
  int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
  int left_at = T::warp_row(warp) + left_line(lane), right_at = T::kRows + T::warp_output(warp) + right_line(lane);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    uint32_t left[T::kLeft][4], right[T::kRight][2];
    int chunk = step * kChunks / kSteps;
#pragma unroll
    for (int i = 0; i < T::kLeft; ++i)
      load_matrices(left[i], stage + place_of(left_at + i * kLeftRows, chunk + left_chunk(lane)));
#pragma unroll
    for (int j = 0; j < T::kRight; j += 2) {
      uint32_t two[4];
      load_matrices(two, stage + place_of(right_at + j * kRightRows, chunk + right_chunk(lane)));
      right[j][0] = two[0], right[j][1] = two[1], right[j + 1][0] = two[2], right[j + 1][1] = two[3];
    }
#pragma unroll
    for (int i = 0; i < T::kLeft; ++i)
#pragma unroll
      for (int j = 0; j < T::kRight; ++j) multiply_add(sums[i][j], left[i], right[j]);
  }
}

// The sums of a tile over lines ``first`` to ``last`` of K.
template <class T>
MASQ_DEVICE void multiply_codes(int32_t (&sums)[T::kLeft][T::kRight][4], const Product& given, TilePlace tile,
                                int64_t first, int64_t last) {
  uint8_t* shared = shared_memory();
  Sources<T> sources(given, tile, first);
#pragma unroll
  for (int stage = 0; stage < T::kStages - 1; ++stage) {
    if (first + stage < last) sources.copy(shared + stage * T::kStage);
    commit_copies();
  }
  int read = 0, write = T::kStages - 1;
  for (int64_t line = first; line < last; ++line) {
    wait_copies<T::kStages - 2>();
    sync_threads();  // The stage is there for all, and none reads any more the one that is written next.
    if (line + T::kStages - 1 < last) sources.copy(shared + write * T::kStage);
    commit_copies();
    multiply_lines<T>(sums, shared + read * T::kStage);
    read = read + 1 == T::kStages ? 0 : read + 1;
    write = write + 1 == T::kStages ? 0 : write + 1;
  }
  wait_copies<0>();
  sync_threads();
}

// Eight ranks of an output of a second factor in bfloat16, which holds every code of 8 bits.
MASQ_DEVICE Four right_chunk_of(const Term& term, int64_t output, int64_t rank) {
  Four found = {};
  if (!term.coded) return *(const Four*)((const uint16_t*)term.right + output * term.depth + rank);
  Two codes = *(const Two*)((const int8_t*)term.right + output * term.depth + rank);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    float value = (float)(int8_t)(codes.words[i / 4] >> (i % 4 * 8));
    found.words[i / 2] |= number_to_bits(value) >> 16 << (i % 2 * 16);
  }
  return found;
}

struct Part {
  int64_t begin, end, column, count;
};

MASQ_DEVICE Part part_of(const Term& term, int index) {
  const int32_t* four = term.parts + 4 * index;
  return {four[0], four[1], four[2], four[3]};
}

// Lines of U and of second factors for ranks from ``start`` of a part, where the first stage was.
template <class T>
MASQ_DEVICE void gather_factors(const Term& term, Part part, int64_t start, const int32_t* places, int64_t first_output) {
  uint8_t* shared = shared_memory();
  for (int at = thread_index(); at < T::kLines * kChunks; at += T::kThreads) {
    int line = at / kChunks;
    int64_t rank = start + at % kChunks * (kRanks / kChunks), output = first_output + (line - T::kRows);
    Four numbers = {};
    if (line < T::kRows) {
      if (places[line] >= 0) numbers = *(const Four*)(term.u + places[line] * term.width + part.column + rank);
    } else if (output >= part.begin && output < part.end) {
      numbers = right_chunk_of(term, output, rank);
    }
    *(Four*)(shared + place_of(line, at % kChunks)) = numbers;
  }
}

// Add U L2 of one modality; a tile without a row of it does not touch its factors.
template <class T>
MASQ_DEVICE void correct(float (&values)[T::kLeft][T::kRight][4], const Product& given, const Term& term, TilePlace tile) {
  int32_t* places = (int32_t*)(shared_memory() + T::kStage);
  bool has = false;
  for (int line = thread_index(); line < T::kRows; line += T::kThreads) {
    int32_t place = tile.row + line < given.rows ? term.places[tile.row + line] : -1;
    places[line] = place;
    has |= place >= 0;
  }
  if (!any_thread(has)) return;
  for (int index = 0; index < term.num_parts; ++index) {
    Part part = part_of(term, index);
    if (part.begin >= tile.output + T::kOutputs || part.end <= tile.output) continue;
    for (int64_t start = 0; start < part.count; start += kRanks) {
      gather_factors<T>(term, part, start, places, tile.output);
      sync_threads();
      multiply_lines<T>(values, shared_memory());
      sync_threads();
    }
  }
}

// Call ``act(i, j, pair, row, output)`` for every two neighbouring sums of a lane whose row and first output are there.
template <class T, class Act>
MASQ_DEVICE void for_pairs(const Product& given, TilePlace tile, Act act) {
  int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
#pragma unroll
  for (int i = 0; i < T::kLeft; ++i)
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      int64_t row = tile.row + T::warp_row(warp) + i * kLeftRows + sum_row(lane, 2 * pair);
#pragma unroll
      for (int j = 0; j < T::kRight; ++j) {
        int64_t output = tile.output + T::warp_output(warp) + j * kRightRows + sum_output(lane, 2 * pair);
        if (row < given.rows && output < given.outputs) act(i, j, pair, row, output);
      }
    }
}

// Sums rounded once to float32, times the scale of their row, times that of their output.
MASQ_DEVICE float scaled(int32_t sum, float x_scale, float w_scale) { return (float)sum * x_scale * w_scale; }

MASQ_DEVICE int64_t neighbour(const Product& given, int64_t output) {
  return output + 1 < given.outputs ? output + 1 : output;
}

// Everything after the exact sums.
template <class T>
MASQ_DEVICE void finish(int32_t (&sums)[T::kLeft][T::kRight][4], const Product& given, TilePlace tile) {
  float values[T::kLeft][T::kRight][4] = {};
  for_pairs<T>(given, tile, [&](int i, int j, int pair, int64_t row, int64_t output) {
    float x_scale = given.x_scale[row];
    values[i][j][2 * pair] = scaled(sums[i][j][2 * pair], x_scale, given.w_scale[output]);
    values[i][j][2 * pair + 1] = scaled(sums[i][j][2 * pair + 1], x_scale, given.w_scale[neighbour(given, output)]);
  });
  if (given.added != nullptr)
    for_pairs<T>(given, tile, [&](int i, int j, int pair, int64_t row, int64_t output) {
      int64_t place = given.added_places[row], at = place * given.outputs + output;
      if (place < 0) return;
      values[i][j][2 * pair] += load_number(given.added, at, given.added_type);
      if (output + 1 < given.outputs) values[i][j][2 * pair + 1] += load_number(given.added, at + 1, given.added_type);
    });
  for (int term = 0; term < given.num_terms; ++term) correct<T>(values, given, given.terms[term], tile);
  for_pairs<T>(given, tile, [&](int i, int j, int pair, int64_t row, int64_t output) {
    float two[2] = {values[i][j][2 * pair], values[i][j][2 * pair + 1]};
    if (given.bias != nullptr) two[0] += given.bias[output], two[1] += given.bias[neighbour(given, output)];
    store_two(given.y, row, output, given.outputs, given.type, two);
  });
}

template <class T>
MASQ_KERNEL(T::kThreads, T::kResident) multiply_tile(const Product given) {
  TilePlace tile = tile_place<T>(program_index(), given.rows, given.outputs);
  int slice = slice_index();
  int64_t lines = given.line / kLine;
  int32_t sums[T::kLeft][T::kRight][4] = {};
  multiply_codes<T>(sums, given, tile, slice_begin(lines, slice, given.slices),
                    slice_begin(lines, slice + 1, given.slices));
  if (given.slices == 1) {
    finish<T>(sums, given, tile);
    return;
  }
  for_pairs<T>(given, tile, [&](int i, int j, int pair, int64_t row, int64_t output) {
    int32_t* to = given.sums + (slice * given.rows + row) * given.outputs + output;
    to[0] = sums[i][j][2 * pair];
    if (output + 1 < given.outputs) to[1] = sums[i][j][2 * pair + 1];
  });
}

constexpr int kCombineThreads = 256;

// Y of the sums over slices of K: the same integers, so the same numbers. One thread takes two outputs.
MASQ_KERNEL(kCombineThreads, 1) combine_slices(const Product given) {
  int64_t pairs = (given.outputs + 1) / 2, index = program_index() * kCombineThreads + thread_index();
  int64_t row = index / pairs, output = index % pairs * 2;
  if (row >= given.rows) return;
  int32_t total[2] = {0, 0};
  int64_t next = neighbour(given, output);
  for (int slice = 0; slice < given.slices; ++slice) {
    const int32_t* from = given.sums + (slice * given.rows + row) * given.outputs;
    total[0] += from[output];
    total[1] += from[next];
  }
  float x_scale = given.x_scale[row];
  float two[2] = {scaled(total[0], x_scale, given.w_scale[output]), scaled(total[1], x_scale, given.w_scale[next])};
  if (given.bias != nullptr) two[0] += given.bias[output], two[1] += given.bias[next];
  store_two(given.y, row, output, given.outputs, given.type, two);
}

#endif
