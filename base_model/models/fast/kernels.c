/* What a CPU computes around the integer products, each in one pass over its data; kernels.py builds and calls it.

   float32. Neighbours in the last axis are adjacent in memory; rows of x and out are `..._stride` floats apart, those
   of everything else follow each other. NaN goes through: the result has NaN where torch's operators have it. */

#include <float.h>
#include <math.h>
#include <omp.h>
#include <string.h>

#include "vectors.h"

#define TASK 16     /* rows that a thread finishes at a time */
#define COLUMNS 512 /* of B^T at a time: with r = 8 they stay in the first-level cache */
#define GROUP 16    /* heads whose K or V are quantized together */

/* quantization.row_scale of a row whose largest |x| has these bits: max|x| / qmax, rounded towards zero, FLT_MIN at
   least; 0 for zeros */
static inline float scale_of(uint32_t largest, float qmax) {
    float amax, scale;
    memcpy(&amax, &largest, sizeof amax);
    if (amax == 0) return 0;
    scale = amax / qmax;
    if ((double)scale * qmax > amax) {
        uint32_t bits;
        memcpy(&bits, &scale, sizeof bits);
        bits--; /* the next float below a positive one */
        memcpy(&scale, &bits, sizeof scale);
    }
    return scale < FLT_MIN ? FLT_MIN : scale;
}

/* without their signs, floats are ordered as their bits are, NaN above all */
static inline float row_scale(const float *x, long n, float qmax) {
    const uint32_t *bits = (const uint32_t *)x;
    uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
    for (long i = 0; i < n; i++) {
        uint32_t magnitude = bits[i] & 0x7fffffff;
        largest = magnitude > largest ? magnitude : largest;
    }
    return scale_of(largest, qmax);
}

/* ---- Hadamard transforms: the additions of rotation.hadamard in their order, so that codes are the same */

/* 0, 1, 2, ...: what is made of it by operators on registers is a constant, unlike what a loop over lanes writes */
static const integers lanes = {
    0, 1, 2, 3,
#if LANES > 4
    4, 5, 6, 7,
#endif
#if LANES > 8
    8, 9, 10, 11, 12, 13, 14, 15,
#endif
};

/* neighbours at a distance within a register change places: lane i gets lane i ^ distance */
static inline __attribute__((always_inline)) vector exchanged(vector v, const int distance) {
#ifdef __clang__
    vector w;
    for (int i = 0; i < LANES; i++) w[i] = v[i ^ distance];
    return w;
#else
    return __builtin_shuffle(v, lanes ^ distance);
#endif
}

/* v H for `count` registers of numbers; inlined with a constant, so that they stay in registers */
static inline __attribute__((always_inline)) void butterflies(vector *v, const int count) {
#pragma GCC unroll 4
    for (int distance = 1; distance < LANES; distance *= 2) {
        /* lower of a pair: a + b, upper: a - b; times 1 or -1 is exact, so that one multiply-add does either */
        const vector sign = __builtin_convertvector(1 + 2 * ((lanes & distance) != 0), vector);
#pragma GCC unroll 64
        for (int i = 0; i < count; i++) v[i] = v[i] * sign + exchanged(v[i], distance);
    }
#pragma GCC unroll 8
    for (int distance = 1; distance < count; distance *= 2) {
#pragma GCC unroll 64
        for (int i = 0; i < count; i++) {
            if (i & distance) continue;
            vector a = v[i], b = v[i + distance];
            v[i] = a + b, v[i + distance] = a - b;
        }
    }
}

/* out = (before * x) H for `count` registers of numbers; before may be NULL. The products meet a shuffle or a
   multiplication first, so that they are rounded before they are added to anything. */
static inline __attribute__((always_inline)) void transform(const float *x, const float *before, float *out,
                                                            const int count) {
    vector v[256 / LANES]; /* of a constant size: of a variable one it would be memory */
#pragma GCC unroll 64
    for (int i = 0; i < count; i++) {
        v[i] = *(const vector *)(x + i * LANES);
        if (before) v[i] *= *(const vector *)(before + i * LANES);
    }
    butterflies(v, count);
#pragma GCC unroll 64
    for (int i = 0; i < count; i++) *(vector *)(out + i * LANES) = v[i];
}

/* out = x * factors; not inlined: the product must be rounded before it is added to anything */
static __attribute__((noinline)) void multiply_by(const float *x, const float *factors, long n, float *out) {
    for (long i = 0; i < n; i++) out[i] = x[i] * factors[i];
}

/* out = (before * x) H, block by block; x, out: (n), may be the same; before: (n) or NULL */
static void hadamard(const float *x, const float *before, long n, long block, float *out) {
    for (long start = 0; start < n; start += block) {
        const float *in = x + start, *factors = before ? before + start : NULL;
        float *y = out + start;
        switch (block) {
            case 256: transform(in, factors, y, 256 / LANES); break;
            case 128: transform(in, factors, y, 128 / LANES); break;
            case 64: transform(in, factors, y, 64 / LANES); break;
            case 32: transform(in, factors, y, 32 / LANES); break;
            case 16: transform(in, factors, y, 16 / LANES); break;
            default:
                if (factors) multiply_by(in, factors, block, y);
                else if (y != in) memcpy(y, in, block * sizeof *y);
                for (long distance = 1; distance < block; distance *= 2)
                    for (long i = 0; i < block; i++) {
                        if (i & distance) continue;
                        float a = y[i], b = y[i + distance];
                        y[i] = a + b, y[i + distance] = a - b;
                    }
        }
    }
}

/* out = after * (before * x) H. x, out: (rows, n); before, after: (n) or NULL. */
void hadamard_rows(const float *x, long rows, long n, long x_stride, long block, const float *before,
                   const float *after, float *out, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long row = 0; row < rows; row++) {
        float *y = out + row * n;
        hadamard(x + row * x_stride, before, n, block, y);
        if (after) multiply_by(y, after, n, y);
    }
}

/* ---- linear layers */

/* low_rank = scaling * x A^T for a block of count <= BLOCK rows. x: (count, n); A: (r, n); low_rank: (count, r). */
static void project(const float *x, long count, long n, long x_stride, const float *A, long r, float scaling,
                    float *low_rank) {
    for (long j = 0; j < r; j += VECTORS) {
        vector sums[BLOCK][VECTORS] = {0};
        const float *left[BLOCK], *right[VECTORS]; /* where there are fewer rows, the first of them again */
        for (long k = 0; k < BLOCK; k++) left[k] = x + (k < count ? k : 0) * x_stride;
        for (long k = 0; k < VECTORS; k++) right[k] = A + (j + k < r ? j + k : j) * n;
        long whole = n / LANES * LANES;
        for (long i = 0; i < whole; i += LANES)
            for (int p = 0; p < BLOCK; p++)
                for (int q = 0; q < VECTORS; q++)
                    sums[p][q] += *(const vector *)(left[p] + i) * *(const vector *)(right[q] + i);
        for (long p = 0; p < count; p++) {
            for (long q = 0; q < VECTORS && j + q < r; q++) {
                float sum = 0;
                for (int lane = 0; lane < LANES; lane++) sum += sums[p][q][lane];
                for (long i = whole; i < n; i++) sum += left[p][i] * right[q][i];
                low_rank[p * r + j + q] = scaling * sum;
            }
        }
    }
}

/* Codes and scale of every row, where there are factors of (x * factors) H, and the first half of the LoRA branch,
   low_rank = scaling * x A^T. x: (rows, n); factors: (n) or NULL; rotated: (threads, n), scratch; codes: (rows, n);
   scale: (rows); A: (r, n); low_rank: (rows, r). */
void quantize_rows(const float *x, long rows, long n, long x_stride, float qmax, const float *factors, long block,
                   float *rotated, int8_t *codes, float *scale, const float *A, long r, float scaling,
                   float *low_rank, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long first = 0; first < rows; first += BLOCK) {
        long count = rows - first < BLOCK ? rows - first : BLOCK;
        for (long row = first; row < first + count; row++) {
            const float *in = x + row * x_stride;
            if (factors) {
                float *y = rotated + omp_get_thread_num() * n;
                hadamard(in, factors, n, block, y);
                in = y;
            }
            float divisor = scale[row] = row_scale(in, n, qmax);
            if (divisor == 0) divisor = 1;
            const float *next = x + (row + 1 < rows ? row + 1 : row) * x_stride;
            for (long i = 0; i < n; i += LANES) __builtin_prefetch(next + i);
            for (long i = 0; i < n; i++) codes[row * n + i] = (int8_t)(int32_t)rintf(in[i] / divisor);
        }
        project(x + first * x_stride, count, n, x_stride, A, r, scaling, low_rank + first * r);
    }
}

/* Fake-quantizes y: (n) with one scale. */
static void fake_quantize(float *y, long n, float qmax) {
    float scale = row_scale(y, n, qmax), divisor = scale == 0 ? 1 : scale;
    for (long i = 0; i < n; i++) y[i] = rintf(y[i] / divisor) * scale;
}

/* Fake-quantizes heads in their Hadamard basis, each with a scale of its own: step by step for GROUP of them, so that
   none waits for the scale of one. heads: (n), n a multiple of size. */
static inline __attribute__((always_inline)) void fake_quantize_heads(float *heads, long n, const long size,
                                                                      float qmax) {
    long block = size & -size; /* as rotation.block_size */
    float scales[GROUP];
    if (block > 256) block = 256;
    for (long first = 0; first < n; first += GROUP * size) {
        float *group = heads + first;
        long count = (n - first) / size < GROUP ? (n - first) / size : GROUP;
        for (long h = 0; h < count; h++) {
            hadamard(group + h * size, NULL, size, block, group + h * size);
            scales[h] = row_scale(group + h * size, size, qmax);
        }
        for (long h = 0; h < count; h++) {
            float *head = group + h * size, scale = scales[h], divisor = scale == 0 ? 1 : scale;
            for (long i = 0; i < size; i++) head[i] = rintf(head[i] / divisor);
            hadamard(head, NULL, size, block, head); /* exact: sums of codes */
            for (long i = 0; i < size; i++) head[i] *= scale / block;
        }
    }
}

/* out = acc * row_scales * column_scale + bias + low_rank B^T; then K and V, the last two thirds, are fake-quantized
   if kv_qmax > 0: with one scale each, or rotated head by head if head_size > 0. acc, out: (rows, n);
   row_scales: (rows); column_scale, bias: (n); low_rank: (rows, r); Bt: (r, n). */
void finish_rows(const int32_t *acc, long rows, long n, const float *row_scales, const float *column_scale,
                 const float *bias, const float *low_rank, const float *Bt, long r, float kv_qmax,
                 long head_size, float *out, long out_stride, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long first = 0; first < rows; first += TASK) {
        long last = first + TASK < rows ? first + TASK : rows;
        for (long start = 0; start < n; start += COLUMNS) {
            long stop = start + COLUMNS < n ? start + COLUMNS : n, whole = start + (stop - start) / LANES * LANES;
            for (long row = first; row < last; row += BLOCK) {
                long count = last - row < BLOCK ? last - row : BLOCK;
                for (long i = start; i < whole; i += LANES) { /* a vector of B^T serves all rows of the block */
                    vector scale = *(const vector *)(column_scale + i), constant = *(const vector *)(bias + i);
                    vector y[BLOCK];
                    for (long k = 0; k < BLOCK; k++) { /* where there are fewer rows, the first of them again */
                        long own = row + (k < count ? k : 0);
                        vector sums = __builtin_convertvector(*(const integers *)(acc + own * n + i), vector);
                        y[k] = sums * scale * row_scales[own] + constant;
                    }
                    for (long j = 0; j < r; j++)
                        for (long k = 0; k < BLOCK; k++)
                            y[k] += low_rank[(row + (k < count ? k : 0)) * r + j] * *(const vector *)(Bt + j * n + i);
                    for (long k = 0; k < count; k++) *(vector *)(out + (row + k) * out_stride + i) = y[k];
                }
                for (long own = row; own < row + count; own++) {
                    for (long i = whole; i < stop; i++) {
                        float y = (float)acc[own * n + i] * column_scale[i] * row_scales[own] + bias[i];
                        for (long j = 0; j < r; j++) y += low_rank[own * r + j] * Bt[j * n + i];
                        out[own * out_stride + i] = y;
                    }
                }
            }
        }
        for (long row = first; kv_qmax > 0 && row < last; row++) {
            for (long part = 1; part < 3; part++) {
                float *kv = out + row * out_stride + part * (n / 3);
                if (head_size == 0) fake_quantize(kv, n / 3, kv_qmax);
                else if (head_size == HEAD_SIZE) fake_quantize_heads(kv, n / 3, HEAD_SIZE, kv_qmax); /* a constant */
                else fake_quantize_heads(kv, n / 3, head_size, kv_qmax);
            }
        }
    }
}
