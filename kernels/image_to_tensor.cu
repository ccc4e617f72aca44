// Resizes 8-bit images, clips them to a window, normalises them and writes them as channels × rows × columns.
//
// blockIdx.y is the image of the batch. Without resizing, cropping and padding, and with aligned addresses, a thread
// copies 16 neighbouring pixels with accesses of 16 bytes. Otherwise it gathers: neighbouring threads compute
// neighbouring pixels, so that the stores of a warp fill whole sectors and its loads are close together; a thread goes
// on with pixels at distances of the whole grid. `_grid` of image_to_tensor.py has as many threads as there is work.
//
// Weights are integers and exact at any size. In units of 1 / (2 · resampled) source pixels, target pixel i is at
// (2i + 1) · source and source pixel p at (2p + 1) · resampled. The weight of p is `reach`, half the width of the
// triangle, minus the distance of the two. The weighted sum, its division by the sum of the weights and the
// normalisation are rounded. Sums are compensated, so the error does not grow with the number of weights;
// image_to_tensor.py derives the bound. Options: -D SCALAR=__half | float, ENTRY=name. Not measured on a GPU yet.
#include <cuda_fp16.h>

constexpr int STRIP = 16;                        // pixels of a thread
constexpr int GROUP = 16 / sizeof(SCALAR);         // pixels of a 16-byte store
constexpr int CHANNELS = 3;

struct Axis {
    int source, resampled, canvas;               // pixels
    int reach;

    __device__ int offset() const { return (canvas - resampled) >> 1; }  // rounds towards minus infinity
};

struct Taps {                                    // source pixels first … last
    int first, last, centre;

    __device__ Taps(const Axis& axis, int target) {
        const int step = 2 * axis.resampled;
        centre = (2 * target + 1) * axis.source;
        const int before = centre - axis.reach - axis.resampled;
        first = before < 0 ? 0 : before / step + 1;
        last = min((centre + axis.reach - axis.resampled - 1) / step, axis.source - 1);
    }

    __device__ int weight(const Axis& axis, int p) const {
        return axis.reach - abs((2 * p + 1) * axis.resampled - centre);
    }

    __device__ int total_weight(const Axis& axis) const {  // at most 2^29 for axes of 16384 pixels
        int total = 0;
        for (int p = first; p <= last; ++p) total += weight(axis, p);
        return total;
    }
};

// A compensated sum with two roundings: the exact rounding error of each addition (Knuth's TwoSum) is added to the next
// term.
struct Sum {
    float rounded = 0.0f, error = 0.0f;

    __device__ void add(float weight, float value) {
        const float term = __fmaf_rn(weight, value, error);
        const float next = __fadd_rn(rounded, term);
        const float added = __fsub_rn(next, rounded);
        error = __fadd_rn(__fsub_rn(rounded, __fsub_rn(next, added)), __fsub_rn(term, added));
        rounded = next;
    }
};

struct Picture {
    const unsigned char* pixels;
    int channels, row_stride, pixel_stride;      // strides in bytes
};

struct Normalization {
    float low, high, scale[CHANNELS], bias[CHANNELS];

    __device__ float above_low(unsigned char pixel) const {
        return __fsub_rn(fminf(fmaxf(static_cast<float>(pixel), low), high), low);
    }
    __device__ SCALAR apply(float value, int channel) const {
        return static_cast<SCALAR>(__fmaf_rn(value, scale[channel], bias[channel]));
    }
};

// Copy 16 pixels of SOURCE bytes each without resizing.
template <int SOURCE>
__device__ void copy(const unsigned char* from, SCALAR* to, size_t plane, const Normalization& normalization) {
    unsigned char bytes[STRIP * SOURCE];
#pragma unroll
    for (int k = 0; k < SOURCE; ++k) {
        const uint4 word = reinterpret_cast<const uint4*>(from)[k];
        memcpy(bytes + 16 * k, &word, 16);
    }
#pragma unroll
    for (int channel = 0; channel < CHANNELS; ++channel) {
#pragma unroll
        for (int start = 0; start < STRIP; start += GROUP) {
            SCALAR values[GROUP];
#pragma unroll
            for (int k = 0; k < GROUP; ++k) {
                const unsigned char pixel = bytes[(start + k) * SOURCE + channel % SOURCE];
                values[k] = normalization.apply(normalization.above_low(pixel), channel);
            }
            uint4 word;
            memcpy(&word, values, 16);
            *reinterpret_cast<uint4*>(to + channel * plane + start) = word;
        }
    }
}

// Return one pixel of the resampled image minus the lower end of the window, per channel.
__device__ void sample(
    const Picture& picture, const Axis& rows, const Axis& columns, int y, int x, const Normalization& normalization,
    float (&values)[CHANNELS]
) {
    const Taps y_taps(rows, y), x_taps(columns, x);
    Sum sums[CHANNELS];
    for (int p = y_taps.first; p <= y_taps.last; ++p) {
        const unsigned char* row = picture.pixels + static_cast<size_t>(p) * picture.row_stride;
        Sum row_sums[CHANNELS];
        for (int q = x_taps.first; q <= x_taps.last; ++q) {
            const unsigned char* pixel = row + static_cast<size_t>(q) * picture.pixel_stride;
            const float weight = static_cast<float>(x_taps.weight(columns, q));
#pragma unroll
            for (int c = 0; c < CHANNELS; ++c) {
                if (c < picture.channels) row_sums[c].add(weight, normalization.above_low(pixel[c]));
            }
        }
        const float weight = static_cast<float>(y_taps.weight(rows, p));
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) sums[c].add(weight, row_sums[c].rounded);
    }
    const long long total = static_cast<long long>(y_taps.total_weight(rows)) * x_taps.total_weight(columns);
    const float divisor = __ll2float_rn(total);
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) values[c] = __fdiv_rn(sums[c < picture.channels ? c : 0].rounded, divisor);
}

extern "C" __global__ void __launch_bounds__(128) ENTRY(
    const unsigned char* __restrict__ pixels, int batch, int height, int width, int channels, int image_stride,
    int row_stride, int pixel_stride, int resampled_height, int resampled_width, int image_height, int image_width,
    int antialias, int low_bits, int high_bits, int scale0_bits, int scale1_bits, int scale2_bits, int bias0_bits,
    int bias1_bits, int bias2_bits, SCALAR* __restrict__ tensor
) {
    const Axis rows = {
        height, resampled_height, image_height, 2 * (antialias ? max(height, resampled_height) : resampled_height)};
    const Axis columns = {
        width, resampled_width, image_width, 2 * (antialias ? max(width, resampled_width) : resampled_width)};
    const Normalization normalization = {
        __int_as_float(low_bits), __int_as_float(high_bits),
        {__int_as_float(scale0_bits), __int_as_float(scale1_bits), __int_as_float(scale2_bits)},
        {__int_as_float(bias0_bits), __int_as_float(bias1_bits), __int_as_float(bias2_bits)}};
    const Picture picture = {
        pixels + static_cast<size_t>(blockIdx.y) * image_stride, channels, row_stride, pixel_stride};
    const int plane = image_height * image_width;
    SCALAR* const to = tensor + static_cast<size_t>(blockIdx.y) * CHANNELS * plane;
    const int thread = blockIdx.x * blockDim.x + threadIdx.x;

    const bool as_it_is = height == resampled_height && height == image_height && width == resampled_width &&
                          width == image_width && pixel_stride == channels;
    const size_t addresses = reinterpret_cast<size_t>(picture.pixels) | reinterpret_cast<size_t>(to);
    if (as_it_is && (addresses | row_stride | width) % 16 == 0) {
        const int pixel = thread * STRIP;
        if (pixel >= plane) return;
        const size_t row = pixel / width, column = pixel % width;
        const unsigned char* from = picture.pixels + row * row_stride + column * pixel_stride;
        if (channels == CHANNELS) copy<CHANNELS>(from, to + pixel, plane, normalization);
        else copy<1>(from, to + pixel, plane, normalization);
        return;
    }

#pragma unroll 1
    for (int pixel = thread; pixel < plane; pixel += gridDim.x * blockDim.x) {
        const int y = pixel / image_width - rows.offset(), x = pixel % image_width - columns.offset();
        float values[CHANNELS] = {};              // padding: the lower end of the window
        if (y >= 0 && y < resampled_height && x >= 0 && x < resampled_width) {
            sample(picture, rows, columns, y, x, normalization, values);
        }
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) {
            to[static_cast<size_t>(c) * plane + pixel] = normalization.apply(values[c], c);
        }
    }
}
