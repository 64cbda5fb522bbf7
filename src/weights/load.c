/* Reads GGUF rows and packs them on a thread team. Called by weights.pyx while a model is loaded; takes no memory. */
#include "smallthinker/load.h"

#include "smallthinker/clock.h"
#include "smallthinker/layout.h"
#include "smallthinker/reader.h"

#include <stdatomic.h>

enum { ALIGN = 64 };

static size_t rounded(size_t bytes) { return (bytes + ALIGN - 1) / ALIGN * ALIGN; }

static int is_copy(const st_piece *piece) { return !piece->expert && piece->as == ST_AS_COPY; }

static size_t piece_room(const st_piece *piece) {
    return is_copy(piece) ? 0 : rounded(piece->bytes[0]) + rounded(piece->bytes[1]) + rounded(piece->bytes[2]);
}

/* 0, or as st_read_at. */
static int load_piece(const st_piece *piece, uint8_t *room) {
    if (is_copy(piece))
        return st_read_at(piece->fd[0], piece->offset[0], piece->bytes[0], piece->to);
    uint8_t *part[3];
    for (int i = 0; i < 3; i++) {
        part[i] = room;
        int status = piece->bytes[i] ? st_read_at(piece->fd[i], piece->offset[i], piece->bytes[i], room) : 0;
        if (status != 0)
            return status;
        room += rounded(piece->bytes[i]);
    }
    if (piece->expert)
        st_expert_pack(piece->expert, part[0], part[1], part[2], piece->to);
    else if (piece->as == ST_AS_TILES)
        st_pack_tile16(piece->type, part[0], piece->rows, piece->cols, piece->to, 0, st_tiles(piece->rows));
    else
        st_pack_rows(piece->type, part[0], piece->rows, piece->cols, piece->to, piece->bytes[0] / (size_t)piece->rows);
    return 0;
}

size_t st_load_room(const st_piece *pieces, int64_t n) {
    size_t most = 0;
    for (int64_t i = 0; i < n; i++)
        most = piece_room(pieces + i) > most ? piece_room(pieces + i) : most;
    return most;
}

struct loading {
    st_team *team;
    const st_piece *pieces;
    uint8_t *room;
    size_t room_bytes; /* of a thread */
    int (*interrupted)(void *caller);
    void *caller;
    int64_t ask_ns, ask_at;
    atomic_llong ended; /* as st_load */
};

/* Only the first reason to end counts. */
static void end(struct loading *loading, long long why) {
    long long expected = ST_LOADED;
    atomic_compare_exchange_strong(&loading->ended, &expected, why);
}

static void load_some(void *arg, int tid) {
    struct loading *loading = arg;
    while (atomic_load(&loading->ended) == ST_LOADED) {
        int64_t i = st_team_next(loading->team, tid);
        if (i < 0)
            return;
        if (load_piece(loading->pieces + i, loading->room + (size_t)tid * loading->room_bytes) != 0)
            end(loading, i);
        if (tid == 0 && st_nanoseconds() >= loading->ask_at) {
            if (loading->interrupted(loading->caller))
                end(loading, ST_LOAD_INTERRUPTED);
            loading->ask_at = st_nanoseconds() + loading->ask_ns;
        }
    }
}

int64_t st_load(st_team *team, const st_piece *pieces, int64_t n, uint8_t *room, int (*interrupted)(void *caller),
                void *caller, int64_t ask_ns) {
    struct loading loading = {.team = team,
                              .pieces = pieces,
                              .room = room,
                              .room_bytes = st_load_room(pieces, n),
                              .interrupted = interrupted,
                              .caller = caller,
                              .ask_ns = ask_ns,
                              .ask_at = st_nanoseconds() + ask_ns};
    atomic_init(&loading.ended, ST_LOADED);
    st_team_run(team, load_some, &loading, n);
    return atomic_load(&loading.ended);
}
