/* What a CPU computes around the integer products, each in one pass over its data; kernels.py builds and calls it.

   float32. Neighbours in the last axis are adjacent in memory; rows of x and out are `..._stride` floats apart, those
   of everything else follow each other. NaN goes through: the result has NaN where torch's operators have it. */

#include <float.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#define TASK 16     /* rows that a thread finishes at a time */
#define COLUMNS 512 /* of B^T at a time: with r = 8 they stay in the first-level cache */
#define BLOCK 4     /* rows that products take at a time */
#define HEAD_SIZE 64 /* features of a head of GPT-2 */
#define GROUP 16     /* heads whose K or V are quantized together */
#if defined __AVX512F__
#define LANES 16  /* floats in a register */
#define VECTORS 4 /* BLOCK x VECTORS sums stay in registers: there are 32 here, */
#elif defined __AVX__
#define LANES 8
#define VECTORS 2 /* 16 here */
#else
#define LANES 4
#define VECTORS 2
#endif
typedef float vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t integers __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

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

/* exp(x) for x <= 0 within 1e-7 of itself, exp(-87) at least; loops over it vectorize. 2^n exp(r) with a whole n and
   |r| <= ln(2) / 2, exp(r) = 1 + r + r^2 p(r), p fitted by reweighted least squares. */
static inline float exponential(float x) {
    x = -87.0f > x ? -87.0f : x;
    float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f; /* adding 1.5 * 2^23 rounds to a whole number */
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;   /* ln 2 in two parts, the first exact times n */
    float p = 0.49999994f + r * (0.166665211f + r * (0.041668389f + r * (0.00836871751f + r * 0.00138146023f)));
    uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return power * (1.0f + r * (1.0f + r * p));
}

/* out = x sigmoid(u), u = 2 sqrt(2 / pi) (x + 0.044715 x^3): GPT-2's tanh GELU. x, out: (rows, n). */
void gelu_rows(const float *x, long rows, long n, long x_stride, float *out, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long row = 0; row < rows; row++) {
        const float *in = x + row * x_stride;
#pragma omp simd
        for (long i = 0; i < n; i++) {
            float u = 1.59576912f * in[i] * (1.0f + 0.044715f * in[i] * in[i]), e = exponential(-fabsf(u));
            out[row * n + i] = in[i] * (u < 0 ? e : 1.0f) / (1.0f + e);
        }
    }
}

/* ---- causal attention */

#define CHUNK HEAD_SIZE /* keys in a chunk: as many, because multiply() makes rows of this length for both products */

/* out[q] = sum over k < count of weights[q][k] * rows[k], for q < BLOCK; each row HEAD_SIZE floats */
static inline void multiply(const float *weights, long weights_stride, const float *rows, long rows_stride,
                            long count, float *out, long out_stride) {
    for (int start = 0; start < HEAD_SIZE; start += VECTORS * LANES) {
        vector sums[BLOCK][VECTORS] = {0};
        for (long k = 0; k < count; k++) {
            const vector *row = (const vector *)(rows + k * rows_stride + start);
            for (int q = 0; q < BLOCK; q++)
                for (int v = 0; v < VECTORS; v++) sums[q][v] += weights[q * weights_stride + k] * row[v];
        }
        for (int q = 0; q < BLOCK; q++) memcpy(out + q * out_stride + start, sums[q], sizeof sums[q]);
    }
}

/* scores[0..own) become exp(score - largest), scores[own..seen) 0; returns their sum */
static float exponentials(float *scores, long own, long seen) {
    float largest = -INFINITY, sum = 0;
#pragma omp simd reduction(max : largest)
    for (long t = 0; t < own; t++) largest = scores[t] > largest ? scores[t] : largest;
#pragma omp simd reduction(+ : sum)
    for (long t = 0; t < own; t++) sum += scores[t] = exponential(scores[t] - largest);
    for (long t = own; t < seen; t++) scores[t] = 0;
    return sum;
}

/* softmax(scaling * q k^T) v, where token i sees tokens 0..i.
   q, k, v: (batch, heads, length, HEAD_SIZE) with their first three strides; out: (batch, length, heads, HEAD_SIZE);
   scratch: (threads, HEAD_SIZE + BLOCK, padded), padded: length rounded up to whole chunks. */
void attend(const float *q, const long *q_strides, const float *k, const long *k_strides, const float *v,
            const long *v_strides, long batch, long heads, long length, float scaling, float *out, float *scratch,
            long padded, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (long item = 0; item < batch * heads; item++) {
        long b = item / heads, h = item % heads;
        const float *Q = q + b * q_strides[0] + h * q_strides[1], *K = k + b * k_strides[0] + h * k_strides[1];
        const float *V = v + b * v_strides[0] + h * v_strides[1];
        float *keys = scratch + omp_get_thread_num() * (HEAD_SIZE + BLOCK) * padded;
        float *scores = keys + HEAD_SIZE * padded;
        for (long t = 0; t < padded; t++) /* scaled, transposed within each chunk: (chunk, feature, key) */
            for (long f = 0; f < HEAD_SIZE; f++)
                keys[(t / CHUNK * HEAD_SIZE + f) * CHUNK + t % CHUNK] =
                    t < length ? scaling * K[t * k_strides[2] + f] : 0;
        for (long first = 0; first < length; first += BLOCK) {
            long count = length - first < BLOCK ? length - first : BLOCK, seen = first + count;
            float queries[BLOCK * HEAD_SIZE], sums[BLOCK * HEAD_SIZE], totals[BLOCK];
            for (long i = 0; i < BLOCK; i++) { /* the last block repeats its first query */
                long query = i < count ? first + i : first;
                memcpy(queries + i * HEAD_SIZE, Q + query * q_strides[2], HEAD_SIZE * sizeof *Q);
            }
            for (long start = 0; start < seen; start += CHUNK)
                multiply(queries, HEAD_SIZE, keys + start * HEAD_SIZE, CHUNK, HEAD_SIZE, scores + start, padded);
            for (long i = 0; i < BLOCK; i++)
                totals[i] = exponentials(scores + i * padded, i < count ? first + i + 1 : first + 1, seen);
            multiply(scores, padded, V, v_strides[2], seen, sums, HEAD_SIZE);
            for (long i = 0; i < count; i++) {
                float *y = out + ((b * length + first + i) * heads + h) * HEAD_SIZE;
                for (long f = 0; f < HEAD_SIZE; f++) y[f] = sums[i * HEAD_SIZE + f] / totals[i];
            }
        }
    }
}
