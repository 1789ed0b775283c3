// Sums of matrix products over cold weights, for CPUs that multiply bfloat16 but have no matrix unit (AMX is better
// served by the library). A low-rank update is one more term of the sum, so it costs its own arithmetic and no pass
// over the result, and what comes out is rounded once.

#include <omp.h>
#include <stdlib.h>
#include <string.h>

#include "product.h"

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)

#define COLUMNS 32  // of the result, computed by one task; 16 where the result has no more
#define DEPTH 1024  // pairs laid out at a time: 128 KB

// One product a b of the sum. a is (rows, depth), b (depth, columns); the elements of a row of a follow one another,
// and so do those of a row of b, or where transposed those of a column. Steps are in elements.
typedef struct {
    const bf16 *a;
    long a_step;
    const bf16 *b;
    long b_step, depth, transposed;
} term;

// `depth` pairs of `width` columns from pair `first` and column `column` on, to (depth, tile) with zeros to the right.
static void lay_out(const term *t, long column, long width, long first, long depth, pair *out, long tile) {
    if (width < tile) memset(out, 0, sizeof(pair) * (size_t)(depth * tile));
    if (t->transposed) {
        const pair *in = (const pair *)(t->b + column * t->b_step) + first;
        long step = t->b_step / 2, done = width == tile ? depth / 16 * 16 : 0;
        for (long k = 0; k < done; k += 16)
            for (long i = 0; i < tile; i += 16) transpose_block(in + i * step + k, step, out + k * tile + i, tile);
        for (long i = 0; i < width; i++)
            for (long k = done; k < depth; k++) out[k * tile + i] = in[i * step + k];
    } else {
        const bf16 *in = t->b + 2 * first * t->b_step + column;
        for (long k = 0; k < depth; k++, in += 2 * t->b_step)
#pragma omp simd
            for (long i = 0; i < width; i++) out[k * tile + i] = (pair)in[i] | (pair)in[t->b_step + i] << 16;
    }
}

// result (rows, tile) = a b over `depth` pairs from `first` on, or added to it; `spare` holds the last rows, filled
// up to 8.
static void put_product(const term *t, long row, long rows, long first, long depth, const pair *b, float *result,
                        pair *spare, long tile, int add) {
    const pair *a = (const pair *)(t->a + row * t->a_step) + first;
    long whole = rows / 8 * 8, step = t->a_step / 2;
    product(a, step, b, tile, result, tile, whole, tile, depth, add);
    if (whole == rows) return;
    memset(spare, 0, sizeof(pair) * (size_t)(8 * depth));
    for (long r = whole; r < rows; r++)
        memcpy(spare + (r - whole) * depth, a + r * step, sizeof(pair) * (size_t)depth);
    product(spare, depth, b, tile, result + whole * tile, tile, 8, tile, depth, add);
}

typedef struct {
    const term *terms;
    long count;
    const bf16 *start;  // what the products are added to, or null: (rows, columns), or one row for all with step 0
    long start_step;
    void *out;  // (rows, columns) without gaps; float where wide, else bfloat16. It may be `start`
    long rows, columns, wide;
} sum;

static void put_row(const float *from, void *out, long place, long width, int wide) {
    if (wide) {
        memcpy((float *)out + place, from, sizeof(float) * (size_t)width);
        return;
    }
    store_row((bf16 *)out + place, from, width, 1.0f);
}

static void sum_task(const sum *s, long column, long row, long rows, pair *b, float *result, pair *spare) {
    long width = s->columns - column < COLUMNS ? s->columns - column : COLUMNS;
    long tile = width > COLUMNS / 2 ? COLUMNS : COLUMNS / 2;
    int add = s->start != 0;
    if (add) memset(result, 0, sizeof(float) * (size_t)((rows + 7) / 8 * 8 * tile));
    for (long r = 0; s->start && r < rows; r++) {
        const bf16 *start = s->start + (row + r) * s->start_step + column;
        for (long i = 0; i < width; i++) result[r * tile + i] = up(start[i]);
    }
    for (const term *t = s->terms; t < s->terms + s->count; t++)
        for (long first = 0; first < t->depth / 2; first += DEPTH) {
            long depth = t->depth / 2 - first < DEPTH ? t->depth / 2 - first : DEPTH;
            lay_out(t, column, width, first, depth, b, tile);
            put_product(t, row, rows, first, depth, b, result, spare, tile, add);
            add = 1;
        }
    for (long r = 0; r < rows; r++)
        put_row(result + r * tile, s->out, (row + r) * s->columns + column, width, s->wide != 0);
}

// Rows of a task: all of them, unless the columns alone are too few tasks for the threads.
static long rows_of_a_task(long rows, long across) {
    long threads = omp_get_max_threads(), pieces = 1;
    if (across % threads && across < 8 * threads) pieces = (4 * threads + across - 1) / across;
    long share = (rows + pieces - 1) / pieces;
    return (share + 7) / 8 * 8;
}

// out = start + sum of the terms' products, added in float. Depths and steps are even. Returns 0, or 1 where memory ran
// out.
long sum_of_products(const term *terms, long count, const bf16 *start, long start_step, void *out, long rows,
                     long columns, long wide) {
    sum s = {terms, count, start, start_step, out, rows, columns, wide};
    long across = (columns + COLUMNS - 1) / COLUMNS, share = rows_of_a_task(rows, across), failed = 0;
    long tasks = across * ((rows + share - 1) / share);
    size_t floats = (size_t)(share * COLUMNS);
#pragma omp parallel reduction(| : failed) if (tasks > 1)
    {
        float *result = aligned_alloc(64, sizeof(float) * floats + sizeof(pair) * DEPTH * (COLUMNS + 8));
        pair *b = (pair *)(result + floats);
        failed |= !result;
#pragma omp for schedule(dynamic, 1)
        for (long task = 0; task < tasks; task++) {
            long row = task / across * share, left = rows - row < share ? rows - row : share;
            if (result) sum_task(&s, task % across * COLUMNS, row, left, b, result, b + DEPTH * COLUMNS);
        }
        free(result);
    }
    return failed;
}
#endif
