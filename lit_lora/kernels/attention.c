// Causal attention over packed documents, forward and backward, for CPUs that multiply bfloat16 (AVX-512 BF16).
//
// A task is one document and one key/value head with the query heads that share it. Its keys and values are rotated and
// laid out once; then panels of 32 queries go over the keys that they see, so scores exist for one panel only and the
// causal half that is masked is not computed. The backward computes the scores again from the saved log-sum-exp (as
// FlashAttention does, arXiv:2205.14135 section 3). Tokens that all documents begin with are given once: their queries
// are those of the first document, and the gradients of their keys and values are summed over all. Products read pairs of neighbors along the summed dimension, "pair"
// below: that is what the instruction multiplies.

#include <stdlib.h>
#include <string.h>

#include "product.h"

#ifdef __AVX512BF16__

#define PANEL 32  // queries of a panel; all sizes below are padded to a multiple of it

static inline long padded(long n) { return (n + PANEL - 1) / PANEL * PANEL; }

// Rows (count, width) to pairs of rows, (count / 2, width).
static void pair_rows(const bf16 *rows, pair *out, long count, long width) {
    for (long r = 0; r < count; r += 2)
#pragma omp simd
        for (long i = 0; i < width; i++)
            out[r / 2 * width + i] = (pair)rows[r * width + i] | (pair)rows[(r + 1) * width + i] << 16;
}

// (count, width) pairs to (width, count), both multiples of 16.
static void transpose(const pair *in, pair *out, long count, long width) {
    for (long i = 0; i < width; i += 16)
        for (long r = 0; r < count; r += 16) transpose_block(in + r * width + i, width, out + i * count + r, count);
}

typedef struct {
    const float *cosine, *sine;  // (tokens, half)
    long size, width, half;      // of a head, and padded; its first 2 half dimensions are turned, the others are not
} turn;

// Turn the pairs (a, b) = (i, i + half), of 16 i or those of the mask, by the angle of token t: sign +1 forward, -1 for
// the gradient.
static inline void turn16(const turn *by, long t, long i, __mmask16 which, __m512 a, __m512 b, float sign, bf16 *out) {
    long half = by->half;
    __m512 cosine = _mm512_maskz_loadu_ps(which, by->cosine + t * half + i);
    __m512 sine = _mm512_mul_ps(_mm512_set1_ps(sign), _mm512_maskz_loadu_ps(which, by->sine + t * half + i));
    store16(out + i, which, _mm512_fmsub_ps(a, cosine, _mm512_mul_ps(b, sine)));
    store16(out + half + i, which, _mm512_fmadd_ps(b, cosine, _mm512_mul_ps(a, sine)));
}

static void rotate(const turn *by, long t, const bf16 *in, bf16 *out) {
    long half = by->half, rest = by->size - 2 * half;
    for (long i = 0; i < half; i += 16) {
        __mmask16 which = first16(half - i);
        turn16(by, t, i, which, load16(in + i, which), load16(in + half + i, which), 1.0f, out);
    }
    if (rest) memcpy(out + 2 * half, in + 2 * half, sizeof(bf16) * (size_t)rest);
}

static void rotate_back(const turn *by, long t, const float *in, bf16 *out) {
    long half = by->half, rest = by->size - 2 * half;
    for (long i = 0; i < half; i += 16) {
        __mmask16 which = first16(half - i);
        __m512 a = _mm512_maskz_loadu_ps(which, in + i), b = _mm512_maskz_loadu_ps(which, in + half + i);
        turn16(by, t, i, which, a, b, -1.0f, out);
    }
    store_row(out + 2 * half, in + 2 * half, rest, 1.0f);
}

typedef struct {
    bf16 *rows, *q, *outer, *weights;       // (length, width); (PANEL, width) twice; (PANEL, length)
    pair *keys_by_size, *values_by_size;    // (width / 2, length): pairs along the head
    pair *keys_by_key, *values_by_key;      // (length / 2, width): pairs along the document
    pair *probabilities, *dscores;          // (PANEL / 2, length): pairs along the queries
    pair *short_pairs, *q_pairs, *outer_pairs;  // (PANEL / 2, width) and, transposed, (width, PANEL / 2) twice
    float *scores, *grads, *result;         // (PANEL, length) twice; (PANEL, width)
    float *dkeys, *dvalues;                 // (width, length)
} space;

static void *take(char **place, long count, size_t size) {
    void *here = *place;
    *place += ((size_t)count * size + 63) / 64 * 64;
    return here;
}

// Lay the buffers out from `place`; returns where they end.
static char *lay_out(space *s, char *place, long length, long width) {
    s->rows = take(&place, length * width, sizeof(bf16));
    s->q = take(&place, PANEL * width, sizeof(bf16));
    s->outer = take(&place, PANEL * width, sizeof(bf16));
    s->weights = take(&place, PANEL * length, sizeof(bf16));
    pair **half[] = {&s->keys_by_size, &s->values_by_size, &s->keys_by_key, &s->values_by_key};
    for (int i = 0; i < 4; i++) *half[i] = take(&place, length * width / 2, sizeof(pair));
    s->probabilities = take(&place, PANEL / 2 * length, sizeof(pair));
    s->dscores = take(&place, PANEL / 2 * length, sizeof(pair));
    pair **small[] = {&s->short_pairs, &s->q_pairs, &s->outer_pairs};
    for (int i = 0; i < 3; i++) *small[i] = take(&place, PANEL / 2 * width, sizeof(pair));
    s->scores = take(&place, PANEL * length, sizeof(float));
    s->grads = take(&place, PANEL * length, sizeof(float));
    s->result = take(&place, PANEL * width, sizeof(float));
    s->dkeys = take(&place, width * length, sizeof(float));
    s->dvalues = take(&place, width * length, sizeof(float));
    return place;
}

typedef struct {
    const bf16 *query, *key, *value;  // (rows, heads or groups, size): the common tokens, the rest of each document
    const long *starts;               // documents + 1, as if each held the common tokens; so are the rows of `by`
    long documents, common, heads, groups, window;
    float scale;
    turn by;
} problem;

// Where token t of a document is given.
static inline long row_of(const problem *p, long document, long t) {
    return t < p->common ? t : p->starts[document] + t - document * p->common;
}

// One head of a document's tokens first .. first + count, to (padded, width) with zeros around; turned if asked.
static void gather(const problem *p, const bf16 *x, long heads, long head, long document, long first, long count,
                   bf16 *out, int turned) {
    const turn *by = &p->by;
    if (by->size < by->width || count < padded(count))
        memset(out, 0, sizeof(bf16) * (size_t)(padded(count) * by->width));
    for (long r = 0; r < count; r++) {
        const bf16 *row = x + (row_of(p, document, first + r) * heads + head) * by->size;
        if (turned)
            rotate(by, p->starts[document] + first + r, row, out + r * by->width);
        else
            memcpy(out + r * by->width, row, sizeof(bf16) * (size_t)by->size);
    }
}

// The queries of a panel: how many, which keys they see, in whole groups of PANEL.
typedef struct { long first, rows, begin, keys; } panel;

static inline panel panel_at(const problem *p, long first, long length) {
    long rows = length - first < PANEL ? length - first : PANEL;
    long begin = first - p->window + 1 > 0 ? (first - p->window + 1) / PANEL * PANEL : 0;
    return (panel){first, rows, begin, padded(first + rows) - begin};
}

// exponential() of bf16.h, 16 at once.
static inline __m512 exponentials(__m512 x) {
    __m512 t = _mm512_max_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _mm512_set1_ps(-126.0f));
    __m512 n = _mm512_roundscale_ps(t, 0), r = _mm512_sub_ps(t, n), p = _mm512_set1_ps(1.53533e-4f);
    const float more[] = {1.339887e-3f, 9.618437e-3f, 5.550332e-2f, 2.4022648e-1f, 6.9314718e-1f, 1.0f};
#pragma GCC unroll 6
    for (int i = 0; i < 6; i++) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(more[i]));
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_GE_OQ), p, n);
}

// Which of the 16 keys from `i` on are between lo and hi.
static inline __mmask16 seen(long i, long lo, long hi) {
    if (i >= lo && i + 16 <= hi) return 0xffff;
    long below = hi - i < 0 ? 0 : hi - i > 16 ? 16 : hi - i, above = lo - i < 0 ? 0 : lo - i > 16 ? 16 : lo - i;
    return (__mmask16)((1u << below) - 1u) & (__mmask16)~((1u << above) - 1u);
}

// Scores of row r to exp(score - maximum) in bfloat16; masked ones to 0. Returns the log-sum-exp, sets the sum.
static float softmax(const problem *p, const panel *at, long r, const float *scores, bf16 *weights, float *total) {
    long hi = at->first + r + 1 - at->begin, lo = hi - p->window > 0 ? hi - p->window : 0;
    __m512 most = _mm512_set1_ps(-3.0e38f), sum = _mm512_setzero_ps(), scale = _mm512_set1_ps(p->scale);
    for (long i = 0; i < at->keys; i += 16)
        most = _mm512_mask_max_ps(most, seen(i, lo, hi), most, _mm512_loadu_ps(scores + i));
    float maximum = _mm512_reduce_max_ps(most);
    most = _mm512_set1_ps(maximum);
    for (long i = 0; i < at->keys; i += 16) {
        __m512 weight = exponentials(_mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(scores + i), most), scale));
        weight = _mm512_maskz_mov_ps(seen(i, lo, hi), weight);
        sum = _mm512_add_ps(sum, weight);
        store16(weights + i, 0xffff, weight);
    }
    *total = _mm512_reduce_add_ps(sum);
    return maximum * p->scale + __builtin_logf(*total);
}

static void forward_task(const problem *p, const space *s, long document, long group, bf16 *out, float *lse) {
    long count = p->starts[document + 1] - p->starts[document], length = padded(count);
    long width = p->by.width, size = p->by.size, share = p->heads / p->groups;
    gather(p, p->key, p->groups, group, document, 0, count, s->rows, 1);
    transpose((pair *)s->rows, s->keys_by_size, length, width / 2);
    gather(p, p->value, p->groups, group, document, 0, count, s->rows, 0);
    pair_rows(s->rows, s->values_by_key, length, width);
    for (long head = group * share; head < (group + 1) * share; head++)
        for (long first = document ? p->common : 0; first < count; first += PANEL) {
            panel at = panel_at(p, first, count);
            gather(p, p->query, p->heads, head, document, first, at.rows, s->q, 1);
            product((pair *)s->q, width / 2, s->keys_by_size + at.begin, length, s->scores, at.keys, PANEL, at.keys,
                    width / 2, 0);
            float sums[PANEL];
            for (long r = 0; r < at.rows; r++)
                lse[row_of(p, document, first + r) * p->heads + head] =
                    softmax(p, &at, r, s->scores + r * at.keys, s->weights + r * at.keys, sums + r);
            product((pair *)s->weights, at.keys / 2, s->values_by_key + at.begin / 2 * width, width, s->result, width,
                    PANEL, width, at.keys / 2, 0);
            for (long r = 0; r < at.rows; r++) {
                bf16 *row = out + (row_of(p, document, first + r) * p->heads + head) * size;
                store_row(row, s->result + r * width, size, 1.0f / sums[r]);
            }
        }
}

// Row r of scores -> probabilities, of the gradient of probabilities -> of scores, which goes to `halves` too; masked
// ones to 0.
static void softmax_backward(const problem *p, const panel *at, long r, float *scores, float *grads, bf16 *halves,
                             float lse) {
    long hi = r < at->rows ? at->first + r + 1 - at->begin : 0, lo = hi - p->window > 0 ? hi - p->window : 0;
    __m512 dots = _mm512_setzero_ps(), scale = _mm512_set1_ps(p->scale), sum = _mm512_set1_ps(lse);
    for (long i = 0; i < at->keys; i += 16) {
        __m512 probability = exponentials(_mm512_fmsub_ps(_mm512_loadu_ps(scores + i), scale, sum));
        probability = _mm512_maskz_mov_ps(seen(i, lo, hi), probability);
        dots = _mm512_fmadd_ps(probability, _mm512_loadu_ps(grads + i), dots);
        _mm512_storeu_ps(scores + i, probability);
    }
    __m512 dot = _mm512_set1_ps(_mm512_reduce_add_ps(dots));
    for (long i = 0; i < at->keys; i += 16) {
        __m512 grad = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(grads + i), dot), scale);
        grad = _mm512_mul_ps(grad, _mm512_loadu_ps(scores + i));
        _mm512_storeu_ps(grads + i, grad);
        store16(halves + i, 0xffff, grad);
    }
}

// Two rows of floats to pairs along the rows.
static void pair_up(const float *even, const float *odd, pair *out, long count) {
    for (long i = 0; i < count; i += 16) {
        __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(even + i)));
        __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(odd + i)));
        _mm512_storeu_si512(out + i, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
}

static void backward_panel(const problem *p, const space *s, long document, long head, long length, panel at,
                           const bf16 *dout, const float *lse, bf16 *dquery) {
    long width = p->by.width;
    gather(p, p->query, p->heads, head, document, at.first, at.rows, s->q, 1);
    gather(p, dout, p->heads, head, document, at.first, at.rows, s->outer, 0);
    product((pair *)s->q, width / 2, s->keys_by_size + at.begin, length, s->scores, at.keys, PANEL, at.keys, width / 2,
            0);
    product((pair *)s->outer, width / 2, s->values_by_size + at.begin, length, s->grads, at.keys, PANEL, at.keys,
            width / 2, 0);
    for (long r = 0; r < PANEL; r++) {
        float sum = r < at.rows ? lse[row_of(p, document, at.first + r) * p->heads + head] : 0.0f;
        long row = r * at.keys;
        softmax_backward(p, &at, r, s->scores + row, s->grads + row, s->weights + row, sum);
    }
    for (long r = 0; r < PANEL; r += 2) {
        long even = r * at.keys, odd = even + at.keys;
        pair_up(s->scores + even, s->scores + odd, s->probabilities + r / 2 * at.keys, at.keys);
        pair_up(s->grads + even, s->grads + odd, s->dscores + r / 2 * at.keys, at.keys);
    }
    product((pair *)s->weights, at.keys / 2, s->keys_by_key + at.begin / 2 * width, width, s->result, width, PANEL,
            width, at.keys / 2, 0);
    for (long r = 0; r < at.rows; r++) {
        bf16 *row = dquery + (row_of(p, document, at.first + r) * p->heads + head) * p->by.size;
        rotate_back(&p->by, p->starts[document] + at.first + r, s->result + r * width, row);
    }
    pair_rows(s->q, s->short_pairs, PANEL, width);
    transpose(s->short_pairs, s->q_pairs, PANEL / 2, width);
    pair_rows(s->outer, s->short_pairs, PANEL, width);
    transpose(s->short_pairs, s->outer_pairs, PANEL / 2, width);
    product(s->q_pairs, PANEL / 2, s->dscores, at.keys, s->dkeys + at.begin, length, width, at.keys, PANEL / 2, 1);
    product(s->outer_pairs, PANEL / 2, s->probabilities, at.keys, s->dvalues + at.begin, length, width, at.keys,
            PANEL / 2, 1);
}

static void backward_task(const problem *p, const space *s, long document, long group, const bf16 *dout,
                          const float *lse, bf16 *dquery, bf16 *dkey, bf16 *dvalue, float *shares) {
    long start = p->starts[document], count = p->starts[document + 1] - start, length = padded(count);
    long width = p->by.width, size = p->by.size, share = p->heads / p->groups;
    gather(p, p->value, p->groups, group, document, 0, count, s->rows, 0);
    transpose((pair *)s->rows, s->values_by_size, length, width / 2);
    gather(p, p->key, p->groups, group, document, 0, count, s->rows, 1);
    transpose((pair *)s->rows, s->keys_by_size, length, width / 2);
    pair_rows(s->rows, s->keys_by_key, length, width);
    memset(s->dkeys, 0, sizeof(float) * (size_t)(width * length));
    memset(s->dvalues, 0, sizeof(float) * (size_t)(width * length));
    for (long head = group * share; head < (group + 1) * share; head++)
        for (long first = document ? p->common : 0; first < count; first += PANEL)
            backward_panel(p, s, document, head, length, panel_at(p, first, count), dout, lse, dquery);
    float key[16 * width], value[16 * width];
    for (long r = 0; r < count; r++) {
        long row = (row_of(p, document, r) * p->groups + group) * size, place = r % 16 * width;
        for (long i = 0; i < width && !place; i += 16) {  // the next 16 tokens
            transpose_block((pair *)s->dkeys + i * length + r, length, (pair *)key + i, width);
            transpose_block((pair *)s->dvalues + i * length + r, length, (pair *)value + i, width);
        }
        if (r < p->common) {  // not rounded before they are summed
            float *both = shares + ((document * p->common + r) * p->groups + group) * 2 * size;
            memcpy(both, key + place, sizeof(float) * (size_t)size);
            memcpy(both + size, value + place, sizeof(float) * (size_t)size);
            continue;
        }
        rotate_back(&p->by, start + r, key + place, dkey + row);
        store_row(dvalue + row, value + place, size, 1.0f);
    }
}

// The gradients of a common token's key and value, from all documents.
static void sum_shares(const problem *p, const float *shares, long t, bf16 *dkey, bf16 *dvalue) {
    long size = p->by.size, row = t * p->groups;
    float both[2 * size];
    for (long group = 0; group < p->groups; group++) {
        memset(both, 0, sizeof(both));
        for (long document = 0; document < p->documents; document++) {
            const float *more = shares + ((document * p->common + t) * p->groups + group) * 2 * size;
            for (long i = 0; i < 2 * size; i++) both[i] += more[i];
        }
        rotate_back(&p->by, t, both, dkey + (row + group) * size);
        store_row(dvalue + (row + group) * size, both + size, size, 1.0f);
    }
}

static long longest(const long *starts, long documents) {
    long most = 0;
    for (long d = 0; d < documents; d++) most = starts[d + 1] - starts[d] > most ? starts[d + 1] - starts[d] : most;
    return padded(most);
}

// Each thread's buffers, or null.
static char *room(const problem *p, space *s, int backward) {
    long length = longest(p->starts, p->documents);
    size_t bytes = (size_t)(lay_out(s, 0, length, p->by.width) - (char *)0);
    if (!backward) bytes = (size_t)((char *)s->dkeys - (char *)0);
    char *place = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (place) lay_out(s, place, length, p->by.width);
    return place;
}

// out (rows, heads, size) and lse (rows, heads) of queries (rows, heads, size), keys and values (rows, groups, size)
// that are not rotated yet. Returns 0, or 1 where memory ran out.
long packed_attention(const bf16 *query, const bf16 *key, const bf16 *value, const float *cosine, const float *sine,
                      const long *starts, bf16 *out, float *lse, long documents, long common, long heads, long groups,
                      long size, long rotated, long window, float scale) {
    turn by = {cosine, sine, size, padded(size), rotated / 2};
    problem p = {query, key, value, starts, documents, common, heads, groups, window, scale, by};
    long failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        space s;
        char *place = room(&p, &s, 0);
        failed |= !place;
#pragma omp for schedule(dynamic, 1)
        for (long task = 0; task < documents * groups; task++)
            if (place) forward_task(&p, &s, task / groups, task % groups, out, lse);
        free(place);
    }
    return failed;
}

// The gradients of queries, keys and values from that of the output.
long packed_attention_backward(const bf16 *query, const bf16 *key, const bf16 *value, const float *cosine,
                               const float *sine, const long *starts, const float *lse, const bf16 *dout, bf16 *dquery,
                               bf16 *dkey, bf16 *dvalue, long documents, long common, long heads, long groups,
                               long size, long rotated, long window, float scale) {
    turn by = {cosine, sine, size, padded(size), rotated / 2};
    problem p = {query, key, value, starts, documents, common, heads, groups, window, scale, by};
    float *shares = common ? malloc(sizeof(float) * (size_t)(documents * common * groups * 2 * size)) : 0;
    long failed = common && !shares;
#pragma omp parallel reduction(| : failed)
    {
        space s;
        char *place = room(&p, &s, 1);
        failed |= !place;
        int able = place && (shares || !common);
#pragma omp for schedule(dynamic, 1)
        for (long task = 0; task < documents * groups; task++)
            if (able) backward_task(&p, &s, task / groups, task % groups, dout, lse, dquery, dkey, dvalue, shares);
#pragma omp for
        for (long t = 0; t < common; t++)
            if (able) sum_shares(&p, shares, t, dkey, dvalue);
        free(place);
    }
    free(shares);
    return failed;
}
#endif
