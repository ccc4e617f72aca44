// CUDA's words for a C++ compiler: a kernel's source compiles unchanged, and its threads are fibres of one CPU thread.
//
// The 16- and 8-bit types are NVIDIA's own headers. Functions that round exactly on a GPU do so here; the approximate
// ones (rsqrtf, __expf) are computed in double and rounded once, so they are closer to the truth than on any GPU.
// A name that is not here is a compile error, never a guess.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <vector_functions.h>

#include "fibres.h"

#undef __launch_bounds__
#undef __shared__
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("block_shared")))  // blocks run one after another

#define threadIdx (fibres::thread_index)
#define blockIdx (fibres::block_index)
#define blockDim (fibres::block_size)
#define gridDim (fibres::grid_size)

#define __syncthreads() fibres::block_barrier(__FILE__, __LINE__)
#define __syncwarp(...) fibres::warp_barrier(__FILE__, __LINE__ __VA_OPT__(, ) __VA_ARGS__)
#define __shfl_sync(...) fibres::shuffle(__FILE__, __LINE__, fibres::Move::index, __VA_ARGS__)
#define __shfl_xor_sync(...) fibres::shuffle(__FILE__, __LINE__, fibres::Move::exclusive_or, __VA_ARGS__)
#define __shfl_down_sync(...) fibres::shuffle(__FILE__, __LINE__, fibres::Move::down, __VA_ARGS__)
#define __shfl_up_sync(...) fibres::shuffle(__FILE__, __LINE__, fibres::Move::up, __VA_ARGS__)

namespace cuda_host {

template <class To, class From>
To bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

// cvt.rni.s32.f32: half to even, saturating, NaN becomes 0.
inline int to_int(float value) {
    if (std::isnan(value)) return 0;
    if (value >= 2147483648.0f) return INT32_MAX;
    if (value < -2147483648.0f) return INT32_MIN;
    return static_cast<int>(std::nearbyint(value));
}

}  // namespace cuda_host

inline float __int_as_float(int value) { return cuda_host::bits<float>(value); }
inline float __uint_as_float(unsigned value) { return cuda_host::bits<float>(value); }
inline int __float_as_int(float value) { return cuda_host::bits<int>(value); }
inline unsigned __float_as_uint(float value) { return cuda_host::bits<unsigned>(value); }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline int __float2int_rn(float a) { return cuda_host::to_int(a); }
inline float __int2float_rn(int a) { return static_cast<float>(a); }

inline float __ll2float_rn(long long a) { return static_cast<float>(a); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }

inline float rsqrtf(float a) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(a))); }
inline float __expf(float a) { return static_cast<float>(std::exp(static_cast<double>(a))); }

template <class T> T __ldg(const T* address) { return *address; }
template <class T> T min(T a, T b) { return b < a ? b : a; }
template <class T> T max(T a, T b) { return a < b ? b : a; }
