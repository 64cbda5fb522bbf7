/* What the x86 tables do alike around their own inner steps; included by avx512vnni.c and vec256.h after these:
 *   tile_sum                                 the sums of a tile's 16 rows
 *   tile_<type>_x1(tile, nb, x, stream, sum) blocks of a tile for one token, added to sum; stream: it comes from
 *                                            memory, and what follows is prefetched
 *   store_rows(sum, count, y)                the first `count` rows of a tile
 *   rows_<type>_r(R, rows, nb, x, out)       one or two rows
 *   chunk_<type>(down, g, chunk, a, y)       128 outputs of 32 neurons, added to y
 *   weigh_blocks(scales, stride, count, a, w), transposed_chunk(lines, line, a, w, first, y)
 *                                            the same where down is transposed: weights of 16 blocks; 128 outputs
 *   add_weighted(weight, total, y)           y += weight * total of 128 outputs
 *   softmaxes_q8, weights_q8, values_q8_all  attention_q8_256.h, attention_q8_512.h */

/* The activate of all x86 tables, of avx2.c. */
void st_avx2_activate(const float *g, const float *up, st_active *out);

#define ROWS(NAME, name)                                                                                               \
    static ST_ROWS(rows_##name) {                                                                                      \
        for (int64_t k = 0; k < n; k += 2) {                                                                           \
            const uint8_t *rows[2] = {w + stride * (size_t)index[k],                                                   \
                                      k + 1 < n ? w + stride * (size_t)index[k + 1] : NULL};                           \
            if (rows[1])                                                                                               \
                rows_##name##_r(2, rows, nb, x, out + k);                                                              \
            else                                                                                                       \
                rows_##name##_r(1, rows, nb, x, out + k);                                                              \
        }                                                                                                              \
    }
ST_SPARSE_TYPES(ROWS)

typedef void tile_one(const uint8_t *tile, int64_t nb, const st_q8x4 *const *x, int stream, tile_sum *sum);
typedef void down_chunk(const st_down_view *down, int64_t g, int64_t chunk, const st_active *a, float *y);

/* Blocks of a gate tile between two turns of the other stages: whole st_q8x4, whole super-blocks. */
#define GATE_STEP(NAME) (ST_##NAME##_COLUMNS == ST_BLOCK ? 4 : ST_##NAME##_COLUMNS / ST_BLOCK)

/* What ffn needs of each type. */
#define GATE_OF(NAME, name) [ST_TILED_##NAME] = {tile_##name##_x1, ST_TILE_BYTES(NAME), GATE_STEP(NAME)},
#define UP_OF(NAME, name) [ST_TILED_##NAME] = {rows_##name, ST_##NAME##_BYTES, ST_##NAME##_COLUMNS / ST_BLOCK},
#define CHUNK_OF(NAME, name) [ST_TILED_##NAME] = chunk_##name,
static const struct {
    tile_one *tile;
    int64_t bytes; /* of a block of a tile, on average */
    int64_t step;
} gate_of[ST_TILED_COUNT] = {ST_TILED_TYPES(GATE_OF)};
static const struct {
    st_rows *rows;
    int64_t bytes, blocks; /* of so many blocks of 32 columns of a row */
} up_of[ST_TILED_COUNT] = {ST_SPARSE_TYPES(UP_OF)};
static down_chunk *const chunk_of[ST_TILED_COUNT] = {ST_SPARSE_TYPES(CHUNK_OF)};

/* Chunks whose bits above the nibbles share 64 bytes of a line; 0: there are none. */
static const int64_t chunks_above[ST_TILED_COUNT] = {[ST_TILED_Q5_K] = 4, [ST_TILED_Q6_K] = 2};

/* 128 outputs of one group where down is transposed, added to y. w holds the weights of this chunk, which are made here
 * for four chunks at a time: i counts the chunks from the first that is computed. chunks: of a line. */
static inline void transposed_group(const st_down_view *down, int64_t chunks, int64_t g, int64_t chunk,
                                    const st_fired *fired, int64_t i, block_weights *w, float *y) {
    const uint8_t *lines = down->lines + 32 * down->stride * (size_t)g + 64 * chunk;
    if (i % 4 == 0)
        weigh_blocks(down->scales + 32 * down->scale_stride * (size_t)g + 8 * chunk, down->scale_stride,
                     4 * (chunks - chunk), fired, w);
    transposed_chunk(lines, down->stride, fired, w, (int)(i % 4) * 4, y);
}

/* Share i of n of what the neurons of a group have for n chunks from `chunk` on, of `chunks`. */
static inline void prefetch_chunks(const st_down_view *down, int tiled, int64_t chunks, int64_t g, int64_t chunk,
                                   int64_t n, const uint8_t *index, int quads, int64_t i) {
    const uint8_t *lines = down->lines + 32 * down->stride * (size_t)g;
    int64_t share = chunks_above[tiled];
    prefetch_neurons(lines + 64 * chunk, down->stride, n, index, quads, i, n);
    if (share)
        prefetch_neurons(lines + 64 * (chunks + chunk / share), down->stride,
                         (chunk + n - 1) / share - chunk / share + 1, index, quads, i, n);
}

/* Down in either layout: active, or fired, is NULL. By group, so that a neuron's whole run of bytes is used when it
 * comes. */
static inline __attribute__((always_inline)) void down_chunks(const int tiled, down_chunk *const add,
                                                              const st_down_view *down, int64_t d, int64_t groups,
                                                              int64_t c0, int64_t c1, const st_active *active,
                                                              const st_fired *fired, float weight, float *y) {
    int64_t chunks = (d + ST_DOWN_CHUNK - 1) / ST_DOWN_CHUNK;
    for (int64_t c = c0; c < c1; c += DOWN_CHUNKS, y += DOWN_CHUNKS * ST_DOWN_CHUNK) {
        int64_t n = c1 - c < DOWN_CHUNKS ? c1 - c : DOWN_CHUNKS;
        float total[DOWN_CHUNKS * ST_DOWN_CHUNK];
        block_weights w;
        for (int64_t g = 0; g < groups; g++) {
            if (g % ST_FFN_PART == 0)
                memset(total, 0, (size_t)n * ST_DOWN_CHUNK * sizeof *total);
            for (int64_t i = 0; i < n; i++) {
                if (g + 2 < groups)
                    prefetch_chunks(down, tiled, chunks, g + 2, c, n, active ? active[g + 2].index : fired[g + 2].index,
                                    active ? active[g + 2].quads : fired[g + 2].quads, i);
                if (active && active[g].quads)
                    add(down, g, c + i, active + g, total + i * ST_DOWN_CHUNK);
                if (fired && fired[g].quads)
                    transposed_group(down, chunks, g, c + i, fired + g, i, &w, total + i * ST_DOWN_CHUNK);
            }
            if ((g + 1) % ST_FFN_PART == 0 || g + 1 == groups)
                for (int64_t i = 0; i < n; i++)
                    add_weighted(weight, total + i * ST_DOWN_CHUNK, y + i * ST_DOWN_CHUNK);
        }
    }
}

#define DOWN(NAME, name)                                                                                               \
    static ST_DOWN(down_##name) {                                                                                      \
        for (int64_t t = 0; t < n; t++)                                                                                \
            down_chunks(ST_TILED_##NAME, chunk_##name, down, d, groups, c0, c1, a[t], NULL, weight[t], y[t]);          \
    }
#define DOWN_TRANSPOSED(NAME, name)                                                                                    \
    static ST_DOWN_TRANSPOSED(down_transposed_##name) {                                                                \
        down_chunks(ST_TILED_##NAME, NULL, down, d, groups, c0, c1, NULL, a, weight, y);                               \
    }
ST_SPARSE_TYPES(DOWN)
ST_TRANSPOSED_TYPES(DOWN_TRANSPOSED)

/* The gate's blocks come from memory in order; the other stages' arithmetic goes between them, where the core would
 * wait, and between all of it what stage[1] will need is asked for. */
static ST_FFN(ffn) {
    st_neurons *gate = stage[0], *ahead = stage[1], *up = stage[2], *down = stage[3];
    int64_t chunks = (nb * ST_BLOCK + ST_DOWN_CHUNK - 1) / ST_DOWN_CHUNK;
    int64_t gate_step = gate_of[tiled[0]].step, tile_bytes = gate_of[tiled[0]].bytes;
    int64_t row = nb / up_of[tiled[1]].blocks * up_of[tiled[1]].bytes;
    int again = gate && ahead && gate->gate == ahead->gate; /* of another token: it is in the cache */
    const st_fired *fired = down && down->transposed ? &down->output : NULL;
    const uint8_t *index = NULL;
    int quads = 0;
    if (down) {
        index = fired ? fired->index : down->active.index;
        quads = fired ? fired->quads : down->active.quads;
    }
    int64_t steps = 2 * ((nb + gate_step - 1) / gate_step), step = 0, todo = quads ? chunks : 0;
    float value[32], spread[32];
    block_weights w;
    runs_ahead next;
    int third = gate_step > 4; /* whether a step has room for asking a third time */
    look_ahead(&next, ahead, tiled[2], chunks, (2 + third) * steps);
    for (int tile = 0; tile < 2; tile++) {
        tile_sum sum[1];
        memset(sum, 0, sizeof sum);
        for (int64_t b = 0; b < nb; b += gate_step, step++) {
            if (gate) {
                const st_q8x4 *x = gate->x + b / 4;
                gate_of[tiled[0]].tile(gate->gate + (tile * nb + b) * tile_bytes,
                                       nb - b < gate_step ? nb - b : gate_step, &x, !again, sum);
            }
            ask_ahead(&next);
            if (up) {
                int64_t k0 = share(up->fired, step, steps), k1 = share(up->fired, step + 1, steps);
                for (int64_t k = k0 + 2; k < k1 + 2 && k < up->fired; k++)
                    prefetch_near(up->up + up->up_stride * (size_t)up->index[k], row);
                up_of[tiled[1]].rows(up->up, up->up_stride, nb, up->index + k0, k1 - k0, up->x, value + k0);
                if (up->transposed) /* the neurons' own scales, which the last stage wants all at once */
                    for (int64_t k = k0; k < k1; k++)
                        prefetch_near(up->down.scales + up->down.scale_stride * (size_t)up->index[k], chunks * 8);
            }
            ask_ahead(&next);
            for (int64_t i = share(todo, step, steps); i < share(todo, step + 1, steps); i++) {
                float *y = down->y + i * ST_DOWN_CHUNK;
                prefetch_chunks(&down->down, tiled[2], chunks, down->group, i + 1, 1, index, quads, 0);
                if (fired)
                    transposed_group(&down->down, chunks, down->group, i, fired, i, &w, y);
                else
                    chunk_of[tiled[2]](&down->down, down->group, i, &down->active, y);
            }
            if (third)
                ask_ahead(&next);
        }
        if (gate)
            store_rows((const void *)sum, ST_TILE_ROWS, gate->g + 16 * tile);
    }
    if (gate)
        st_neurons_choose(gate);
    if (up && up->transposed) {
        st_neurons_multiply(up, value, &up->output);
    } else if (up) {
        st_neurons_spread(up, value, spread);
        st_avx2_activate(up->g, spread, &up->active);
    }
}

static ST_ATTENTION_Q8(attention_q8) {
    int16_t *w = (int16_t *)(scores + G * ST_ATTN_CHUNK);
    softmaxes_q8(k, v, hd / ST_BLOCK, q, G, p0, p1, scale, scores, m, l);
    for (int64_t b = 0; b < hd / ST_BLOCK; b++, v += ST_KV_Q8_BLOCK_BYTES) {
        float by = weights_q8(v, scores, G, p0, p1, w) / 32767;
        int64_t ahead = b + 1 < hd / ST_BLOCK ? ST_KV_Q8_BLOCK_BYTES : 0;
        values_q8_all(v + 2 * ST_ATTN_CHUNK, ahead, w, G, p0, p1, by, acc + b * ST_BLOCK, hd);
    }
}
