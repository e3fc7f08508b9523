// The library: everything is in headers, which the emulator of the tests compiles without a GPU.

#include "device.h"
//
#include "entry.h"
