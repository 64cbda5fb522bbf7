/* Floats to the GGUF blocks that files hold. Called by the converter on the user's computer, never while a model runs:
 * activations are quantised by the kernel tables. */
#ifndef SMALLTHINKER_QUANTIZE_H
#define SMALLTHINKER_QUANTIZE_H

#include <stdint.h>

/* dst = src[n] as Q4_0, Q8_0 or F16. type: ST_Q4_0 or ST_Q8_0 (n a multiple of 32) or ST_F16; src_type: ST_F32 or
 * ST_BF16; dst: st_row_bytes(type, n) bytes, may not overlap src. Q4_0: the scale is the element of largest magnitude,
 * the first of equal ones, over -8; Q8_0: the largest magnitude over 127, halves away from zero; scales and F16 round
 * to nearest even. Returns ST_OK; ST_ERR_ARGUMENT for other types or sizes; ST_ERR_UNSUPPORTED where a value is not
 * finite or too large for the type. */
int st_quantize(int type, uint8_t *dst, int src_type, const void *src, int64_t n);

#endif
