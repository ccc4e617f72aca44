// Resizes logits bilinearly to the source's size and writes a label per pixel: the argmax, or logit > 0 for one class.
//
// blockIdx.y is the image of the batch. Without resizing, cropping and padding, and with aligned addresses, a thread
// computes 16 neighbouring labels with accesses of 16 bytes. Otherwise it gathers: neighbouring threads compute
// neighbouring labels, so that the stores of a warp fill whole sectors and its loads are close together; a thread goes
// on with labels at distances of the whole grid. `_grid` of logits_to_mask.py has as many threads as there is work.
// Softmax and sigmoid are omitted, because they do not change the label. Of equal logits the lowest class wins, as in
// preprocess.labels_of.
//
// Positions are integers in units of 1 / (2 · source) pixels and exact at any size; weights are rounded once.
// Every product and sum is rounded, as on the CPU.
// Options: -D SCALAR=__half | __nv_bfloat16 | float, ENTRY=name. Not measured on a GPU yet.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

constexpr int STRIP = 16;                        // labels of a thread
constexpr int GROUP = 16 / sizeof(SCALAR);         // logits of a 16-byte load

struct Axis {
    int canvas, resampled, source;               // pixels
    float inverse;                               // of 2 * source
};

// whole / (2 * source), rounded once: the product with the rounded inverse, corrected by its remainder (Markstein).
__device__ float share(int whole, const Axis& axis) {
    const float numerator = static_cast<float>(whole);
    const float quotient = __fmul_rn(numerator, axis.inverse);
    const float rest = __fmaf_rn(-quotient, static_cast<float>(2 * axis.source), numerator);
    return __fmaf_rn(rest, axis.inverse, quotient);
}

struct Position {                                // between two pixels of the canvas
    int near, far;
    float near_weight, far_weight;
    bool inside;                                 // of the canvas; cropped pixels are background

    __device__ Position(const Axis& axis, int pixel) {
        const int offset = (axis.canvas - axis.resampled) >> 1;  // rounds towards minus infinity
        const int unit = 2 * axis.source;
        const int centre = (2 * pixel + 1) * axis.resampled;
        inside = centre + unit * offset >= 0 && centre + unit * offset < unit * axis.canvas;
        const int along = min(max(centre - axis.source, 0), unit * (axis.resampled - 1));  // from the first centre
        const int rest = along % unit;
        far_weight = share(rest, axis);
        near_weight = share(unit - rest, axis);
        const int first = max(offset, 0), last = min(offset + axis.resampled, axis.canvas) - 1;  // without padding
        near = min(max(along / unit + offset, first), last);
        far = min(max(along / unit + (rest > 0) + offset, first), last);
    }
};

__device__ float weighted(float near, float far, const Position& at) {
    const float sum = __fmul_rn(near, at.near_weight);
    return at.far_weight == 0.0f ? sum : __fadd_rn(sum, __fmul_rn(far, at.far_weight));
}

__device__ float on_row(const SCALAR* row, const Position& x) {
    const float near = static_cast<float>(row[x.near]);
    return weighted(near, x.far == x.near ? near : static_cast<float>(row[x.far]), x);
}

__device__ unsigned char label_at(
    const SCALAR* logits, int classes, const Axis& rows, const Axis& columns, int row, int column
) {
    const Position y(rows, row), x(columns, column);
    if (!y.inside || !x.inside) return 0;
    float best = 0.0f;                           // the threshold of a single logit
    int label = 0;
    for (int index = 0; index < classes; ++index) {
        const SCALAR* plane = logits + static_cast<size_t>(index) * rows.canvas * columns.canvas;
        const float near = on_row(plane + static_cast<size_t>(y.near) * columns.canvas, x);
        const float far = y.far == y.near ? near : on_row(plane + static_cast<size_t>(y.far) * columns.canvas, x);
        const float value = weighted(near, far, y);
        if (value > best) label = classes == 1 ? 1 : index;
        if (value > best || (index == 0 && classes > 1)) best = value;
    }
    return static_cast<unsigned char>(label);
}

// Compute the labels of 16 pixels without resizing.
__device__ uint4 labels_of(const SCALAR* logits, int classes, size_t plane) {
    float best[STRIP] = {};
    unsigned char labels[STRIP] = {};
#pragma unroll 1
    for (int index = 0; index < classes; ++index, logits += plane) {
#pragma unroll
        for (int start = 0; start < STRIP; start += GROUP) {
            const uint4 word = *reinterpret_cast<const uint4*>(logits + start);
            SCALAR values[GROUP];
            memcpy(values, &word, 16);
#pragma unroll
            for (int k = 0; k < GROUP; ++k) {
                const float value = static_cast<float>(values[k]);
                if (value > best[start + k]) labels[start + k] = classes == 1 ? 1 : index;
                if (value > best[start + k] || (index == 0 && classes > 1)) best[start + k] = value;
            }
        }
    }
    uint4 packed;
    memcpy(&packed, labels, 16);
    return packed;
}

extern "C" __global__ void __launch_bounds__(128) ENTRY(
    const SCALAR* __restrict__ logits, int batch, int classes, int image_height, int image_width, int resampled_height,
    int resampled_width, int height, int width, unsigned char* __restrict__ mask
) {
    const Axis rows = {image_height, resampled_height, height, 1.0f / static_cast<float>(2 * height)};
    const Axis columns = {image_width, resampled_width, width, 1.0f / static_cast<float>(2 * width)};
    const size_t image_plane = static_cast<size_t>(image_height) * image_width;
    const int plane = height * width;
    const SCALAR* const picture = logits + blockIdx.y * classes * image_plane;
    unsigned char* const to = mask + static_cast<size_t>(blockIdx.y) * plane;
    const int thread = blockIdx.x * blockDim.x + threadIdx.x;

    const bool as_it_is = height == resampled_height && height == image_height && width == resampled_width &&
                          width == image_width;
    const size_t addresses = reinterpret_cast<size_t>(picture) | reinterpret_cast<size_t>(to);
    if (as_it_is && (addresses | plane) % 16 == 0) {
        const int pixel = thread * STRIP;
        if (pixel < plane) *reinterpret_cast<uint4*>(to + pixel) = labels_of(picture + pixel, classes, plane);
        return;
    }

#pragma unroll 1
    for (int pixel = thread; pixel < plane; pixel += gridDim.x * blockDim.x) {
        to[pixel] = label_at(picture, classes, rows, columns, pixel / width, pixel % width);
    }
}
