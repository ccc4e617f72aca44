// Rotary position embedding of q and k, read from the fused row [q | k | v] of a token; one block of 128 threads per
// token. Inputs are in token order, outputs in head order, (batch, heads, tokens, head_dim), as attention expects. The
// transpose adds no memory traffic, because the columns of a head are contiguous in both.
//
// The block writes cosines and sines of the token to shared memory, a chunk of pairs at a time. Every thread then
// rotates the same neighbouring pairs in each of its heads. Half-split layout pairs column i with i + head_dim / 2: two
// accesses of 16 bytes. Interleaved layout pairs 2i with 2i + 1: one access. If the head size is not a multiple of
// these accesses, or the address is not aligned, a thread moves one pair of single elements. v is copied on request.
// All arithmetic is IEEE float32, rounded to nearest; only the result is rounded to SCALAR.
//
// Angles: ANGLES_TABLE reads cosine and sine of (position, pair). ANGLES_FREQUENCY reads, per pair, the fraction of a
// full rotation per position, as a 64-bit integer; its product with the position modulo 2^64 is an exact range reduction
// for every position below 2^31.
// Options: -D ENTRY is the function name, SCALAR=__half | __nv_bfloat16 | float, LAYOUT=LAYOUT_HALF | LAYOUT_INTERLEAVED,
// ANGLES=ANGLES_TABLE | ANGLES_FREQUENCY. Not measured on a GPU yet.
#include "elements.cuh"

#define LAYOUT_HALF 0
#define LAYOUT_INTERLEAVED 1
#define ANGLES_TABLE 0
#define ANGLES_FREQUENCY 1

constexpr int THREADS = 128;
constexpr int CHUNK = 256;  // pairs whose angles are in shared memory at once: heads of up to 512 columns need one chunk

struct Heads {
    int query, key, value;  // numbers of heads; value: those that are copied
    int dim;
};

// Cosine and sine of the angle 2 pi · `fraction` · 2^-64, within 2 ulps: reduction to the nearest multiple of pi/2, then
// the polynomials of Cephes (Moshier, sinf.c) on a remainder of at most pi/4. The remainder is an exact integer, so
// values near 0 are as accurate, in ulps, as others; its upper 24 bits times 2 pi are computed exactly as a sum of two
// floats.
__device__ __forceinline__ void turn(unsigned long long fraction, float& cosine, float& sine) {
    const unsigned quarter = static_cast<unsigned>((fraction + (1ull << 61)) >> 62);
    const long long rest = static_cast<long long>(fraction - (static_cast<unsigned long long>(quarter) << 62));
    const float upper = __int2float_rn(static_cast<int>(rest >> 38));
    const float lower = __ll2float_rn(rest & ((1ll << 38) - 1));
    const float product = __fmul_rn(upper, 0x1.921fb6p-24f);  // 2 pi · 2^-26, in two parts
    const float remainder = __fmaf_rn(upper, 0x1.921fb6p-24f, -product);
    const float tail = __fmaf_rn(lower, 0x1.921fb6p-62f, __fmaf_rn(upper, -0x1.777a5cp-49f, remainder));
    const float x = __fadd_rn(product, tail);
    const float square = __fmul_rn(x, x);
    float s = __fmaf_rn(-1.9515295891e-4f, square, 8.3321608736e-3f);
    s = __fmaf_rn(s, square, -1.6666654611e-1f);
    s = __fmaf_rn(__fmul_rn(s, square), x, x);
    float c = __fmaf_rn(2.443315711809948e-5f, square, -1.388731625493765e-3f);
    c = __fmaf_rn(c, square, 4.166664568298827e-2f);
    c = __fmaf_rn(__fmul_rn(square, square), c, __fmaf_rn(square, -0.5f, 1.0f));
    const bool swapped = quarter & 1;
    cosine = swapped ? s : c;
    sine = swapped ? c : s;
    if ((quarter + 1) & 2) cosine = -cosine;
    if (quarter & 2) sine = -sine;
}

struct Angles {
#if ANGLES == ANGLES_TABLE
    const float* cosine;
    const float* sine;
#else
    const int* frequencies;  // the upper half of every pair's fraction, then the lower halves
#endif
    int position;

    __device__ __forceinline__ void fetch(int half, int pair, float& cosines, float& sines) const {
#if ANGLES == ANGLES_TABLE
        const size_t place = static_cast<size_t>(position) * half + pair;
        cosines = cosine[place];
        sines = sine[place];
#else
        const unsigned long long upper = static_cast<unsigned>(frequencies[pair]);
        const unsigned lower = static_cast<unsigned>(frequencies[half + pair]);
        turn(static_cast<unsigned>(position) * (upper << 32 | lower), cosines, sines);
#endif
    }
};

// Access pattern of a thread in a head: PAIRS pairs at once, RUN elements and ANGLE_RUN angles per access.
template <bool VECTOR>
struct Access {
    static constexpr int RUN = VECTOR ? LANES : 1;
    static constexpr int PAIRS = !VECTOR ? 1 : LAYOUT == LAYOUT_HALF ? LANES : LANES / 2;
    static constexpr int ANGLE_RUN = !VECTOR ? 1 : PAIRS < 4 ? PAIRS : 4;
};

// Move PAIRS pairs of a head, starting at `pair`, and rotate them if TURN.
template <int RUN, bool TURN, int PAIRS>
__device__ __forceinline__ void move(const SCALAR* from, SCALAR* to, int half, int pair, const float (&cosines)[PAIRS],
                                     const float (&sines)[PAIRS]) {
    SCALAR both[2 * PAIRS];  // half-split: the first column of every pair, then the second
#if LAYOUT == LAYOUT_HALF
    SCALAR(&first)[PAIRS] = reinterpret_cast<SCALAR(&)[PAIRS]>(both[0]);
    SCALAR(&second)[PAIRS] = reinterpret_cast<SCALAR(&)[PAIRS]>(both[PAIRS]);
    load<RUN>(from + pair, first);
    load<RUN>(from + half + pair, second);
    constexpr int STEP = 1, PARTNER = PAIRS;
#else
    load<RUN>(from + 2 * pair, both);
    constexpr int STEP = 2, PARTNER = 1;
#endif
    if (TURN) {
#pragma unroll
        for (int k = 0; k < PAIRS; ++k) {
            SCALAR& a = both[STEP * k];
            SCALAR& b = both[STEP * k + PARTNER];
            const float x = widen(a), y = widen(b);
            a = narrow<SCALAR>(__fmaf_rn(x, cosines[k], -__fmul_rn(y, sines[k])));
            b = narrow<SCALAR>(__fmaf_rn(y, cosines[k], __fmul_rn(x, sines[k])));
        }
    }
#if LAYOUT == LAYOUT_HALF
    store<RUN>(to + pair, first);
    store<RUN>(to + half + pair, second);
#else
    store<RUN>(to + 2 * pair, both);
#endif
}

// `stride` is the distance of two heads in the outputs: tokens · head_dim.
template <bool VECTOR>
__device__ __forceinline__ void rotate_token(const SCALAR* qkv, const Angles& angles, const Heads& heads, size_t stride,
                                             SCALAR* q, SCALAR* k, SCALAR* v, float* all_cosines, float* all_sines) {
    constexpr int RUN = Access<VECTOR>::RUN;
    constexpr int PAIRS = Access<VECTOR>::PAIRS;
    const int half = heads.dim / 2;
    for (int chunk = 0; chunk < half; chunk += CHUNK) {
        const int pairs = min(half - chunk, CHUNK);
        for (int pair = threadIdx.x; pair < pairs; pair += THREADS) {
            angles.fetch(half, chunk + pair, all_cosines[pair], all_sines[pair]);
        }
        __syncthreads();
        const int places = pairs / PAIRS;  // runs of pairs in this part of a head
        const int lanes = min(places, THREADS);
        const int groups = THREADS / lanes;  // heads that the block processes at once
        const int group = threadIdx.x / lanes;
        for (int place = threadIdx.x % lanes; group < groups && place < places; place += lanes) {
            const int pair = place * PAIRS;
            float cosines[PAIRS], sines[PAIRS];
            load<Access<VECTOR>::ANGLE_RUN>(all_cosines + pair, cosines);
            load<Access<VECTOR>::ANGLE_RUN>(all_sines + pair, sines);
            for (int head = group; head < heads.query + heads.key + heads.value; head += groups) {
                const SCALAR* from = qkv + head * heads.dim;
                const int key = head - heads.query, value = key - heads.key;
                if (key < 0) move<RUN, true>(from, q + head * stride, half, chunk + pair, cosines, sines);
                else if (value < 0) move<RUN, true>(from, k + key * stride, half, chunk + pair, cosines, sines);
                else move<RUN, false>(from, v + value * stride, half, chunk + pair, cosines, sines);
            }
        }
        __syncthreads();  // before the next chunk's angles
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
ENTRY(const SCALAR* __restrict__ qkv,
#if ANGLES == ANGLES_TABLE
      const float* __restrict__ cos, const float* __restrict__ sin,
#else
      const int* __restrict__ frequencies,
#endif
      int batch, int tokens, int first_position, int num_heads, int num_kv_heads, int head_dim, int copy_values,
      SCALAR* __restrict__ q, SCALAR* __restrict__ k, SCALAR* __restrict__ v) {
    alignas(16) __shared__ float cosines[CHUNK];
    alignas(16) __shared__ float sines[CHUNK];
    const int item = blockIdx.x / tokens, token = blockIdx.x % tokens;
    if (item >= batch) return;
    const Heads heads{num_heads, num_kv_heads, copy_values ? num_kv_heads : 0, head_dim};
    const int position = first_position + token;
    const bool vector = head_dim % (2 * Access<true>::PAIRS) == 0 && aligned<LANES>(qkv) && aligned<LANES>(q) &&
                        aligned<LANES>(k) && (!copy_values || aligned<LANES>(v));
#if ANGLES == ANGLES_TABLE
    const Angles angles{cos, sin, position};
#else
    const Angles angles{frequencies, position};
#endif
    const size_t stride = static_cast<size_t>(tokens) * head_dim;
    const size_t place = static_cast<size_t>(token) * head_dim;
    const SCALAR* from = qkv + static_cast<size_t>(blockIdx.x) * (num_heads + 2 * num_kv_heads) * head_dim;
    SCALAR* query = q + item * num_heads * stride + place;
    SCALAR* key = k + item * num_kv_heads * stride + place;
    SCALAR* value = copy_values ? v + item * num_kv_heads * stride + place : v;
    if (vector) rotate_token<true>(from, angles, heads, stride, query, key, value, cosines, sines);
    else rotate_token<false>(from, angles, heads, stride, query, key, value, cosines, sines);
}
