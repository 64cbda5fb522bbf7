/* The kernel table: every operation of the forward pass that touches many numbers. One table per instruction
 * set; src/kernels/ref.c is the definition, and src/system/cpu.c fills them. Within one table results have a fixed
 * summation order: they depend on neither the number of threads nor on how many tokens are computed together. */
#ifndef SMALLTHINKER_KERNELS_H
#define SMALLTHINKER_KERNELS_H

#include "smallthinker/layout.h"

#define ST_ATTN_CHUNK 256 /* positions of one attention unit */
#define ST_FFN_PART 6     /* groups of 32 neurons whose down is summed before it is weighted */
#define ST_DOWN_TOKENS 16 /* at most, of a call of down */
#define ST_UP_TOKENS 16   /* at most, of a call of up: their rows stay in the first cache */
#define ST_ATTN_TOKENS 8  /* at most, of a call of attention_many */

/* Floats of scratch of attention_many for `rows` = n * G queries of hd: a little more than the scores of each row,
 * and some keys or values as floats. */
#define ST_ATTN_ROW (ST_ATTN_CHUNK + 16)
#define ST_ATTN_KEYS 8
#define ST_ATTN_VALUES 64
#define ST_ATTN_SCRATCH(rows, hd)                                                                                      \
    ((rows) * ST_ATTN_ROW + ST_ATTN_KEYS * (((hd) + 15) / 16 * 16) + ST_ATTN_VALUES * ST_ATTN_VALUES)

/* 32 neurons of one expert on their way through the FFN of one token. The caller sets the first eight fields. */
typedef struct st_neurons {
    const st_q8x4 *x;    /* the token's quantised row of d columns */
    const uint8_t *gate; /* their two tiles of Tile16 */
    const uint8_t *up;   /* the expert's up, Rows layout, up_stride bytes a row */
    size_t up_stride;
    st_down_view down; /* the expert's down, Down layout or Down transposed */
    int transposed;    /* which of them */
    float *y;          /* [d in whole chunks] what their down is added to */
    int64_t group;     /* which 32 neurons of the expert */
    int64_t fired;     /* neurons whose gate is not <= 0 */
    int32_t index[32]; /* those, counted over the expert */
    float g[32];
    st_active active; /* what they give to Down */
    st_fired output;  /* and to Down transposed */
} st_neurons;

/* Signatures, written once: ST_GEMM(name) begins the declaration or the definition of a kernel, st_gemm is its type. */
#define ST_GEMM(NAME)                                                                                                  \
    void NAME(const uint8_t *w, int64_t rows, int64_t nb, int64_t t0, int64_t t1, const st_q8x4 *const *x, int64_t n,  \
              float *y, int64_t ldy)
#define ST_ROWS(NAME)                                                                                                  \
    void NAME(const uint8_t *w, size_t stride, int64_t nb, const int32_t *index, int64_t n, const st_q8x4 *x,          \
              float *out)
#define ST_UP(NAME)                                                                                                    \
    void NAME(const uint8_t *w, size_t stride, int64_t nb, const st_q8x4 *const *x, int64_t n,                         \
              const uint32_t fires[32], float *up)
#define ST_FFN(NAME) void NAME(const int tiled[3], int64_t nb, st_neurons *const stage[4])
#define ST_DOWN(NAME)                                                                                                  \
    void NAME(const st_down_view *down, int64_t d, int64_t groups, int64_t c0, int64_t c1, const st_active *const *a,  \
              const float *weight, int64_t n, float *const *y)
#define ST_DOWN_TRANSPOSED(NAME)                                                                                       \
    void NAME(const st_down_view *down, int64_t d, int64_t groups, int64_t c0, int64_t c1, const st_fired *a,          \
              float weight, float *y)
#define ST_ATTENTION(NAME)                                                                                             \
    void NAME(const float *q, int64_t G, int64_t hd, const uint16_t *k, const uint16_t *v, int64_t n, float scale,     \
              float *scores, float *acc, float *m, float *l)
#define ST_ATTENTION_MANY(NAME)                                                                                        \
    void NAME(const float *q, int64_t ldq, int64_t n, int64_t G, int64_t hd, const uint16_t *k, const uint16_t *v,     \
              const int32_t *p0, const int32_t *p1, float scale, float *scratch, float *acc, float *m, float *l)
#define ST_ATTENTION_Q8(NAME)                                                                                          \
    void NAME(const st_q8x4 *const *q, int64_t G, int64_t hd, const uint8_t *k, const uint8_t *v, int64_t p0,          \
              int64_t p1, float scale, float *scores, float *acc, float *m, float *l)
typedef ST_GEMM(st_gemm);
typedef ST_ROWS(st_rows);
typedef ST_UP(st_up);
typedef ST_FFN(st_ffn);
typedef ST_DOWN(st_down);
typedef ST_DOWN_TRANSPOSED(st_down_transposed);
typedef ST_ATTENTION(st_attention);
typedef ST_ATTENTION_MANY(st_attention_many);
typedef ST_ATTENTION_Q8(st_attention_q8);

/* Kernels over weights are arrays by tiled type (types.h): gemm has all of them, rows and down the sparse types,
 * down_transposed those that have it, and NULL for the rest. */
typedef struct st_kernels {
    const char *name;

    /* x[cols] -> out[ceil(cols / 128)]. scale = max|x| / 127, round to nearest even; NaN gives NaN scales. */
    void (*quantize)(const float *x, int64_t cols, st_q8x4 *out);

    /* y[i * ldy + r - 16 * t0] = W[r] . x[i] for the rows r of tiles t0..t1 that are below `rows`, i < n.
     * W: Tile16 of the type, 64-byte aligned; x: n pointers to quantised rows of cols = 32 * nb columns, whole blocks
     * of the type. */
    st_gemm *gemm[ST_TILED_COUNT];

    /* out[i] = W[index[i]] . x for i < n.  W: Rows layout, nb blocks of 32 columns a row, `stride` bytes apart. */
    st_rows *rows[ST_TILED_COUNT];

    /* up[32 * i + r] = W[r] . x[i] for the rows r < 32 and tokens i < n <= ST_UP_TOKENS where bit i of fires[r] is set,
     * else 0: the bits of rows, for many tokens. NULL where rows, token by token, is as quick. */
    st_up *up[ST_TILED_COUNT];

    /* One step of the FFN of a few tokens: each of stage[0..3] (NULL: none; all different) goes one stage further.
     * tiled: the places of the types of gate, up and down, the same for all four (st_expert has them).
     *   stage[0]: its gate is computed, and which neurons fire.
     *   stage[1]: what stands together of those that fire (expert.h) is prefetched, and the group's scales (hints).
     *   stage[2]: up of those that fire, and their activations.
     *   stage[3]: y[d] += W_down[:, its 32 neurons] . h; y has room for whole chunks of ST_DOWN_CHUNK.
     * The steps of different groups share a call because the gate streams from memory, and the rest of the arithmetic
     * fits into its waits.  nb: d / 32. */
    st_ffn *ffn;

    /* For each of n <= ST_DOWN_TOKENS tokens y[o - 128 * c0] += weight * (W_down . h)[o] for the outputs o of chunks
     * c0..c1 (128 each; y has room for whole chunks), summed by parts of ST_FFN_PART groups: each part's sum is
     * weighted and added by itself, as for one token (ffn) it has to be.  down: Down layout of d outputs and 32 *
     * groups neurons, its lines 64-byte aligned; a: of each token [groups]. */
    st_down *down[ST_TILED_COUNT];

    /* The same of one token over Down transposed. For every block b of 32 outputs, the products h[k] *
     * scale[index[k]][b] of a group are rounded to bytes q[k] by the rule of quantize, and their sum with the nibbles
     * is taken times their scale. */
    st_down_transposed *down_transposed[ST_TILED_COUNT];

    /* g[32] (gate, before relu) and up[32] (read only where g > 0) -> the 32 neurons' st_active. */
    void (*activate)(const float *g, const float *up, st_active *out);

    /* Scores of G query heads against n <= ST_ATTN_CHUNK cached positions of one KV head, softmax within the
     * chunk: m[h] = largest score, l[h] = sum of exp(score - m), acc[h][hd] = sum of exp(score - m) * v.
     * q: [G][hd] floats; k, v: [n][hd] fp16; scores: scratch of G * ST_ATTN_CHUNK floats. hd % 8 == 0 for the
     * vector tables; n >= 1. */
    st_attention *attention;

    /* The same for n <= ST_ATTN_TOKENS tokens of a prompt, with its bits, over one page: token i, whose queries are
     * [G][hd] at q + i * ldq, sees positions p0[i]..p1[i] (0 <= p0 < p1 <= ST_ATTN_CHUNK) of k and v, of which all
     * between the first and the last one that any of them sees are written.  acc: [n][G][hd]; m, l: [n][G]; scratch:
     * ST_ATTN_SCRATCH(n * G, hd) floats. */
    st_attention_many *attention_many;

    /* The same over positions p0..p1 (0 <= p0 < p1 <= ST_ATTN_CHUNK) of one KV head in a Q8_0 page.
     * q: 2 * G pointers to quantised rows of hd columns, the queries and then what st_kv_query_rest makes of them:
     * their scales are the queries' / 254, so that 254 * q + rest counts in 16 bits, which a table may make of both at
     * once. k, v: the page's keys and values (kv.h), written at least at p0..p1, zero or older positions elsewhere;
     * scores: scratch of 2 * G * ST_ATTN_CHUNK floats; hd % 32 == 0.  The weights of a block of dimensions are
     * exp(score - m) times the values' scales, rounded to 1/32767 of the largest scale (ARM64: 1/32639), so that the
     * sum over the positions is one of integers: exact. */
    st_attention_q8 *attention_q8;

    /* out[n] = x / sqrt(mean(x^2) + eps) * w */
    void (*rmsnorm)(const float *x, const float *w, int64_t n, float eps, float *out);
    float (*dot)(const float *a, const float *b, int64_t n);
    void (*axpy)(float a, const float *x, float *y, int64_t n); /* y += a * x */
    void (*to_f16)(const float *x, uint16_t *out, int64_t n);
    void (*from_f16)(const uint16_t *x, float *out, int64_t n);

    /* Rotates the pairs v[i], v[i + half] by the angles whose cosines and sines these are (NEOX order). */
    void (*rope)(float *v, const float *cosine, const float *sine, int64_t half);

    /* ids[k]: where the k largest of x[n] are, the largest first; of equal ones the first. NaN counts as larger than
     * any number. keys[n] is scratch; k <= n. */
    void (*top_k)(const float *x, int64_t n, int64_t k, int32_t *keys, int32_t *ids);
} st_kernels;

/* What a file decides of the contracts above, and what refuses the rest (tests/engine/test_contracts.py):
 *   rows are whole blocks of their type        read_tensor() of gguf_reader.pyx
 *   d, f and heads * hd are multiples of 32    _read_sizes() of files/config.py
 *   hd % 8 == 0 and G is whole (attention)     _read_sizes()
 *   hd % 32 == 0 (attention_q8)                page_of() of kv_cache.pyx
 *   half <= hd / 2 (rope)                      _read_rope_dim()
 *   k <= n (top_k)                             _read_sizes(): at most as many experts are used as there are
 *   a predictor's inner width % 32 == 0        predictor_size() of files/config.py
 *   sparse types of up and down, f % 32 == 0   st_expert_init(): others are tiles or stay GGUF rows
 *   room for whole chunks of 128, alignment    buffer_sizes() of buffers.pyx and Arena.take(): no file decides */

/* What every table's ffn does alike (src/kernels/neurons.c). */

/* Fills fired and index from g. */
void st_neurons_choose(st_neurons *n);
/* What stood at a stage stands at the next one; the first is free. */
void st_neurons_advance(st_neurons *stage[4]);
/* In which of n <= ST_UP_TOKENS tokens with these gates [n][32] each of 32 neurons fires: bits. */
void st_neurons_tokens(const float *gate, int64_t n, uint32_t fires[32]);
/* up[32] from the values of the neurons that fired; zero for the others. */
void st_neurons_spread(const st_neurons *n, const float *value, float *up);
/* Gate times up of the neurons that fired, for a transposed down. */
void st_neurons_multiply(const st_neurons *n, const float *value, st_fired *out);

#endif
