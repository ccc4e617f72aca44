// Computes y = int8(((x - mean) / sqrt(variance + epsilon) · weight + bias) / scale), one block of 128 threads per row.
//
// The variance is the mean of the squared differences from the mean, computed from registers in a second pass without
// rounding to SCALAR. An aligned row whose length is a multiple of 16 bytes uses accesses of 16 bytes (VECTOR). A thread
// keeps up to 32 elements in registers, so rows of up to 4096 columns (ViT-B/16 has 768) are read once; wider rows are
// read again. Any other row uses one element per access and is read again beyond 512 columns.
// All arithmetic is IEEE float32, rounded to nearest.
// Options: -D ENTRY is the function name; the others are in elements.cuh. Not measured on a GPU yet.
#include "elements.cuh"
#include "reduce.cuh"

constexpr int THREADS = 128;
constexpr int WARPS = THREADS / 32;

struct Norm {
    int width;
    float epsilon;
    float scale;  // of SCALE_TENSOR
};

struct Moments {
    float mean, inverse_deviation;
};

__device__ __forceinline__ float normalised(SCALAR value, SCALAR weight, SCALAR bias, const Moments& moments) {
    const float centred = __fsub_rn(widen(value), moments.mean);
    return __fmaf_rn(__fmul_rn(centred, moments.inverse_deviation), widen(weight), widen(bias));
}

template <bool VECTOR>
__device__ __forceinline__ void normalise(const SCALAR* x, const SCALAR* weight, const SCALAR* bias, const Norm& norm,
                                          OUTPUT* y, float* token_scale, float* scratch) {
    constexpr int RUN = VECTOR ? LANES : 1;
    constexpr int SHARE = VECTOR ? 32 : 4;  // elements of a row in a thread's registers
    constexpr int TILE = THREADS * SHARE;
    constexpr int RUNS = SHARE / RUN;
    using Part = Share<THREADS, RUNS, RUN>;
    const int width = norm.width;
    const bool wide = width > TILE;
    SCALAR kept[RUNS][RUN], weights[RUNS][RUN], biases[RUNS][RUN];
    if (!wide) {  // all loads are issued before the first use
        Part::read(x, 0, width, kept);
        Part::read(weight, 0, width, weights);
        Part::read(bias, 0, width, biases);
    }
    Moments moments;

    float sums[4] = {};  // four partial sums have a smaller rounding error than one
    for (int tile = 0; tile < width; tile += TILE) {
        if (wide) Part::read(x, tile, width, kept);
#pragma unroll
        for (int k = 0; k < SHARE; ++k) sums[k % 4] = __fadd_rn(sums[k % 4], widen(kept[k / RUN][k % RUN]));
    }
    const float own_sum = __fadd_rn(__fadd_rn(sums[0], sums[1]), __fadd_rn(sums[2], sums[3]));
    moments.mean = __fdiv_rn(block_sum<WARPS>(own_sum, scratch), static_cast<float>(width));

    float squares[4] = {};
    for (int tile = 0; tile < width; tile += TILE) {
        if (wide) Part::read(x, tile, width, kept);
#pragma unroll
        for (int k = 0; k < SHARE; ++k) {
            const float centred = __fsub_rn(widen(kept[k / RUN][k % RUN]), moments.mean);
            const bool inside = Part::column(tile, k / RUN) < width;
            squares[k % 4] = inside ? __fmaf_rn(centred, centred, squares[k % 4]) : squares[k % 4];
        }
    }
    const float own_squares = __fadd_rn(__fadd_rn(squares[0], squares[1]), __fadd_rn(squares[2], squares[3]));
    const float variance = __fdiv_rn(block_sum<WARPS>(own_squares, scratch), static_cast<float>(width));
    moments.inverse_deviation = __frcp_rn(__fsqrt_rn(__fadd_rn(variance, norm.epsilon)));

    float scale = norm.scale;
#if SCALE == SCALE_TOKEN
    float largest = 0.0f;
    for (int tile = 0; tile < width; tile += TILE) {
        if (wide) {
            Part::read(x, tile, width, kept);
            Part::read(weight, tile, width, weights);
            Part::read(bias, tile, width, biases);
        }
#pragma unroll
        for (int k = 0; k < SHARE; ++k) {  // beyond the end of the row, weight, bias and result are 0
            largest = max_magnitude(largest, normalised(kept[k / RUN][k % RUN], weights[k / RUN][k % RUN],
                                                        biases[k / RUN][k % RUN], moments));
        }
    }
    scale = __fdiv_rn(block_max_magnitude<WARPS>(largest, scratch), 127.0f);
    if (threadIdx.x == 0) *token_scale = scale;
#endif

    for (int tile = 0; tile < width; tile += TILE) {
        if (wide) {
            Part::read(x, tile, width, kept);
            Part::read(weight, tile, width, weights);
            Part::read(bias, tile, width, biases);
        }
        OUTPUT results[RUNS][RUN];
#pragma unroll
        for (int k = 0; k < SHARE; ++k) {
            const float result = normalised(kept[k / RUN][k % RUN], weights[k / RUN][k % RUN], biases[k / RUN][k % RUN],
                                            moments);
            results[k / RUN][k % RUN] = narrow<OUTPUT>(__fdiv_rn(result, scale));
        }
        Part::write(y, tile, width, results);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 3)
ENTRY(const SCALAR* __restrict__ x, const SCALAR* __restrict__ weight, const SCALAR* __restrict__ bias, int rows,
      int width, int epsilon_bits,
#if SCALE == SCALE_TENSOR
      int scale_bits,
#endif
      OUTPUT* __restrict__ y
#if SCALE == SCALE_TOKEN
      , float* __restrict__ scales
#endif
) {
    __shared__ float scratch[WARPS];
    const int row = blockIdx.x;
    if (row >= rows) return;
    const size_t start = static_cast<size_t>(row) * width;
    const bool vector = width % LANES == 0 && aligned<LANES>(x) && aligned<LANES>(weight) && aligned<LANES>(bias) &&
                        aligned<LANES>(y);
    Norm norm{width, __int_as_float(epsilon_bits), 1.0f};
    float* token_scale = nullptr;
#if SCALE == SCALE_TENSOR
    norm.scale = __int_as_float(scale_bits);
#else
    token_scale = scales + row;
#endif
    if (vector) normalise<true>(x + start, weight, bias, norm, y + start, token_scale, scratch);
    else normalise<false>(x + start, weight, bias, norm, y + start, token_scale, scratch);
}
