/* The expert pager. States of an expert: absent -> queued -> (read) -> ready or failed; a pinned expert is never
 * evicted, and a queued one is always pinned or about to be ready. One short lock guards everything but the
 * takers' first look. */
#include "smallthinker/pager.h"

#include "smallthinker/eviction.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { ABSENT, QUEUED, READY, FAILED };

struct expert {
    atomic_int state;
    int32_t slot; /* -1 where absent */
    int32_t pins;
    double score;
};

struct st_pager {
    st_pager_config config;
    int64_t *offsets;
    const st_eviction *policy;
    struct expert *experts;
    int32_t *owner; /* of every slot; -1 free */
    int32_t *queue; /* ring of ids to read, first come first served */
    int64_t queue_head, queue_size;
    int stop;
    pthread_mutex_t mutex;
    pthread_cond_t work, done;
    pthread_t *threads;
    int started;
    atomic_llong stall_ns;
    st_pager_stats stats;
};

static int64_t nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static void *io_main(void *arg) {
    st_pager *pager = arg;
    pthread_mutex_lock(&pager->mutex);
    for (;;) {
        while (pager->queue_size == 0 && !pager->stop)
            pthread_cond_wait(&pager->work, &pager->mutex);
        if (pager->queue_size == 0)
            break;
        int32_t id = pager->queue[pager->queue_head];
        pager->queue_head = (pager->queue_head + 1) % pager->config.experts;
        pager->queue_size--;
        uint8_t *slot = pager->config.memory + (size_t)pager->experts[id].slot * pager->config.bytes;
        pthread_mutex_unlock(&pager->mutex);
        int status = pager->config.read(pager->config.source, pager->offsets[id], pager->config.bytes, slot);
        pthread_mutex_lock(&pager->mutex);
        if (status == 0)
            pager->stats.bytes_read += (int64_t)pager->config.bytes;
        else
            pager->stats.read_errors++;
        atomic_store(&pager->experts[id].state, status == 0 ? READY : FAILED);
        pthread_cond_broadcast(&pager->done);
    }
    pthread_mutex_unlock(&pager->mutex);
    return NULL;
}

static void free_all(st_pager *pager) {
    free(pager->offsets);
    free(pager->experts);
    free(pager->owner);
    free(pager->queue);
    free(pager->threads);
    free(pager);
}

st_pager *st_pager_create(const st_pager_config *config) {
    size_t experts = (size_t)config->experts, slots = (size_t)config->slots;
    st_pager *pager = calloc(1, sizeof *pager);
    if (!pager)
        return NULL;
    pager->config = *config;
    pager->policy = st_eviction_find(config->policy);
    pager->offsets = malloc(experts * sizeof *pager->offsets);
    pager->experts = calloc(experts, sizeof *pager->experts);
    pager->owner = malloc(slots * sizeof *pager->owner);
    pager->queue = malloc(experts * sizeof *pager->queue);
    pager->threads = calloc((size_t)config->io_threads, sizeof *pager->threads);
    if (!pager->policy || !pager->offsets || !pager->experts || !pager->owner || !pager->queue || !pager->threads) {
        free_all(pager);
        return NULL;
    }
    memcpy(pager->offsets, config->offsets, experts * sizeof *pager->offsets);
    for (size_t i = 0; i < experts; i++)
        pager->experts[i].slot = -1;
    for (size_t i = 0; i < slots; i++)
        pager->owner[i] = -1;
    pthread_mutex_init(&pager->mutex, NULL);
    pthread_cond_init(&pager->work, NULL);
    pthread_cond_init(&pager->done, NULL);
    for (; pager->started < config->io_threads; pager->started++)
        if (pthread_create(&pager->threads[pager->started], NULL, io_main, pager) != 0)
            break;
    if (pager->started == 0) {
        st_pager_destroy(pager);
        return NULL;
    }
    return pager;
}

void st_pager_destroy(st_pager *pager) {
    if (!pager)
        return;
    pthread_mutex_lock(&pager->mutex);
    pager->stop = 1;
    pager->queue_size = 0;
    pthread_cond_broadcast(&pager->work);
    pthread_mutex_unlock(&pager->mutex);
    for (int i = 0; i < pager->started; i++)
        pthread_join(pager->threads[i], NULL);
    pthread_mutex_destroy(&pager->mutex);
    pthread_cond_destroy(&pager->work);
    pthread_cond_destroy(&pager->done);
    free_all(pager);
}

/* A free slot, or that of the unpinned expert with the smallest score; -1 where all are pinned. Locked. */
static int32_t find_slot(st_pager *pager) {
    int32_t best = -1;
    double least = 0;
    for (int64_t i = 0; i < pager->config.slots; i++) {
        int32_t id = pager->owner[i];
        if (id < 0)
            return (int32_t)i;
        struct expert *expert = pager->experts + id;
        if (expert->pins > 0 || atomic_load_explicit(&expert->state, memory_order_relaxed) == QUEUED)
            continue;
        if (best < 0 || expert->score < least) {
            best = (int32_t)i;
            least = expert->score;
        }
    }
    if (best >= 0) {
        struct expert *old = pager->experts + pager->owner[best];
        old->slot = -1;
        atomic_store(&old->state, ABSENT);
        pager->owner[best] = -1;
        pager->stats.evictions++;
    }
    return best;
}

void st_pager_want(st_pager *pager, const int32_t *ids, const int32_t *tokens, int64_t n, double now) {
    int queued = 0;
    pthread_mutex_lock(&pager->mutex);
    for (int64_t i = 0; i < n; i++) /* pin all first, so that none evicts another of the same call */
        pager->experts[ids[i]].pins++;
    for (int64_t i = 0; i < n; i++) {
        struct expert *expert = pager->experts + ids[i];
        for (int32_t t = 0; t < (tokens ? tokens[i] : 1) && t < 8; t++)
            expert->score = pager->policy->touch(expert->score, now);
        if (atomic_load_explicit(&expert->state, memory_order_relaxed) != ABSENT) {
            pager->stats.hits++;
            continue;
        }
        pager->stats.misses++;
        expert->slot = find_slot(pager);
        if (expert->slot < 0) { /* more wanted than slots: the caller's mistake, but not a crash */
            atomic_store(&expert->state, FAILED);
            continue;
        }
        pager->owner[expert->slot] = ids[i];
        atomic_store(&expert->state, QUEUED);
        pager->queue[(pager->queue_head + pager->queue_size++) % pager->config.experts] = ids[i];
        queued++;
    }
    if (queued)
        pthread_cond_broadcast(&pager->work);
    pthread_mutex_unlock(&pager->mutex);
}

int st_pager_ready(st_pager *pager, int32_t id) { return atomic_load(&pager->experts[id].state) >= READY; }

const uint8_t *st_pager_take(st_pager *pager, int32_t id) {
    struct expert *expert = pager->experts + id;
    if (!st_pager_ready(pager, id)) {
        int64_t start = nanoseconds();
        pthread_mutex_lock(&pager->mutex);
        while (!st_pager_ready(pager, id))
            pthread_cond_wait(&pager->done, &pager->mutex);
        pthread_mutex_unlock(&pager->mutex);
        atomic_fetch_add(&pager->stall_ns, nanoseconds() - start);
    }
    if (atomic_load(&expert->state) == FAILED)
        return NULL;
    return pager->config.memory + (size_t)expert->slot * pager->config.bytes;
}

void st_pager_release(st_pager *pager, const int32_t *ids, int64_t n) {
    pthread_mutex_lock(&pager->mutex);
    for (int64_t i = 0; i < n; i++) {
        struct expert *expert = pager->experts + ids[i];
        expert->pins--;
        if (expert->pins == 0 && atomic_load(&expert->state) == FAILED) {
            if (expert->slot >= 0)
                pager->owner[expert->slot] = -1;
            expert->slot = -1;
            atomic_store(&expert->state, ABSENT);
        }
    }
    pthread_mutex_unlock(&pager->mutex);
}

void st_pager_get_stats(st_pager *pager, st_pager_stats *stats) {
    pthread_mutex_lock(&pager->mutex);
    *stats = pager->stats;
    pthread_mutex_unlock(&pager->mutex);
    stats->stall_ns = atomic_load(&pager->stall_ns);
}
