/* The one list of tensor types: what the core reads, which of them it also has fast layouts and kernels for. Every
 * other list of types is made from these, in Python through the binding (TYPES of _native/layouts.pyx). */
#ifndef SMALLTHINKER_TYPES_H
#define SMALLTHINKER_TYPES_H

#include <stddef.h>
#include <stdint.h>

/* Types whose rows can be read: X(NAME, name in functions, number in GGUF, columns of a block, bytes of a block). Each
 * has a dequantiser dequantize_<name> in src/weights/types.c; a row here and that function make a type work. */
#define ST_TYPES(X)                                                                                                    \
    X(F32, f32, 0, 1, 4)                                                                                               \
    X(F16, f16, 1, 1, 2)                                                                                               \
    X(Q4_0, q4_0, 2, 32, 18)                                                                                           \
    X(Q4_1, q4_1, 3, 32, 20)                                                                                           \
    X(Q5_0, q5_0, 6, 32, 22)                                                                                           \
    X(Q5_1, q5_1, 7, 32, 24)                                                                                           \
    X(Q8_0, q8_0, 8, 32, 34)                                                                                           \
    X(Q2_K, q2_k, 10, 256, 84)                                                                                         \
    X(Q3_K, q3_k, 11, 256, 110)                                                                                        \
    X(Q4_K, q4_k, 12, 256, 144)                                                                                        \
    X(Q5_K, q5_k, 13, 256, 176)                                                                                        \
    X(Q6_K, q6_k, 14, 256, 210)                                                                                        \
    X(IQ4_NL, iq4_nl, 20, 32, 18)                                                                                      \
    X(IQ4_XS, iq4_xs, 23, 256, 136)                                                                                    \
    X(BF16, bf16, 30, 1, 2)

/* Those that also have Tile16 (layout.h, a packer of blocks in src/weights/layout.c) and a gemm in every kernel table:
 * X(NAME, name in functions). */
#define ST_TILED_TYPES(X)                                                                                              \
    X(Q4_0, q4_0)                                                                                                      \
    X(Q8_0, q8_0)                                                                                                      \
    X(Q4_K, q4_k)                                                                                                      \
    X(Q5_K, q5_k)                                                                                                      \
    X(Q6_K, q6_k)

/* Those of them that also have Rows and Down (layout.h), with rows and down kernels: experts whose up and down are of
 * these are computed sparsely. */
#define ST_SPARSE_TYPES(X)                                                                                             \
    X(Q4_0, q4_0)                                                                                                      \
    X(Q4_K, q4_k)                                                                                                      \
    X(Q5_K, q5_k)                                                                                                      \
    X(Q6_K, q6_k)

/* Those of these that also have Down transposed. */
#define ST_TRANSPOSED_TYPES(X) X(Q4_0, q4_0)

/* Types of the GGUF format that are only known by name, for messages: X(NAME, number). */
#define ST_OTHER_TYPES(X)                                                                                              \
    X(Q8_1, 9)                                                                                                         \
    X(Q8_K, 15)                                                                                                        \
    X(IQ2_XXS, 16)                                                                                                     \
    X(IQ2_XS, 17)                                                                                                      \
    X(IQ3_XXS, 18)                                                                                                     \
    X(IQ1_S, 19)                                                                                                       \
    X(IQ3_S, 21)                                                                                                       \
    X(IQ2_S, 22)                                                                                                       \
    X(I8, 24)                                                                                                          \
    X(I16, 25)                                                                                                         \
    X(I32, 26)                                                                                                         \
    X(I64, 27)                                                                                                         \
    X(F64, 28)                                                                                                         \
    X(IQ1_M, 29)                                                                                                       \
    X(Q4_0_4_4, 31)                                                                                                    \
    X(Q4_0_4_8, 32)                                                                                                    \
    X(Q4_0_8_8, 33)                                                                                                    \
    X(TQ1_0, 34)                                                                                                       \
    X(TQ2_0, 35)                                                                                                       \
    X(MXFP4, 39)                                                                                                       \
    X(NVFP4, 40)                                                                                                       \
    X(Q1_0, 41)

#define ST_TYPE_NUMBER(NAME, name, number, columns, bytes) ST_##NAME = number,
#define ST_TYPE_SIZES(NAME, name, number, columns, bytes) ST_##NAME##_COLUMNS = columns, ST_##NAME##_BYTES = bytes,
#define ST_TILED_NUMBER(NAME, name) ST_TILED_##NAME,

/* ST_F32, ST_Q4_0, ...: numbered as in GGUF. */
typedef enum st_type { ST_TYPES(ST_TYPE_NUMBER) ST_TYPE_NUMBERS = 64 } st_type;

/* ST_Q4_0_COLUMNS, ST_Q4_0_BYTES, ...: of a block. */
enum { ST_TYPES(ST_TYPE_SIZES) };

/* ST_TILED_Q4_0, ...: the same types counted without gaps, which kernels and layouts are found by. */
enum { ST_TILED_TYPES(ST_TILED_NUMBER) ST_TILED_COUNT };

typedef struct st_type_info {
    const char *name; /* as GGUF tools print it */
    int columns;      /* of a block */
    int bytes;        /* of a block; 0 where only the name is known */
    void (*dequantize)(const uint8_t *row, int64_t blocks, float *out);
} st_type_info;

/* What is known of the type with a GGUF number; NULL where that names none. */
const st_type_info *st_type_of(int number);
/* The place of a type among the tiled ones (ST_TILED_...), or -1. */
int st_tiled(int type);
/* Whether a type is one of ST_SPARSE_TYPES. */
int st_sparse(int type);

/* Bytes of one GGUF row of cols elements; 0 where cols does not fit the type's block or the type cannot be read. */
size_t st_row_bytes(int type, int64_t cols);
/* One GGUF row of cols elements, whole blocks of a type that can be read, as floats. */
void st_dequantize_row(int type, const uint8_t *row, int64_t cols, float *out);

/* The eight six-bit scales and minima of a Q4_K or Q5_K block, from the 12 bytes that hold them there. */
void st_k_scales(const uint8_t *packed, uint8_t scale[8], uint8_t min[8]);

float st_f16_to_f32(uint16_t h);
uint16_t st_f32_to_f16(float f); /* round to nearest even; overflow to infinity */

#endif
