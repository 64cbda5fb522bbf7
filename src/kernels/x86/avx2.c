/* AVX2 + FMA + F16C: products of a block are summed in 16 bits (8 x 2 x 15 x 127 = 30480 fits), widened once. */
#define ST_TABLE st_kernels_avx2
#define ST_TABLE_NAME "avx2"
#define DOT(sum, u, s) _mm256_add_epi16(sum, _mm256_maddubs_epi16(u, s))
#define TO_I32(sum) _mm256_madd_epi16(sum, _mm256_set1_epi16(1))
/* maddubs wants one unsigned operand: |w| times s with w's sign; 2 x 128 x 127 = 32512 fits. */
#define DOT_SIGNED(w, s)                                                                                               \
    _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(s, w)), _mm256_set1_epi16(1))
#include "small.h"
#include "vec256.h"

void st_avx2_quantize(const float *x, int64_t cols, st_q8x4 *out) { quantize(x, cols, out); }
void st_avx2_activate(const float *g, const float *up, st_active *out) { activate(g, up, out); }
void st_avx2_rmsnorm(const float *x, const float *w, int64_t n, float eps, float *out) { rmsnorm(x, w, n, eps, out); }
void st_avx2_axpy(float a, const float *x, float *y, int64_t n) { axpy(a, x, y, n); }
void st_avx2_to_f16(const float *x, uint16_t *out, int64_t n) { to_f16(x, out, n); }
void st_avx2_from_f16(const uint16_t *x, float *out, int64_t n) { from_f16(x, out, n); }
