// Element types of the row kernels, their conversions, and vector loads and stores.
//
// -D SCALAR=__half | __nv_bfloat16 | float            type of the floating inputs
// -D OUTPUT=SCALAR | int8 | __nv_fp8_e4m3             type of the output; __nv_fp8_e4m3 needs -D WITH_FP8=1
// -D SCALE=SCALE_NONE | SCALE_TENSOR | SCALE_TOKEN    scale of OUTPUT: none, one for the tensor, one per row
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#ifdef WITH_FP8
#include <cuda_fp8.h>
#endif

#define SCALE_NONE 0
#define SCALE_TENSOR 1
#define SCALE_TOKEN 2

using int8 = signed char;

constexpr int LANES = 16 / sizeof(SCALAR);  // elements of a 16-byte access

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

// Round to nearest, ties to even.
template <typename T>
__device__ __forceinline__ T narrow(float value);
template <>
__device__ __forceinline__ float narrow<float>(float value) { return value; }
template <>
__device__ __forceinline__ __half narrow<__half>(float value) { return __float2half_rn(value); }
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float value) { return __float2bfloat16_rn(value); }
template <>
__device__ __forceinline__ int8 narrow<int8>(float value) {  // saturates; NaN becomes 0
    return static_cast<int8>(min(max(__float2int_rn(value), -128), 127));
}
#ifdef WITH_FP8
template <>
__device__ __forceinline__ __nv_fp8_e4m3 narrow<__nv_fp8_e4m3>(float value) {  // saturates; NaN stays NaN
    __nv_fp8_e4m3 result;
    result.__x = __nv_cvt_float_to_fp8(value, __NV_SATFINITE, __NV_E4M3);
    return result;
}
#endif

template <int BYTES>
struct Word;
template <>
struct Word<16> { using Type = uint4; };
template <>
struct Word<8> { using Type = uint2; };
template <>
struct Word<4> { using Type = unsigned; };
template <>
struct Word<2> { using Type = unsigned short; };
template <>
struct Word<1> { using Type = unsigned char; };

// Return whether `pointer` is aligned for accesses of RUN elements.
template <int RUN, typename T>
__device__ __forceinline__ bool aligned(const T* pointer) {
    return reinterpret_cast<size_t>(pointer) % (RUN * sizeof(T)) == 0;
}

// Move COUNT neighbouring elements, RUN per access.
template <int RUN, int COUNT, typename T>
__device__ __forceinline__ void load(const T* from, T (&values)[COUNT]) {
    using Type = typename Word<RUN * sizeof(T)>::Type;
#pragma unroll
    for (int k = 0; k < COUNT; k += RUN) {
        const Type word = *reinterpret_cast<const Type*>(from + k);
        memcpy(values + k, &word, sizeof(Type));
    }
}

template <int RUN, int COUNT, typename T>
__device__ __forceinline__ void store(T* to, const T (&values)[COUNT]) {
    using Type = typename Word<RUN * sizeof(T)>::Type;
#pragma unroll
    for (int k = 0; k < COUNT; k += RUN) {
        Type word;
        if constexpr (sizeof(T) == 1 && RUN % 4 == 0) {  // with memcpy, NVRTC for sm_120 reads bytes before they are set
            unsigned parts[RUN / 4] = {};
#pragma unroll
            for (int j = 0; j < RUN; ++j) {
                parts[j / 4] |= static_cast<unsigned>(reinterpret_cast<const unsigned char&>(values[k + j])) << 8 * (j % 4);
            }
            memcpy(&word, parts, sizeof(Type));
        } else {
            memcpy(&word, values + k, sizeof(Type));
        }
        *reinterpret_cast<Type*>(to + k) = word;
    }
}

// A thread's share of one tile of a row: RUNS runs of RUN neighbouring elements; the runs of a block are adjacent. All
// loads are issued first; elements beyond the end of the row are 0.
template <int THREADS, int RUNS, int RUN>
struct Share {
    static __device__ __forceinline__ int column(int tile, int run) { return tile + (run * THREADS + threadIdx.x) * RUN; }

    template <typename T>
    static __device__ __forceinline__ void read(const T* row, int tile, int width, T (&values)[RUNS][RUN]) {
#pragma unroll
        for (int r = 0; r < RUNS; ++r) {
            if (column(tile, r) < width) {
                load<RUN>(row + column(tile, r), values[r]);
            } else {
#pragma unroll
                for (int k = 0; k < RUN; ++k) values[r][k] = T{};
            }
        }
    }

    template <typename T>
    static __device__ __forceinline__ void write(T* row, int tile, int width, const T (&values)[RUNS][RUN]) {
#pragma unroll
        for (int r = 0; r < RUNS; ++r) {
            if (column(tile, r) < width) store<RUN>(row + column(tile, r), values[r]);
        }
    }
};
