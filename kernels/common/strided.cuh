// Positions in strided tensors: broadcasting, reordering and slicing are loops over axes along which every operand
// advances by a step of its own. The host merges axes first, so few are left.
#pragma once
#include "common/index.cuh"

// As `MOST_AXES` of src/ops/strided.rs.
inline constexpr int MOST_AXES = 8;

// A number for each axis, outermost first.
using Axes = Array<u64, MOST_AXES>;

struct Division {
    u64 quotient, remainder;
};

// In 32 bits where that is enough, which is several times faster.
__device__ __forceinline__ Division divide(u64 dividend, u64 divisor) {
    if (((dividend | divisor) >> 32) == 0) {
        const u32 quotient = u32(dividend) / u32(divisor);
        return {quotient, u32(dividend) - quotient * u32(divisor)};
    }
    const u64 quotient = dividend / divisor;
    return {quotient, dividend - quotient * divisor};
}

// Calls `visit(axis, position)` for each axis of the element that is `index`-th in row-major order.
template <class Visit>
__device__ __forceinline__ void for_each_position(u64 index, u32 rank, const Axes& extents, Visit visit) {
    for (int axis = int(rank) - 1; axis > 0; --axis) {
        const Division division = divide(index, extents[axis]);
        visit(axis, division.remainder);
        index = division.quotient;
    }
    if (rank > 0) visit(0, index);
}
