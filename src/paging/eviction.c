/* Forecasts of the next use. Called by the pager under its lock. Why these half-lives, and what others did:
 * docs/notes/2026-11-30-forecast-eviction.md. */
#include "smallthinker/eviction.h"

#include <math.h>

static const double half_lives[ST_RATES] = {2, 8, 32, 128, 512};
enum { FIRST = 2, USES = 3 }; /* the half-life that counts until something is known, and the one of recent uses */

/* Steps of all layers after which an error weighs half. */
#define MEMORY 64.0

/* What is left of a rate after so many tokens. */
static double left(int i, double tokens) { return exp2(-tokens / half_lives[i]); }

void st_forecast_init(st_forecast *forecast, int layers) {
    *forecast = (st_forecast){.steps = MEMORY * layers, .best = FIRST};
}

void st_forecast_step(st_forecast *forecast, st_layer_time *time, double tokens) {
    double less = exp2(-1 / forecast->steps);
    int best = FIRST;
    for (int i = 0; i < ST_RATES; i++)
        if (forecast->error[i] < forecast->error[best])
            best = i;
    forecast->best = best;
    for (int i = 0; i < ST_RATES; i++) {
        double rest = left(i, tokens), grown = time->known > 0 ? 1 / (1 - left(i, time->known)) : 1;
        time->grown[i] = grown;
        /* As if no expert were used; those that are put it right. */
        forecast->error[i] = forecast->error[i] * less + grown * grown * time->squares[i];
        time->squares[i] *= rest * rest;
    }
    time->tokens = tokens;
    time->now += tokens;
    time->known += tokens;
}

void st_forecast_use(st_forecast *forecast, st_layer_time *time, st_use *use, double uses) {
    double share = uses / time->tokens;
    double before = fmax(0, time->now - time->tokens - use->last);
    for (int i = 0; i < ST_RATES; i++) {
        double rate = use->rate[i] * left(i, time->now - use->last);
        double updated = rate + (1 - left(i, time->tokens)) * share;
        forecast->error[i] += share * share - 2 * share * use->rate[i] * left(i, before) * time->grown[i];
        time->squares[i] += updated * updated - rate * rate;
        use->rate[i] = (float)updated;
    }
    use->last = time->now;
}

void st_forecast_start(st_layer_time *time, st_use *use, double uses) {
    double rate = fmin(1, uses * (1 - left(USES, 1)));
    time->known = 1e9;
    for (int i = 0; i < ST_RATES; i++) {
        double before = use->rate[i] * left(i, time->now - use->last);
        time->squares[i] += rate * rate - before * before;
        time->grown[i] = 1;
        use->rate[i] = (float)rate;
    }
    use->last = time->now;
}

float st_forecast_wait(const st_forecast *forecast, const st_layer_time *time, const st_use *use) {
    int i = forecast->best;
    float fallen = exp2f((float)((use->last - time->now) / half_lives[i]));
    return 1 / (use->rate[i] * (float)time->grown[i] * fallen);
}

double st_recent_uses(const st_layer_time *time, const st_use *use) {
    return use->rate[USES] * left(USES, time->now - use->last) / (1 - left(USES, 1));
}
