/* The checksum of packed files: CRC-32 as in zlib, PNG and IEEE 802.3. */
#ifndef SMALLTHINKER_CRC32_H
#define SMALLTHINKER_CRC32_H

#include <stddef.h>
#include <stdint.h>

uint32_t st_crc32(const uint8_t *data, size_t bytes);

#endif
