/* Eviction policies. Called by the pager under its lock; they hold no state of their own. */
#include "smallthinker/eviction.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

/* Tokens after which a use counts half. */
#define HALF_LIFE 512.0

static double lru(double score, double now) {
    (void)score;
    return now;
}

/* Uses, each weighing half after HALF_LIFE tokens. The score is log2(sum) + now / HALF_LIFE: it orders experts as
 * their decayed sums do at any time, so that it changes only when its expert is used. */
static double frequency(double score, double now) {
    double sum = score > 0 ? exp2(score - now / HALF_LIFE) : 0;
    return log2(sum + 1) + now / HALF_LIFE;
}

static const st_eviction policies[] = {{"frequency", frequency}, {"lru", lru}};

const st_eviction *st_eviction_find(const char *name) {
    if (!name)
        return &policies[0];
    for (size_t i = 0; i < sizeof policies / sizeof policies[0]; i++)
        if (strcmp(policies[i].name, name) == 0)
            return &policies[i];
    return NULL;
}
