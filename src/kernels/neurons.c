/* What every table's ffn does with its neurons between the products: which fire, and what they give to down. Plain C, a
 * few dozen numbers a call. */
#include "smallthinker/kernels.h"

#include <string.h>

void st_neurons_choose(st_neurons *n) {
    n->fired = 0;
    for (int i = 0; i < 32; i++) {
        n->index[n->fired] = (int32_t)(32 * n->group + i);
        n->fired += !(n->g[i] <= 0); /* a NaN gate is passed on, not hidden */
    }
}

void st_neurons_tokens(const float *gate, int64_t n, uint32_t fires[32]) {
    memset(fires, 0, 32 * sizeof *fires);
    for (int64_t t = 0; t < n; t++)
        for (int i = 0; i < 32; i++)
            fires[i] |= (uint32_t)!(gate[32 * t + i] <= 0) << t;
}

void st_neurons_advance(st_neurons *stage[4]) {
    for (int i = 3; i > 0; i--)
        stage[i] = stage[i - 1];
    stage[0] = NULL;
}

void st_neurons_spread(const st_neurons *n, const float *value, float *up) {
    memset(up, 0, 32 * sizeof *up);
    for (int64_t i = 0; i < n->fired; i++)
        up[n->index[i] - 32 * n->group] = value[i];
}

void st_neurons_multiply(const st_neurons *n, const float *value, st_fired *out) {
    int used = 0;
    for (int64_t i = 0; i < n->fired; i++) {
        int32_t index = n->index[i] - (int32_t)(32 * n->group);
        out->h[used] = n->g[index] * value[i];
        out->index[used] = (uint8_t)index;
        used += out->h[used] != 0;
    }
    out->quads = (used + 3) / 4;
    for (int i = used; i < 4 * out->quads; i++) {
        out->h[i] = 0;
        out->index[i] = out->index[used - 1];
    }
}
