// bfloat16 in C, and the two functions that the kernels' loops are made of: plain C that the compiler vectorizes.

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
