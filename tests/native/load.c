/* Loading: the same bytes by one thread and by several as packing at once gives, files that end early, and a caller
 * that interrupts. */
#define _POSIX_C_SOURCE 200809L
#include "smallthinker/load.h"

#include "check.h"
#include "smallthinker/layout.h"

#include <fcntl.h>
#include <string.h>
#include <unistd.h>

enum { D = 256, F = 128, ROWS = 512, EXPERTS = 24, STEP = 32, PIECES = ROWS / STEP + EXPERTS + 2 };

static uint8_t *file_bytes;
static size_t row_bytes, matrix_bytes, part_bytes, expert_bytes, file_size;
static st_expert expert;

static int open_file(const char *folder, size_t size) {
    char path[512];
    snprintf(path, sizeof path, "%s/rows", folder);
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
    CHECK(fd >= 0 && write(fd, file_bytes, size) == (ssize_t)size);
    return fd;
}

/* A matrix as tiles, the same one as sparse rows at the end, all of it as it is, and experts. */
static int64_t list_pieces(st_piece *pieces, int fd, uint8_t *to) {
    int64_t n = 0;
    for (int64_t r = 0; r < ROWS; r += STEP)
        pieces[n++] = (st_piece){.fd = {fd},
                                 .offset = {r * (int64_t)row_bytes},
                                 .bytes = {STEP * row_bytes},
                                 .as = ST_AS_TILES,
                                 .type = ST_Q4_0,
                                 .rows = STEP,
                                 .cols = D,
                                 .to = to + (size_t)r * row_bytes};
    to += matrix_bytes;
    for (int as = ST_AS_ROWS; as <= ST_AS_COPY; as++, to += matrix_bytes) {
        pieces[n] = pieces[0];
        pieces[n].bytes[0] = matrix_bytes;
        pieces[n].rows = ROWS;
        pieces[n].as = as;
        pieces[n++].to = to;
    }
    for (int64_t e = 0; e < EXPERTS; e++, to += expert_bytes) {
        pieces[n] = (st_piece){.expert = &expert, .to = to};
        for (int i = 0; i < 3; i++) {
            pieces[n].fd[i] = fd;
            pieces[n].bytes[i] = part_bytes;
            pieces[n].offset[i] = (int64_t)(matrix_bytes + part_bytes * (size_t)(3 * e + i));
        }
        n++;
    }
    CHECK(n == PIECES);
    return n;
}

static void pack_at_once(uint8_t *to) {
    st_pack_tile16(ST_Q4_0, file_bytes, ROWS, D, to, 0, st_tiles(ROWS));
    st_pack_rows(ST_Q4_0, file_bytes, ROWS, D, to + matrix_bytes, row_bytes);
    memcpy(to + 2 * matrix_bytes, file_bytes, matrix_bytes);
    const uint8_t *from = file_bytes + matrix_bytes;
    for (int64_t e = 0; e < EXPERTS; e++, from += 3 * part_bytes)
        st_expert_pack(&expert, from, from + part_bytes, from + 2 * part_bytes,
                       to + 3 * matrix_bytes + (size_t)e * expert_bytes);
}

static int never(void *asked) {
    ++*(int *)asked;
    return 0;
}

static int at_the_third(void *asked) { return ++*(int *)asked == 3; }

int main(int argc, char **argv) {
    CHECK(argc == 2);
    CHECK(st_expert_init(&expert, D, F, ST_Q4_0, ST_Q4_0, ST_Q4_0, 0, 1) == 0 && expert.layout == ST_EXPERT_SPARSE);
    row_bytes = st_row_bytes(ST_Q4_0, D);
    matrix_bytes = ROWS * row_bytes;
    part_bytes = expert.rows[0];
    CHECK(part_bytes == expert.rows[1] && part_bytes == expert.rows[2]);
    CHECK(st_tile16_bytes(ST_Q4_0, ROWS, D) == matrix_bytes);
    expert_bytes = (expert.bytes + 63) / 64 * 64;
    file_size = matrix_bytes + 3 * EXPERTS * part_bytes;
    file_bytes = malloc(file_size);
    for (size_t i = 0; i < file_size; i++)
        file_bytes[i] = (uint8_t)(i * 2654435761u >> 13);
    size_t size = 3 * matrix_bytes + EXPERTS * expert_bytes;
    uint8_t *expected = calloc(size, 1), *got = calloc(size, 1);
    pack_at_once(expected);

    st_piece pieces[PIECES];
    int fd = open_file(argv[1], file_size);
    int64_t n = list_pieces(pieces, fd, got);
    for (int threads = 1; threads <= 4; threads++) {
        st_team *team = st_team_create(threads, NULL);
        uint8_t *room = malloc(st_load_room(pieces, n) * (size_t)threads);
        int asked = 0;
        memset(got, 0, size);
        CHECK(st_load(team, pieces, n, room, never, &asked, 0) == ST_LOADED);
        CHECK(memcmp(got, expected, size) == 0);
        CHECK(threads > 1 ? asked <= n : asked == n); /* the others may have done all before the caller began */
        CHECK(st_load(team, pieces, n, room, never, &asked, INT64_MAX / 2) == ST_LOADED);
        CHECK(st_load(team, pieces, 0, room, never, &asked, 0) == ST_LOADED);

        asked = 0;
        int64_t ended = st_load(team, pieces, n, room, at_the_third, &asked, 0);
        CHECK(asked == 3 ? ended == ST_LOAD_INTERRUPTED : threads > 1 && ended == ST_LOADED);

        CHECK(ftruncate(fd, (off_t)(file_size - 1)) == 0); /* of the last expert, down */
        CHECK(st_load(team, pieces, n, room, never, &asked, 0) == n - 1);
        CHECK(ftruncate(fd, 0) == 0);
        ended = st_load(team, pieces, n, room, never, &asked, 0);
        CHECK(ended >= 0 && ended < n);
        CHECK(pwrite(fd, file_bytes, file_size, 0) == (ssize_t)file_size);
        free(room);
        st_team_destroy(team);
    }
    close(fd);
    free(file_bytes);
    free(expected);
    free(got);
    puts("ok");
    return 0;
}
