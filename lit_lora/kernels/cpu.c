// Fused bfloat16 kernels for training on a CPU: what PyTorch would do in several passes over memory, in one.
//
// Matrix products stay PyTorch's. Everything here reads and writes bfloat16 and computes in float32. The loops are
// plain C that the compiler vectorizes; build.py compiles it for the machine it runs on. Each function has the same
// arithmetic in PyTorch beside its caller, which is used without a compiler and in the tests.

#include "bf16.h"

// 1 / x for x >= 1, to 1e-7 relative: three Newton steps cost less than a vector division.
static inline float reciprocal(float x) {
    union { float f; int32_t i; } v = {x};
    v.i = 0x7EF311C7 - v.i;
    float r = v.f;
    r = r * (2.0f - x * r);
    r = r * (2.0f - x * r);
    return r * (2.0f - x * r);
}

// s = x + delta; y = s * rstd * (offset + weight). delta may be null: then s is not written.
void add_rms_norm(const bf16 *x, const bf16 *delta, const bf16 *weight, bf16 *s, bf16 *y, float *rstd,
                  long tokens, long width, float eps, float offset) {
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
        for (long i = 0; i < width; i++) out[i] = down(up(row[i]) * r * (offset + up(weight[i])));
    }
}

// dx = dresidual + rstd * (dy * w - s * rstd^2 * mean(dy * w * s)) with w = offset + weight. dresidual may be null.
void rms_norm_backward(const bf16 *dy, const bf16 *dresidual, const bf16 *s, const bf16 *weight, const float *rstd,
                       bf16 *dx, long tokens, long width, float offset) {
#pragma omp parallel for schedule(static)
    for (long t = 0; t < tokens; t++) {
        const bf16 *g = dy + t * width, *row = s + t * width;
        bf16 *out = dx + t * width;
        float dot = 0.0f, r = rstd[t];
#pragma omp simd reduction(+ : dot)
        for (long i = 0; i < width; i++) dot += up(g[i]) * (offset + up(weight[i])) * up(row[i]);
        float c = dot * r * r / (float)width;
        if (dresidual) {
            const bf16 *d = dresidual + t * width;
#pragma omp simd
            for (long i = 0; i < width; i++)
                out[i] = down(up(d[i]) + r * (up(g[i]) * (offset + up(weight[i])) - up(row[i]) * c));
        } else {
#pragma omp simd
            for (long i = 0; i < width; i++)
                out[i] = down(r * (up(g[i]) * (offset + up(weight[i])) - up(row[i]) * c));
        }
    }
}

// exp(-x), at most exp(80), as reciprocal() takes nothing near the largest float; and with it 1 / (1 + exp(-x)).
static inline float inverse_exponential(float x) { return exponential(x < -80.0f ? 80.0f : -x); }
static inline float sigmoid_of(float x) { return reciprocal(1.0f + inverse_exponential(x)); }

void swiglu(const bf16 *gate, const bf16 *value, bf16 *y, long count) {
#pragma omp parallel for simd schedule(static) if (count > 16384)
    for (long i = 0; i < count; i++) {
        float g = up(gate[i]);
        y[i] = down(g * sigmoid_of(g) * up(value[i]));
    }
}

void swiglu_backward(const bf16 *dy, const bf16 *gate, const bf16 *value, bf16 *dgate, bf16 *dvalue, long count) {
#pragma omp parallel for simd schedule(static)
    for (long i = 0; i < count; i++) {
        float d = up(dy[i]), g = up(gate[i]), v = up(value[i]);
        float sigmoid = sigmoid_of(g);
        dgate[i] = down(d * v * sigmoid * (1.0f + g * (1.0f - sigmoid)));
        dvalue[i] = down(d * g * sigmoid);
    }
}

// gelu(g) by its approximation with tanh is g * sigmoid(2 sqrt(2 / pi) (g + 0.044715 g^3)): as swiglu, but for this.
static inline float gelu_argument(float g) { return g * (1.5957691f + 0.07135482f * g * g); }

void geglu(const bf16 *gate, const bf16 *value, bf16 *y, long count) {
#pragma omp parallel for simd schedule(static) if (count > 16384)
    for (long i = 0; i < count; i++) {
        float g = up(gate[i]);
        y[i] = down(g * sigmoid_of(gelu_argument(g)) * up(value[i]));
    }
}

void geglu_backward(const bf16 *dy, const bf16 *gate, const bf16 *value, bf16 *dgate, bf16 *dvalue, long count) {
#pragma omp parallel for simd schedule(static)
    for (long i = 0; i < count; i++) {
        float d = up(dy[i]), g = up(gate[i]), v = up(value[i]);
        float e = inverse_exponential(gelu_argument(g)), sigmoid = reciprocal(1.0f + e);
        float slope = 1.5957691f + 0.21406446f * g * g, rest = e * sigmoid;  // 1 - sigmoid would lose all its digits
        dgate[i] = down(d * v * sigmoid * (1.0f + g * rest * slope));
        dvalue[i] = down(d * g * sigmoid);
    }
}

// Turns each pair (x[i], x[i + half]) of a head by its token's angle, or back where turn is -1.
void rotate(const bf16 *x, const float *cosine, const float *sine, bf16 *out, long tokens, long heads, long half,
            float turn) {
#pragma omp parallel for schedule(static) if (tokens > 8)
    for (long t = 0; t < tokens; t++) {
        const float *c = cosine + t * half, *s = sine + t * half;
        for (long h = 0; h < heads; h++) {
            const bf16 *a = x + (t * heads + h) * 2 * half, *b = a + half;
            bf16 *first = out + (t * heads + h) * 2 * half, *second = first + half;
#pragma omp simd
            for (long i = 0; i < half; i++) {
                float p = up(a[i]), q = up(b[i]), turned = turn * s[i];
                first[i] = down(p * c[i] - q * turned);
                second[i] = down(q * c[i] + p * turned);
            }
        }
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

// Weights of 4 bits: two codes a byte, the first in the high half, one absmax a block of values. The absmax may be
// codes themselves (8 bits into map, one nested value for 256 of them, around offset): then nested is not null.
// Codes of 2 or 3 bits, the first in the highest bits, are spread to 4 bits a row or a block at a time.
typedef struct { const void *absmax; const float *nested, *map, *offset; } scales;

static inline float scale_of(scales s, long block) {
    if (!s.nested) return ((const float *)s.absmax)[block];
    volatile float product = s.map[((const uint8_t *)s.absmax)[block]] * s.nested[block / 256];  // not fused: rounded
    return product + *s.offset;
}

#if defined(__AVX512BW__) || defined(__BMI2__)
#include <immintrin.h>
#endif

// Codes of 2 or 3 bits as codes of 4, sixteen at a time.
static inline const uint8_t *spread(const uint8_t *codes, uint8_t *out, long count, long bits) {
    if (bits == 4) return codes;
    for (long i = 0; i < count; i += 16, codes += 2 * bits) {
        uint64_t word = (uint64_t)codes[0] << 24 | codes[1] << 16 | codes[2] << 8 | codes[3], wide = 0;
        if (bits == 3) word = word << 16 | codes[4] << 8 | codes[5];
#ifdef __BMI2__
        wide = _pdep_u64(word, bits == 3 ? 0x7777777777777777u : 0x3333333333333333u);
#else
        for (int c = 0; c < 16; c++) wide |= (word >> (c * bits) & ((1u << bits) - 1)) << (4 * c);
#endif
        for (int byte = 0; byte < 8; byte++) out[i / 2 + byte] = (uint8_t)(wide >> (56 - 8 * byte));
    }
    return out;
}

#ifdef __AVX512BW__
static inline void unpack_bf16(const uint8_t *codes, const float *values, bf16 *out, long count) {
    bf16 rounded[32] = {0};
    for (long i = 0; i < 16; i++) rounded[i] = down(values[i]);
    __m512i table = _mm512_loadu_si512(rounded), low = _mm512_set1_epi32(15);
    for (long i = 0; i < count; i += 32) {
        __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(codes + i / 2)));
        __m512i second = _mm512_slli_epi32(_mm512_and_si512(bytes, low), 16);
        __m512i index = _mm512_or_si512(_mm512_srli_epi32(bytes, 4), second);
        _mm512_storeu_si512(out + i, _mm512_permutexvar_epi16(index, table));
    }
}

static inline float dot_4bit(const uint8_t *codes, const float *values, const float *even, const float *odd, scales s,
                             long first, long blocks, long block) {
    __m512 table = _mm512_loadu_ps(values), total = _mm512_setzero_ps();
    __m512i low = _mm512_set1_epi32(15);
    for (long b = 0; b < blocks; b++) {
        __m512 sum = _mm512_setzero_ps(), other = _mm512_setzero_ps();
        for (long i = b * block / 2; i < (b + 1) * block / 2; i += 16) {
            __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(codes + i)));
            __m512 a = _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), table);
            __m512 c = _mm512_permutexvar_ps(_mm512_and_si512(bytes, low), table);
            sum = _mm512_fmadd_ps(a, _mm512_loadu_ps(even + i), sum);
            other = _mm512_fmadd_ps(c, _mm512_loadu_ps(odd + i), other);
        }
        total = _mm512_fmadd_ps(_mm512_add_ps(sum, other), _mm512_set1_ps(scale_of(s, first + b)), total);
    }
    return _mm512_reduce_add_ps(total);
}
#else
static inline void unpack_bf16(const uint8_t *codes, const float *values, bf16 *out, long count) {
    bf16 rounded[16];
    for (long i = 0; i < 16; i++) rounded[i] = down(values[i]);
    for (long i = 0; i < count; i += 2) {
        out[i] = rounded[codes[i / 2] >> 4];
        out[i + 1] = rounded[codes[i / 2] & 15];
    }
}

static inline float dot_4bit(const uint8_t *codes, const float *values, const float *even, const float *odd, scales s,
                             long first, long blocks, long block) {
    float total = 0.0f;
    for (long b = 0; b < blocks; b++) {
        float sum = 0.0f;
        for (long i = b * block / 2; i < (b + 1) * block / 2; i++)
            sum += values[codes[i] >> 4] * even[i] + values[codes[i] & 15] * odd[i];
        total += sum * scale_of(s, first + b);
    }
    return total;
}
#endif

static inline void write_block(const uint8_t *codes, const float *values, void *out, long b, long block, long bits,
                               long wide) {
    uint8_t four[block / 2];
    const uint8_t *in = spread(codes + b * block * bits / 8, four, block, bits);
    if (wide) {
        float *to = (float *)out + b * block;
        for (long i = 0; i < block; i += 2) {
            to[i] = values[in[i / 2] >> 4];
            to[i + 1] = values[in[i / 2] & 15];
        }
    } else {
        unpack_bf16(in, values, (bf16 *)out + b * block, block);
    }
}

// out = values[code] * absmax, rounded once; float where wide, else bfloat16.
void dequantize_blocks(const uint8_t *codes, const float *values, const void *absmax, const float *nested,
                       const float *map, const float *offset, void *out, long blocks, long block, long bits,
                       long wide) {
    scales s = {absmax, nested, map, offset};
#pragma omp parallel for schedule(static) if (blocks > 64)
    for (long b = 0; b < blocks; b++) {
        float scaled[16] = {0}, scale = scale_of(s, b);
        for (long i = 0; i < 1 << bits; i++) scaled[i] = values[i] * scale;
        write_block(codes, scaled, out, b, block, bits, wide);
    }
}

// The same of groups: out = code * scale + zero.
void dequantize_groups(const uint8_t *codes, const float *scale, const float *zero, void *out, long blocks, long block,
                       long bits, long wide) {
#pragma omp parallel for schedule(static) if (blocks > 64)
    for (long b = 0; b < blocks; b++) {
        float values[16];
        for (long i = 0; i < 16; i++) {
            volatile float product = (float)i * scale[b];  // not fused: rounded
            values[i] = product + zero[b];
        }
        write_block(codes, values, out, b, block, bits, wide);
    }
}

// y = W x for one token, straight from the codes; no block lies in two rows.
void matrix_vector_blocks(const uint8_t *codes, const float *values, const void *absmax, const float *nested,
                          const float *map, const float *offset, const bf16 *x, bf16 *y, long rows, long columns,
                          long block, long bits) {
    scales s = {absmax, nested, map, offset};
    long blocks = columns / block;
    float even[columns / 2], odd[columns / 2], known[16] = {0};
    for (long i = 0; i < 1 << bits; i++) known[i] = values[i];
    for (long i = 0; i < columns / 2; i++) even[i] = up(x[2 * i]), odd[i] = up(x[2 * i + 1]);
#pragma omp parallel for schedule(static)
    for (long r = 0; r < rows; r++) {
        uint8_t four[columns / 2];
        const uint8_t *row = spread(codes + r * columns * bits / 8, four, columns, bits);
        y[r] = down(dot_4bit(row, known, even, odd, s, r * blocks, blocks, block));
    }
}

void matrix_vector_groups(const uint8_t *codes, const float *scale, const float *zero, const bf16 *x, bf16 *y, long rows,
                          long columns, long block, long bits) {
    scales s = {scale, 0, 0, 0};
    long blocks = columns / block;
    float even[columns / 2], odd[columns / 2], sums[blocks], values[16];
    for (long i = 0; i < 16; i++) values[i] = (float)i;
    for (long b = 0; b < blocks; b++) {
        sums[b] = 0.0f;
        for (long i = b * block / 2; i < (b + 1) * block / 2; i++) {
            even[i] = up(x[2 * i]), odd[i] = up(x[2 * i + 1]);
            sums[b] += even[i] + odd[i];
        }
    }
#pragma omp parallel for schedule(static)
    for (long r = 0; r < rows; r++) {
        uint8_t four[columns / 2];
        const uint8_t *row = spread(codes + r * columns * bits / 8, four, columns, bits);
        float total = dot_4bit(row, values, even, odd, s, r * blocks, blocks, block);
        for (long b = 0; b < blocks; b++) total += zero[r * blocks + b] * sums[b];
        y[r] = down(total);
    }
}

// Codes and absmax of x, in blocks. A value between two of the 16 sorted values goes to the nearer one, at the midpoint
// to the lower; order gives the code of each.
void quantize_4bit(const float *x, const float *midpoints, const uint8_t *order, uint8_t *codes, float *absmax,
                   long blocks, long block) {
#pragma omp parallel for schedule(static)
    for (long b = 0; b < blocks; b++) {
        const float *in = x + b * block;
        float most = 0.0f;
#pragma omp simd reduction(max : most)
        for (long i = 0; i < block; i++) most = __builtin_fabsf(in[i]) > most ? __builtin_fabsf(in[i]) : most;
        absmax[b] = most;
        float inverse = 1.0f / (most > 1e-38f ? most : 1e-38f);
        uint8_t rank[block];
        for (long i = 0; i < block; i++) {
            float scaled = in[i] * inverse;
            int count = 0;
            for (long m = 0; m < 15; m++) count += scaled > midpoints[m];
            rank[i] = (uint8_t)count;
        }
        for (long i = 0; i < block / 2; i++)
            codes[b * block / 2 + i] = (uint8_t)(order[rank[2 * i]] << 4 | order[rank[2 * i + 1]]);
    }
}

// out = q * scale / 127 of each row; float where wide, else bfloat16.
void dequantize_8bit(const int8_t *codes, const float *absmax, void *out, long rows, long columns, long wide) {
#pragma omp parallel for schedule(static)
    for (long r = 0; r < rows; r++) {
        const int8_t *in = codes + r * columns;
        float scale = absmax[r] * (1.0f / 127.0f);
        float *floats = (float *)out + r * columns;
        bf16 *halves = (bf16 *)out + r * columns;
        if (wide) {
            for (long i = 0; i < columns; i++) floats[i] = (float)in[i] * scale;
        } else {
#pragma omp simd
            for (long i = 0; i < columns; i++) halves[i] = down((float)in[i] * scale);
        }
    }
}

void matrix_vector_8bit(const int8_t *codes, const float *absmax, const bf16 *x, bf16 *y, long rows, long columns) {
    float wide[columns];
    for (long i = 0; i < columns; i++) wide[i] = up(x[i]);
#pragma omp parallel for schedule(static)
    for (long r = 0; r < rows; r++) {
        const int8_t *row = codes + r * columns;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (long i = 0; i < columns; i++) sum += (float)row[i] * wide[i];
        y[r] = down(sum * absmax[r] * (1.0f / 127.0f));
    }
}
