/* Heads in groups, which share what they read. */
#ifndef SMALLTHINKER_X86_HEADS_H
#define SMALLTHINKER_X86_HEADS_H

/* STEP(h, H) over G heads in groups of at most MOST <= 6, of equal size as far as possible: h is the first, H their
 * number, a constant. */
#define EACH_GROUP(MOST, G, STEP)                                                                                      \
    for (int64_t left_groups = ((G) + (MOST) - 1) / (MOST), h = 0, size; h < (G); h += size, left_groups--) {          \
        size = ((G) - h + left_groups - 1) / left_groups;                                                              \
        switch (size) {                                                                                                \
        case 1: STEP(h, 1); break;                                                                                     \
        case 2: STEP(h, 2); break;                                                                                     \
        case 3: STEP(h, 3); break;                                                                                     \
        case 4: STEP(h, ((MOST) < 4 ? (MOST) : 4)); break;                                                             \
        case 5: STEP(h, ((MOST) < 5 ? (MOST) : 5)); break;                                                             \
        default: STEP(h, (MOST)); break;                                                                               \
        }                                                                                                              \
    }

#endif
