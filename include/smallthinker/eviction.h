/* Which cached expert goes first: the one whose next use a forecast puts farthest away. */
#ifndef SMALLTHINKER_EVICTION_H
#define SMALLTHINKER_EVICTION_H

enum { ST_RATES = 5 };

/* An expert's rates of use, in uses a token, each an average in which a token counts half after a half-life of its own.
 * last: when they were right, in tokens; they fall from then on. */
typedef struct st_use {
    double last;
    float rate[ST_RATES];
} st_use;

/* Which half-life counts: the one whose rates have forecast the last steps best. A step is what is computed at once: a
 * token, or a batch of them. All zero, it has seen nothing. */
typedef struct st_forecast {
    double now;               /* tokens seen when the step ends that is in progress */
    double tokens;            /* of this step */
    double known;             /* tokens that the rates are averages of */
    double grown[ST_RATES];   /* what a rate is multiplied by, which began at zero `known` tokens ago */
    double squares[ST_RATES]; /* sum over all experts of the square of their rate */
    double error[ST_RATES];   /* sum of the squared errors of the rates as forecasts, old steps weighing less */
    int best;
} st_forecast;

/* A step begins, unless it has: at its end `now` tokens have been seen, which never falls. */
void st_forecast_step(st_forecast *forecast, double now);
/* `uses` tokens of this step use the expert. Called once a step for each expert that is used. */
void st_forecast_use(st_forecast *forecast, st_use *use, double uses);
/* Takes it that the expert had so many recent uses, as st_forecast_uses tells them. */
void st_forecast_start(st_forecast *forecast, st_use *use, double uses);

/* Tokens until the next use, at the rate that counts; infinity where there is none. */
float st_forecast_wait(const st_forecast *forecast, const st_use *use);
/* Recent uses: each weighs half after 128 tokens. */
double st_forecast_uses(const st_forecast *forecast, const st_use *use);

#endif
