/* Heads in groups, which share what they read. */
#ifndef SMALLTHINKER_HEADS_H
#define SMALLTHINKER_HEADS_H

/* Of EACH_GROUP, whose h and size these are. */
#define GROUP_OF(H, MOST, STEP)                                                                                        \
    if ((MOST) >= (H) && size == (H)) {                                                                                \
        STEP(h, ((MOST) < (H) ? (MOST) : (H)));                                                                        \
    }
/* STEP(h, H) over G heads in groups of at most MOST <= 8, of equal size as far as possible: h is the first, H their
 * number, a constant. */
#define EACH_GROUP(MOST, G, STEP)                                                                                      \
    for (int64_t left_groups = ((G) + (MOST) - 1) / (MOST), h = 0, size; h < (G); h += size, left_groups--) {          \
        _Static_assert((MOST) <= 8, "a group of each size");                                                           \
        size = ((G) - h + left_groups - 1) / left_groups;                                                              \
        GROUP_OF(1, MOST, STEP)                                                                                        \
        GROUP_OF(2, MOST, STEP)                                                                                        \
        GROUP_OF(3, MOST, STEP)                                                                                        \
        GROUP_OF(4, MOST, STEP)                                                                                        \
        GROUP_OF(5, MOST, STEP)                                                                                        \
        GROUP_OF(6, MOST, STEP)                                                                                        \
        GROUP_OF(7, MOST, STEP)                                                                                        \
        GROUP_OF(8, MOST, STEP)                                                                                        \
    }

#endif
