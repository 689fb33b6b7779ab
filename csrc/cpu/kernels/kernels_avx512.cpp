#if defined(__x86_64__)
#define MYLAYERS_ISA avx512
#include "kernels-inl.h"
#endif
