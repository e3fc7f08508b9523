// The CUDA kernels as a library for a processor, see emulated.h.

#include "emulated.h"
//
#include <entry.h>

extern "C" {

// Whether the last threads and warps run first, and whether asynchronous copies are done at once.
void masq_emulate(int last_first, int eager) {
  emulated::state().last_first = last_first != 0;
  emulated::state().eager = eager != 0;
}

// How often two lines of a matrix load lay in the same banks, since the last call.
int64_t masq_emulated_conflicts() {
  int64_t found = emulated::state().conflicts;
  emulated::state().conflicts = 0;
  return found;
}
}
