// A GPU for tests: the names of masq/kernels/cuda/csrc/device.h on a processor, one fiber for each thread of a program.
//
// Matrix instructions follow the fragments of the PTX ISA (9.7.14.5, mma.m16n8k64 with .s4 and mma.m16n8k16 with .bf16)
// element by element, and know nothing of layout.h. Timing is as bad as the rules allow: a thread runs until it has to
// wait for others, warps take turns from the first or from the last, and asynchronous copies are done when they are
// issued, or not before they are waited for. Shared memory is full of garbage when a program begins.

#ifndef MASQ_EMULATED_H
#define MASQ_EMULATED_H

#include <setjmp.h>
#include <stdlib.h>
#include <ucontext.h>

#include <deque>
#include <vector>

#include "../../masq/kernels/csrc/common.h"

#define MASQ_DEVICE inline
#define MASQ_KERNEL(threads, resident) inline void

namespace emulated {

constexpr int kLanes = 32;
constexpr size_t kStack = 1 << 16;
constexpr int kDeadlock = -100, kOutside = -101;

struct Copy {
  void* to;
  uint8_t bytes[16];
};

struct Thread {
  ucontext_t start;
  jmp_buf here;
  std::vector<uint8_t> stack = std::vector<uint8_t>(kStack);
  bool begun, done;
  const int* waits_for;  // It goes on when this is no longer ``seen``.
  int seen;
  std::deque<std::vector<Copy>> groups;
  std::vector<Copy> open;
};

struct Meeting {
  int arrived = 0, generation = 0;
};

// What a lane hands to an instruction of its warp, and what it gets back.
struct Operand {
  const void* address;
  uint32_t left[4], right[2], result[4];
};

struct Warp {
  Meeting meeting;
  Operand operands[kLanes];
};

struct State {
  bool last_first = false, eager = false;
  int64_t program = 0;
  int slice = 0, threads = 0, current = 0;
  std::vector<Thread> pool;
  std::vector<Warp> warps;
  Meeting program_meeting;
  bool said = false, answer = false;
  uint8_t *shared = nullptr, *shared_end = nullptr;
  int64_t conflicts = 0;
  int error = 0;
  void (*body)() = nullptr;
  jmp_buf scheduler;
};

inline State& state() {
  static State one;
  return one;
}

inline Thread& self() { return state().pool[state().current]; }
inline Warp& own_warp() { return state().warps[state().current / kLanes]; }
inline int lane() { return state().current % kLanes; }
inline Operand& own_operand() { return own_warp().operands[lane()]; }

inline void pause() {
  if (_setjmp(self().here) == 0) _longjmp(state().scheduler, 1);
}

// Wait until all have arrived; the last one acts for them.
template <class Act>
void meet(Meeting& meeting, int count, Act act) {
  if (++meeting.arrived == count) {
    act();
    meeting.arrived = 0;
    ++meeting.generation;
    return;
  }
  self().waits_for = &meeting.generation;
  self().seen = meeting.generation;
  pause();
}

inline void check_shared(const void* at, size_t bytes) {
  if ((const uint8_t*)at < state().shared || (const uint8_t*)at + bytes > state().shared_end) state().error = kOutside;
}

inline void perform(std::vector<Copy>& group) {
  for (Copy& copy : group) memcpy(copy.to, copy.bytes, 16);
}

inline void fiber() {
  state().body();
  self().done = true;
  _longjmp(state().scheduler, 1);
}

inline bool runnable(const Thread& thread) {
  return !thread.done && (thread.waits_for == nullptr || *thread.waits_for != thread.seen);
}

inline void resume(int index) {
  state().current = index;
  Thread& thread = self();
  if (_setjmp(state().scheduler) != 0) return;
  if (thread.begun) _longjmp(thread.here, 1);
  thread.begun = true;
  setcontext(&thread.start);
}

// Every warp runs as far as it can before the next one does.
inline bool run_warp(int warp) {
  bool any = false;
  for (bool went = true; went; any |= went) {
    went = false;
    for (int i = 0; i < kLanes; ++i) {
      int index = warp * kLanes + (state().last_first ? kLanes - 1 - i : i);
      if (!runnable(state().pool[index])) continue;
      resume(index);
      went = true;
    }
  }
  return any;
}

inline void begin_program() {
  State& s = state();
  s.warps.assign(s.threads / kLanes, Warp());
  s.program_meeting = Meeting();
  if ((int)s.pool.size() < s.threads) s.pool.resize(s.threads);
  for (int i = 0; i < s.threads; ++i) {
    Thread& thread = s.pool[i];
    thread.begun = thread.done = false;
    thread.waits_for = nullptr;
    thread.groups.clear();
    thread.open.clear();
    getcontext(&thread.start);
    thread.start.uc_stack.ss_sp = thread.stack.data();
    thread.start.uc_stack.ss_size = kStack;
    thread.start.uc_link = nullptr;
    makecontext(&thread.start, fiber, 0);
  }
}

inline int run_program() {
  begin_program();
  int warps = state().threads / kLanes;
  for (bool went = true; went;) {
    went = false;
    for (int i = 0; i < warps; ++i) went |= run_warp(state().last_first ? warps - 1 - i : i);
  }
  for (int i = 0; i < state().threads; ++i)
    if (!state().pool[i].done) return kDeadlock;
  return state().error;
}

inline int code_of(const uint32_t* words, int index) {
  int code = words[index / 8] >> (index % 8 * 4) & 15;
  return code < 8 ? code : code - 16;
}

inline float bfloat_of(const uint32_t* words, int index) { return bits_to_float(words[index / 2] >> (index % 2 * 16) << 16); }

// mma.m16n8k64: 32 elements of A, 16 of B and 4 of C in every lane, where the PTX ISA puts them.
inline void multiply_s4(Warp& warp) {
  static int a[16][64], b[64][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    int group = lane >> 2, in_group = lane % 4;
    for (int i = 0; i < 32; ++i) {
      int row = i < 8 || (16 <= i && i < 24) ? group : group + 8;
      int column = i < 16 ? in_group * 8 + (i & 7) : in_group * 8 + (i & 7) + 32;
      a[row][column] = code_of(warp.operands[lane].left, i);
    }
    for (int i = 0; i < 16; ++i) {
      int row = i < 8 ? in_group * 8 + (i & 7) : in_group * 8 + (i & 7) + 32;
      b[row][group] = code_of(warp.operands[lane].right, i);
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    int group = lane >> 2, in_group = lane % 4;
    for (int i = 0; i < 4; ++i) {
      int row = i < 2 ? group : group + 8, column = in_group * 2 + (i & 1), sum = (int)warp.operands[lane].result[i];
      for (int k = 0; k < 64; ++k) sum += a[row][k] * b[k][column];
      warp.operands[lane].result[i] = (uint32_t)sum;
    }
  }
}

// mma.m16n8k16 with .bf16: 8 elements of A, 4 of B and 4 of C in every lane.
inline void multiply_bf16(Warp& warp) {
  static float a[16][16], b[16][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    int group = lane >> 2, in_group = lane % 4;
    for (int i = 0; i < 8; ++i) {
      int row = i < 2 || (4 <= i && i < 6) ? group : group + 8;
      int column = i < 4 ? in_group * 2 + (i & 1) : in_group * 2 + (i & 1) + 8;
      a[row][column] = bfloat_of(warp.operands[lane].left, i);
    }
    for (int i = 0; i < 4; ++i) {
      int row = i < 2 ? in_group * 2 + (i & 1) : in_group * 2 + (i & 1) + 8;
      b[row][group] = bfloat_of(warp.operands[lane].right, i);
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    int group = lane >> 2, in_group = lane % 4;
    for (int i = 0; i < 4; ++i) {
      int row = i < 2 ? group : group + 8, column = in_group * 2 + (i & 1);
      float sum = bits_to_float(warp.operands[lane].result[i]);
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      warp.operands[lane].result[i] = float_to_bits(sum);
    }
  }
}

// ldmatrix .x4: lane i gives the address of line i % 8 of matrix i / 8, and gets word i % 4 of line i / 4 of each.
inline void load_four(Warp& warp) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    unsigned banks = 0;
    for (int line = 0; line < 8; ++line) {
      const uint8_t* from = (const uint8_t*)warp.operands[matrix * 8 + line].address;
      check_shared(from, 16);
      if (state().error) return;
      unsigned bank = 1u << ((size_t)(from - state().shared) / 16 % 8);
      state().conflicts += (banks & bank) != 0;
      banks |= bank;
      for (int word = 0; word < 4; ++word) memcpy(&warp.operands[line * 4 + word].result[matrix], from + word * 4, 4);
    }
  }
}

template <class Number>
void multiply(Number (&sums)[4], const uint32_t (&left)[4], const uint32_t (&right)[2], void (*instruction)(Warp&)) {
  Operand& own = own_operand();
  memcpy(own.left, left, sizeof left);
  memcpy(own.right, right, sizeof right);
  memcpy(own.result, sums, sizeof sums);
  meet(own_warp().meeting, kLanes, [instruction] { instruction(own_warp()); });
  memcpy(sums, own.result, sizeof sums);
}

}  // namespace emulated

inline int thread_index() { return emulated::state().current; }
inline int num_threads() { return emulated::state().threads; }
inline int64_t program_index() { return emulated::state().program; }
inline int slice_index() { return emulated::state().slice; }
inline uint8_t* shared_memory() { return emulated::state().shared; }

inline void sync_threads() { emulated::meet(emulated::state().program_meeting, num_threads(), [] {}); }

inline bool any_thread(bool said) {
  emulated::State& s = emulated::state();
  s.said |= said;
  emulated::meet(s.program_meeting, num_threads(), [&s] { s.answer = s.said, s.said = false; });
  return s.answer;
}

inline uint32_t max_of_warp(uint32_t value) {
  using namespace emulated;
  own_operand().left[0] = value;
  meet(own_warp().meeting, kLanes, [] {
    uint32_t highest = 0;
    for (const Operand& one : own_warp().operands) highest = one.left[0] > highest ? one.left[0] : highest;
    for (Operand& one : own_warp().operands) one.result[0] = highest;
  });
  return own_operand().result[0];
}

inline void copy_async(void* to, const void* from) {
  using namespace emulated;
  check_shared(to, 16);
  if (state().error) return;
  Copy copy = {to, {}};
  memcpy(copy.bytes, from, 16);
  if (state().eager) memcpy(to, copy.bytes, 16);
  else self().open.push_back(copy);
}

inline void commit_copies() {
  emulated::self().groups.push_back(std::move(emulated::self().open));
  emulated::self().open.clear();
}

template <int PENDING>
void wait_copies() {
  for (auto& groups = emulated::self().groups; groups.size() > PENDING; groups.pop_front()) emulated::perform(groups[0]);
}

inline void load_matrices(uint32_t (&to)[4], const void* from) {
  using namespace emulated;
  own_operand().address = from;
  meet(own_warp().meeting, kLanes, [] { load_four(own_warp()); });
  memcpy(to, own_operand().result, sizeof to);
}

inline void multiply_add(int32_t (&sums)[4], const uint32_t (&left)[4], const uint32_t (&right)[2]) {
  emulated::multiply(sums, left, right, emulated::multiply_s4);
}

inline void multiply_add(float (&sums)[4], const uint32_t (&left)[4], const uint32_t (&right)[2]) {
  emulated::multiply(sums, left, right, emulated::multiply_bf16);
}

inline float bits_to_number(uint32_t bits) { return bits_to_float(bits); }
inline uint32_t number_to_bits(float value) { return float_to_bits(value); }
inline uint16_t number_to_bfloat16(float value) { return to_bfloat(value); }
inline uint16_t number_to_float16(float value) { return to_half(value); }
inline float float16_to_number(uint16_t bits) { return half_to_float(bits); }

template <class Arguments>
int launch(void (*kernel)(Arguments), int64_t programs, int slices, int threads, int shared, void*,
           const Arguments& given) {
  static void (*chosen)(Arguments);
  static const Arguments* arguments;
  chosen = kernel, arguments = &given;
  emulated::State& s = emulated::state();
  s.body = [] { chosen(*arguments); };
  s.threads = threads, s.error = 0;
  std::vector<uint8_t> memory(shared + 128);
  s.shared = (uint8_t*)(((uintptr_t)memory.data() + 127) / 128 * 128), s.shared_end = s.shared + shared;
  for (s.slice = 0; s.slice < slices; ++s.slice)
    for (s.program = 0; s.program < programs; ++s.program) {
      memset(s.shared, 0xa5, shared);
      if (int failed = emulated::run_program()) return failed;
    }
  return 0;
}

inline int use_device(int) { return 0; }

inline const char* error_text(int error) {
  return error == emulated::kDeadlock ? "threads wait for each other" : "shared memory is left";
}

#endif
