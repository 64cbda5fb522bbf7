/* Chunks of Down in the K types. Included where chunk_k() and chunk_q6_k_c() stand, which take what depends on the
 * chunk as constants: each of these has its own code for each. */
static void chunk_q4_k(const st_down_view *down, int64_t g, int64_t chunk, const st_active *a, float *y) {
    chunk_k(4, 0, down, g, chunk, a, y);
}

static void chunk_q5_k(const st_down_view *down, int64_t g, int64_t chunk, const st_active *a, float *y) {
    switch (chunk % 4) {
    case 0: chunk_k(5, 0, down, g, chunk, a, y); break;
    case 1: chunk_k(5, 1, down, g, chunk, a, y); break;
    case 2: chunk_k(5, 2, down, g, chunk, a, y); break;
    default: chunk_k(5, 3, down, g, chunk, a, y); break;
    }
}

static void chunk_q6_k(const st_down_view *down, int64_t g, int64_t chunk, const st_active *a, float *y) {
    if (chunk % 2)
        chunk_q6_k_c(1, down, g, chunk, a, y);
    else
        chunk_q6_k_c(0, down, g, chunk, a, y);
}
