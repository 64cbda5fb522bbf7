/* Forecasts of the next use. Called by the pager under its lock. Why these half-lives, and what others did:
 * docs/notes/2026-11-30-forecast-eviction.md. */
#include "smallthinker/eviction.h"

#include <math.h>

static const double half_lives[ST_RATES] = {2, 8, 32, 128, 512};
enum { FIRST = 2, USES = 3 }; /* the half-life that counts until something is known, and the one of uses */

/* Steps after which an error weighs half. */
#define MEMORY 64.0

/* What is left of a rate after so many tokens. */
static double left(int i, double tokens) { return exp2(-tokens / half_lives[i]); }

void st_forecast_step(st_forecast *forecast, double now) {
    if (now <= forecast->now)
        return;
    forecast->tokens = now - forecast->now;
    forecast->now = now;
    int best = FIRST;
    for (int i = 0; i < ST_RATES; i++)
        if (forecast->error[i] < forecast->error[best])
            best = i;
    forecast->best = best;
    for (int i = 0; i < ST_RATES; i++) {
        double rest = left(i, forecast->tokens), grown = forecast->known > 0 ? 1 / (1 - left(i, forecast->known)) : 1;
        forecast->grown[i] = grown;
        /* As if no expert were used; those that are put it right. */
        forecast->error[i] = forecast->error[i] * exp2(-1 / MEMORY) + grown * grown * forecast->squares[i];
        forecast->squares[i] *= rest * rest;
    }
    forecast->known += forecast->tokens;
}

void st_forecast_use(st_forecast *forecast, st_use *use, double uses) {
    double share = uses / forecast->tokens;
    double before = fmax(0, forecast->now - forecast->tokens - use->last);
    for (int i = 0; i < ST_RATES; i++) {
        double rate = use->rate[i] * left(i, forecast->now - use->last);
        double updated = rate + (1 - left(i, forecast->tokens)) * share;
        forecast->error[i] += share * share - 2 * share * use->rate[i] * left(i, before) * forecast->grown[i];
        forecast->squares[i] += updated * updated - rate * rate;
        use->rate[i] = (float)updated;
    }
    use->last = forecast->now;
}

void st_forecast_start(st_forecast *forecast, st_use *use, double uses) {
    double rate = fmin(1, uses * (1 - left(USES, 1)));
    forecast->known = 1e9;
    for (int i = 0; i < ST_RATES; i++) {
        double before = use->rate[i] * left(i, forecast->now - use->last);
        forecast->squares[i] += rate * rate - before * before;
        forecast->grown[i] = 1;
        use->rate[i] = (float)rate;
    }
    use->last = forecast->now;
}

float st_forecast_wait(const st_forecast *forecast, const st_use *use) {
    int i = forecast->best;
    float fallen = exp2f((float)((use->last - forecast->now) / half_lives[i]));
    return 1 / (use->rate[i] * (float)forecast->grown[i] * fallen);
}

double st_forecast_uses(const st_forecast *forecast, const st_use *use) {
    return use->rate[USES] * left(USES, forecast->now - use->last) / (1 - left(USES, 1));
}
