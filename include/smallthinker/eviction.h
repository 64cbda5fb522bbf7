/* Which cached expert goes first. A policy is one row of the table in eviction.c. */
#ifndef SMALLTHINKER_EVICTION_H
#define SMALLTHINKER_EVICTION_H

typedef struct st_eviction {
    const char *name;
    /* The score of an expert that `uses` tokens use at time `now` (in tokens), from its score before (0 when never
     * used). The expert with the smallest score is evicted. */
    double (*touch)(double score, double now, double uses);
    /* What a score is worth at time `now`, in recent uses: touch(0, now, that) orders experts as the score does. */
    double (*uses)(double score, double now);
} st_eviction;

/* The policy of that name, or NULL; NULL asks for the default. */
const st_eviction *st_eviction_find(const char *name);

#endif
