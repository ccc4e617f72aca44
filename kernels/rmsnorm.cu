// Computes y = x / sqrt(mean(x²) + epsilon) · weight per row, one block of 256 threads per row; see rmsnorm.cuh.
//
// Options: -D ENTRY is the function name; the others are in elements.cuh. Not measured on a GPU yet.
#include "rmsnorm.cuh"

struct Row {
    const SCALAR* x;

    template <int RUNS, int RUN>
    __device__ __forceinline__ void first(int tile, int width, SCALAR (&kept)[RUNS][RUN]) const {
        Share<THREADS, RUNS, RUN>::read(x, tile, width, kept);
    }
    template <int RUNS, int RUN>
    __device__ __forceinline__ void again(int tile, int width, SCALAR (&kept)[RUNS][RUN]) const {
        first(tile, width, kept);
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 2)
ENTRY(const SCALAR* __restrict__ x, const SCALAR* __restrict__ weight, int rows, int width, int epsilon_bits,
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
    const bool vector = width % LANES == 0 && aligned<LANES>(x) && aligned<LANES>(weight) && aligned<LANES>(y);
    Norm norm{width, __int_as_float(epsilon_bits), 1.0f};
    float* token_scale = nullptr;
#if SCALE == SCALE_TENSOR
    norm.scale = __int_as_float(scale_bits);
#elif SCALE == SCALE_TOKEN
    token_scale = scales + row;
#endif
    const Row source{x + start};
    if (vector) normalise<true>(source, weight, norm, y + start, token_scale, scratch);
    else normalise<false>(source, weight, norm, y + start, token_scale, scratch);
}
