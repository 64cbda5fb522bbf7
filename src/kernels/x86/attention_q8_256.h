/* attention_q8 at 256 bits, included by vec256.h after exp8. Up to three heads share each read and widening of keys and
 * values, to 16 bits. Never included elsewhere. */
#include "smallthinker/kv.h"

/* Q8_SUMS: of the four vectors of a line of values, how many a head has sums of at once. What adds to its sum itself
 * takes five cycles until the next one may: twelve sums of three heads fill them. */
#ifdef __AVXVNNI__
#define MADD16(sum, a, b) _mm256_dpwssd_avx_epi32(sum, a, b)
enum { Q8_SUMS = 4 };
#else
#define MADD16(sum, a, b) _mm256_add_epi32(sum, _mm256_madd_epi16(a, b))
enum { Q8_SUMS = 2 };
#endif

/* All ones in the lanes of eight positions from p that are in p0..p1. */
static inline __m256 lanes_q8(int64_t p, int64_t p0, int64_t p1) {
    __m256i at = _mm256_add_epi32(_mm256_set1_epi32((int)p), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    __m256i low = _mm256_cmpgt_epi32(at, _mm256_set1_epi32((int)p0 - 1));
    return _mm256_castsi256_ps(_mm256_and_si256(low, _mm256_cmpgt_epi32(_mm256_set1_epi32((int)p1), at)));
}

enum { Q8_HEADS = 3, Q8_BLOCKS = 8 };

/* Some blocks of the queries of some heads, in 16 bits: value = by * q. */
typedef struct queries_q8 {
    int16_t q[Q8_HEADS][Q8_BLOCKS][ST_BLOCK];
    float by[Q8_HEADS][Q8_BLOCKS];
} queries_q8;

/* Block b of a query from its two roundings. */
static inline void query_q8(const st_q8x4 *whole, const st_q8x4 *rest, int64_t b, int16_t q[ST_BLOCK], float *by) {
    int64_t quad = b / 4, lane = b % 4;
    for (int half = 0; half < 2; half++) {
        __m256i high = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)whole[quad].q[half][lane]));
        __m256i low = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)rest[quad].q[half][lane]));
        high = _mm256_mullo_epi16(high, _mm256_set1_epi16(254));
        _mm256_storeu_si256((__m256i *)(q + 16 * half), _mm256_add_epi16(high, low));
    }
    *by = rest[quad].scale[4 * lane];
}

/* Sums of eight rows from those of their pairs of columns: four rows each in a and b. */
static inline __m256 rows_of_pairs(__m256i a, __m256i b) {
    return _mm256_cvtepi32_ps(_mm256_permute4x64_epi64(_mm256_hadd_epi32(a, b), 0xd8));
}

/* Scores of 16 positions, added to those of other blocks, for H heads. tile: of the first of nb blocks. ask: as many
 * bytes that will be read; NULL: the keys that follow. */
static inline __attribute__((always_inline)) void tile_scores_q8(const int H, const uint8_t *tile, int64_t nb,
                                                                 const queries_q8 *queries, const uint8_t *ask,
                                                                 float *scores) {
    for (int64_t b = 0; b < nb; b++, tile += ST_TILE_Q8_0_BYTES) {
        if (ask)
            prefetch_far(ask + b * ST_TILE_Q8_0_BYTES, ST_TILE_Q8_0_BYTES);
        else
            prefetch_ahead(tile, ST_TILE_Q8_0_BYTES);
        for (int half = 0; half < 2; half++) { /* eight positions: their sums stay in registers */
            __m256i dot[Q8_HEADS][2];
            for (int h = 0; h < H; h++)
                dot[h][0] = dot[h][1] = _mm256_setzero_si256();
            _Pragma("GCC unroll 2") for (int g = 0; g < 8; g++) for (int i = 0; i < 2; i++) {
                const uint8_t *keys = tile + 32 + 64 * g + 32 * half + 16 * i;
                __m256i key = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)keys));
                for (int h = 0; h < H; h++) {
                    int64_t four;
                    memcpy(&four, queries->q[h][b] + 4 * g, 8);
                    dot[h][i] = MADD16(dot[h][i], key, _mm256_set1_epi64x(four));
                }
            }
            __m256 scale = load_f16x8(tile + 16 * half);
            for (int h = 0; h < H; h++) {
                float *to = scores + h * ST_ATTN_CHUNK + 8 * half;
                __m256 by = _mm256_mul_ps(scale, _mm256_set1_ps(queries->by[h][b]));
                _mm256_storeu_ps(to, _mm256_fmadd_ps(rows_of_pairs(dot[h][0], dot[h][1]), by, _mm256_loadu_ps(to)));
            }
        }
    }
}

/* scores[h][256] of tiles t0..t1 for heads h0..h0 + H of G. ask: see tile_scores_q8. */
static inline __attribute__((always_inline)) void scores_q8_h(const int H, const uint8_t *k, int64_t nb, int64_t t0,
                                                              int64_t t1, const st_q8x4 *const *q, int64_t G,
                                                              int64_t h0, const uint8_t *ask, float *scores) {
    queries_q8 queries;
    for (int h = 0; h < H; h++)
        memset(scores + h * ST_ATTN_CHUNK + t0 * ST_TILE_ROWS, 0, (size_t)(t1 - t0) * ST_TILE_ROWS * sizeof *scores);
    for (int64_t b0 = 0; b0 < nb; b0 += Q8_BLOCKS) {
        int64_t blocks = nb - b0 < Q8_BLOCKS ? nb - b0 : Q8_BLOCKS;
        for (int h = 0; h < H; h++)
            for (int64_t b = 0; b < blocks; b++)
                query_q8(q[h0 + h], q[G + h0 + h], b0 + b, queries.q[h][b], &queries.by[h][b]);
        for (int64_t t = t0; t < t1; t++) {
            int64_t at = (t * nb + b0) * ST_TILE_Q8_0_BYTES;
            tile_scores_q8(H, k + at, blocks, &queries, ask ? ask + at : NULL, scores + t * ST_TILE_ROWS);
        }
    }
}

/* s[p0..p1) = s * scale -> exp(score - max), zero for the rest of the tiles touched; returns their sum. */
static float softmax_q8(float *s, int64_t p0, int64_t p1, float scale, float *max) {
    __m256 m = _mm256_set1_ps(-INFINITY), none = m, sum = _mm256_setzero_ps(), bad = sum;
    int64_t start = p0 / 16 * 16, end = (p1 + 15) / 16 * 16;
    for (int64_t p = start; p < end; p += 8) {
        __m256 x = _mm256_mul_ps(_mm256_loadu_ps(s + p), _mm256_set1_ps(scale));
        x = _mm256_blendv_ps(none, x, lanes_q8(p, p0, p1));
        _mm256_storeu_ps(s + p, x);
        bad = _mm256_or_ps(bad, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
        m = _mm256_max_ps(m, x);
    }
    int nan = _mm256_movemask_ps(bad);
    *max = nan ? NAN : max8(m);
    m = _mm256_set1_ps(*max);
    for (int64_t p = start; p < end; p += 8) {
        __m256 e = _mm256_and_ps(exp8(_mm256_sub_ps(_mm256_loadu_ps(s + p), m)), lanes_q8(p, p0, p1));
        _mm256_storeu_ps(s + p, e);
        sum = _mm256_add_ps(sum, e);
    }
    return nan ? NAN : sum8(sum);
}

/* scores[G][256] = exp(score - m), of the positions p0..p1; l: their sums. Of whole pages all but
 * the first heads ask for the values v, which are as long as the keys. */
static void softmaxes_q8(const uint8_t *k, const uint8_t *v, int64_t nb, const st_q8x4 *const *q, int64_t G, int64_t p0,
                         int64_t p1, float scale, float *scores, float *m, float *l) {
    int64_t t0 = p0 / ST_TILE_ROWS, t1 = (p1 + ST_TILE_ROWS - 1) / ST_TILE_ROWS;
    /* Values stand in another order than keys: only all of them are where tiles are. */
    const uint8_t *ask = t0 == 0 && t1 == ST_ATTN_CHUNK / ST_TILE_ROWS ? v : NULL;
#define STEP(h, H) scores_q8_h(H, k, nb, t0, t1, q, G, h, h ? ask : NULL, scores + h * ST_ATTN_CHUNK)
    EACH_GROUP(Q8_HEADS, G, STEP)
#undef STEP
    for (int64_t h = 0; h < G; h++)
        l[h] = softmax_q8(scores + h * ST_ATTN_CHUNK, p0, p1, scale, m + h);
}

/* w[G][256] = scores times the block's scales, in 15 bits of the largest scale, which is returned. */
static float weights_q8(const uint8_t *scales, const float *scores, int64_t G, int64_t p0, int64_t p1, int16_t *w) {
    float by[ST_ATTN_CHUNK];
    int64_t start = p0 / 16 * 16, end = (p1 + 15) / 16 * 16;
    __m256 most = _mm256_setzero_ps(), bad = most;
    for (int64_t p = start; p < end; p += 8) {
        __m256 d = _mm256_and_ps(load_f16x8(scales + 2 * p), lanes_q8(p, p0, p1));
        bad = _mm256_or_ps(bad, _mm256_cmp_ps(d, d, _CMP_UNORD_Q));
        most = _mm256_max_ps(most, d);
        _mm256_storeu_ps(by + p, d);
    }
    float top = _mm256_movemask_ps(bad) ? NAN : max8(most), inverse = top > 0 ? 32767 / top : 0;
    for (int64_t p = start; p < end; p += 16) {
        __m256 f0 = _mm256_mul_ps(_mm256_loadu_ps(by + p), _mm256_set1_ps(inverse));
        __m256 f1 = _mm256_mul_ps(_mm256_loadu_ps(by + p + 8), _mm256_set1_ps(inverse));
        for (int64_t h = 0; h < G; h++) {
            const float *s = scores + h * ST_ATTN_CHUNK + p;
            __m256i e0 = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(s), f0));
            __m256i e1 = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(s + 8), f1));
            __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi32(e0, e1), 0xd8);
            _mm256_storeu_si256((__m256i *)(w + h * ST_ATTN_CHUNK + p), both);
        }
    }
    return top;
}

/* Sums of one block of 32 dimensions for H heads; w: [H][256]. */
static inline __attribute__((always_inline)) void values_q8(const int H, const uint8_t *lines, const int16_t *w,
                                                            int64_t p0, int64_t p1, float by, float *acc, int64_t hd) {
    for (int part = 0; part < 4; part += Q8_SUMS, lines += 16 * Q8_SUMS, acc += 8 * Q8_SUMS) {
        __m256i sum[Q8_HEADS][Q8_SUMS];
        for (int h = 0; h < H; h++)
            for (int i = 0; i < Q8_SUMS; i++)
                sum[h][i] = _mm256_setzero_si256();
        _Pragma("GCC unroll 2") for (int64_t pair = p0 / 2; pair < (p1 + 1) / 2; pair++)
            _Pragma("GCC unroll 4") for (int i = 0; i < Q8_SUMS; i++) {
            __m256i x = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(lines + 64 * pair + 16 * i)));
            for (int h = 0; h < H; h++)
                sum[h][i] = MADD16(sum[h][i], x, broadcast4((const int8_t *)(w + h * ST_ATTN_CHUNK + 2 * pair)));
        }
        for (int h = 0; h < H; h++)
            for (int i = 0; i < Q8_SUMS; i++)
                _mm256_storeu_ps(acc + h * hd + 8 * i,
                                 _mm256_mul_ps(_mm256_cvtepi32_ps(sum[h][i]), _mm256_set1_ps(by)));
    }
}

/* Sums of one block for all heads. ahead: not needed, the keys have asked for all blocks. */
static void values_q8_all(const uint8_t *lines, int64_t ahead, const int16_t *w, int64_t G, int64_t p0, int64_t p1,
                          float by, float *acc, int64_t hd) {
    (void)ahead;
#define STEP(h, H) values_q8(H, lines, w + h * ST_ATTN_CHUNK, p0, p1, by, acc + h * hd, hd)
    EACH_GROUP(Q8_HEADS, G, STEP)
#undef STEP
}
