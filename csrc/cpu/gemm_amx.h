// bfloat16 products on AMX: which thread packs and computes what.
#pragma once

#include "gemm.h"

namespace mylayers::cpu {

// Rows up to which each thread packs columns of its own; of more rows all threads pack first.
constexpr int64_t kAmxPassRows = 256;
// Rows of a tile.
constexpr int64_t kAmxTileRows = 16;

// out (m, n), rows `ld_out` apart, = act(a (m, k) @ b (k, n) + bias (n) or nothing), for a and b
// of In, bfloat16_t or float rounded to it, whose rows or columns are contiguous; summed in float32
// and rounded once to Out, bfloat16_t or float. m, n, k > 0. A row of out depends on its row of a,
// on b and on bias alone, to the bit. On so many threads, or on this one.
template <class In, class Out>
void gemm_amx(
    int64_t m, int64_t n, int64_t k, Matrix<In> a, Matrix<In> b, const float* bias, Activation act,
    Out* out, int64_t ld_out, int64_t threads);

}  // namespace mylayers::cpu
