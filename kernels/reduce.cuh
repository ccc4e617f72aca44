// Sums and maxima over a warp and over a block of WARPS full warps.
//
// Every thread gets the result. The order of additions is fixed, so the result of a row is the same in every run and at
// every position in the batch.
#pragma once

constexpr unsigned WHOLE_WARP = 0xffffffffu;

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
        value = __fadd_rn(value, __shfl_xor_sync(WHOLE_WARP, value, distance));
    }
    return value;
}

__device__ __forceinline__ unsigned warp_max(unsigned value) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
        value = max(value, __shfl_xor_sync(WHOLE_WARP, value, distance));
    }
    return value;
}

// `scratch` holds WARPS elements of shared memory and may be reused as soon as this returns.
template <int WARPS>
__device__ __forceinline__ float block_sum(float value, float* scratch) {
    value = warp_sum(value);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    __syncthreads();
    float total = scratch[0];
#pragma unroll
    for (int warp = 1; warp < WARPS; ++warp) total = __fadd_rn(total, scratch[warp]);
    __syncthreads();
    return total;
}

// The largest magnitude in a block. The bits of magnitudes, compared as integers, sort like the numbers, with NaN above
// infinity, so a NaN is propagated; fmaxf would drop it.
template <int WARPS>
__device__ __forceinline__ float block_max_magnitude(float value, float* scratch) {
    const unsigned bits = warp_max(__float_as_uint(value) & 0x7fffffffu);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = __uint_as_float(bits);
    __syncthreads();
    unsigned largest = __float_as_uint(scratch[0]);
#pragma unroll
    for (int warp = 1; warp < WARPS; ++warp) largest = max(largest, __float_as_uint(scratch[warp]));
    __syncthreads();
    return __uint_as_float(largest);
}

__device__ __forceinline__ float max_magnitude(float first, float second) {
    return __uint_as_float(max(__float_as_uint(first) & 0x7fffffffu, __float_as_uint(second) & 0x7fffffffu));
}
