/* When to use fewer threads than there are; called by the engine after each token. It never touches the team. */
#include "smallthinker/sizing.h"

/* Tokens: of a trial, of which the first does not count; with sleep before a thread less is tried; between two trials
 * at least and at most, which costs a percent or two where they are in vain. */
enum { TRIAL = 5, SETTLED = 8, SOONEST = 64, LATEST = 128 };
/* Of a mean, for a token; the share asleep from which a thread less is tried; times in which it must do. */
static const double FADING = 0.2, ASLEEP = 0.15, QUICKER = 0.97;

static void change(st_sizing *s, int by, int trial) {
    s->size += by;
    s->trial = trial;
    s->tokens = s->sleepy = 0;
    s->tried = s->asleep = 0;
}

void st_sizing_init(st_sizing *s, int threads) {
    *s = (st_sizing){.most = threads, .size = threads, .patience = SETTLED};
}

/* Keeps what was tried where it was quicker; else goes back, and is slower to try again. */
static void end_trial(st_sizing *s) {
    double seconds = s->tried / (TRIAL - 1);
    int quicker = seconds < QUICKER * s->usual;
    s->vain = quicker ? -s->trial : s->trial;
    if (quicker) {
        s->usual = seconds;
        s->patience = SOONEST;
        change(s, 0, 0);
    } else {
        change(s, -s->trial, 0);
        s->patience = s->patience < SOONEST ? SOONEST : LATEST;
    }
}

void st_sizing_token(st_sizing *s, double seconds, double slept) {
    s->tokens += s->tokens < LATEST;
    if (s->most == 1 || s->tokens == 1 || !(seconds > 0)) /* whose threads may just have been woken */
        return;
    if (s->trial) {
        s->tried += seconds;
        if (s->tokens == TRIAL)
            end_trial(s);
        return;
    }
    double share = s->size > 1 ? slept / (seconds * (s->size - 1)) : 0;
    s->usual = s->usual > 0 ? s->usual + FADING * (seconds - s->usual) : seconds;
    s->asleep += FADING * (share - s->asleep);
    s->sleepy = s->asleep > ASLEEP ? s->sleepy + (s->sleepy < SETTLED) : 0;
    int less = s->size > 1 && s->sleepy >= SETTLED, more = s->size < s->most; /* the usual time is of sleepy tokens */
    if (s->tokens < s->patience)
        return;
    if (less && !(more && s->vain < 0))
        change(s, -1, -1);
    else if (more)
        change(s, 1, 1);
}
