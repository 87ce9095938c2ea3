/* GELU and causal attention of a CPU, each in one pass over its data; kernels.py builds and calls it.

   Conventions as in kernels.c. */

#include <math.h>
#include <omp.h>
#include <string.h>

#include "vectors.h"

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
