/* src/system/sizing.c against a machine that is simulated: a token's time by the number of threads, and how long they
 * slept. Run by tests/engine/test_native.py. Prints "ok" or dies. */
#include "smallthinker/sizing.h"

#include "check.h"

enum { MOST = 4 };

/* Decodes some tokens; returns how many of them each size had. seconds[size]: of a token; asleep: share of them that
 * every thread of more than `free` slept. */
static void decode(st_sizing *s, int tokens, const double *seconds, int free, double asleep, int *used) {
    for (int i = 0; i <= MOST; i++)
        used[i] = 0;
    for (int i = 0; i < tokens; i++) {
        CHECK(1 <= s->size && s->size <= s->most);
        used[s->size]++;
        double took = seconds[s->size] * (i % 2 ? 1.02 : 0.98);
        st_sizing_token(s, took, s->size > free ? asleep * took * (s->size - 1) : 0);
    }
}

int main(void) {
    const double alone[] = {0, 4, 2.1, 1.5, 1.2}, one_taken[] = {0, 4.1, 2.2, 1.6, 2.4}, all_taken[] = {0, 4, 5, 6, 7};
    int used[MOST + 1];
    st_sizing s;
    st_sizing_init(&s, MOST);
    decode(&s, 2000, alone, MOST, 0, used); /* nobody sleeps: nothing is tried */
    CHECK(used[MOST] == 2000);
    decode(&s, 1000, one_taken, 3, 0.5, used); /* found at once, and hardly left */
    CHECK(s.size == 3 && used[3] > 900 && used[2] == 0);
    decode(&s, 300, alone, MOST, 0, used); /* the CPU is back */
    CHECK(s.size == MOST && used[MOST] > 150);
    decode(&s, 1000, one_taken, 3, 0.5, used);
    CHECK(s.size == 3);
    decode(&s, 1000, alone, 1, 0.2, used); /* it is back, and there is sleep at every size */
    CHECK(used[MOST] > 600);
    decode(&s, 2000, all_taken, 1, 0.5, used); /* down to one */
    CHECK(s.size == 1 && used[1] > 1500);
    decode(&s, 1000, alone, MOST, 0, used);
    CHECK(s.size == MOST && used[MOST] > 400);
    decode(&s, 4000, alone, 1, 0.5, used); /* sleep that fewer threads do not end: tried now and then */
    CHECK(used[MOST] > 3800 && used[MOST - 1] > 0 && used[2] == 0);
    st_sizing_token(&s, 0, 0);
    st_sizing_init(&s, 1);
    decode(&s, 1000, alone, 1, 0, used);
    CHECK(used[1] == 1000);
    puts("ok");
    return 0;
}
