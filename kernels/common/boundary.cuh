// Points of a map that a box around a cell names, read bilinearly (src/ops/denfi/mod.rs has the frames and the source).
#pragma once
#include "common/index.cuh"
#include "common/vector.cuh"

constexpr u32 TAPS = 9;

// sin(pi x) and cos(pi x). The whole turns are taken off exactly, so that no argument is too large.
__device__ __forceinline__ void sin_cos_pi(float x, float& sine, float& cosine) {
#ifdef __CUDACC__
    sincospif(x, &sine, &cosine);
#else
    const float angle = 3.14159265358979f * (x - 2 * rintf(x / 2));
    sine = sinf(angle);
    cosine = cosf(angle);
#endif
}

// As `Description` of src/ops/denfi/gpu.rs.
struct BoundaryMap {
    u32 batch, height, width, channels, bins;
    // Whether residuals are clamped to [-1, 1], and whether the boundary is f32 whatever the map is.
    u32 clamp_residual, wide;
    // Cells per metre, and the factor on the extents of boxes.
    float rows_per_metre, columns_per_metre, scale;

    __device__ __forceinline__ u64 cells_of_image() const { return u64(height) * width; }
    __device__ __forceinline__ u64 cells() const { return batch * cells_of_image(); }
    __device__ __forceinline__ u32 outputs() const { return 4 + 2 * bins; }
};

// The regression map (cells, 4 + 2 bins).
template <class T> struct RegressionMap {
    const void* values;
    u32 wide;
    __device__ __forceinline__ float operator()(u64 at) const {
        return wide ? static_cast<const float*>(values)[at] : to_float(static_cast<const T*>(values)[at]);
    }
};

// Metres from a cell to the sides of its box, along the heading and to its left, and the heading.
struct Boundary {
    float left, front, right, rear, sine, cosine;
};

// A NaN stays.
__device__ __forceinline__ float clamp(float x, float limit) { return x < -limit ? -limit : x > limit ? limit : x; }

// The first of the largest scores.
template <class T> __device__ __forceinline__ u32 best_bin(const RegressionMap<T>& raw, u64 scores, u32 bins) {
    u32 best = 0;
    float largest = raw(scores);
    for (u32 bin = 1; bin < bins; ++bin) {
        const float score = raw(scores + bin);
        if (score > largest) {
            largest = score;
            best = bin;
        }
    }
    return best;
}

template <class T>
__device__ __forceinline__ Boundary decode(const RegressionMap<T>& raw, u64 cell, const BoundaryMap& map) {
    const u64 first = cell * map.outputs();
    Boundary boundary;
    boundary.left = expf(clamp(raw(first), 7));
    boundary.front = expf(clamp(raw(first + 1), 7));
    boundary.right = expf(clamp(raw(first + 2), 7));
    boundary.rear = expf(clamp(raw(first + 3), 7));
    const u32 bin = best_bin(raw, first + 4, map.bins);
    float residual = raw(first + 4 + map.bins + bin);
    if (map.clamp_residual) residual = clamp(residual, 1);
    sin_cos_pi((2 * bin + residual) / map.bins, boundary.sine, boundary.cosine);
    return boundary;
}

// A tap in the frame of the box.
struct Offset {
    float u, v;
};

__device__ __forceinline__ Offset offset_of_tap(const Boundary& b, u32 tap, float scale) {
    const float alpha = float(tap / 3) - 1, beta = float(tap % 3) - 1;
    return {0.5f * (b.front - b.rear) + 0.5f * scale * beta * (b.front + b.rear),
            0.5f * (b.left - b.right) + 0.5f * scale * alpha * (b.left + b.right)};
}

constexpr i32 OUTSIDE = -2;

// Position row + row_part, column + column_part of a map, both parts in [0, 1); row is OUTSIDE where nothing is read.
struct Point {
    i32 row, column;
    float row_part, column_part;

    // 0: upper left, 1: upper right, 2: lower left, 3: lower right.
    __device__ __forceinline__ float weight(u32 neighbour) const {
        return (neighbour / 2 ? row_part : 1 - row_part) * (neighbour % 2 ? column_part : 1 - column_part);
    }
    __device__ __forceinline__ bool has(u32 neighbour, u32 height, u32 width) const {
        return row != OUTSIDE && u32(row + i32(neighbour / 2)) < height && u32(column + i32(neighbour % 2)) < width;
    }
    // Only of a neighbour that the map has.
    __device__ __forceinline__ u32 pixel(u32 neighbour, u32 width) const {
        return u32(row + i32(neighbour / 2)) * width + u32(column + i32(neighbour % 2));
    }
};

// (row, column) plus an offset in cells. Extents are at most 2^24, so that whole numbers of cells are exact. What a NaN
// names has weights NaN at the map's first cell.
__device__ __forceinline__ Point point_at(u32 row, u32 column, float down, float across, u32 height, u32 width) {
    const float whole_down = floorf(down), whole_across = floorf(across);
    const float base_row = float(row) + whole_down, base_column = float(column) + whole_across;
    const float row_part = down - whole_down, column_part = across - whole_across;
    if (down != down || across != across) return {0, 0, NAN, NAN};
    const bool inside = base_row >= -1 && base_row < float(height) && base_column >= -1 && base_column < float(width) &&
                        (base_row >= 0 || row_part > 0) && (base_column >= 0 || column_part > 0);
    if (!inside) return {OUTSIDE, OUTSIDE, 0, 0};
    return {i32(base_row), i32(base_column), row_part, column_part};
}

// Where tap `tap` of the box around `cell` is.
__device__ __forceinline__ Point point_of_tap(const Boundary& b, u64 cell, u32 tap, const BoundaryMap& map) {
    const Offset offset = offset_of_tap(b, tap, map.scale);
    const u32 within = u32(cell % map.cells_of_image());
    return point_at(within / map.width, within % map.width,
                    (b.sine * offset.u + b.cosine * offset.v) * map.rows_per_metre,
                    (b.cosine * offset.u - b.sine * offset.v) * map.columns_per_metre, map.height, map.width);
}

// What a tap reads: cells of its image, and their weights, 0 for those that the map does not have.
struct Neighbours {
    u32 pixels[4];
    float weights[4];
};

// The neighbours of all taps of COUNT cells from `first` on; those beyond the last cell have none. By the whole block;
// complete after a barrier.
template <u32 COUNT, class T>
__device__ __forceinline__ void stage_neighbours(Neighbours* neighbours, Boundary* boundaries,
                                                 const RegressionMap<T>& raw, u64 first, const BoundaryMap& map) {
    for (u32 i = linear_thread(); i < COUNT; i += block_threads()) {
        if (first + i < map.cells()) boundaries[i] = decode(raw, first + i, map);
    }
    __syncthreads();
    for (u32 i = linear_thread(); i < COUNT * TAPS; i += block_threads()) {
        Neighbours at = {};
        const u64 cell = first + i / TAPS;
        if (cell < map.cells()) {
            const Point point = point_of_tap(boundaries[i / TAPS], cell, i % TAPS, map);
#pragma unroll
            for (u32 n = 0; n < 4; ++n) {
                if (!point.has(n, map.height, map.width)) continue;
                at.pixels[n] = point.pixel(n, map.width);
                at.weights[n] = point.weight(n);
            }
        }
        neighbours[i] = at;
    }
}

// The sample of N channels. A weight of 0 is not read, so what is not a number there does no harm.
template <int N, class T>
__device__ __forceinline__ void sample(float (&values)[N], const T* image, const Neighbours& at, u32 channels) {
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = 0;
#pragma unroll
    for (u32 n = 0; n < 4; ++n) {
        if (at.weights[n] == 0) continue;
        float read[N];
        load_as_float(read, image + u64(at.pixels[n]) * channels);
#pragma unroll
        for (int i = 0; i < N; ++i) values[i] = fmaf(at.weights[n], read[i], values[i]);
    }
}
