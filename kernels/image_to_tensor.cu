// Resize 8-bit pictures, clip them to a window, normalise them and lay them out as channels × rows × columns.
//
// A block makes a tile of 2048 pixels that follow each other in the tensor; blockIdx.y is the picture of the batch.
// Where nothing is resized, cropped or padded and everything is aligned, a thread takes 16 neighbouring pixels, so that
// each load and store is 16 bytes. Else threads that are neighbours make neighbouring pixels, 16 times, one at a time:
// a warp's stores fill whole sectors, and the bytes it gathers lie together.
//
// Weights are whole numbers, exact at any size: in units of 1 / (2 · resampled) source pixels, target pixel i lies at
// (2i + 1) · source and source pixel p at (2p + 1) · resampled; the weight of p is what their distance leaves of
// `reach`, half the triangle's width. What rounds is the weighted sum, its division by the weights' sum, and the
// normalisation. Sums are compensated, so that their error does not grow with the number of weights; image_to_tensor.py
// derives the bound. -D SCALAR=__half | float, ENTRY=name. Not timed on any card yet.
#include <cuda_fp16.h>

constexpr int STRIP = 16;                        // pixels of a thread
constexpr int GROUP = 16 / sizeof(SCALAR);         // pixels of a 16-byte store
constexpr int CHANNELS = 3;

struct Axis {
    int source, resampled, canvas;               // pixels
    int reach;

    __device__ int offset() const { return (canvas - resampled) >> 1; }  // rounds down, also below zero
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

// A sum that is as exact as if it were rounded twice: each addition's rounding error, which Knuth's TwoSum gives
// exactly, is added to the next term.
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

// 16 pixels as they are, of SOURCE bytes each.
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

// How far one pixel of the resampled picture lies above the window's lower end, in each channel.
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
    const int tile = blockIdx.x * blockDim.x * STRIP;

    const bool as_it_is = height == resampled_height && height == image_height && width == resampled_width &&
                          width == image_width && pixel_stride == channels;
    const size_t addresses = reinterpret_cast<size_t>(picture.pixels) | reinterpret_cast<size_t>(to);
    if (as_it_is && (addresses | row_stride | width) % 16 == 0) {
        const int pixel = tile + threadIdx.x * STRIP;
        if (pixel >= plane) return;
        const size_t row = pixel / width, column = pixel % width;
        const unsigned char* from = picture.pixels + row * row_stride + column * pixel_stride;
        if (channels == CHANNELS) copy<CHANNELS>(from, to + pixel, plane, normalization);
        else copy<1>(from, to + pixel, plane, normalization);
        return;
    }

#pragma unroll 1
    for (int pixel = tile + threadIdx.x; pixel < min(plane, tile + static_cast<int>(blockDim.x) * STRIP);
         pixel += blockDim.x) {
        const int y = pixel / image_width - rows.offset(), x = pixel % image_width - columns.offset();
        float values[CHANNELS] = {};              // where it is padded: the window's lower end
        if (y >= 0 && y < resampled_height && x >= 0 && x < resampled_width) {
            sample(picture, rows, columns, y, x, normalization, values);
        }
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) {
            to[static_cast<size_t>(c) * plane + pixel] = normalization.apply(values[c], c);
        }
    }
}
