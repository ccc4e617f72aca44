// Computes sum = x + residual and y = sum / sqrt(mean(sum²) + epsilon) · weight, one block of 256 threads per row.
//
// The sum is rounded to SCALAR and written to its own output; the rounded sum is normalised. See rmsnorm.cuh.
// Options: -D ENTRY is the function name; the others are in elements.cuh. Not measured on a GPU yet.
#include "rmsnorm.cuh"

struct Row {
    const SCALAR* x;
    const SCALAR* residual;
    SCALAR* sum;

    template <int RUNS, int RUN>
    __device__ __forceinline__ void first(int tile, int width, SCALAR (&kept)[RUNS][RUN]) const {
        using Part = Share<THREADS, RUNS, RUN>;
        SCALAR added[RUNS][RUN];
        Part::read(x, tile, width, kept);
        Part::read(residual, tile, width, added);
#pragma unroll
        for (int k = 0; k < RUNS * RUN; ++k) {
            SCALAR& value = kept[k / RUN][k % RUN];
            value = narrow<SCALAR>(__fadd_rn(widen(value), widen(added[k / RUN][k % RUN])));
        }
        Part::write(sum, tile, width, kept);
    }
    template <int RUNS, int RUN>  // each thread reads the elements that it wrote
    __device__ __forceinline__ void again(int tile, int width, SCALAR (&kept)[RUNS][RUN]) const {
        Share<THREADS, RUNS, RUN>::read(sum, tile, width, kept);
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 2)
ENTRY(const SCALAR* __restrict__ x, const SCALAR* __restrict__ residual, const SCALAR* __restrict__ weight, int rows,
      int width, int epsilon_bits,
#if SCALE == SCALE_TENSOR
      int scale_bits,
#endif
      OUTPUT* __restrict__ y,
#if SCALE == SCALE_TOKEN
      float* __restrict__ scales,
#endif
      SCALAR* __restrict__ sum) {
    __shared__ float scratch[WARPS];
    const int row = blockIdx.x;
    if (row >= rows) return;
    const size_t start = static_cast<size_t>(row) * width;
    const bool vector = width % LANES == 0 && aligned<LANES>(x) && aligned<LANES>(residual) && aligned<LANES>(weight) &&
                        aligned<LANES>(y) && aligned<LANES>(sum);
    Norm norm{width, __int_as_float(epsilon_bits), 1.0f};
    float* token_scale = nullptr;
#if SCALE == SCALE_TENSOR
    norm.scale = __int_as_float(scale_bits);
#elif SCALE == SCALE_TOKEN
    token_scale = scales + row;
#endif
    const Row source{x + start, residual + start, sum + start};
    if (vector) normalise<true>(source, weight, norm, y + start, token_scale, scratch);
    else normalise<false>(source, weight, norm, y + start, token_scale, scratch);
}
