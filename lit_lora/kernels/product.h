// The product of two blocks in registers, for CPUs that multiply bfloat16 (AVX-512 BF16). The instruction multiplies
// two pairs of neighbors and adds: a "pair" is two bfloat16 that follow one another along the summed dimension.

#include "bf16.h"

#ifdef __AVX512BF16__
#include <immintrin.h>

typedef uint32_t pair;

// The first 16 of `left` numbers, or as many as there are.
static inline __mmask16 first16(long left) { return left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1u); }

// 16 numbers, or those of the mask, from bfloat16 and to it.
static inline __m512 load16(const bf16 *x, __mmask16 which) {
    __m512i halves = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(which, x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(halves, 16));
}
static inline void store16(bf16 *x, __mmask16 which, __m512 values) {
    _mm256_mask_storeu_epi16(x, which, (__m256i)_mm512_cvtneps_pbh(values));
}

// out = factor * in.
static inline void store_row(bf16 *out, const float *in, long count, float factor) {
    for (long i = 0; i < count; i += 16) {
        __mmask16 which = first16(count - i);
        store16(out + i, which, _mm512_mul_ps(_mm512_maskz_loadu_ps(which, in + i), _mm512_set1_ps(factor)));
    }
}

// One block of the product below: 8 rows, and 16 columns or twice 16.
static inline __attribute__((always_inline)) void block(const pair *a, long a_step, const pair *b, long b_step, float *c,
                                                        long c_step, long depth, int add, const int halves) {
    __m512 sum[8][2];
#pragma GCC unroll 8
    for (int r = 0; r < 8; r++)
#pragma GCC unroll 2
        for (int h = 0; h < halves; h++)
            sum[r][h] = add ? _mm512_loadu_ps(c + r * c_step + 16 * h) : _mm512_setzero_ps();
    for (long k = 0; k < depth; k++) {
        __m512bh right[2];
#pragma GCC unroll 2
        for (int h = 0; h < halves; h++) right[h] = (__m512bh)_mm512_loadu_si512(b + k * b_step + 16 * h);
#pragma GCC unroll 8
        for (int r = 0; r < 8; r++) {
            __m512bh both = (__m512bh)_mm512_set1_epi32((int)a[r * a_step + k]);
#pragma GCC unroll 2
            for (int h = 0; h < halves; h++) sum[r][h] = _mm512_dpbf16_ps(sum[r][h], both, right[h]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < 8; r++)
#pragma GCC unroll 2
        for (int h = 0; h < halves; h++) _mm512_storeu_ps(c + r * c_step + 16 * h, sum[r][h]);
}

// c (m, n) = a (m, 2 depth) b (2 depth, n), or added to c. Rows of a are pairs; b is pairs of rows, (depth, n).
// m is a multiple of 8, n of 16.
static void product(const pair *a, long a_step, const pair *b, long b_step, float *c, long c_step, long m, long n,
                    long depth, int add) {
    for (long j = 0; j < n; j += 32)
        for (long i = 0; i < m; i += 8) {
            const pair *rows = a + i * a_step;
            float *to = c + i * c_step + j;
            if (n - j >= 32)
                block(rows, a_step, b + j, b_step, to, c_step, depth, add, 2);
            else
                block(rows, a_step, b + j, b_step, to, c_step, depth, add, 1);
        }
}

// A block of 16 x 16 pairs, transposed in registers: rows of `in` become columns of `out`.
static void transpose_block(const pair *in, long step, pair *out, long out_step) {
    __m512i row[16], half[16];
    for (int i = 0; i < 16; i++) row[i] = _mm512_loadu_si512(in + i * step);
    for (int i = 0; i < 16; i += 2) {
        half[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
        half[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            row[i + 2 * j] = _mm512_unpacklo_epi64(half[i + j], half[i + 2 + j]);
            row[i + 2 * j + 1] = _mm512_unpackhi_epi64(half[i + j], half[i + 2 + j]);
        }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 16; j += 8) {
            half[i + j] = _mm512_shuffle_i32x4(row[i + j], row[i + j + 4], 0x88);
            half[i + j + 4] = _mm512_shuffle_i32x4(row[i + j], row[i + j + 4], 0xdd);
        }
    for (int i = 0; i < 8; i++) {
        _mm512_storeu_si512(out + i * out_step, _mm512_shuffle_i32x4(half[i], half[i + 8], 0x88));
        _mm512_storeu_si512(out + (i + 8) * out_step, _mm512_shuffle_i32x4(half[i], half[i + 8], 0xdd));
    }
}
#endif
