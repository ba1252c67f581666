// Batches of crops from a resident set of images, for each of several models, and their normalisation.
//
//   y(g, b, i, j, c) = (x / 255 - mean(g, c)) / deviation(g, c),   x = image(n, i + top, j' + left, c)
//
// with (n, top, left, flip) = plan(g, b), j' = j, or width - 1 - j where flip is not 0, and x = 0 outside of the image.
// A plan of n = -1 is padding and gives zeros; a number beyond the images gives NaN, since a kernel cannot stop the host.
//
// Tiling: a thread for each value; neighbours read neighbouring bytes.
// Bytes: 1 read and one value written per element. FLOPs: 3 per element. Bound by memory.

#include "common/kernel.cuh"

#include "common/convert.cuh"
#include "common/index.cuh"

struct Crops {
    u32 models, batch, images, height, width, channels;
};

template <class T>
__device__ __forceinline__ void crop(T* output, const unsigned char* images, const i64* plan, const float* mean,
                                     const float* deviation, const Crops& c) {
    const u64 elements = u64(c.models) * c.batch * c.height * c.width * c.channels;
    for (u64 at = grid_thread(); at < elements; at += grid_threads()) {
        u64 rest = at / c.channels;
        const u32 channel = u32(at - rest * c.channels);
        const u32 column = u32(rest % c.width);
        rest /= c.width;
        const u32 row = u32(rest % c.height);
        rest /= c.height;
        const i64* own = plan + rest * 4;
        if (own[0] < 0 || own[0] >= c.images) {
            output[at] = from_float<T>(own[0] < 0 ? 0.0f : NAN);
            continue;
        }
        const i64 y = row + own[1], x = i64(own[3] != 0 ? c.width - 1 - column : column) + own[2];
        const bool inside = y >= 0 && y < c.height && x >= 0 && x < c.width;
        const u64 from = ((u64(own[0]) * c.height + u64(y)) * c.width + u64(x)) * c.channels + channel;
        const float value = inside ? float(images[from]) / 255.0f : 0.0f;
        const u64 parameter = rest / c.batch * c.channels + channel;
        output[at] = from_float<T>((value - mean[parameter]) / deviation[parameter]);
    }
}

#define INSTANCE(suffix, T)                                                                           \
    extern "C" __global__ void __launch_bounds__(256)                                                 \
        crops_##suffix(T* output, const unsigned char* images, const i64* plan, const float* mean,    \
                       const float* deviation, Array<u32, 6> extents) {                               \
        const Crops crops = {extents[0], extents[1], extents[2], extents[3], extents[4], extents[5]}; \
        crop(output, images, plan, mean, deviation, crops);                                           \
    }
INSTANCE(f32, float)

KERNELS(crops, KERNEL(crops_f32))
