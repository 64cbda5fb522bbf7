/* libFuzzer's door to what the C core does with bytes from files: layouts, dequantising, quantising, checksums and
 * scores of eviction, on memory of exactly the size that the contracts name. Built by `make fuzz` with clang's
 * sanitizers. */
#include "smallthinker/crc32.h"
#include "smallthinker/eviction.h"
#include "smallthinker/expert.h"
#include "smallthinker/quantize.h"
#include "smallthinker/status.h"

#include "check.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

/* What is left of the input: numbers first, then bytes that are repeated as often as needed. */
typedef struct input {
    const uint8_t *data;
    size_t size;
} input;

static uint8_t take(input *in) {
    if (in->size == 0)
        return 0;
    in->size--;
    return *in->data++;
}

static uint8_t *fill(const input *in, size_t bytes) {
    uint8_t *p = malloc(bytes ? bytes : 1);
    CHECK(p);
    for (size_t i = 0; i < bytes; i++)
        p[i] = in->size ? in->data[i % in->size] : (uint8_t)i;
    return p;
}

/* A pack, and its way back: not a bit changes. */
static void expert(input *in) {
    int64_t d = take(in) * (take(in) % 2 ? 32 : 1), f = take(in) * (take(in) % 2 ? 8 : 1);
    int gate = take(in) % 34 - 1, same = take(in) % 4;
    int up = same ? gate : take(in) % 34, down = same ? gate : take(in) % 34, transposed = take(in) % 2;
    st_expert e;
    if (st_expert_init(&e, d, f, gate, up, down, transposed, take(in) % 2) < 0)
        return;
    CHECK(e.up_at >= e.rows[0] && e.down_at >= e.rows[0] && e.bytes >= e.rows[0] + e.rows[1] + e.rows[2]);
    uint8_t *source[3], *back[3], *blob = malloc(e.bytes);
    CHECK(blob);
    for (int i = 0; i < 3; i++) {
        source[i] = fill(in, e.rows[i]);
        back[i] = malloc(e.rows[i]);
        CHECK(back[i]);
    }
    st_expert_pack(&e, source[0], source[1], source[2], blob);
    st_expert_unpack(&e, blob, back[0], back[1], back[2]);
    for (int i = 0; i < 3; i++) {
        CHECK(memcmp(source[i], back[i], e.rows[i]) == 0);
        free(source[i]);
        free(back[i]);
    }
    free(blob);
}

/* A matrix in tiles: the way back, and each row as floats, as from its GGUF row. */
static void tiles(input *in) {
    int type = take(in) % 32;
    int64_t rows = 1 + take(in) % 40, cols = take(in) * (take(in) % 2 ? 32 : 1);
    size_t bytes = st_tile16_bytes(type, rows, cols), row = st_row_bytes(type, cols);
    if (bytes == 0 || row == 0)
        return;
    uint8_t *source = fill(in, row * (size_t)rows), *tiled = malloc(bytes), *back = malloc(row * (size_t)rows);
    float *one = malloc((size_t)cols * sizeof *one), *other = malloc((size_t)cols * sizeof *other);
    CHECK(tiled && back && one && other);
    st_pack_tile16(type, source, rows, cols, tiled, 0, (rows + ST_TILE_ROWS - 1) / ST_TILE_ROWS);
    st_unpack_tile16(type, tiled, rows, cols, back);
    CHECK(memcmp(source, back, row * (size_t)rows) == 0);
    for (int64_t r = 0; r < rows; r++) {
        st_dequantize_tile16_row(type, tiled, cols, r, one);
        st_dequantize_row(type, source + (size_t)r * row, cols, other);
        CHECK(memcmp(one, other, (size_t)cols * sizeof *one) == 0);
    }
    free(source);
    free(tiled);
    free(back);
    free(one);
    free(other);
}

static void dequantize(input *in) {
    int type = take(in) % 70;
    int64_t cols = take(in) * (take(in) % 2 ? 32 : 1);
    size_t bytes = st_row_bytes(type, cols);
    if (bytes == 0)
        return;
    uint8_t *row = fill(in, bytes);
    float *out = malloc((size_t)cols * sizeof *out);
    CHECK(out);
    st_dequantize_row(type, row, cols, out);
    free(row);
    free(out);
}

/* What was taken is finite, and no further from its source than half a step of its block's scale. */
static void quantize(input *in) {
    const int types[] = {ST_Q4_0, ST_Q8_0, ST_F16, ST_Q6_K}, sources[] = {ST_F32, ST_BF16, ST_F16};
    int type = types[take(in) % 4], from = sources[take(in) % 3];
    int64_t n = take(in) * (take(in) % 4 ? 32 : 1);
    size_t bytes = st_row_bytes(type, n);
    uint8_t *source = fill(in, (size_t)n * (from == ST_F32 ? 4 : 2)), *made = malloc(bytes ? bytes : 1);
    CHECK(made);
    int status = st_quantize(type, made, from, source, n);
    CHECK(status == ST_OK || status == ST_ERR_ARGUMENT || status == ST_ERR_UNSUPPORTED);
    if (status == ST_OK && n > 0) {
        float *out = malloc((size_t)n * sizeof *out);
        CHECK(out);
        st_dequantize_row(type, made, n, out);
        for (int64_t i = 0; i < n; i++)
            CHECK(isfinite(out[i]));
        free(out);
    }
    free(source);
    free(made);
}

/* Against the definition, bit by bit. */
static void checksum(input *in) {
    uint8_t *data = fill(in, in->size);
    uint32_t sum = UINT32_MAX;
    for (size_t i = 0; i < in->size; i++) {
        sum ^= data[i];
        for (int bit = 0; bit < 8; bit++)
            sum = sum >> 1 ^ (sum & 1 ? 0xedb88320u : 0);
    }
    CHECK(st_crc32(data, in->size) == ~sum);
    free(data);
}

/* Uses of a profile, as a file may claim them, and steps of any length: rates stay numbers between none and one a
 * token, and order as uses do. */
static void eviction(input *in) {
    st_forecast forecast;
    st_layer_time time = {0};
    st_use use[4] = {{0}};
    st_forecast_init(&forecast, 1);
    for (int i = 0; i < 4 && in->size >= sizeof(double); i++) {
        double uses;
        memcpy(&uses, in->data, sizeof uses);
        in->data += sizeof uses;
        in->size -= sizeof uses;
        st_forecast_start(&time, use + i, isfinite(uses) ? fabs(uses) : 1);
    }
    while (in->size > 0) {
        uint8_t what = take(in);
        double tokens = what < 8 ? 1e6 : 1 + what % 16;
        st_forecast_step(&forecast, &time, tokens);
        for (int i = 0; i < 4; i++)
            if (what >> (4 + i) & 1)
                st_forecast_use(&forecast, &time, use + i, 1 + (int)(what % 3) * (tokens - 1) / 2);
    }
    for (int i = 0; i < 4; i++) {
        CHECK(st_forecast_wait(&forecast, &time, use + i) > 0 && st_recent_uses(&time, use + i) >= 0);
        for (int r = 0; r < ST_RATES; r++)
            CHECK(use[i].rate[r] >= 0 && use[i].rate[r] < 1.001f && isfinite(forecast.error[r]));
        for (int k = 0; k < 4; k++)
            if (use[i].last == use[k].last && use[i].rate[forecast.best] > use[k].rate[forecast.best])
                CHECK(st_forecast_wait(&forecast, &time, use + i) <= st_forecast_wait(&forecast, &time, use + k));
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static void (*const parts[])(input *) = {expert, tiles, dequantize, quantize, checksum, eviction};
    input in = {data, size};
    parts[take(&in) % (sizeof parts / sizeof *parts)](&in);
    return 0;
}
