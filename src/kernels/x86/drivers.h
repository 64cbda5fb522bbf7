/* What the x86 tables do alike around their own inner steps; included by avx512vnni.c and vec256.h after these. They
 * define VECTOR, TILE_VECTORS                          the sums of a tile's 16 rows tile_q4_0_part(tile, b0, b1, x,
 * sum)          blocks b0..b1 of a tile for one token, added to sum store_rows(sum, count, y)                     the
 * first `count` rows of a tile rows_r(R, rows, nb, x, out)                   one or two rows SCORES, scores_h(H, ...),
 * values_h(H, ...)    attention for up to three heads; SCORES positions at a time softmax_chunk(s, n, max) */

static void rows_q4_0(const uint8_t *w, int64_t nb, const int32_t *index, int64_t n, const st_q8x4 *x, float *out) {
    for (int64_t k = 0; k < n; k += 2) {
        const uint8_t *rows[2] = {w + index[k] * nb * 18, k + 1 < n ? w + index[k + 1] * nb * 18 : NULL};
        if (rows[1])
            rows_r(2, rows, nb, x, out + k);
        else
            rows_r(1, rows, nb, x, out + k);
    }
}

/* A tile's blocks come from memory in order; the rows' arithmetic and the prefetches of `ahead` go between them, where
 * the core would wait. */
static void gate_up_q4_0(const uint8_t *gate, int64_t nb, const st_q8x4 *x, float *g, const uint8_t *up,
                         const int32_t *index, int64_t n, float *out, const uint8_t *up_ahead, const int32_t *ahead,
                         int64_t n_ahead) {
    int64_t steps = 2 * ((nb + GATE_STEP - 1) / GATE_STEP), step = 0;
    for (int tile = 0; tile < 2; tile++, gate += nb * ST_TILE_Q4_0_BYTES) {
        VECTOR sum[TILE_VECTORS];
        memset(sum, 0, sizeof sum);
        for (int64_t b = 0; b < nb; b += GATE_STEP, step++) {
            int64_t end = b + GATE_STEP < nb ? b + GATE_STEP : nb;
            int64_t k0 = share(n, step, steps), k1 = share(n, step + 1, steps);
            tile_q4_0_part(gate, b, end, x, sum);
            rows_q4_0(up, nb, index + k0, k1 - k0, x, out + k0);
            for (int64_t k = share(n_ahead, step, steps); k < share(n_ahead, step + 1, steps); k++)
                prefetch_row(up_ahead + ahead[k] * nb * 18, nb * 18);
        }
        store_rows(sum, ST_TILE_ROWS, g + 16 * tile);
    }
}

static void attention(const float *q, int64_t G, int64_t hd, const uint16_t *k, const uint16_t *v, int64_t n,
                      float scale, float *scores, float *acc, float *m, float *l) {
    for (int64_t p = 0; p < n; p += SCORES)
        for (int64_t h = 0; h < G; h += 3) {
            const uint16_t *keys = k + p * hd;
            float *out = scores + h * ST_ATTN_CHUNK + p;
            switch (G - h) {
            case 1: scores_h(1, q + h * hd, hd, keys, n - p, scale, out); break;
            case 2: scores_h(2, q + h * hd, hd, keys, n - p, scale, out); break;
            default: scores_h(3, q + h * hd, hd, keys, n - p, scale, out); break;
            }
        }
    for (int64_t h = 0; h < G; h++)
        l[h] = softmax_chunk(scores + h * ST_ATTN_CHUNK, n, m + h);
    for (int64_t h = 0; h < G; h += 3) {
        const float *s = scores + h * ST_ATTN_CHUNK;
        switch (G - h) {
        case 1: values_h(1, s, v, hd, n, acc + h * hd); break;
        case 2: values_h(2, s, v, hd, n, acc + h * hd); break;
        default: values_h(3, s, v, hd, n, acc + h * hd); break;
        }
    }
}
