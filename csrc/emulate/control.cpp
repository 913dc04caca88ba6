// What the tests set and ask: the order of blocks and threads, and why a launch failed.
#include "cuda_runtime.h"

extern "C" {

void gose_emulate_order(int order) { gose::emulate::machine().order = gose::emulate::Order(order); }

const char* gose_emulate_error() { return gose::emulate::machine().error.c_str(); }
}
