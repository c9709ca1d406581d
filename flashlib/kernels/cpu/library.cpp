// The library that flashlib loads: plain C functions, compiled once for each instruction set. No C++ runtime is needed.
#include "backward.h"
#include "narrow.h"

extern "C" {
__attribute__((visibility("default"))) int64_t flashlib_problem_size(void) { return sizeof(Problem); }

__attribute__((visibility("default"))) void flashlib_forward(Problem* p) { forward(*p); }

__attribute__((visibility("default"))) void flashlib_backward(Problem* p) { backward(*p); }
}
