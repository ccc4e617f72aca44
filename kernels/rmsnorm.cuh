// Normalisation of one row by a block of 256 threads, for rmsnorm.cu and add_rmsnorm.cu.
//
// An aligned row whose length is a multiple of 16 bytes uses accesses of 16 bytes (VECTOR). A thread keeps up to 32
// elements in registers, so rows of up to 8192 columns are read once; wider rows are read again. Any other row uses one
// element per access and is read again beyond 1024 columns.
// The order of roundings is LLaMA's, see rmsnorm.py. All arithmetic is IEEE float32, rounded to nearest.
#pragma once
#include "elements.cuh"
#include "reduce.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;

struct Norm {
    int width;
    float epsilon;
    float scale;  // of SCALE_TENSOR
};

// One element of the result, before division by the scale and rounding to OUTPUT.
__device__ __forceinline__ float normalised(SCALAR value, SCALAR weight, float inverse_rms) {
    float result = __fmul_rn(widen(value), inverse_rms);
#if SCALE == SCALE_NONE
    result = widen(narrow<SCALAR>(result));
#endif
    return __fmul_rn(result, widen(weight));
}

// Normalise a row. ROW reads a tile of its elements: `first(tile, width, kept)`, then `again(…)` for wide rows.
template <bool VECTOR, typename ROW>
__device__ __forceinline__ void normalise(const ROW& row, const SCALAR* weight, const Norm& norm, OUTPUT* y,
                                          float* token_scale, float* scratch) {
    constexpr int RUN = VECTOR ? LANES : 1;
    constexpr int SHARE = VECTOR ? 32 : 4;  // elements of a row in a thread's registers
    constexpr int TILE = THREADS * SHARE;
    constexpr int RUNS = SHARE / RUN;
    using Part = Share<THREADS, RUNS, RUN>;
    const int width = norm.width;
    const bool wide = width > TILE;
    SCALAR kept[RUNS][RUN], weights[RUNS][RUN];
    if (!wide) Part::read(weight, 0, width, weights);  // loads overlap with the sum

    float squares[4] = {};  // four partial sums have a smaller rounding error than one
    for (int tile = 0; tile < width; tile += TILE) {
        row.first(tile, width, kept);
#pragma unroll
        for (int k = 0; k < SHARE; ++k) {
            const float value = widen(kept[k / RUN][k % RUN]);
            squares[k % 4] = __fmaf_rn(value, value, squares[k % 4]);
        }
    }
    const float own = __fadd_rn(__fadd_rn(squares[0], squares[1]), __fadd_rn(squares[2], squares[3]));
    const float mean = __fdiv_rn(block_sum<WARPS>(own, scratch), static_cast<float>(width));
    const float inverse_rms = __frcp_rn(__fsqrt_rn(__fadd_rn(mean, norm.epsilon)));

    float scale = norm.scale;
#if SCALE == SCALE_TOKEN
    float largest = 0.0f;
    for (int tile = 0; tile < width; tile += TILE) {
        if (wide) {
            row.again(tile, width, kept);
            Part::read(weight, tile, width, weights);
        }
#pragma unroll
        for (int k = 0; k < SHARE; ++k) {
            largest = max_magnitude(largest, normalised(kept[k / RUN][k % RUN], weights[k / RUN][k % RUN], inverse_rms));
        }
    }
    scale = __fdiv_rn(block_max_magnitude<WARPS>(largest, scratch), 127.0f);
    if (threadIdx.x == 0) *token_scale = scale;
#endif

    for (int tile = 0; tile < width; tile += TILE) {
        if (wide) {
            row.again(tile, width, kept);
            Part::read(weight, tile, width, weights);
        }
        OUTPUT results[RUNS][RUN];
#pragma unroll
        for (int k = 0; k < SHARE; ++k) {
            const float result = normalised(kept[k / RUN][k % RUN], weights[k / RUN][k % RUN], inverse_rms);
#if SCALE == SCALE_NONE
            results[k / RUN][k % RUN] = narrow<OUTPUT>(result);
#else
            results[k / RUN][k % RUN] = narrow<OUTPUT>(__fdiv_rn(result, scale));
#endif
        }
        Part::write(y, tile, width, results);
    }
}
