// Whatever the compiler's default target has: SSE2 on x86-64, NEON on Arm.
#define MYLAYERS_ISA generic
#include "kernels-inl.h"
