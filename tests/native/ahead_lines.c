/* ahead.h: every line of what fires is asked for, once, in parts as equal as they can be. */
#include <stdint.h>

static void count_line(const uint8_t *p);
#define ST_ASK count_line
#include "../../src/kernels/ahead.h"

#include "check.h"

#include <stdlib.h>

enum { NEURONS = 64, STRIDE = 26 * 64, SCALES = 12 * 256 };

static _Alignas(64) uint8_t weights[NEURONS * STRIDE], scales[2 * SCALES];
static int asked_rows[NEURONS * STRIDE / 64], asked_scales[2 * SCALES / 64], asked;

static void count_line(const uint8_t *p) {
    asked++;
    if (p >= weights && p < weights + sizeof weights) {
        asked_rows[(p - weights) / 64]++;
    } else {
        CHECK(p >= scales && p < scales + sizeof scales);
        asked_scales[(p - scales) / 64]++;
    }
}

/* Asks in so many parts for what the neurons of `group` need whose bits are set. */
static void ask(int64_t group, uint32_t fires, int parts) {
    st_neurons n = {.down = {weights, scales, STRIDE, SCALES}, .group = group};
    runs_ahead ahead;
    memset(asked_rows, 0, sizeof asked_rows);
    memset(asked_scales, 0, sizeof asked_scales);
    for (int i = 0; i < 32; i++)
        if (fires >> i & 1)
            n.index[n.fired++] = (int32_t)(32 * group + i);
    look_ahead(&ahead, &n, ST_TILED_Q4_0, 12, parts);
    int all = (int)n.fired * (STRIDE / 64) + (n.fired ? SCALES / 64 : 0);
    for (int part = 0; part < parts; part++) {
        asked = 0;
        ask_ahead(&ahead);
        CHECK(asked == all / parts || asked == all / parts + 1);
    }
    for (int i = 0; i < NEURONS * STRIDE / 64; i++) {
        int neuron = i / (STRIDE / 64);
        CHECK(asked_rows[i] == (neuron / 32 == group && fires >> neuron % 32 & 1));
    }
    for (int i = 0; i < 2 * SCALES / 64; i++)
        CHECK(asked_scales[i] == (n.fired && i / (SCALES / 64) == group));
}

int main(void) {
    runs_ahead none;
    look_ahead(&none, NULL, ST_TILED_Q4_0, 12, 48);
    ask_ahead(&none);
    CHECK(asked == 0);
    for (int round = 0; round < 2000; round++) {
        uint32_t some = (uint32_t)rand() * 2654435761u & (uint32_t)rand();
        ask(round % 2, round % 4 ? some : round % 8 ? UINT32_MAX : 0, 2 + rand() % 150);
    }
    puts("ok");
    return 0;
}
