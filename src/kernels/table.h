/* How the file of an instruction set fills its table: a function st_fill_<name>(st_kernels *k), which a row of
 * src/system/cpu.c names, gets the table it improves on and enters what it does better. */
#ifndef SMALLTHINKER_TABLE_H
#define SMALLTHINKER_TABLE_H

#include "smallthinker/kernels.h"

/* Bytes of 16 rows by 32 columns in Tile16, on average over a block of the type. */
#define ST_TILE_BYTES(NAME) (ST_TILE_ROWS * ST_##NAME##_BYTES * ST_BLOCK / ST_##NAME##_COLUMNS)

/* Enters a family of kernels by the names that functions have: gemm_q4_0 ... of every type. */
#define ST_ENTER_GEMM(NAME, name) k->gemm[ST_TILED_##NAME] = gemm_##name;
#define ST_ENTER_SPARSE(NAME, name)                                                                                    \
    k->rows[ST_TILED_##NAME] = rows_##name;                                                                            \
    k->down[ST_TILED_##NAME] = down_##name;
#define ST_ENTER_TRANSPOSED(NAME, name) k->down_transposed[ST_TILED_##NAME] = down_transposed_##name;
#define ST_ENTER_MATRICES                                                                                              \
    ST_TILED_TYPES(ST_ENTER_GEMM)                                                                                      \
    ST_SPARSE_TYPES(ST_ENTER_SPARSE)                                                                                   \
    ST_TRANSPOSED_TYPES(ST_ENTER_TRANSPOSED)                                                                           \
    k->ffn = ffn;

#endif
