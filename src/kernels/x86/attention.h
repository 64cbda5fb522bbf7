/* Attention over F16 pages; included by avx2.c and avx512vnni.c after heads.h and:
 *   HEADS, scores_h(H, ...), values_h(H, ...)  four scores, or the values, of H <= HEADS heads at once
 *   softmax_chunk(s, n, max)
 *   KEYS, KEY_ROWS, key_scores_h(H, ...)   scores of KEYS positions for H <= KEY_ROWS rows, from keys that are floats
 *   COLUMNS, add_values_h(H, ...)          values, floats too, added up for H <= HEADS rows, COLUMNS of them
 *   widen(x, n, out) */

enum { SCORES = 4 }; /* positions whose scores are computed together */

/* Asks for lines from..to of what comes after the keys of some positions and of their values, which are read by columns
 * and come into the second-level cache while the keys are multiplied. */
static inline void prefetch_positions(const uint16_t *keys, const uint16_t *values, int64_t from, int64_t to) {
    prefetch_ahead((const uint8_t *)keys + 64 * from, (int)(64 * (to - from)));
    prefetch_far((const uint8_t *)values + 64 * from, 64 * (to - from));
}

/* Each group of heads asks for its part. */
static ST_ATTENTION(attention) {
    int64_t lines = SCORES * hd * 2 / 64, groups = (G + HEADS - 1) / HEADS, part = (lines + groups - 1) / groups;
    for (int64_t p = 0; p < n; p += SCORES) {
        const uint16_t *keys = k + p * hd;
        int64_t asked = 0;
#define STEP(h, H)                                                                                                     \
    prefetch_positions(keys, v + p * hd, asked, asked + part < lines ? asked + part : lines);                          \
    asked += part;                                                                                                     \
    scores_h(H, q + h * hd, hd, keys, n - p, scale, scores + h * ST_ATTN_CHUNK + p)
        EACH_GROUP(HEADS, G, STEP)
#undef STEP
    }
    for (int64_t h = 0; h < G; h++)
        l[h] = softmax_chunk(scores + h * ST_ATTN_CHUNK, n, m + h);
#define STEP(h, H) values_h(H, scores + h * ST_ATTN_CHUNK, v, hd, n, acc + h * hd)
    EACH_GROUP(HEADS, G, STEP)
#undef STEP
}

enum { VALUES = ST_ATTN_VALUES }; /* positions whose values are floats together */

/* Scores of every row, [rows][ST_ATTN_ROW], at positions p0..p1; a few keys are widened for all rows. */
static void scores_many(const float *q, int64_t ldq, int64_t n, int64_t G, int64_t hd, const uint16_t *k, int64_t p0,
                        int64_t p1, float scale, float *keys, float *scores) {
    int64_t ld = (hd + 15) / 16 * 16, rows = n * G;
    for (int64_t i = 0; i < KEYS * ld; i++)
        keys[i] = 0;
    for (int64_t p = p0; p < p1; p += KEYS) {
        for (int64_t j = 0; j < KEYS; j++)
            widen(k + (p + j < p1 ? p + j : p1 - 1) * hd, hd, keys + j * ld);
        for (int64_t r = 0; r < rows; r += KEY_ROWS) {
            const float *query[KEY_ROWS];
            int64_t left = rows - r < KEY_ROWS ? rows - r : KEY_ROWS;
            for (int64_t i = 0; i < KEY_ROWS; i++) {
                int64_t row = r + (i < left ? i : left - 1);
                query[i] = q + row / G * ldq + row % G * hd;
            }
            float *out = scores + r * ST_ATTN_ROW + p - p0;
            switch (left) {
            case 1: key_scores_h(1, query, hd, keys, ld, scale, out); break;
            case 2: key_scores_h(2, query, hd, keys, ld, scale, out); break;
            default: key_scores_h(KEY_ROWS, query, hd, keys, ld, scale, out); break;
            }
        }
    }
}

/* acc[row] = sum over the positions p0..p1 of their weights times their values; some are widened for all rows. A sum
 * that goes on from memory has the bits of one that never left its register. */
static void values_many(const float *weights, int64_t rows, int64_t hd, const uint16_t *v, int64_t p0, int64_t p1,
                        float *values, float *acc) {
    for (int64_t c = 0; c < hd; c += COLUMNS) {
        int64_t columns = hd - c < COLUMNS ? hd - c : COLUMNS;
        for (int64_t p = p0; p < p1; p += VALUES) {
            int64_t count = p1 - p < VALUES ? p1 - p : VALUES;
            for (int64_t j = 0; j < count; j++)
                widen(v + (p + j) * hd + c, columns, values + j * COLUMNS);
#define STEP(h, H)                                                                                                     \
    add_values_h(H, weights + h * ST_ATTN_ROW + p - p0, values, columns, count, p == p0, acc + h * hd + c, hd)
            EACH_GROUP(HEADS, rows, STEP)
#undef STEP
        }
    }
}

/* Beside a token's own positions its weights are zero: that adds nothing, since what is in the cache is finite. */
static ST_ATTENTION_MANY(attention_many) {
    int64_t first = p0[0], last = p1[0], rows = n * G;
    for (int64_t i = 1; i < n; i++) {
        first = p0[i] < first ? p0[i] : first;
        last = p1[i] > last ? p1[i] : last;
    }
    float *floats = scratch + rows * ST_ATTN_ROW;
    scores_many(q, ldq, n, G, hd, k, first, last, scale, floats, scratch);
    for (int64_t r = 0; r < rows; r++) {
        float *s = scratch + r * ST_ATTN_ROW;
        int64_t before = p0[r / G] - first, end = p1[r / G] - first;
        l[r] = softmax_chunk(s + before, end - before, m + r);
        for (int64_t p = 0; p < before; p++)
            s[p] = 0;
        for (int64_t p = end; p < last - first; p++)
            s[p] = 0;
    }
    values_many(scratch, rows, hd, v, first, last, floats, acc);
}
