/* Operations of the AVX2 table that the AVX-512 table shares: a table of constants cannot name another's members. */
#ifndef SMALLTHINKER_X86_SMALL_H
#define SMALLTHINKER_X86_SMALL_H

#include "smallthinker/kernels.h"

void st_avx2_quantize(const float *x, int64_t cols, st_q8x4 *out);
void st_avx2_activate(const float *g, const float *up, st_active *out);
void st_avx2_rmsnorm(const float *x, const float *w, int64_t n, float eps, float *out);
void st_avx2_axpy(float a, const float *x, float *y, int64_t n);
void st_avx2_to_f16(const float *x, uint16_t *out, int64_t n);
void st_avx2_from_f16(const uint16_t *x, float *out, int64_t n);

#endif
