/* A fixed number of memory slots for experts that live in a file: asked for ahead, read by I/O threads, pinned
 * while in use. One caller at a time asks and releases; any thread may take. */
#ifndef SMALLTHINKER_PAGER_H
#define SMALLTHINKER_PAGER_H

#include <stddef.h>
#include <stdint.h>

typedef struct st_pager st_pager;

/* Reads exactly size bytes at offset; 0 or a negative status. Called by several threads. */
typedef int (*st_pager_read)(void *source, int64_t offset, size_t size, void *buffer);

typedef struct st_pager_config {
    st_pager_read read;
    void *source;
    int64_t experts;        /* of all layers together; ids are 0 .. experts - 1, layer by layer */
    int64_t layer;          /* experts of a layer */
    const int64_t *offsets; /* of every expert in the file; copied */
    size_t bytes;           /* of one expert, a multiple of 4096 */
    uint8_t *memory;        /* slots * bytes, 4096-aligned; the caller's, must outlive the pager */
    int64_t slots;          /* at the beginning all of them are used: see st_pager_resize */
    int io_threads;
    const uint32_t
        *sums;           /* CRC-32 of every expert, compared when it is first read; copied; NULL: nothing is compared */
    size_t piece;        /* bytes after which a read ahead gives way to a wanted expert; a multiple of 4096 */
    int64_t give_way_ns; /* or several pieces, as many as the storage reads in this time; 0: one */
    /* CPU time that was taken away from this machine up to now; NULL: none ever is (st_stolen_ns). Asked now and then
     * by the I/O threads: where much is, takers sleep rather than look. */
    int64_t (*stolen)(void);
    /* Writes zeros to slots before they are used, on a thread of the pager's, and so has the system find their memory;
     * NULL: a zero to each page. */
    void (*write)(uint8_t *memory, size_t bytes);
} st_pager_config;

/* Of experts asked for by want: hits + ahead_hits + misses = all. */
typedef struct st_pager_stats {
    int64_t hits;       /* in memory from an earlier use */
    int64_t ahead_hits; /* read ahead for this use, wholly or in part */
    int64_t misses;     /* read from its beginning */
    int64_t bytes_read;
    int64_t bytes_wasted;               /* of reads ahead that were given up or never used */
    int64_t read_errors, evictions;     /* a wrong checksum is a read error */
    int64_t predicted, predicted_right; /* experts named to ahead, and those of them wanted in time */
    int64_t ahead_reads;                /* reads ahead begun */
    int64_t stall_ns;                   /* time that takers waited, summed over threads */
    int64_t disk_ns;                    /* time with a read in progress */
    int64_t near_ns;                    /* a taker looks from so long before an expert should come */
    int64_t free_slots;                 /* that hold nothing now, and whose memory the system has found */
} st_pager_stats;

/* NULL where memory or threads cannot be had. */
st_pager *st_pager_create(const st_pager_config *config);
/* NULL is fine; reads and writes in flight are waited for. In the child of a fork it only frees memory. */
void st_pager_destroy(st_pager *pager);

/* Pins n distinct experts of a layer, all that a step of so many tokens needs of it, and starts reading those that are
 * absent. uses: how many of the tokens use each (NULL: one). At most `slots` experts may be pinned at once; those
 * beyond come as failed reads. */
void st_pager_want(st_pager *pager, const int32_t *ids, const int32_t *uses, int64_t n, int64_t tokens);
/* Names n distinct experts that will probably be wanted soon, the likeliest and nearest first. They are read while
 * no wanted expert waits, and kept until they are wanted or a later call no longer names them: every call replaces
 * the list, and what is not named again is cancelled. n <= experts. */
void st_pager_ahead(st_pager *pager, const int32_t *ids, int64_t n);
/* How near a wanted expert is: 2 arrived (or failed), so that take will not wait; 1 partly read; 0 not begun. */
int st_pager_progress(st_pager *pager, int32_t id);
/* The weights of a wanted expert, waiting for them; NULL where the read failed, or takers are interrupted. Valid until
 * release. */
const uint8_t *st_pager_take(st_pager *pager, int32_t id);
/* Waits for a wanted expert for about ns nanoseconds at most; 1 where take will not wait. */
int st_pager_wait(st_pager *pager, int32_t id, int64_t ns);
/* on: takers do not wait any longer, and those that do come back with NULL, until a later call with 0. */
void st_pager_interrupt(st_pager *pager, int on);
/* Unpins what want pinned. A failed expert may be wanted again. */
void st_pager_release(st_pager *pager, const int32_t *ids, int64_t n);
/* Nanoseconds since the last wanted expert came: since want where all were there already. */
int64_t st_pager_since_arrival(st_pager *pager);

/* Uses only the first `slots` of the config's slots from now on; what the others held is moved into a place of the
 * first ones whose expert was used less, or given up, and their memory is not touched again until a later call includes
 * them. Nothing may be pinned; waits for reads and writes in progress there. */
void st_pager_resize(st_pager *pager, int64_t slots);

/* How much each expert was used lately, into uses[experts]: tokens, old ones weighing less (see eviction.h). */
void st_pager_get_uses(st_pager *pager, double *uses);
/* Takes what st_pager_get_uses gave in an earlier run for n experts, the most used first, as if it had just happened,
 * and reads them into free slots while nothing else is to be read; again, as long as there are slots that nothing had
 * yet, where one of them had to go. */
void st_pager_warm(st_pager *pager, const int32_t *ids, const double *uses, int64_t n);

void st_pager_get_stats(st_pager *pager, st_pager_stats *stats);
/* states[experts]: 1 where the expert is in memory now. */
void st_pager_get_resident(st_pager *pager, uint8_t *states);

#endif
