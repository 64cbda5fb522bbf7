/* One kernel, worked a given number of times on the shapes of the 4B model: what tools/arm/predict.py counts the
 * instructions of, under qemu. Usage: arm_count KERNEL TABLE TIMES; prints the weights of one time. */
#include "smallthinker/cpu.h"
#include "smallthinker/expert.h"
#include "smallthinker/kv.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    ROWS = 768,
    COLS = 1536,
    FFN = 768,
    TOKENS = 8,
    STEP = 8,
    ACTIVE = 3, /* of STEP neurons fire: 62 % do not */
    HEADS = 6,  /* of one KV head */
    HEAD_DIM = 128
};

static void *zeros(size_t bytes) {
    void *p = aligned_alloc(64, (bytes + 127) / 64 * 64);
    if (!p)
        exit(1);
    return memset(p, 0, bytes);
}

static const st_q8x4 *input(const st_kernels *k) {
    st_q8x4 *x = zeros(COLS / 128 * sizeof *x);
    float *values = zeros(COLS * sizeof *values);
    for (int i = 0; i < COLS; i++)
        values[i] = (float)(i % 17 - 8);
    k->quantize(values, COLS, x);
    return x;
}

static long gemm(const st_kernels *k, int type, int64_t n, int times) {
    const st_q8x4 *x[TOKENS], *one = input(k);
    for (int i = 0; i < TOKENS; i++)
        x[i] = one;
    uint8_t *w = zeros(st_tile16_bytes(type, ROWS, COLS));
    float *y = zeros(TOKENS * ROWS * sizeof *y);
    for (int t = 0; t < times; t++)
        k->gemm[st_tiled(type)](w, ROWS, COLS / 32, 0, ROWS / 16, x, n, y, ROWS);
    return n * ROWS * COLS;
}

static st_expert expert(void) {
    st_expert e;
    if (st_expert_init(&e, COLS, FFN, ST_Q4_0, ST_Q4_0, ST_Q4_0, 0, 1) != 0)
        exit(1);
    return e;
}

/* As the engine calls it: the active rows of 32 neurons at a time. */
static long rows(const st_kernels *k, int times) {
    st_expert e = expert();
    const uint8_t *blob = zeros(e.bytes);
    float out[32];
    const st_q8x4 *x = input(k);
    for (int t = 0; t < times; t++)
        for (int32_t group = 0; group < FFN; group += 32) {
            int32_t index[32];
            int64_t n = 0;
            for (int32_t i = 0; i < 32; i++)
                if (i % STEP < ACTIVE)
                    index[n++] = group + i;
            k->rows[ST_TILED_Q4_0](blob + e.up_at, e.stride, COLS / 32, index, n, x, out);
        }
    return (long)FFN * ACTIVE / STEP * COLS;
}

/* One chunk of outputs. */
static long down(const st_kernels *k, int times) {
    st_expert e = expert();
    st_down_view view = st_expert_down(&e, zeros(e.bytes));
    st_active *a = zeros(FFN / 32 * sizeof *a);
    float gate[32], up[32], y[128] = {0}, weight = 1, *out = y;
    for (int i = 0; i < 32; i++) {
        gate[i] = i % STEP < ACTIVE ? 1.0f : -1.0f;
        up[i] = 1;
    }
    for (int g = 0; g < FFN / 32; g++)
        k->activate(gate, up, a + g);
    const st_active *active = a;
    for (int t = 0; t < times; t++)
        k->down[ST_TILED_Q4_0](&view, COLS, FFN / 32, 0, 1, &active, &weight, 1, &out);
    return (long)FFN * ACTIVE / STEP * 128;
}

/* A whole page of one KV head: its weights are the products with keys and with values. */
static long attention(const st_kernels *k, int type, int times) {
    uint8_t *keys = zeros(st_kv_head_bytes(type, HEAD_DIM)), *values = zeros(st_kv_head_bytes(type, HEAD_DIM));
    float *q = zeros(HEADS * HEAD_DIM * sizeof *q), *acc = zeros(HEADS * HEAD_DIM * sizeof *acc), m[HEADS], l[HEADS];
    float *scores = zeros(2 * HEADS * ST_ATTN_CHUNK * sizeof *scores);
    const st_q8x4 *queries[2 * HEADS], *one = input(k);
    for (int i = 0; i < 2 * HEADS; i++)
        queries[i] = one;
    for (int t = 0; t < times; t++)
        if (type == ST_F16)
            k->attention(q, HEADS, HEAD_DIM, (const uint16_t *)keys, (const uint16_t *)values, ST_ATTN_CHUNK, 1, scores,
                         acc, m, l);
        else
            k->attention_q8(queries, HEADS, HEAD_DIM, keys, values, 0, ST_ATTN_CHUNK, 1, scores, acc, m, l);
    return 2L * HEADS * HEAD_DIM * ST_ATTN_CHUNK;
}

int main(int argc, char **argv) {
    if (argc != 4 || !st_cpu_table(argv[2])) {
        fprintf(stderr, "usage: arm_count KERNEL TABLE TIMES (a table that this CPU can run)\n");
        return 2;
    }
    const st_kernels *k = st_cpu_table(argv[2]);
    int times = atoi(argv[3]);
    long weights = strcmp(argv[1], "gemv_q4_0") == 0       ? gemm(k, ST_Q4_0, 1, times)
                   : strcmp(argv[1], "gemm_q4_0") == 0     ? gemm(k, ST_Q4_0, TOKENS, times)
                   : strcmp(argv[1], "gemv_q8_0") == 0     ? gemm(k, ST_Q8_0, 1, times)
                   : strcmp(argv[1], "rows") == 0          ? rows(k, times)
                   : strcmp(argv[1], "attention_f16") == 0 ? attention(k, ST_F16, times)
                   : strcmp(argv[1], "attention_q8") == 0  ? attention(k, ST_Q8_0, times)
                                                           : down(k, times);
    printf("%ld\n", weights);
    return 0;
}
