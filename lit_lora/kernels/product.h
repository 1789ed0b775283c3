// The product of two blocks in registers, for CPUs that multiply bfloat16 (AVX-512 BF16). The instruction multiplies
// two pairs of neighbours and adds: a "pair" is two bfloat16 that follow one another along the summed dimension.

#include "bf16.h"

#ifdef __AVX512BF16__
#include <immintrin.h>

typedef uint32_t pair;

// c (m, n) = a (m, 2 depth) b (2 depth, n), or added to c. Rows of a are pairs; b is pairs of rows, (depth, n).
// m is a multiple of 8, n of 32.
static void product(const pair *a, long a_step, const pair *b, long b_step, float *c, long c_step, long m, long n,
                    long depth, int add) {
    for (long j = 0; j < n; j += 32)
        for (long i = 0; i < m; i += 8) {
            __m512 sum[8][2];
#pragma GCC unroll 8
            for (int r = 0; r < 8; r++) {
                const float *old = c + (i + r) * c_step + j;
                sum[r][0] = add ? _mm512_loadu_ps(old) : _mm512_setzero_ps();
                sum[r][1] = add ? _mm512_loadu_ps(old + 16) : _mm512_setzero_ps();
            }
            for (long k = 0; k < depth; k++) {
                __m512bh left = (__m512bh)_mm512_loadu_si512(b + k * b_step + j);
                __m512bh right = (__m512bh)_mm512_loadu_si512(b + k * b_step + j + 16);
#pragma GCC unroll 8
                for (int r = 0; r < 8; r++) {
                    __m512bh both = (__m512bh)_mm512_set1_epi32((int)a[(i + r) * a_step + k]);
                    sum[r][0] = _mm512_dpbf16_ps(sum[r][0], both, left);
                    sum[r][1] = _mm512_dpbf16_ps(sum[r][1], both, right);
                }
            }
#pragma GCC unroll 8
            for (int r = 0; r < 8; r++) {
                _mm512_storeu_ps(c + (i + r) * c_step + j, sum[r][0]);
                _mm512_storeu_ps(c + (i + r) * c_step + j + 16, sum[r][1]);
            }
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
