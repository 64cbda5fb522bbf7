/* CRC-32, eight bytes a step ("slicing by 8": Kounavis and Berry, 2005). Used by the pager when an expert is first
 * read; Python has zlib for everything else. */
#include "smallthinker/crc32.h"

#include <pthread.h>

#define POLYNOMIAL 0xEDB88320u /* of IEEE 802.3, bits reversed */

static uint32_t table[8][256]; /* table[k][b]: byte b followed by k zero bytes */
static pthread_once_t filled = PTHREAD_ONCE_INIT;

static void fill(void) {
    for (uint32_t b = 0; b < 256; b++) {
        uint32_t c = b;
        for (int bit = 0; bit < 8; bit++)
            c = (c >> 1) ^ (c & 1 ? POLYNOMIAL : 0);
        table[0][b] = c;
    }
    for (int k = 1; k < 8; k++)
        for (int b = 0; b < 256; b++)
            table[k][b] = (table[k - 1][b] >> 8) ^ table[0][table[k - 1][b] & 255];
}

static uint32_t little_endian(const uint8_t *p) {
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

uint32_t st_crc32(const uint8_t *data, size_t bytes) {
    pthread_once(&filled, fill);
    uint32_t c = UINT32_MAX;
    for (; bytes >= 8; data += 8, bytes -= 8) {
        uint32_t a = c ^ little_endian(data), b = little_endian(data + 4);
        c = table[7][a & 255] ^ table[6][a >> 8 & 255] ^ table[5][a >> 16 & 255] ^ table[4][a >> 24] ^
            table[3][b & 255] ^ table[2][b >> 8 & 255] ^ table[1][b >> 16 & 255] ^ table[0][b >> 24];
    }
    while (bytes--)
        c = (c >> 8) ^ table[0][(c ^ *data++) & 255];
    return ~c;
}
