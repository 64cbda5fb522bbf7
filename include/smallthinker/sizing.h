/* How many threads a decode pays with. Where something else takes a CPU, a phase waits for the thread that has none,
 * for milliseconds each time: one thread fewer is quicker then, and with two of them even one thread alone. Tried out,
 * and tried again now and then; no result depends on it. */
#ifndef SMALLTHINKER_SIZING_H
#define SMALLTHINKER_SIZING_H

typedef struct st_sizing {
    int most, size;       /* threads there are; threads to use */
    int tokens;           /* since the size changed */
    int sleepy;           /* of them, the newest ones in which threads slept */
    int patience;         /* tokens before another size is tried */
    int trial;            /* -1, 1: the size is tried instead of one more, or one less; 0: it is in use */
    int vain;             /* -1, 1: the way that was last tried in vain, or back from a better size: not the next one */
    double usual, asleep; /* fading: seconds of a token, share of them that a thread slept */
    double tried;         /* seconds of the trial so far */
} st_sizing;

void st_sizing_init(st_sizing *s, int threads);
/* After a token that took `seconds` by s->size threads, which slept `slept` seconds of it all together; sets s->size
 * for the next one. */
void st_sizing_token(st_sizing *s, double seconds, double slept);

#endif
