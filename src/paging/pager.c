/* The expert pager. An expert is absent, queued, reading, parked (a read ahead that gave way), ready or failed. What
 * is pinned or being read is never evicted; what is named ahead only where nothing else is left. Slots are new until
 * the writer, or a read, has written to them; where memory is slow, who needs a slot evicts although some are new. One
 * short lock guards everything but the takers' first look. */
#define _POSIX_C_SOURCE 200809L
#include "smallthinker/pager.h"

#include "smallthinker/clock.h"
#include "smallthinker/crc32.h"
#include "smallthinker/eviction.h"
#include "smallthinker/thread_start.h"

#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { ABSENT, QUEUED, READING, PARKED, READY, FAILED };
/* From how long before an expert should come, and for how long after, a taker looks again and again instead of
 * sleeping: with all cores asleep, what ends a read has to wake one first. Where the host takes CPU time away, looking
 * uses up what reading needs: shorter, from this share of one CPU on, asked once in a while. Measured:
 * docs/notes/2026-12-01-waiting-for-reads.md, 2026-12-01-xeon.md. */
enum { NEAR_NS = 600000, NEAR_STOLEN_NS = 100000, STOLEN_EVERY_NS = 1000000000 };
static const double MUCH_STOLEN = 0.03;
/* A taker sleeps no longer than this at once: what pthread_cond_timedwait can be told is finite. */
enum { SLEEP_NS = 1000000000 };
enum { NOT_AHEAD, NAMED, NAMED_BEFORE, WARMING };
/* Of a slot that no expert has: all of its memory was written to before; or not, so that the system may still have to
 * find it; or it is being written to. */
enum { FREE = -1, NEW = -2, WRITTEN_TO = -3 };
/* Memory and storage are compared by as many bytes, and what they did before counts half after as many again. */
enum { COMPARED_BYTES = 16 << 20, PAGE_BYTES = 4096 };

struct expert {
    atomic_int state;
    int32_t slot; /* -1 where it has none: always when ABSENT, perhaps when QUEUED */
    int32_t pins;
    uint8_t ahead;   /* NAMED in the list of reads ahead, or WARMING */
    uint8_t checked; /* its checksum was right once, or there is none */
    uint8_t unused;  /* read before it was wanted, and not wanted since */
    uint8_t broken;  /* its last read failed: only who needs it tries again */
    uint8_t in_new;  /* its slot was NEW when it got it */
    int32_t layer;
    size_t done;   /* bytes read so far */
    int64_t begun; /* when the read of the next ones was */
    st_use use;
};

/* Bytes lately, and nanoseconds that they took. */
struct rate {
    double bytes, ns;
};

struct st_pager {
    st_pager_config config;
    int64_t *offsets;
    uint32_t *sums; /* or NULL */
    st_forecast forecast;
    st_layer_time *times;  /* of every layer */
    int32_t layer, layers; /* the one whose experts were wanted last; how many there are */
    struct expert *experts;
    int32_t *owner; /* of every slot; FREE, NEW or WRITTEN_TO */
    int64_t slots;  /* in use: the first ones */
    int64_t free_slots, new_slots;
    int32_t writing;           /* the slot that is WRITTEN_TO, or -1 */
    struct rate written, read; /* of new memory, and of reads into other memory */
    int32_t *queue;            /* ring of wanted ids to read, first come first served */
    int64_t queue_head, queue_size;
    int32_t *ahead; /* ids to read ahead, the most urgent first */
    int64_t n_ahead, pinned;
    int32_t *warm; /* ids to fill free slots with */
    int64_t n_warm, next_warm;
    int warm_again; /* there are slots that were never free since st_pager_warm: those that had to go may come back */
    int wanted_reads, reads; /* in progress: of wanted experts, and of all */
    int64_t reads_since;     /* when `reads` left zero */
    int64_t arrived;         /* when the last wanted expert came, or was asked for where it was there */
    int64_t asked, stolen;   /* when it was last asked what was taken away, and the answer */
    int stop, interrupted;
    pthread_mutex_t mutex;
    pthread_cond_t work, done, memory;
    pthread_t *threads, writer;
    int started, has_writer;
    pid_t process; /* that has the threads: a fork's child does not */
    atomic_llong stall_ns;
    st_pager_stats stats;
};

static int get_state(const struct expert *expert) { return atomic_load_explicit(&expert->state, memory_order_relaxed); }

/* ---- slots; all under the lock ---- */

static void free_slot(st_pager *pager, struct expert *expert, int state) {
    if (expert->slot >= 0) {
        int in_new = expert->in_new && expert->done < pager->config.bytes, used = expert->slot < pager->slots;
        pager->owner[expert->slot] = in_new ? NEW : FREE;
        pager->new_slots += in_new && used;
        pager->free_slots += !in_new && used;
        if (in_new)
            pthread_cond_signal(&pager->memory);
    }
    if (expert->unused)
        pager->stats.bytes_wasted += (int64_t)expert->done;
    expert->slot = -1;
    expert->done = 0;
    expert->unused = 0;
    atomic_store(&expert->state, state);
}

/* The first slot in that state, where there is one. */
static int32_t find_slot(const st_pager *pager, int32_t state) {
    int32_t slot = 0;
    while (pager->owner[slot] != state)
        slot++;
    return slot;
}

static void count_rate(struct rate *rate, size_t bytes, int64_t ns) {
    double keep = rate->bytes >= 2.0 * COMPARED_BYTES ? 0.5 : 1;
    rate->bytes = rate->bytes * keep + (double)bytes;
    rate->ns = rate->ns * keep + (double)ns;
}

/* Whether memory that was never written to takes much longer than reading an expert again does: then it is for the
 * writer, and who needs a slot evicts. Hosts that take free memory back can be so: docs/notes/2026-12-01-starts.md. */
static int memory_is_slow(const st_pager *pager) {
    const struct rate *written = &pager->written, *read = &pager->read;
    return written->bytes >= COMPARED_BYTES && read->bytes >= COMPARED_BYTES &&
           written->ns * read->bytes > 2 * read->ns * written->bytes;
}

/* Whether there is a slot without evicting. */
static int has_room(const st_pager *pager) {
    return pager->free_slots > 0 || (pager->new_slots > 0 && !memory_is_slow(pager));
}

/* Tokens until an expert's next use by forecast: the layers until its own has its turn again, then what its rate says.
 */
static float next_use(const st_pager *pager, const struct expert *expert) {
    int32_t ahead = expert->layer - pager->layer;
    if (ahead <= 0)
        ahead += pager->layers;
    return (float)ahead / (float)pager->layers +
           st_forecast_wait(&pager->forecast, pager->times + expert->layer, &expert->use);
}

/* The slot of the expert that may go and is used again last; -1 where there is none. */
static int32_t find_victim(const st_pager *pager, int ahead_too) {
    int32_t best = -1;
    float last = 0;
    for (int64_t i = 0; i < pager->slots; i++) {
        if (pager->owner[i] < 0)
            continue;
        const struct expert *expert = pager->experts + pager->owner[i];
        int state = get_state(expert);
        if (expert->pins > 0 || (state != READY && state != PARKED) || (expert->ahead && !ahead_too))
            continue;
        float next = next_use(pager, expert);
        if (best < 0 || next > last) {
            best = (int32_t)i;
            last = next;
        }
    }
    return best;
}

/* Takes a slot that no expert has out of the counts; 1 where it was NEW. */
static int take_slot(st_pager *pager, int32_t slot) {
    int is_new = pager->owner[slot] == NEW;
    pager->new_slots -= is_new;
    pager->free_slots -= !is_new;
    if (pager->new_slots > 0)
        pthread_cond_signal(&pager->memory); /* perhaps few are free now */
    return is_new;
}

/* A slot that no expert has: FREE, or else NEW. */
static int32_t find_empty(const st_pager *pager) { return find_slot(pager, pager->free_slots > 0 ? FREE : NEW); }

/* A slot whose expert had to go; -1 where none may. */
static int32_t evict(st_pager *pager, int ahead_too) {
    int32_t slot = find_victim(pager, 0);
    if (slot < 0 && ahead_too)
        slot = find_victim(pager, 1);
    if (slot >= 0) {
        free_slot(pager, pager->experts + pager->owner[slot], ABSENT);
        pager->stats.evictions++;
    }
    return slot;
}

/* Gives the expert a slot: a free one, a new one unless memory is slow, or by evicting. 0 where all are in use, or the
 * writer is about to make one free. */
static int give_slot(st_pager *pager, int32_t id, int may_evict) {
    struct expert *expert = pager->experts + id;
    int32_t slot = -1;
    if (expert->slot >= 0)
        return 1;
    if (has_room(pager)) {
        slot = find_empty(pager);
    } else if (pager->writing >= 0 && !memory_is_slow(pager)) {
        return 0;
    } else if (may_evict) {
        slot = evict(pager, expert->pins > 0);
        if (slot < 0 && expert->pins > 0 && pager->new_slots > 0)
            slot = find_empty(pager);
    }
    if (slot < 0)
        return 0;
    expert->in_new = (uint8_t)take_slot(pager, slot);
    pager->owner[slot] = id;
    expert->slot = slot;
    return 1;
}

/* ---- I/O threads ---- */

/* The wanted expert to read next, with a slot; -1 where there is none. */
static int32_t next_wanted(st_pager *pager) {
    while (pager->queue_size > 0) {
        int32_t id = pager->queue[pager->queue_head];
        if (pager->experts[id].pins > 0 && !give_slot(pager, id, 1))
            return -1; /* reads ahead in progress, or the writer, have the last slots; their end comes back here */
        pager->queue_head = (pager->queue_head + 1) % pager->config.experts;
        pager->queue_size--;
        if (pager->experts[id].pins > 0)
            return id;
        free_slot(pager, pager->experts + id, ABSENT); /* released before its turn */
    }
    return -1;
}

/* The most urgent expert to read ahead, with a slot; -1 where there is none. */
static int32_t next_ahead(st_pager *pager) {
    for (int64_t i = 0; i < pager->n_ahead; i++) {
        int32_t id = pager->ahead[i];
        struct expert *expert = pager->experts + id;
        int state = get_state(expert);
        if (expert->ahead == NAMED && !expert->broken && (state == ABSENT || state == PARKED) &&
            give_slot(pager, id, 1)) {
            pager->stats.ahead_reads += state == ABSENT;
            return id;
        }
    }
    for (; pager->next_warm < pager->n_warm && has_room(pager); pager->next_warm++) {
        int32_t id = pager->warm[pager->next_warm];
        if (get_state(pager->experts + id) == ABSENT && !pager->experts[id].broken && give_slot(pager, id, 0)) {
            pager->experts[id].ahead = WARMING;
            return id;
        }
    }
    return -1;
}

/* Whether the read of an expert that nobody waits for should stop where it is. */
static int must_give_way(const st_pager *pager, const struct expert *expert) {
    return expert->pins == 0 &&
           (expert->ahead == NOT_AHEAD || pager->queue_size > 0 || pager->wanted_reads > 0 || pager->stop);
}

static void finish_read(st_pager *pager, struct expert *expert) {
    if (--pager->reads == 0)
        pager->stats.disk_ns += st_nanoseconds() - pager->reads_since;
    if (expert->pins > 0)
        pager->arrived = st_nanoseconds();
    if (expert->done == pager->config.bytes)
        atomic_store(&expert->state, READY);
    else if (expert->pins > 0)
        atomic_store(&expert->state, FAILED);
    else if (expert->ahead == NAMED && expert->done > 0)
        atomic_store(&expert->state, PARKED);
    else
        free_slot(pager, expert, ABSENT);
    if (expert->ahead == WARMING)
        expert->ahead = NOT_AHEAD;
    pthread_cond_broadcast(&pager->done);
    if (pager->wanted_reads == 0 && pager->n_ahead > 0)
        pthread_cond_signal(&pager->work); /* reads ahead may go on, on the other threads too */
}

/* Compares the checksum of an expert that has just been read; a wrong one is as if nothing had been read. */
static void check_sum(st_pager *pager, struct expert *expert, uint32_t sum, const uint8_t *slot) {
    pthread_mutex_unlock(&pager->mutex);
    int right = st_crc32(slot, pager->config.bytes) == sum;
    pthread_mutex_lock(&pager->mutex);
    expert->checked = (uint8_t)right;
    if (!right) {
        pager->stats.read_errors++;
        expert->broken = 1;
        expert->ahead = NOT_AHEAD;
        expert->done = 0;
    }
}

/* Bytes that a read ahead takes at once: what the storage has read in give_way_ns up to now, in whole pieces. */
static size_t ahead_bytes(const st_pager *pager) {
    double pieces = 1, read = (double)pager->stats.bytes_read, ns = (double)pager->stats.disk_ns;
    double most = 1 + (double)pager->config.bytes / (double)pager->config.piece;
    if (ns > 0)
        pieces = read * (double)pager->config.give_way_ns / ns / (double)pager->config.piece;
    return pieces < 2 ? pager->config.piece : (size_t)fmin(pieces, most) * pager->config.piece;
}

/* Looks again what the host takes away, where it is time to. Locked, except while it asks. */
static void ask_stolen(st_pager *pager) {
    int64_t now = st_nanoseconds(), since = now - pager->asked;
    if (!pager->config.stolen || since < STOLEN_EVERY_NS)
        return;
    pager->asked = now;
    pthread_mutex_unlock(&pager->mutex);
    int64_t stolen = pager->config.stolen();
    pthread_mutex_lock(&pager->mutex);
    int much = (double)(stolen - pager->stolen) > MUCH_STOLEN * (double)since;
    pager->stats.near_ns = much ? NEAR_STOLEN_NS : NEAR_NS;
    pager->stolen = stolen;
}

/* Reads an expert to its end, or until it has to give way. Locked, except while it reads. */
static void read_expert(st_pager *pager, int32_t id) {
    struct expert *expert = pager->experts + id;
    uint8_t *slot = pager->config.memory + (size_t)expert->slot * pager->config.bytes;
    atomic_store(&expert->state, READING);
    expert->unused = expert->pins == 0;
    if (pager->reads++ == 0)
        pager->reads_since = st_nanoseconds();
    while (expert->done < pager->config.bytes) {
        size_t done = expert->done, size = pager->config.bytes - done;
        int wanted = expert->pins > 0;
        size_t most = wanted ? size : ahead_bytes(pager);
        if (size > most)
            size = most;
        pager->wanted_reads += wanted;
        expert->begun = st_nanoseconds();
        pthread_mutex_unlock(&pager->mutex);
        int status = pager->config.read(pager->config.source, pager->offsets[id] + (int64_t)done, size, slot + done);
        pthread_mutex_lock(&pager->mutex);
        pager->wanted_reads -= wanted;
        if (status != 0) {
            pager->stats.read_errors++;
            expert->ahead = NOT_AHEAD;
            expert->broken = 1;
            break;
        }
        expert->done += size;
        pager->stats.bytes_read += (int64_t)size;
        if (!expert->in_new)
            count_rate(&pager->read, size, st_nanoseconds() - expert->begun);
        if (must_give_way(pager, expert))
            break;
    }
    if (expert->done == pager->config.bytes)
        expert->broken = 0;
    if (expert->done == pager->config.bytes && !expert->checked)
        check_sum(pager, expert, pager->sums[id], slot);
    finish_read(pager, expert);
    ask_stolen(pager);
}

static void *io_main(void *arg) {
    st_pager *pager = arg;
    pthread_mutex_lock(&pager->mutex);
    while (!pager->stop) {
        int32_t id = next_wanted(pager);
        /* A wanted expert has the storage to itself: a read ahead beside it would only make it later. */
        if (id < 0 && pager->queue_size == 0 && pager->wanted_reads == 0)
            id = next_ahead(pager);
        if (id < 0)
            pthread_cond_wait(&pager->work, &pager->mutex);
        else
            read_expert(pager, id);
    }
    pthread_mutex_unlock(&pager->mutex);
    return NULL;
}

/* ---- the writer ---- */

static void write_to(uint8_t *memory, size_t bytes) {
    for (size_t i = 0; i < bytes; i += PAGE_BYTES)
        *(volatile uint8_t *)(memory + i) = 0;
}

/* CPU time of this thread, in which the system finds memory; not what others on its CPU take meanwhile. */
static int64_t thread_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* Keeps as many slots free as a layer has experts, as long as there are new ones, by writing to these. */
static void *writer_main(void *arg) {
    st_pager *pager = arg;
    void (*write)(uint8_t *memory, size_t bytes) = pager->config.write ? pager->config.write : write_to;
    pthread_mutex_lock(&pager->mutex);
    while (!pager->stop) {
        if (pager->new_slots == 0 || pager->free_slots >= pager->config.layer) {
            pthread_cond_wait(&pager->memory, &pager->mutex);
            continue;
        }
        int32_t slot = pager->writing = find_slot(pager, NEW);
        pager->owner[slot] = WRITTEN_TO;
        pager->new_slots--;
        pthread_mutex_unlock(&pager->mutex);
        int64_t began = thread_ns();
        write(pager->config.memory + (size_t)slot * pager->config.bytes, pager->config.bytes);
        int64_t took = thread_ns() - began;
        pthread_mutex_lock(&pager->mutex);
        count_rate(&pager->written, pager->config.bytes, took);
        pager->owner[slot] = FREE;
        pager->free_slots += slot < pager->slots; /* fewer may be in use by now */
        pager->writing = -1;
        if (pager->warm_again && pager->next_warm == pager->n_warm)
            pager->next_warm = 0;
        pager->warm_again &= pager->new_slots > 0;
        pthread_cond_broadcast(&pager->work);
        pthread_cond_broadcast(&pager->done);
    }
    pthread_mutex_unlock(&pager->mutex);
    return NULL;
}

/* ---- the public calls ---- */

static void free_all(st_pager *pager) {
    free(pager->offsets);
    free(pager->sums);
    free(pager->experts);
    free(pager->times);
    free(pager->owner);
    free(pager->queue);
    free(pager->ahead);
    free(pager->warm);
    free(pager->threads);
    free(pager);
}

st_pager *st_pager_create(const st_pager_config *config) {
    size_t experts = (size_t)config->experts, slots = (size_t)config->slots;
    st_pager *pager = calloc(1, sizeof *pager);
    if (!pager)
        return NULL;
    pager->config = *config;
    pager->process = getpid();
    pager->layers = (int32_t)(config->experts / config->layer);
    pager->offsets = malloc(experts * sizeof *pager->offsets);
    pager->sums = config->sums ? malloc(experts * sizeof *pager->sums) : NULL;
    pager->experts = calloc(experts, sizeof *pager->experts);
    pager->times = calloc((size_t)pager->layers, sizeof *pager->times);
    pager->owner = malloc(slots * sizeof *pager->owner);
    pager->queue = malloc(experts * sizeof *pager->queue);
    pager->ahead = malloc(experts * sizeof *pager->ahead);
    pager->warm = malloc(slots * sizeof *pager->warm);
    pager->threads = calloc((size_t)config->io_threads, sizeof *pager->threads);
    if (!pager->offsets || (config->sums && !pager->sums) || !pager->experts || !pager->times || !pager->owner ||
        !pager->queue || !pager->ahead || !pager->warm || !pager->threads) {
        free_all(pager);
        return NULL;
    }
    memcpy(pager->offsets, config->offsets, experts * sizeof *pager->offsets);
    if (config->sums)
        memcpy(pager->sums, config->sums, experts * sizeof *pager->sums);
    for (size_t i = 0; i < experts; i++) {
        pager->experts[i].slot = -1;
        pager->experts[i].layer = (int32_t)i / (int32_t)config->layer;
        pager->experts[i].checked = !config->sums;
    }
    for (size_t i = 0; i < slots; i++)
        pager->owner[i] = NEW;
    pager->slots = pager->new_slots = config->slots;
    pager->writing = -1;
    pager->stats.near_ns = NEAR_NS;
    pager->asked = st_nanoseconds();
    pager->stolen = config->stolen ? config->stolen() : 0;
    st_forecast_init(&pager->forecast, pager->layers);
    pthread_mutex_init(&pager->mutex, NULL);
    pthread_cond_init(&pager->work, NULL);
    pthread_cond_init(&pager->done, NULL);
    pthread_cond_init(&pager->memory, NULL);
    for (; pager->started < config->io_threads; pager->started++)
        if (st_thread_start(&pager->threads[pager->started], io_main, pager) != 0)
            break;
    pager->has_writer = st_thread_start(&pager->writer, writer_main, pager) == 0;
    if (pager->started == 0 || !pager->has_writer) {
        st_pager_destroy(pager);
        return NULL;
    }
    return pager;
}

void st_pager_destroy(st_pager *pager) {
    if (!pager)
        return;
    if (pager->process != getpid()) { /* its threads are not here, and its lock may be held for ever */
        free_all(pager);
        return;
    }
    pthread_mutex_lock(&pager->mutex);
    pager->stop = 1;
    pthread_cond_broadcast(&pager->work);
    pthread_cond_broadcast(&pager->memory);
    pthread_mutex_unlock(&pager->mutex);
    for (int i = 0; i < pager->started; i++)
        pthread_join(pager->threads[i], NULL);
    if (pager->has_writer)
        pthread_join(pager->writer, NULL);
    pthread_mutex_destroy(&pager->mutex);
    pthread_cond_destroy(&pager->work);
    pthread_cond_destroy(&pager->done);
    pthread_cond_destroy(&pager->memory);
    free_all(pager);
}

/* Counts the use of a wanted expert; 1 where it must be queued. */
static int count_want(st_pager *pager, struct expert *expert) {
    int state = get_state(expert);
    if (expert->ahead == NAMED)
        pager->stats.predicted_right++;
    expert->ahead = NOT_AHEAD;
    if (state == ABSENT || state == FAILED)
        pager->stats.misses++;
    else if (expert->unused)
        pager->stats.ahead_hits++;
    else
        pager->stats.hits++;
    expert->unused = 0;
    return state == ABSENT || state == PARKED;
}

void st_pager_want(st_pager *pager, const int32_t *ids, const int32_t *uses, int64_t n, int64_t tokens) {
    int queued = 0;
    pthread_mutex_lock(&pager->mutex);
    if (n > 0) {
        pager->layer = pager->experts[ids[0]].layer;
        st_forecast_step(&pager->forecast, pager->times + pager->layer, (double)tokens);
    }
    pager->arrived = st_nanoseconds();
    for (int64_t i = 0; i < n; i++) /* pin all first, so that none evicts another of the same call */
        pager->pinned += pager->experts[ids[i]].pins++ == 0;
    for (int64_t i = 0; i < n; i++) {
        struct expert *expert = pager->experts + ids[i];
        int parked = get_state(expert) == PARKED;
        st_forecast_use(&pager->forecast, pager->times + pager->layer, &expert->use, uses ? uses[i] : 1);
        if (!count_want(pager, expert))
            continue;
        if (pager->pinned > pager->slots && !parked) { /* the caller's mistake, but no crash */
            atomic_store(&expert->state, FAILED);
            continue;
        }
        atomic_store(&expert->state, QUEUED);
        pager->queue_size++;
        if (parked) { /* little is left to read of it: it goes first */
            pager->queue_head = (pager->queue_head + pager->config.experts - 1) % pager->config.experts;
            pager->queue[pager->queue_head] = ids[i];
        } else {
            pager->queue[(pager->queue_head + pager->queue_size - 1) % pager->config.experts] = ids[i];
        }
        queued++;
    }
    if (queued)
        pthread_cond_broadcast(&pager->work);
    pthread_mutex_unlock(&pager->mutex);
}

void st_pager_ahead(st_pager *pager, const int32_t *ids, int64_t n) {
    int to_read = 0;
    pthread_mutex_lock(&pager->mutex);
    for (int64_t i = 0; i < pager->n_ahead; i++)
        if (pager->experts[pager->ahead[i]].ahead == NAMED)
            pager->experts[pager->ahead[i]].ahead = NAMED_BEFORE;
    for (int64_t i = 0; i < n; i++) {
        struct expert *expert = pager->experts + ids[i];
        pager->stats.predicted += expert->ahead != NAMED_BEFORE;
        expert->ahead = NAMED;
        to_read |= get_state(expert) == ABSENT || get_state(expert) == PARKED;
    }
    for (int64_t i = 0; i < pager->n_ahead; i++) {
        struct expert *expert = pager->experts + pager->ahead[i];
        if (expert->ahead != NAMED_BEFORE)
            continue;
        expert->ahead = NOT_AHEAD; /* a read in progress stops at the end of its piece */
        if (get_state(expert) == PARKED)
            free_slot(pager, expert, ABSENT);
    }
    for (int64_t i = 0; i < n; i++)
        pager->ahead[i] = ids[i];
    pager->n_ahead = n;
    if (to_read && pager->queue_size == 0 && pager->wanted_reads == 0)
        pthread_cond_broadcast(&pager->work);
    pthread_mutex_unlock(&pager->mutex);
}

int st_pager_progress(st_pager *pager, int32_t id) {
    int state = atomic_load(&pager->experts[id].state);
    return state >= READY ? 2 : state == READING;
}

/* Nanoseconds that reading what is left of an expert should take, by what the storage has read up to now; 0 before the
 * first read has ended. */
static int64_t read_ns(const st_pager *pager, const struct expert *expert) {
    double read = (double)pager->stats.bytes_read, left = (double)(pager->config.bytes - expert->done);
    return read > 0 ? (int64_t)(left * (double)pager->stats.disk_ns / read) : 0;
}

/* Waits on `done` for some nanoseconds; it may come back earlier, as that of a condition does. */
static void wait_done(st_pager *pager, int64_t ns) {
    struct timespec at;
    ns = ns < SLEEP_NS ? ns : SLEEP_NS;
    clock_gettime(CLOCK_REALTIME, &at); /* that of pthread_cond_timedwait; what ends a read wakes us by any clock */
    at.tv_sec += (time_t)((at.tv_nsec + ns) / 1000000000);
    at.tv_nsec = (long)((at.tv_nsec + ns) % 1000000000);
    pthread_cond_timedwait(&pager->done, &pager->mutex, &at);
}

/* Waits until a wanted expert is ready or failed, takers are interrupted, or it is `until`; 0 in the last case. Sleeps,
 * but looks again and again, once, around the moment it should come. */
static int await(st_pager *pager, struct expert *expert, int64_t until) {
    int64_t start = st_nanoseconds(), now = start;
    int looked = 0, over;
    pthread_mutex_lock(&pager->mutex);
    while (!(over = atomic_load(&expert->state) >= READY || pager->interrupted) && now < until) {
        int reading = get_state(expert) == READING;
        int64_t before = pager->stats.near_ns, near = (reading ? expert->begun : now) + read_ns(pager, expert) - before;
        if (!reading && near < now + before) /* queued: look whether it is its turn, more and more seldom */
            near = 2 * now - start + before;
        if (reading && near <= now && !looked) {
            looked = 1;
            pthread_mutex_unlock(&pager->mutex);
            while (atomic_load(&expert->state) < READY && st_nanoseconds() - now < 2 * before)
                sched_yield();
            pthread_mutex_lock(&pager->mutex);
        } else {
            wait_done(pager, (near > now && near < until ? near : until) - now);
        }
        now = st_nanoseconds();
    }
    pthread_mutex_unlock(&pager->mutex);
    atomic_fetch_add(&pager->stall_ns, now - start);
    return over;
}

const uint8_t *st_pager_take(st_pager *pager, int32_t id) {
    struct expert *expert = pager->experts + id;
    if (atomic_load(&expert->state) < READY)
        await(pager, expert, INT64_MAX);
    if (atomic_load(&expert->state) != READY)
        return NULL;
    return pager->config.memory + (size_t)expert->slot * pager->config.bytes;
}

int st_pager_wait(st_pager *pager, int32_t id, int64_t ns) {
    struct expert *expert = pager->experts + id;
    return atomic_load(&expert->state) >= READY || await(pager, expert, st_nanoseconds() + ns);
}

void st_pager_interrupt(st_pager *pager, int on) {
    pthread_mutex_lock(&pager->mutex);
    pager->interrupted = on;
    pthread_cond_broadcast(&pager->done);
    pthread_mutex_unlock(&pager->mutex);
}

void st_pager_release(st_pager *pager, const int32_t *ids, int64_t n) {
    pthread_mutex_lock(&pager->mutex);
    for (int64_t i = 0; i < n; i++) {
        struct expert *expert = pager->experts + ids[i];
        if (--expert->pins > 0)
            continue;
        pager->pinned--;
        if (get_state(expert) == FAILED)
            free_slot(pager, expert, ABSENT);
    }
    pthread_mutex_unlock(&pager->mutex);
}

int64_t st_pager_since_arrival(st_pager *pager) {
    pthread_mutex_lock(&pager->mutex);
    int64_t arrived = pager->arrived;
    pthread_mutex_unlock(&pager->mutex);
    return st_nanoseconds() - arrived;
}

/* Empties a slot that is no longer used. */
static void clear_slot(st_pager *pager, int64_t slot) {
    int32_t id = pager->owner[slot];
    while (pager->owner[slot] == WRITTEN_TO ||
           (id >= 0 && pager->owner[slot] == id && get_state(pager->experts + id) == READING))
        pthread_cond_wait(&pager->done, &pager->mutex);
    if (id < 0 || pager->owner[slot] != id)
        return;
    struct expert *expert = pager->experts + id;
    int empty = pager->free_slots > 0 || pager->new_slots > 0;
    int32_t to = empty ? find_empty(pager) : find_victim(pager, 0);
    struct expert *victim = to >= 0 && pager->owner[to] >= 0 ? pager->experts + pager->owner[to] : NULL;
    if (get_state(expert) != READY || to < 0 || (victim && next_use(pager, victim) <= next_use(pager, expert))) {
        free_slot(pager, expert, get_state(expert) == QUEUED ? QUEUED : ABSENT);
        return;
    }
    if (victim)
        free_slot(pager, victim, ABSENT);
    take_slot(pager, to);
    memcpy(pager->config.memory + (size_t)to * pager->config.bytes,
           pager->config.memory + (size_t)slot * pager->config.bytes, pager->config.bytes);
    pager->owner[slot] = FREE;
    pager->owner[to] = id;
    expert->slot = to;
}

void st_pager_resize(st_pager *pager, int64_t slots) {
    pthread_mutex_lock(&pager->mutex);
    int64_t before = pager->slots;
    pager->slots = slots;
    pager->warm_again = 0;
    for (int64_t i = slots; i < before; i++) { /* none of them may be taken while the others are emptied */
        pager->free_slots -= pager->owner[i] == FREE;
        pager->new_slots -= pager->owner[i] == NEW;
    }
    for (int64_t i = slots; i < before; i++) {
        clear_slot(pager, i);
        pager->owner[i] = NEW; /* the caller may give its memory back */
    }
    pager->new_slots += slots > before ? slots - before : 0;
    pthread_cond_signal(&pager->memory);
    pthread_cond_broadcast(&pager->work);
    pthread_mutex_unlock(&pager->mutex);
}

void st_pager_get_uses(st_pager *pager, double *uses) {
    pthread_mutex_lock(&pager->mutex);
    for (int64_t i = 0; i < pager->config.experts; i++)
        uses[i] = st_recent_uses(pager->times + pager->experts[i].layer, &pager->experts[i].use);
    pthread_mutex_unlock(&pager->mutex);
}

void st_pager_warm(st_pager *pager, const int32_t *ids, const double *uses, int64_t n) {
    pthread_mutex_lock(&pager->mutex);
    for (int64_t i = 0; i < n; i++)
        st_forecast_start(pager->times + pager->experts[ids[i]].layer, &pager->experts[ids[i]].use, uses[i]);
    pager->n_warm = n < pager->slots ? n : pager->slots;
    pager->next_warm = 0;
    pager->warm_again = 1;
    memcpy(pager->warm, ids, (size_t)pager->n_warm * sizeof *ids);
    pthread_cond_broadcast(&pager->work);
    pthread_mutex_unlock(&pager->mutex);
}

void st_pager_get_stats(st_pager *pager, st_pager_stats *stats) {
    pthread_mutex_lock(&pager->mutex);
    *stats = pager->stats;
    stats->free_slots = pager->free_slots;
    pthread_mutex_unlock(&pager->mutex);
    stats->stall_ns = atomic_load(&pager->stall_ns);
}

void st_pager_get_resident(st_pager *pager, uint8_t *states) {
    for (int64_t i = 0; i < pager->config.experts; i++)
        states[i] = atomic_load(&pager->experts[i].state) == READY;
}
