/* What the x86 tables do alike around their own inner steps; included by avx512vnni.c and vec256.h after these:
 *   VECTOR, TILE_VECTORS                     the sums of a tile's 16 rows
 *   tile_q4_0_part(tile, b0, b1, x, stream, sum)  blocks b0..b1 of a tile for one token, added to sum; stream: it
 *                                            comes from memory, and what follows is prefetched
 *   store_rows(sum, count, y)                the first `count` rows of a tile
 *   rows_r(R, rows, nb, x, out)              one or two rows
 *   down_chunk(lines, line, scales, a, y)    128 outputs of 32 neurons, added to y
 *   weigh_blocks(scales, stride, count, a, w), transposed_chunk(lines, line, a, w, first, y)
 *                                            the same where down is transposed: weights of 16 blocks; 128 outputs
 *   add_weighted(weight, total, y)           y += weight * total of 128 outputs
 *   softmax_q8, weights_q8, values_q8_all    attention_q8_256.h, attention_q8_512.h */

/* The activate of all x86 tables, of avx2.c. */
void st_avx2_activate(const float *g, const float *up, st_active *out);

static ST_ROWS(rows_q4_0) {
    for (int64_t k = 0; k < n; k += 2) {
        const uint8_t *rows[2] = {w + stride * (size_t)index[k], k + 1 < n ? w + stride * (size_t)index[k + 1] : NULL};
        if (rows[1])
            rows_r(2, rows, nb, x, out + k);
        else
            rows_r(1, rows, nb, x, out + k);
    }
}

/* 128 outputs of one group, added to y. bytes: of a line. fired is NULL where down is not transposed; otherwise w holds
 * the weights of this chunk, which are made here for four chunks at a time: i counts the chunks from the first that is
 * computed. */
static inline __attribute__((always_inline)) void group_chunk(const st_down_view *down, int64_t bytes, int64_t g,
                                                              int64_t chunk, const st_active *active,
                                                              const st_fired *fired, int64_t i, block_weights *w,
                                                              float *y) {
    const uint8_t *lines = down->lines + 32 * down->stride * (size_t)g + 64 * chunk;
    if (!fired) {
        down_chunk(lines, down->stride, down->scales + down->scale_stride * (size_t)g + 256 * chunk, active, y);
        return;
    }
    if (i % 4 == 0)
        weigh_blocks(down->scales + 32 * down->scale_stride * (size_t)g + 8 * chunk, down->scale_stride,
                     bytes / 16 - 4 * chunk, fired, w);
    transposed_chunk(lines, down->stride, fired, w, (int)(i % 4) * 4, y);
}

/* Down in either layout: active, or fired, is NULL. By group, so that a neuron's whole run of bytes is used when it
 * comes. */
static inline __attribute__((always_inline)) void down_chunks(const st_down_view *down, int64_t d, int64_t groups,
                                                              int64_t c0, int64_t c1, const st_active *active,
                                                              const st_fired *fired, float weight, float *y) {
    int64_t bytes = (d + ST_DOWN_CHUNK - 1) / ST_DOWN_CHUNK * 64;
    for (int64_t c = c0; c < c1; c += DOWN_CHUNKS, y += DOWN_CHUNKS * ST_DOWN_CHUNK) {
        int64_t n = c1 - c < DOWN_CHUNKS ? c1 - c : DOWN_CHUNKS;
        const uint8_t *lines = down->lines + c * 64;
        float total[DOWN_CHUNKS * ST_DOWN_CHUNK];
        block_weights w;
        for (int64_t g = 0; g < groups; g++) {
            if (g % ST_FFN_PART == 0)
                memset(total, 0, (size_t)n * ST_DOWN_CHUNK * sizeof *total);
            for (int64_t i = 0; i < n; i++) {
                if (g + 2 < groups)
                    prefetch_neurons(lines + 32 * down->stride * (size_t)(g + 2), down->stride, n,
                                     active ? active[g + 2].index : fired[g + 2].index,
                                     active ? active[g + 2].quads : fired[g + 2].quads, i);
                if (active ? active[g].quads : fired[g].quads)
                    group_chunk(down, bytes, g, c + i, active ? active + g : NULL, fired ? fired + g : NULL, i, &w,
                                total + i * ST_DOWN_CHUNK);
            }
            if ((g + 1) % ST_FFN_PART == 0 || g + 1 == groups)
                for (int64_t i = 0; i < n; i++)
                    add_weighted(weight, total + i * ST_DOWN_CHUNK, y + i * ST_DOWN_CHUNK);
        }
    }
}

static ST_DOWN(down_q4_0) { down_chunks(down, d, groups, c0, c1, a, NULL, weight, y); }

static ST_DOWN_TRANSPOSED(down_transposed_q4_0) { down_chunks(down, d, groups, c0, c1, NULL, a, weight, y); }

/* Share `step` of `steps` of what stage[1] of ffn_q4_0 will need: lines of down, rows of up and, where down is
 * transposed, scales of the neurons that fire; else the group's scales. bytes: of a line. */
static inline void prefetch_fired(const st_neurons *n, int64_t nb, int64_t bytes, int64_t step, int64_t steps) {
    for (int64_t k = share(n->fired, step, steps); k < share(n->fired, step + 1, steps); k++) {
        prefetch_far(n->down.lines + n->down.stride * (size_t)n->index[k], bytes);
        prefetch_far(n->up + n->up_stride * (size_t)n->index[k], nb * 18);
        if (n->transposed)
            prefetch_far(n->down.scales + n->down.scale_stride * (size_t)n->index[k], bytes / 8);
    }
    int64_t from = share(bytes * 4, step, steps), to = share(bytes * 4, step + 1, steps);
    if (n->fired && !n->transposed)
        prefetch_far(n->down.scales + n->down.scale_stride * (size_t)n->group + from, to - from);
}

/* The gate's blocks come from memory in order; the other stages' arithmetic and prefetches go between them, where the
 * core would wait. */
static ST_FFN(ffn_q4_0) {
    st_neurons *gate = stage[0], *ahead = stage[1], *up = stage[2], *down = stage[3];
    int64_t bytes = (nb * ST_BLOCK + ST_DOWN_CHUNK - 1) / ST_DOWN_CHUNK * 64;
    int again = gate && ahead && gate->gate == ahead->gate; /* of another token: it is in the cache */
    const st_fired *fired = down && down->transposed ? &down->output : NULL;
    int64_t chunks = down && (fired ? fired->quads : down->active.quads) ? bytes / 64 : 0;
    int64_t steps = 2 * ((nb + GATE_STEP - 1) / GATE_STEP), step = 0;
    float value[32], spread[32];
    block_weights w;
    for (int tile = 0; tile < 2; tile++) {
        VECTOR sum[TILE_VECTORS];
        memset(sum, 0, sizeof sum);
        for (int64_t b = 0; b < nb; b += GATE_STEP, step++) {
            if (gate)
                tile_q4_0_part(gate->gate + tile * nb * ST_TILE_Q4_0_BYTES, b, b + GATE_STEP < nb ? b + GATE_STEP : nb,
                               gate->x, !again, sum);
            if (ahead)
                prefetch_fired(ahead, nb, bytes, step, steps);
            if (up) {
                int64_t k0 = share(up->fired, step, steps), k1 = share(up->fired, step + 1, steps);
                for (int64_t k = k0 + 2; k < k1 + 2 && k < up->fired; k++)
                    prefetch_near(up->up + up->up_stride * (size_t)up->index[k], nb * 18);
                rows_q4_0(up->up, up->up_stride, nb, up->index + k0, k1 - k0, up->x, value + k0);
                if (up->transposed) /* the neurons' own scales, which the last stage wants all at once */
                    for (int64_t k = k0; k < k1; k++)
                        prefetch_near(up->down.scales + up->down.scale_stride * (size_t)up->index[k], bytes / 8);
            }
            for (int64_t i = share(chunks, step, steps); i < share(chunks, step + 1, steps); i++) {
                const uint8_t *lines = down->down.lines + 32 * down->down.stride * (size_t)down->group + 64 * i;
                prefetch_neurons(lines + 64, down->down.stride, 1, fired ? fired->index : down->active.index,
                                 fired ? fired->quads : down->active.quads, 0);
                group_chunk(&down->down, bytes, down->group, i, &down->active, fired, i, &w,
                            down->y + i * ST_DOWN_CHUNK);
            }
        }
        if (gate)
            store_rows(sum, ST_TILE_ROWS, gate->g + 16 * tile);
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
    int64_t t0 = p0 / ST_TILE_ROWS;
    int16_t *w = (int16_t *)(scores + G * ST_ATTN_CHUNK);
    gemm_q8_0(k, ST_ATTN_CHUNK, hd / ST_BLOCK, t0, (p1 + ST_TILE_ROWS - 1) / ST_TILE_ROWS, q, 2 * G,
              scores + t0 * ST_TILE_ROWS, ST_ATTN_CHUNK);
    for (int64_t h = 0; h < G; h++)
        l[h] = softmax_q8(scores + h * ST_ATTN_CHUNK, scores + (G + h) * ST_ATTN_CHUNK, p0, p1, scale, m + h);
    for (int64_t b = 0; b < hd / ST_BLOCK; b++, v += ST_KV_Q8_BLOCK_BYTES) {
        float by = weights_q8(v, scores, G, p0, p1, w) / 32767;
        values_q8_all(v + 2 * ST_ATTN_CHUNK, w, G, p0, p1, by, acc + b * ST_BLOCK, hd);
    }
}
