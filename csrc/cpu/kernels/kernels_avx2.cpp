#if defined(__x86_64__)
#define MYLAYERS_ISA avx2
#include "kernels-inl.h"
#endif
