/* Plain C: the definition of every kernel, slow and obvious. Every other table is tested against this one. */
#include "smallthinker/kv.h"

#include "plain.h"
#include "table.h"

#include <math.h>
#include <string.h>

static float u16_f32(const uint8_t *p) {
    uint16_t h;
    memcpy(&h, p, 2);
    return st_f16_to_f32(h);
}

static void quantize(const float *x, int64_t cols, st_q8x4 *out) {
    memset(out, 0, (size_t)((cols + 127) / 128) * sizeof *out);
    for (int64_t b = 0; b < cols / ST_BLOCK; b++, x += ST_BLOCK) {
        st_q8x4 *quad = out + b / 4;
        float amax = 0;
        for (int i = 0; i < ST_BLOCK; i++)
            amax = x[i] != x[i] || fabsf(x[i]) > amax ? fabsf(x[i]) : amax;
        float scale = amax / 127, inverse = amax > 0 ? 127 / amax : 0;
        int sum = 0;
        for (int i = 0; i < ST_BLOCK; i++) {
            float v = nearbyintf(x[i] * inverse);
            int q = v >= -127 && v <= 127 ? (int)v : 0; /* NaN and infinity: the scale carries them */
            quad->q[i / 16][b % 4][i % 16] = (int8_t)q;
            sum += q;
        }
        quad->corr[b % 4 * 4] = -8 * sum;
        for (int i = 0; i < 4; i++)
            quad->scale[b % 4 * 4 + i] = scale;
    }
}

static int q8_at(const st_q8x4 *x, int64_t b, int i) { return x[b / 4].q[i / 16][b % 4][i % 16]; }

static void gemm_tile16(int type, const uint8_t *w, int64_t rows, int64_t nb, int64_t t0, int64_t t1,
                        const st_q8x4 *const *x, int64_t n, float *y, int64_t ldy) {
    int64_t tile_bytes = type == ST_Q4_0 ? ST_TILE_Q4_0_BYTES : ST_TILE_Q8_0_BYTES;
    for (int64_t row = t0 * ST_TILE_ROWS; row < t1 * ST_TILE_ROWS && row < rows; row++) {
        const uint8_t *tile = w + row / ST_TILE_ROWS * nb * tile_bytes;
        int64_t r = row % ST_TILE_ROWS;
        for (int64_t t = 0; t < n; t++) {
            float sum = 0;
            for (int64_t b = 0; b < nb; b++) {
                const uint8_t *block = tile + b * tile_bytes;
                int dot = 0;
                for (int i = 0; i < ST_BLOCK; i++) {
                    int j = type == ST_Q4_0 ? i % 16 : i;
                    uint8_t byte = block[32 + 64 * (j / 4) + 4 * r + j % 4];
                    dot += q8_at(x[t], b, i) * (type == ST_Q4_0 ? (byte >> (i / 16 * 4) & 15) - 8 : (int8_t)byte);
                }
                sum += (float)dot * (u16_f32(block + 2 * r) * x[t][b / 4].scale[b % 4 * 4]);
            }
            y[t * ldy + row - t0 * ST_TILE_ROWS] = sum;
        }
    }
}

static ST_GEMM(gemm_q4_0) { gemm_tile16(ST_Q4_0, w, rows, nb, t0, t1, x, n, y, ldy); }

static ST_GEMM(gemm_q8_0) { gemm_tile16(ST_Q8_0, w, rows, nb, t0, t1, x, n, y, ldy); }

/* Six-bit scale (0) or minimum (1) of block b of row r, from the head of a tile of Q4_K or Q5_K (layout.h). */
static int k_scale(const uint8_t *head, int64_t r, int64_t b, int min) {
    int low = head[64 + 16 * b + r] >> 4 * min & 15, high = head[192 + b % 4 * 16 + r] >> (4 * min + b / 4 * 2) & 3;
    return low | high << 4;
}

/* The products d * scale and dmin * minimum are exact in float32. */
static void gemm_k(int type, const uint8_t *w, int64_t rows, int64_t nb, int64_t t0, int64_t t1,
                   const st_q8x4 *const *x, int64_t n, float *y, int64_t ldy) {
    int64_t bytes = type == ST_Q4_K ? ST_TILE_Q4_K_BYTES : ST_TILE_Q5_K_BYTES, super = ST_TILE_K_HEAD + 8 * bytes;
    for (int64_t row = t0 * ST_TILE_ROWS; row < t1 * ST_TILE_ROWS && row < rows; row++) {
        const uint8_t *tile = w + row / ST_TILE_ROWS * (nb / 8) * super;
        int64_t r = row % ST_TILE_ROWS;
        for (int64_t t = 0; t < n; t++) {
            float sum = 0;
            for (int64_t b = 0; b < nb; b++) {
                const uint8_t *head = tile + b / 8 * super, *block = head + ST_TILE_K_HEAD + b % 8 * bytes;
                float scale = u16_f32(head + 2 * r) * (float)k_scale(head, r, b % 8, 0);
                float min = u16_f32(head + 32 + 2 * r) * (float)k_scale(head, r, b % 8, 1);
                float by = x[t][b / 4].scale[b % 4 * 4];
                int dot = 0;
                for (int i = 0; i < ST_BLOCK; i++) {
                    int low = block[64 * (i % 16 / 4) + 4 * r + i % 4] >> i / 16 * 4 & 15;
                    int high = type == ST_Q5_K ? block[256 + 4 * r + i % 4] >> (i % 16 / 4 * 2 + i / 16) & 1 : 0;
                    dot += q8_at(x[t], b, i) * (low | high << 4);
                }
                sum += (float)dot * (scale * by);
                sum += min * ((float)x[t][b / 4].corr[b % 4 * 4] * (0.125f * by)); /* corr is -8 times the sum of x */
            }
            y[t * ldy + row - t0 * ST_TILE_ROWS] = sum;
        }
    }
}

static ST_GEMM(gemm_q4_k) { gemm_k(ST_Q4_K, w, rows, nb, t0, t1, x, n, y, ldy); }

static ST_GEMM(gemm_q5_k) { gemm_k(ST_Q5_K, w, rows, nb, t0, t1, x, n, y, ldy); }

/* Column i of row r of a Q6_K block of a tile (layout.h), -32..31. */
static int q6_at(const uint8_t *block, int64_t r, int i) {
    int low = block[32 + 64 * (i % 16 / 4) + 4 * r + i % 4] >> i / 16 * 4 & 15;
    int high = block[288 + 64 * (i % 16 / 8) + 4 * r + i % 4] >> (i % 8 / 4 * 4 + i / 16 * 2) & 3;
    return (low | high << 4) - 32;
}

static ST_GEMM(gemm_q6_k) {
    for (int64_t row = t0 * ST_TILE_ROWS; row < t1 * ST_TILE_ROWS && row < rows; row++) {
        const uint8_t *tile = w + row / ST_TILE_ROWS * (nb / 8) * ST_TILE_Q6_K_SUPER_BYTES;
        int64_t r = row % ST_TILE_ROWS;
        for (int64_t t = 0; t < n; t++) {
            float sum = 0;
            for (int64_t b = 0; b < nb; b++) {
                const uint8_t *super = tile + b / 8 * ST_TILE_Q6_K_SUPER_BYTES;
                const uint8_t *block = super + 32 + b % 8 * ST_TILE_Q6_K_BYTES;
                int dot[2] = {0, 0};
                for (int i = 0; i < ST_BLOCK; i++)
                    dot[i / 16] += q8_at(x[t], b, i) * q6_at(block, r, i);
                int scaled = dot[0] * (int8_t)block[r] + dot[1] * (int8_t)block[16 + r];
                sum += (float)scaled * (u16_f32(super + 2 * r) * x[t][b / 4].scale[b % 4 * 4]);
            }
            y[t * ldy + row - t0 * ST_TILE_ROWS] = sum;
        }
    }
}

static ST_ROWS(rows_q4_0) {
    for (int64_t k = 0; k < n; k++) {
        const uint8_t *scales = w + stride * (size_t)index[k], *nibbles = scales + 2 * nb;
        float sum = 0;
        for (int64_t b = 0; b < nb; b++) {
            int dot = 0;
            for (int i = 0; i < ST_BLOCK; i++)
                dot += ((nibbles[16 * b + i % 16] >> (i / 16 * 4) & 15) - 8) * q8_at(x, b, i);
            sum += (float)dot * (u16_f32(scales + 2 * b) * x[b / 4].scale[b % 4 * 4]);
        }
        out[k] = sum;
    }
}

/* Column i of block b in the nibbles of Rows, and in what is above them (layout.h). */
static int row_code(int type, const uint8_t *nibbles, const uint8_t *above, int64_t b, int i) {
    int code = nibbles[16 * b + i % 16] >> (i / 16 * 4) & 15;
    if (type == ST_Q5_K)
        code |= (above[b / 4 * 16 + i % 16] >> (b % 4 * 2 + i / 16) & 1) << 4;
    if (type == ST_Q6_K)
        code |= (above[b / 2 * 16 + i % 16] >> (b % 2 * 4 + i / 16 * 2) & 3) << 4;
    return code;
}

/* As gemm_k. */
static void rows_k(int type, const uint8_t *w, size_t stride, int64_t nb, const int32_t *index, int64_t n,
                   const st_q8x4 *x, float *out) {
    int64_t ns = nb / 8;
    for (int64_t k = 0; k < n; k++) {
        const uint8_t *head = w + stride * (size_t)index[k], *nibbles = head + 16 * ns, *above = nibbles + 16 * nb;
        float sum = 0;
        for (int64_t b = 0; b < nb; b++) {
            uint8_t packed[12], scale[8], min[8];
            float by = x[b / 4].scale[b % 4 * 4];
            int dot = 0;
            for (int i = 0; i < 3; i++)
                memcpy(packed + 4 * i, head + 4 * ((i + 1) * ns + b / 8), 4);
            st_k_scales(packed, scale, min);
            for (int i = 0; i < ST_BLOCK; i++)
                dot += q8_at(x, b, i) * row_code(type, nibbles, above, b, i);
            sum += (float)dot * (u16_f32(head + 2 * (b / 8)) * (float)scale[b % 8] * by);
            sum += u16_f32(head + 2 * (ns + b / 8)) * (float)min[b % 8] *
                   ((float)x[b / 4].corr[b % 4 * 4] * (0.125f * by));
        }
        out[k] = sum;
    }
}

static ST_ROWS(rows_q4_k) { rows_k(ST_Q4_K, w, stride, nb, index, n, x, out); }

static ST_ROWS(rows_q5_k) { rows_k(ST_Q5_K, w, stride, nb, index, n, x, out); }

static ST_ROWS(rows_q6_k) {
    int64_t ns = nb / 8;
    for (int64_t k = 0; k < n; k++) {
        const uint8_t *head = w + stride * (size_t)index[k], *nibbles = head + 18 * ns, *above = nibbles + 16 * nb;
        const int8_t *scale = (const int8_t *)head + 2 * ns;
        float sum = 0;
        for (int64_t b = 0; b < nb; b++) {
            int dot[2] = {0, 0};
            for (int i = 0; i < ST_BLOCK; i++)
                dot[i / 16] += q8_at(x, b, i) * (row_code(ST_Q6_K, nibbles, above, b, i) - 32);
            int scaled = dot[0] * scale[b] + dot[1] * scale[nb + b];
            sum += (float)scaled * (u16_f32(head + 2 * (b / 8)) * x[b / 4].scale[b % 4 * 4]);
        }
        out[k] = sum;
    }
}

static void activate(const float *g, const float *up, st_active *out) {
    float h[32], amax = 0;
    memset(out, 0, sizeof *out);
    for (int i = 0; i < 32; i++) {
        int fires = !(g[i] <= 0); /* a NaN gate is passed on, not hidden */
        h[i] = fires ? g[i] * up[i] : 0;
        out->count += fires;
        amax = h[i] != h[i] || fabsf(h[i]) > amax ? fabsf(h[i]) : amax;
    }
    float inverse = amax > 0 ? 127 / amax : 0;
    int used = 0, sum = 0;
    out->scale = amax / 127;
    for (int i = 0; i < 32; i++) {
        float v = nearbyintf(h[i] * inverse);
        int q = v >= -127 && v <= 127 ? (int)v : 0;
        if (q == 0)
            continue;
        out->index[used] = (uint8_t)i;
        out->h[used++] = (int8_t)q;
        sum += q;
        if (i < 16) {
            out->low = used;
            out->corr_low = -8 * sum;
        }
    }
    if (used == 0 && !(amax <= 0)) /* only NaN or infinity: keep one entry so that the scale is seen */
        used = out->low = 1;
    out->high = used - out->low;
    out->corr = -8 * sum;
    out->quads = (used + 3) / 4;
    for (int i = used; used > 0 && i < 4 * out->quads + 3 && i < 32; i++)
        out->index[i] = out->index[used - 1];
}

/* What outputs o of Down get from the 32 neurons of group g. */
static float down_q4_0_group(const st_down_view *down, int64_t g, int64_t o, const st_active *a) {
    const uint8_t *lines = down->lines + down->stride * 32 * (size_t)g;
    int64_t byte = o / 128 * 64 + (o % 16 / 4) * 16 + (o % 128 / 32) * 4 + o % 4;
    int shift = o % 32 >= 16 ? 4 : 0, dot = 0;
    for (int i = 0; i < 4 * a->quads; i++)
        dot += a->h[i] * ((lines[down->stride * a->index[i] + (size_t)byte] >> shift & 15) - 8);
    return (float)dot * (u16_f32(down->scales + down->scale_stride * (size_t)g + 2 * o) * a->scale);
}

/* The code that the line of a neuron has for output o, of chunks * 128. */
static int down_code(int type, const uint8_t *line, int64_t chunks, int64_t o) {
    int64_t c = o / 128, v = o % 128 / 32, h = o % 32 / 16, L = o % 16 / 4, k = o % 4;
    int code = line[64 * c + 16 * L + 4 * v + k] >> (4 * h) & 15;
    line += 64 * chunks;
    if (type == ST_Q5_K)
        code |= (line[c / 4 * 64 + 16 * L + c % 4 * 4 + k] >> (2 * v + h) & 1) << 4;
    if (type == ST_Q6_K)
        code |= (line[c / 2 * 64 + 16 * L + c % 2 * 8 + v / 2 * 4 + k] >> (v % 2 * 4 + 2 * h) & 3) << 4;
    return code;
}

static float down_k_group(int type, const st_down_view *down, int64_t g, int64_t o, const st_active *a) {
    const uint8_t *lines = down->lines + down->stride * 32 * (size_t)g;
    const uint8_t *super = down->scales + 8 * down->scale_stride * (size_t)(g / 8);
    int64_t chunks = (int64_t)down->scale_stride / (ST_DOWN_K_HEAD / 8 + ST_DOWN_K_SCALES), r = o % 128;
    const uint8_t *head = super + ST_DOWN_K_HEAD * (o / 128);
    const uint8_t *six = super + ST_DOWN_K_HEAD * chunks + ST_DOWN_K_SCALES * (g % 8 * chunks + o / 128);
    int above = six[128 + r % 64] >> (r / 64 * 2), dot = 0;
    float scale = u16_f32(head + 2 * r) * (float)((six[r] & 15) | (above & 3) << 4);
    float min = u16_f32(head + 256 + 2 * r) * (float)(six[r] >> 4 | (above >> 4 & 3) << 4);
    for (int i = 0; i < 4 * a->quads; i++)
        dot += a->h[i] * down_code(type, lines + down->stride * a->index[i], chunks, o);
    return (float)dot * (scale * a->scale) + min * ((float)a->corr * (0.125f * a->scale));
}

static float down_q4_k_group(const st_down_view *down, int64_t g, int64_t o, const st_active *a) {
    return down_k_group(ST_Q4_K, down, g, o, a);
}

static float down_q5_k_group(const st_down_view *down, int64_t g, int64_t o, const st_active *a) {
    return down_k_group(ST_Q5_K, down, g, o, a);
}

static float down_q6_k_group(const st_down_view *down, int64_t g, int64_t o, const st_active *a) {
    const uint8_t *lines = down->lines + down->stride * 32 * (size_t)g;
    const uint8_t *super = down->scales + 8 * down->scale_stride * (size_t)(g / 8);
    int64_t chunks = (int64_t)down->scale_stride / (ST_DOWN_Q6_K_HEAD / 8 + ST_DOWN_Q6_K_SCALES);
    const int8_t *scale =
        (const int8_t *)super + ST_DOWN_Q6_K_HEAD * chunks + ST_DOWN_Q6_K_SCALES * (g % 8 * chunks + o / 128) + o % 128;
    int dot[2] = {0, 0};
    for (int i = 0; i < 4 * a->quads; i++)
        dot[a->index[i] / 16] += a->h[i] * (down_code(ST_Q6_K, lines + down->stride * a->index[i], chunks, o) - 32);
    return (float)(dot[0] * scale[0] + dot[1] * scale[128]) * (u16_f32(super + 2 * o) * a->scale);
}

typedef float down_group(const st_down_view *down, int64_t g, int64_t o, const st_active *a);

static void down_all(down_group *group, const st_down_view *down, int64_t groups, int64_t c0, int64_t c1,
                     const st_active *a, float weight, float *y) {
    for (int64_t o = c0 * ST_DOWN_CHUNK; o < c1 * ST_DOWN_CHUNK; o++)
        for (int64_t part = 0; part < groups; part += ST_FFN_PART) {
            float sum = 0;
            for (int64_t g = part; g < part + ST_FFN_PART && g < groups; g++)
                if (a[g].quads)
                    sum += group(down, g, o, a + g);
            y[o - c0 * ST_DOWN_CHUNK] += weight * sum;
        }
}

#define DOWN(NAME, name)                                                                                               \
    static ST_DOWN(down_##name) {                                                                                      \
        (void)d;                                                                                                       \
        for (int64_t t = 0; t < n; t++)                                                                                \
            down_all(down_##name##_group, down, groups, c0, c1, a[t], weight[t], y[t]);                                \
    }
ST_SPARSE_TYPES(DOWN)

/* Byte k of what block b of 32 outputs multiplies the nibbles of neuron a->index[k] by; scales: of a group's first
 * neuron; stride: from one neuron's to the next. Returns the scale of the bytes. */
static float weigh_block(const uint8_t *scales, size_t stride, int64_t b, const st_fired *a, int q[32]) {
    float product[32], amax = 0;
    for (int k = 0; k < 4 * a->quads; k++) {
        product[k] = a->h[k] * u16_f32(scales + stride * a->index[k] + 2 * b);
        amax = product[k] != product[k] || fabsf(product[k]) > amax ? fabsf(product[k]) : amax;
    }
    for (int k = 0; k < 4 * a->quads; k++) {
        float v = nearbyintf(product[k] * (amax > 0 ? 127 / amax : 0));
        q[k] = v >= -127 && v <= 127 ? (int)v : 0;
    }
    return amax / 127;
}

/* What the 32 outputs of block b get from the 32 neurons of group g, added to y. */
static void transposed_group(const st_down_view *down, int64_t g, int64_t b, const st_fired *a, float *y) {
    const uint8_t *lines = down->lines + down->stride * 32 * (size_t)g + b / 4 * 64 + b % 4 * 4;
    int q[32];
    float scale = weigh_block(down->scales + down->scale_stride * 32 * (size_t)g, down->scale_stride, b, a, q);
    for (int i = 0; i < ST_BLOCK; i++) {
        int dot = 0;
        for (int k = 0; k < 4 * a->quads; k++)
            dot += q[k] *
                   ((lines[down->stride * a->index[k] + (size_t)(i % 16 / 4 * 16 + i % 4)] >> (i / 16 * 4) & 15) - 8);
        y[i] += (float)dot * scale;
    }
}

static ST_DOWN_TRANSPOSED(down_transposed_q4_0) {
    (void)d;
    for (int64_t b = 4 * c0; b < 4 * c1; b++, y += ST_BLOCK)
        for (int64_t part = 0; part < groups; part += ST_FFN_PART) {
            float sum[ST_BLOCK] = {0};
            for (int64_t g = part; g < part + ST_FFN_PART && g < groups; g++)
                if (a[g].quads)
                    transposed_group(down, g, b, a + g, sum);
            for (int i = 0; i < ST_BLOCK; i++)
                y[i] += weight * sum[i];
        }
}

#define GEMM_OF(NAME, name) [ST_TILED_##NAME] = gemm_##name,
#define ROWS_OF(NAME, name) [ST_TILED_##NAME] = rows_##name,
#define GROUP_OF(NAME, name) [ST_TILED_##NAME] = down_##name##_group,
static st_gemm *const gemm_of[ST_TILED_COUNT] = {ST_TILED_TYPES(GEMM_OF)};
static st_rows *const rows_of[ST_TILED_COUNT] = {ST_SPARSE_TYPES(ROWS_OF)};
static down_group *const group_of[ST_TILED_COUNT] = {ST_SPARSE_TYPES(GROUP_OF)};

static ST_FFN(ffn) {
    int64_t padded = (nb * ST_BLOCK + ST_DOWN_CHUNK - 1) / ST_DOWN_CHUNK * ST_DOWN_CHUNK;
    if (stage[3] && stage[3]->transposed) {
        for (int64_t b = 0; b < padded / ST_BLOCK && stage[3]->output.quads; b++)
            transposed_group(&stage[3]->down, stage[3]->group, b, &stage[3]->output, stage[3]->y + b * ST_BLOCK);
    } else if (stage[3] && stage[3]->active.quads)
        for (int64_t o = 0; o < padded; o++)
            stage[3]->y[o] += group_of[tiled[2]](&stage[3]->down, stage[3]->group, o, &stage[3]->active);
    if (stage[2]) {
        float value[32], up[32];
        rows_of[tiled[1]](stage[2]->up, stage[2]->up_stride, nb, stage[2]->index, stage[2]->fired, stage[2]->x, value);
        if (stage[2]->transposed) {
            st_neurons_multiply(stage[2], value, &stage[2]->output);
        } else {
            st_neurons_spread(stage[2], value, up);
            activate(stage[2]->g, up, &stage[2]->active);
        }
    }
    if (stage[0]) {
        gemm_of[tiled[0]](stage[0]->gate, 32, nb, 0, 2, &stage[0]->x, 1, stage[0]->g, 32);
        st_neurons_choose(stage[0]);
    }
}

static ST_ATTENTION(attention) {
    for (int64_t h = 0; h < G; h++) {
        float *s = scores + h * ST_ATTN_CHUNK, max = -INFINITY, sum = 0;
        for (int64_t p = 0; p < n; p++) {
            float dot = 0;
            for (int64_t i = 0; i < hd; i++)
                dot += q[h * hd + i] * st_f16_to_f32(k[p * hd + i]);
            s[p] = dot * scale;
            max = s[p] > max ? s[p] : max;
        }
        for (int64_t i = 0; i < hd; i++)
            acc[h * hd + i] = 0;
        for (int64_t p = 0; p < n; p++) {
            float e = expf(s[p] - max);
            sum += e;
            for (int64_t i = 0; i < hd; i++)
                acc[h * hd + i] += e * st_f16_to_f32(v[p * hd + i]);
        }
        m[h] = max;
        l[h] = sum;
    }
}

static ST_ATTENTION_MANY(attention_many) {
    attention_each(attention, q, ldq, n, G, hd, k, v, p0, p1, scale, scratch, acc, m, l);
}

static ST_ATTENTION_Q8(attention_q8) {
    int64_t t0 = p0 / ST_TILE_ROWS;
    gemm_q8_0(k, p1, hd / ST_BLOCK, t0, (p1 + ST_TILE_ROWS - 1) / ST_TILE_ROWS, q, 2 * G, scores + t0 * ST_TILE_ROWS,
              ST_ATTN_CHUNK);
    for (int64_t h = 0; h < G; h++) {
        float *s = scores + h * ST_ATTN_CHUNK, max = -INFINITY, sum = 0;
        for (int64_t p = p0; p < p1; p++) {
            s[p] = (s[p] + s[G * ST_ATTN_CHUNK + p]) * scale;
            max = s[p] > max || s[p] != s[p] ? s[p] : max; /* NaN stays */
        }
        for (int64_t p = p0; p < p1; p++) {
            s[p] = expf(s[p] - max);
            sum += s[p];
        }
        m[h] = max;
        l[h] = sum;
    }
    for (int64_t b = 0; b < hd / ST_BLOCK; b++, v += ST_KV_Q8_BLOCK_BYTES) {
        float top = 0;
        for (int64_t p = p0; p < p1; p++) {
            float d = u16_f32(v + 2 * p);
            top = d > top || d != d ? d : top;
        }
        for (int64_t h = 0; h < G; h++)
            for (int i = 0; i < ST_BLOCK; i++) {
                int32_t dot = 0;
                for (int64_t p = p0; p < p1; p++) {
                    float w = nearbyintf(scores[h * ST_ATTN_CHUNK + p] * (u16_f32(v + 2 * p) * (32767 / top)));
                    int8_t value = (int8_t)v[2 * ST_ATTN_CHUNK + p / 2 * 64 + 2 * i + p % 2];
                    dot += (w >= 0 ? (int32_t)w : 0) * value; /* NaN: the scale or the sum carries it */
                }
                acc[h * hd + ST_BLOCK * b + i] = (float)dot * (top / 32767);
            }
    }
}

static void rmsnorm(const float *x, const float *w, int64_t n, float eps, float *out) {
    float sum = 0;
    for (int64_t i = 0; i < n; i++)
        sum += x[i] * x[i];
    float scale = 1 / sqrtf(sum / (float)n + eps);
    for (int64_t i = 0; i < n; i++)
        out[i] = x[i] * scale * w[i];
}

static float dot(const float *a, const float *b, int64_t n) {
    float sum = 0;
    for (int64_t i = 0; i < n; i++)
        sum += a[i] * b[i];
    return sum;
}

static void axpy(float a, const float *x, float *y, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        y[i] += a * x[i];
}

static void to_f16(const float *x, uint16_t *out, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        out[i] = st_f32_to_f16(x[i]);
}

static void from_f16(const uint16_t *x, float *out, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        out[i] = st_f16_to_f32(x[i]);
}

void st_fill_ref(st_kernels *k) {
    ST_ENTER_MATRICES
    k->quantize = quantize;
    k->activate = activate;
    k->attention = attention;
    k->attention_many = attention_many;
    k->attention_q8 = attention_q8;
    k->rmsnorm = rmsnorm;
    k->dot = dot;
    k->axpy = axpy;
    k->to_f16 = to_f16;
    k->from_f16 = from_f16;
    k->rope = rope;
    k->top_k = top_k;
}
