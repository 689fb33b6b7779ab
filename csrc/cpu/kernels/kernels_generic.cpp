#if !defined(__aarch64__)
#define MYLAYERS_ISA generic
#include "kernels-inl.h"
#endif
