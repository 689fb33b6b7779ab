#if defined(__aarch64__)
#define MYLAYERS_ISA neon
#include "kernels-inl.h"
#endif
