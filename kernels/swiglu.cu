// Computes y = gate / (1 + exp(-gate)) · up for every row of [gate | up], one block of 256 threads per row.
//
// Without a scale per row, a thread loads 16 bytes of gate and of up and stores the result. With a scale per row, it
// keeps up to 48 results, so rows of up to 12288 columns (LLaMA-7B has 11008) are read once; wider rows are read again.
// A row that is not aligned, or whose length is not a multiple of 16 bytes, uses one element per access and is read
// again beyond 1024 columns. All arithmetic is IEEE float32, rounded to nearest, without approximate instructions, so a
// CPU computes the same bits.
// Options: -D ENTRY is the function name; the others are in elements.cuh. Not measured on a GPU yet.
#include "elements.cuh"
#include "reduce.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr float SMALLEST_GATE = -173.0f;  // below it exp(gate / 2) is subnormal; gate counts as -0

// exp(x) for -86.5 <= x <= 0, to 0.9 ulp: 2^n · exp(r) with |r| <= ln(2)/2 and a minimax polynomial of degree 6.
__device__ __forceinline__ float exponential(float x) {
    constexpr float ROUNDER = 12582912.0f;  // 1.5 · 2^23: adding it rounds to an integer in the low bits
    const float shifted = __fmaf_rn(x, 1.44269504f, ROUNDER);
    const float n = __fsub_rn(shifted, ROUNDER);
    float r = __fmaf_rn(n, -0x1.62e400p-1f, x);  // ln(2) in two parts; n times the first is exact
    r = __fmaf_rn(n, -0x1.7f7d1cp-20f, r);
    float power = 0x1.6a2352p-10f;
    power = __fmaf_rn(power, r, 0x1.123a6cp-7f);
    power = __fmaf_rn(power, r, 0x1.5558f4p-5f);
    power = __fmaf_rn(power, r, 0x1.555490p-3f);
    power = __fmaf_rn(power, r, 0x1.fffffcp-2f);
    power = __fmaf_rn(power, r, 1.0f);
    power = __fmaf_rn(power, r, 1.0f);
    return __uint_as_float(__float_as_uint(power) + (__float_as_uint(shifted) << 23));
}

// With h = exp(-|gate| / 2): gate · up / (1 + h²), times h² for negative gates. Each factor is multiplied by h once, so
// that neither overflows or underflows before the product does.
__device__ __forceinline__ float silu_times(float gate, float up) {
    const float magnitude = fabsf(gate);
    const float half = magnitude > -SMALLEST_GATE ? 0.0f : exponential(__fmul_rn(magnitude, -0.5f));
    const float inverse = __frcp_rn(__fmaf_rn(half, half, 1.0f));
    const float share = gate < 0.0f ? half : 1.0f;
    return __fmul_rn(__fmul_rn(__fmul_rn(gate, share), inverse), __fmul_rn(up, share));
}

template <int RUN>
__device__ __forceinline__ void compute(const SCALAR* gate, const SCALAR* up, float (&results)[RUN]) {
    SCALAR gates[RUN], ups[RUN];
    load<RUN>(gate, gates);
    load<RUN>(up, ups);
#pragma unroll
    for (int k = 0; k < RUN; ++k) results[k] = silu_times(widen(gates[k]), widen(ups[k]));
}

template <int RUN>
__device__ __forceinline__ void write(OUTPUT* y, const float (&results)[RUN], float scale) {
    OUTPUT rounded[RUN];
#pragma unroll
    for (int k = 0; k < RUN; ++k) {
#if SCALE == SCALE_NONE
        rounded[k] = narrow<OUTPUT>(results[k]);
#else
        rounded[k] = narrow<OUTPUT>(__fdiv_rn(results[k], scale));
#endif
    }
    store<RUN>(y, rounded);
}

// A row with a given scale.
template <bool VECTOR>
__device__ __forceinline__ void stream(const SCALAR* gate, const SCALAR* up, int width, float scale, OUTPUT* y) {
    constexpr int RUN = VECTOR ? LANES : 1;
#pragma unroll 2
    for (int column = threadIdx.x * RUN; column < width; column += THREADS * RUN) {
        float results[RUN];
        compute(gate + column, up + column, results);
        write(y + column, results, scale);
    }
}

// A row with the scale that maps its largest magnitude to 127.
template <bool VECTOR>
__device__ __forceinline__ void rescale(const SCALAR* gate, const SCALAR* up, int width, OUTPUT* y, float* token_scale,
                                        float* scratch) {
    constexpr int RUN = VECTOR ? LANES : 1;
    constexpr int SHARE = VECTOR ? 48 : 4;  // results of a row in a thread's registers
    constexpr int TILE = THREADS * SHARE;
    constexpr int RUNS = SHARE / RUN;
    float kept[RUNS][RUN];
    float largest = 0.0f;
    for (int tile = 0; tile < width; tile += TILE) {
#pragma unroll
        for (int r = 0; r < RUNS; ++r) {
            const int column = tile + (r * THREADS + threadIdx.x) * RUN;
            if (column < width) {
                compute(gate + column, up + column, kept[r]);
#pragma unroll
                for (int k = 0; k < RUN; ++k) largest = max_magnitude(largest, kept[r][k]);
            }
        }
    }
    const float scale = __fdiv_rn(block_max_magnitude<WARPS>(largest, scratch), 127.0f);
    if (threadIdx.x == 0) *token_scale = scale;
    for (int tile = 0; tile < width; tile += TILE) {
#pragma unroll
        for (int r = 0; r < RUNS; ++r) {
            const int column = tile + (r * THREADS + threadIdx.x) * RUN;
            if (column < width) {
                if (width > TILE) compute(gate + column, up + column, kept[r]);
                write(y + column, kept[r], scale);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
ENTRY(const SCALAR* __restrict__ gate_up, int rows, int width,
#if SCALE == SCALE_TENSOR
      int scale_bits,
#endif
      OUTPUT* __restrict__ y
#if SCALE == SCALE_TOKEN
      , float* __restrict__ scales
#endif
) {
    const int row = blockIdx.x;
    if (row >= rows) return;
    const SCALAR* gate = gate_up + static_cast<size_t>(row) * 2 * width;
    const SCALAR* up = gate + width;
    OUTPUT* out = y + static_cast<size_t>(row) * width;
    const bool vector = width % LANES == 0 && aligned<LANES>(gate_up) && aligned<LANES>(y);
#if SCALE == SCALE_TOKEN
    __shared__ float scratch[WARPS];
    if (vector) rescale<true>(gate, up, width, out, scales + row, scratch);
    else rescale<false>(gate, up, width, out, scales + row, scratch);
#else
#if SCALE == SCALE_TENSOR
    const float scale = __int_as_float(scale_bits);
#else
    const float scale = 1.0f;
#endif
    if (vector) stream<true>(gate, up, width, scale, out);
    else stream<false>(gate, up, width, scale, out);
#endif
}
