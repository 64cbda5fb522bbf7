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

enum { ST_QUANTIZE_ROWS = 16 }; /* of a matrix, that st_quantize_q4_0_rows takes at a time */

/* dst = a matrix src[rows][cols] as Q4_0 whose outputs err less than those of st_quantize. src_type and dst as there;
 * cols: whole blocks.
 *   weight[cols]: what an error of a column counts, such as the mean square of what the column is multiplied with; not
 *     negative. A block's scale is searched around the largest magnitude over 8, with both signs, then fitted to its
 *     codes by least squares: the sum of weight * error^2 of a block is never larger than with st_quantize.
 *   feedback: NULL; or [cols][cols], of which what is right of the diagonal is read: then an error e of column j is
 * made up for by subtracting e * feedback[j][k] from the columns k > j before these are rounded (GPTQ: Frantar et al.,
 *     2022, arXiv:2210.17323). Rows are independent of each other.
 *   work: [ST_QUANTIZE_ROWS][cols], the caller's.
 * Returns as st_quantize; also ST_ERR_UNSUPPORTED where the feedback makes a weight too large. */
int st_quantize_q4_0_rows(uint8_t *dst, int src_type, const void *src, int64_t rows, int64_t cols, const float *weight,
                          const float *feedback, float *work);

#endif
