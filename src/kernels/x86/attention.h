/* Attention over F16 pages; included by avx2.c and avx512vnni.c after:
 *   HEADS, scores_h(H, ...), values_h(H, ...)  four scores, or the values, of H <= HEADS heads at once
 *   softmax_chunk(s, n, max) */

enum { SCORES = 4 }; /* positions whose scores are computed together */

/* STEP(h, H) over G heads in groups of at most HEADS, of equal size as far as possible; H is a constant. */
#define EACH_GROUP(G, STEP)                                                                                            \
    for (int64_t groups = ((G) + HEADS - 1) / HEADS, h = 0, left; h < (G); h += left, groups--) {                      \
        left = ((G) - h + groups - 1) / groups;                                                                        \
        switch (left) {                                                                                                \
        case 1: STEP(1); break;                                                                                        \
        case 2: STEP(2); break;                                                                                        \
        case 3: STEP(3); break;                                                                                        \
        case 4: STEP(HEADS < 4 ? HEADS : 4); break;                                                                    \
        case 5: STEP(HEADS < 5 ? HEADS : 5); break;                                                                    \
        default: STEP(HEADS); break;                                                                                   \
        }                                                                                                              \
    }

/* The values, which are read by columns, come into the second-level cache while the keys are multiplied. */
static ST_ATTENTION(attention) {
    for (int64_t p = 0; p < n; p += SCORES) {
        const uint16_t *keys = k + p * hd;
        prefetch_ahead((const uint8_t *)keys, (int)(SCORES * hd * 2));
        prefetch_far((const uint8_t *)(v + p * hd), (SCORES < n - p ? SCORES : n - p) * hd * 2);
#define STEP(H) scores_h(H, q + h * hd, hd, keys, n - p, scale, scores + h * ST_ATTN_CHUNK + p)
        EACH_GROUP(G, STEP)
#undef STEP
    }
    for (int64_t h = 0; h < G; h++)
        l[h] = softmax_chunk(scores + h * ST_ATTN_CHUNK, n, m + h);
#define STEP(H) values_h(H, scores + h * ST_ATTN_CHUNK, v, hd, n, acc + h * hd)
    EACH_GROUP(G, STEP)
#undef STEP
}
