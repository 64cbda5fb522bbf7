/* AVX-VNNI (256 bits): four byte products are added to a 32-bit lane in one instruction. */
#define DOT(sum, u, s) _mm256_dpbusd_avx_epi32(sum, u, s)
#define DOTS(bits) 8
#define TO_I32(sum) (sum)
#define DOT_SIGNED(w, s) _mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), _mm256_abs_epi8(w), _mm256_sign_epi8(s, w))
#include "vec256.h"

void st_fill_avxvnni(st_kernels *k) {
    ST_ENTER_MATRICES
    k->attention_q8 = attention_q8;
}
