#if defined(__x86_64__)
#define MYLAYERS_ISA avx512
#define MYLAYERS_INSTRUCTIONS "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"
#include "kernels-inl.h"
#endif
