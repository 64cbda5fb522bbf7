/* AVX-VNNI (256 bits): four byte products are added to a 32-bit lane in one instruction. */
#define ST_TABLE st_kernels_avxvnni
#define ST_TABLE_NAME "avxvnni"
#define DOT(sum, u, s) _mm256_dpbusd_avx_epi32(sum, u, s)
#define TO_I32(sum) (sum)
#define DOT_SIGNED(w, s) _mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), _mm256_abs_epi8(w), _mm256_sign_epi8(s, w))
#include "vec256.h"
