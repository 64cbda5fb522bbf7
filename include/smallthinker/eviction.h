/* Which cached expert goes first: the one whose next use a forecast puts farthest away. */
#ifndef SMALLTHINKER_EVICTION_H
#define SMALLTHINKER_EVICTION_H

enum { ST_RATES = 5 };

/* An expert's rates of use, in uses a token, each an average in which a token counts half after a half-life of its own.
 * last: when they were right, in tokens of its layer; they fall from then on. */
typedef struct st_use {
    double last;
    float rate[ST_RATES];
} st_use;

/* A layer's time. All zero, it has seen nothing. A step is what is computed at once: a token, or a batch of them. */
typedef struct st_layer_time {
    double now;               /* tokens seen when the step ends that is in progress */
    double tokens;            /* of this step */
    double known;             /* tokens that the rates are averages of */
    double grown[ST_RATES];   /* what a rate is multiplied by, which began at zero `known` tokens ago */
    double squares[ST_RATES]; /* sum over the layer's experts of the square of their rate */
} st_layer_time;

/* Which half-life counts, in all layers: the one whose rates have forecast the last steps best. */
typedef struct st_forecast {
    double steps;           /* of a layer, in which an error comes to weigh half */
    double error[ST_RATES]; /* sum of the squared errors of the rates as forecasts, old steps weighing less */
    int best;
} st_forecast;

void st_forecast_init(st_forecast *forecast, int layers);
/* A step of so many tokens, one or more, begins in a layer. */
void st_forecast_step(st_forecast *forecast, st_layer_time *time, double tokens);
/* `uses` tokens of this step use the expert. Called once a step for each expert that is used. */
void st_forecast_use(st_forecast *forecast, st_layer_time *time, st_use *use, double uses);
/* Takes it that the expert had so many recent uses, as st_recent_uses tells them. */
void st_forecast_start(st_layer_time *time, st_use *use, double uses);

/* Tokens until the next use, at the rate that counts; infinity where there is none. */
float st_forecast_wait(const st_forecast *forecast, const st_layer_time *time, const st_use *use);
/* Recent uses: each weighs half after 128 tokens. */
double st_recent_uses(const st_layer_time *time, const st_use *use);

#endif
