#if defined(__x86_64__)
#define MYLAYERS_ISA avx2
#define MYLAYERS_INSTRUCTIONS "avx2,fma,f16c"
#include "kernels-inl.h"
#endif
