// Fused bfloat16 kernels for training on a CPU: what PyTorch would do in several passes over memory, in one.
//
// Matrix products stay PyTorch's. Everything here reads and writes bfloat16 and computes in float32. The loops are
// plain C that the compiler vectorises; build.py compiles this file for the machine it runs on. Each function has the same
// arithmetic in PyTorch beside its caller, which is used without a compiler and in the tests.

#include <stdint.h>

typedef uint16_t bf16;

static inline float up(bf16 h) {
    union { uint32_t u; float f; } v = {(uint32_t)h << 16};
    return v.f;
}

static inline bf16 down(float f) {  // round to nearest, ties to even
    union { float f; uint32_t u; } v = {f};
    return (bf16)((v.u + 0x7fffu + ((v.u >> 16) & 1u)) >> 16);
}

// exp(x) to 3e-7 relative: 2^n times a polynomial of 2^r, |r| <= 1/2. Zero below -87, which is all a softmax needs.
static inline float exponential(float x) {
    float t = x * 1.44269504f;
    t = t < -126.0f ? -126.0f : t;
    t = t > 127.0f ? 127.0f : t;
    float n = __builtin_rintf(t), r = t - n;
    float p = 1.53533e-4f;
    p = p * r + 1.339887e-3f;
    p = p * r + 9.618437e-3f;
    p = p * r + 5.550332e-2f;
    p = p * r + 2.4022648e-1f;
    p = p * r + 6.9314718e-1f;
    p = p * r + 1.0f;
    union { int32_t i; float f; } scale = {((int32_t)n + 127) << 23};
    return x < -87.0f ? 0.0f : p * scale.f;
}

// 1 / x for x >= 1, to 1e-7 relative: three Newton steps cost less than a vector division.
static inline float reciprocal(float x) {
    union { float f; int32_t i; } v = {x};
    v.i = 0x7EF311C7 - v.i;
    float r = v.f;
    r = r * (2.0f - x * r);
    r = r * (2.0f - x * r);
    return r * (2.0f - x * r);
}

// s = x + delta; y = s * rstd * weight. delta may be null: then s is not written.
void add_rms_norm(const bf16 *x, const bf16 *delta, const bf16 *weight, bf16 *s, bf16 *y, float *rstd,
                  long tokens, long width, float eps) {
#pragma omp parallel for schedule(static) if (tokens > 8)
    for (long t = 0; t < tokens; t++) {
        const bf16 *row = x + t * width;
        bf16 *out = y + t * width;
        float square = 0.0f;
        if (delta) {
            const bf16 *d = delta + t * width;
            bf16 *sum = s + t * width;
#pragma omp simd
            for (long i = 0; i < width; i++) sum[i] = down(up(row[i]) + up(d[i]));
            row = sum;
        }
#pragma omp simd reduction(+ : square)
        for (long i = 0; i < width; i++) square += up(row[i]) * up(row[i]);
        float r = 1.0f / __builtin_sqrtf(square / (float)width + eps);
        rstd[t] = r;
#pragma omp simd
        for (long i = 0; i < width; i++) out[i] = down(up(row[i]) * r * up(weight[i]));
    }
}

// dx = dresidual + rstd * (dy * weight - s * rstd^2 * mean(dy * weight * s)). dresidual may be null.
void rms_norm_backward(const bf16 *dy, const bf16 *dresidual, const bf16 *s, const bf16 *weight, const float *rstd,
                       bf16 *dx, long tokens, long width) {
#pragma omp parallel for schedule(static)
    for (long t = 0; t < tokens; t++) {
        const bf16 *g = dy + t * width, *row = s + t * width;
        bf16 *out = dx + t * width;
        float dot = 0.0f, r = rstd[t];
#pragma omp simd reduction(+ : dot)
        for (long i = 0; i < width; i++) dot += up(g[i]) * up(weight[i]) * up(row[i]);
        float c = dot * r * r / (float)width;
        if (dresidual) {
            const bf16 *d = dresidual + t * width;
#pragma omp simd
            for (long i = 0; i < width; i++)
                out[i] = down(up(d[i]) + r * (up(g[i]) * up(weight[i]) - up(row[i]) * c));
        } else {
#pragma omp simd
            for (long i = 0; i < width; i++) out[i] = down(r * (up(g[i]) * up(weight[i]) - up(row[i]) * c));
        }
    }
}

void swiglu(const bf16 *gate, const bf16 *value, bf16 *y, long count) {
#pragma omp parallel for simd schedule(static) if (count > 16384)
    for (long i = 0; i < count; i++) {
        float g = up(gate[i]);
        y[i] = down(g * reciprocal(1.0f + exponential(-g)) * up(value[i]));
    }
}

void swiglu_backward(const bf16 *dy, const bf16 *gate, const bf16 *value, bf16 *dgate, bf16 *dvalue, long count) {
#pragma omp parallel for simd schedule(static)
    for (long i = 0; i < count; i++) {
        float d = up(dy[i]), g = up(gate[i]), v = up(value[i]);
        float sigmoid = reciprocal(1.0f + exponential(-g));
        dgate[i] = down(d * v * sigmoid * (1.0f + g * (1.0f - sigmoid)));
        dvalue[i] = down(d * g * sigmoid);
    }
}

// Between token order (T, heads, size) and document order: (heads, padded length, size) for each document, which begins
// at padded[d] tokens and ends in zeros. Each pair (i, i + size/2) turns by its position's angle on the way: sign +1
// forward, -1 for the gradient, 0 not at all. starts and padded hold documents + 1 offsets. Into token order, factors
// (heads, padded length) per document, if given, multiply each vector.
void rotate_and_pack(const bf16 *source, bf16 *target, const float *cosine, const float *sine, const long *starts,
                     const long *padded, const float *factors, long documents, long heads, long size, long sign,
                     long to_tokens) {
    long half = size / 2;
#pragma omp parallel for schedule(static)
    for (long place = 0; place < padded[documents]; place++) {
        long document = 0;
        while (padded[document + 1] <= place) document++;
        long first = padded[document], length = padded[document + 1] - first;
        long position = place - first, t = starts[document] + position, tail = t >= starts[document + 1];
        if (tail && to_tokens) continue;
        for (long h = 0; h < heads; h++) {
            long by_token = (t * heads + h) * size, row = first * heads + h * length + position;
            const bf16 *in = source + (to_tokens ? row * size : by_token);
            bf16 *out = target + (to_tokens ? by_token : row * size);
            float factor = factors ? factors[row] : 1.0f;
            if (tail) {
                for (long i = 0; i < size; i++) out[i] = 0;
            } else if (sign == 0) {
#pragma omp simd
                for (long i = 0; i < size; i++) out[i] = down(up(in[i]) * factor);
            } else {
                const float *c = cosine + t * half, *s = sine + t * half;
#pragma omp simd
                for (long i = 0; i < half; i++) {
                    float a = up(in[i]), b = up(in[i + half]), turn = (float)sign * s[i];
                    out[i] = down(a * c[i] - b * turn);
                    out[i + half] = down(b * c[i] + a * turn);
                }
            }
        }
    }
}

// The keys that a query sees are [begin, end). The loops below run over whole groups of 16, so the rest of the first
// and last group is set to what softmax turns into 0. keys is a multiple of 16.
typedef struct { long begin, end; } range;

static inline range seen(bf16 *row, long query, long window) {
    long begin = query - window + 1 > 0 ? query - window + 1 : 0, end = query + 1;
    range groups = {begin / 16 * 16, (end + 15) / 16 * 16};
    for (long i = groups.begin; i < begin; i++) row[i] = 0xff7f;
    for (long i = end; i < groups.end; i++) row[i] = 0xff7f;
    return groups;
}

// Rows of scores (queries first .. first + rows of each head, over keys) to exp(score - row maximum), in place, causal
// and within the window. lse gets the log of each row's sum of exponentials, inverse the inverse of their sum.
void causal_softmax(bf16 *scores, float *lse, float *inverse, long heads, long rows, long keys, long first,
                    long window, float scale) {
#pragma omp parallel for schedule(dynamic, 32)
    for (long r = 0; r < heads * rows; r++) {
        bf16 *row = scores + r * keys;
        range in = seen(row, first + r % rows, window);
        float most = -3.0e38f, sum = 0.0f;
#pragma omp simd reduction(max : most)
        for (long i = in.begin; i < in.end; i++) most = up(row[i]) > most ? up(row[i]) : most;
#pragma omp simd reduction(+ : sum)
        for (long i = in.begin; i < in.end; i++) {
            float weight = exponential((up(row[i]) - most) * scale);
            sum += weight;
            row[i] = down(weight);
        }
        for (long i = 0; i < in.begin; i++) row[i] = 0;
        for (long i = in.end; i < keys; i++) row[i] = 0;
        lse[r] = most * scale + __builtin_logf(sum);
        inverse[r] = 1.0f / sum;
    }
}

// scores -> probabilities (from lse); dprobabilities -> dscores; both in place.
void causal_softmax_backward(bf16 *scores, bf16 *dprobabilities, const float *lse, long heads, long rows, long keys,
                             long first, long window, float scale) {
#pragma omp parallel for schedule(dynamic, 32)
    for (long r = 0; r < heads * rows; r++) {
        bf16 *p = scores + r * keys, *d = dprobabilities + r * keys;
        range in = seen(p, first + r % rows, window);
        float dot = 0.0f, sum = lse[r];
#pragma omp simd reduction(+ : dot)
        for (long i = in.begin; i < in.end; i++) {
            float probability = exponential(up(p[i]) * scale - sum);
            p[i] = down(probability);
            dot += probability * up(d[i]);
        }
#pragma omp simd
        for (long i = in.begin; i < in.end; i++) d[i] = down(up(p[i]) * (up(d[i]) - dot) * scale);
        for (long i = 0; i < in.begin; i++) p[i] = 0, d[i] = 0;
        for (long i = in.end; i < keys; i++) p[i] = 0, d[i] = 0;
    }
}

// losses[t] = -log softmax(logits[t])[label]; logits become their gradient, (softmax - onehot) * scale. A negative label
// counts nothing.
void cross_entropy(bf16 *logits, const int64_t *labels, float *losses, long rows, long vocabulary, float scale) {
#pragma omp parallel for schedule(static)
    for (long t = 0; t < rows; t++) {
        bf16 *row = logits + t * vocabulary;
        float most = -3.0e38f, sum = 0.0f;
        if (labels[t] < 0) {
            for (long i = 0; i < vocabulary; i++) row[i] = 0;
            losses[t] = 0.0f;
            continue;
        }
#pragma omp simd reduction(max : most)
        for (long i = 0; i < vocabulary; i++) most = up(row[i]) > most ? up(row[i]) : most;
#pragma omp simd reduction(+ : sum)
        for (long i = 0; i < vocabulary; i++) sum += exponential(up(row[i]) - most);
        float lse = most + __builtin_logf(sum), label = up(row[labels[t]]);
        losses[t] = lse - label;
#pragma omp simd
        for (long i = 0; i < vocabulary; i++) row[i] = down(exponential(up(row[i]) - lse) * scale);
        row[labels[t]] = down((exponential(label - lse) - 1.0f) * scale);
    }
}

// y = weight @ x for one token: bound by reading the weight once, which two threads do twice as fast as one.
void matrix_vector(const bf16 *weight, const bf16 *x, bf16 *y, long rows, long columns) {
#pragma omp parallel for schedule(static)
    for (long r = 0; r < rows; r++) {
        const bf16 *row = weight + r * columns;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (long i = 0; i < columns; i++) sum += up(row[i]) * up(x[i]);
        y[r] = down(sum);
    }
}
