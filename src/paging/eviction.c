/* Eviction policies. Called by the pager under its lock; they hold no state of their own. */
#include "smallthinker/eviction.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

/* Tokens after which a use counts half. Measured with tools/paging/replay.py: docs/notes/2026-11-24-eviction.md. */
#define HALF_LIFE 128.0

static double lru(double score, double now, double uses) {
    (void)score;
    (void)uses;
    return now;
}

static double lru_uses(double score, double now) { return score > 0 ? exp2((score - now) / HALF_LIFE) : 0; }

/* Uses, each weighing half after HALF_LIFE tokens. The score is log2(sum) + now / HALF_LIFE: it orders experts as
 * their decayed sums do at any time, so that it changes only when its expert is used. 0 is left for "never". */
static double frequency_uses(double score, double now) { return score != 0 ? exp2(score - now / HALF_LIFE) : 0; }

static double frequency(double score, double now, double uses) {
    double sum = frequency_uses(score, now) + uses;
    return sum > 0 ? log2(sum) + now / HALF_LIFE : 0;
}

static const st_eviction policies[] = {{"frequency", frequency, frequency_uses}, {"lru", lru, lru_uses}};

const st_eviction *st_eviction_find(const char *name) {
    if (!name)
        return &policies[0];
    for (size_t i = 0; i < sizeof policies / sizeof policies[0]; i++)
        if (strcmp(policies[i].name, name) == 0)
            return &policies[i];
    return NULL;
}
