// Division by a number that is known only when the kernel runs, without a division.
#pragma once
#include "common/kernel.cuh"

// Quotients of numbers below 2^31 by multiplication (Granlund and Montgomery 1994): with 2^s the least power of two that
// is not below d and m = floor(2^32 (2^s - d) / d) + 1, n / d = (n m / 2^32 + n) / 2^s, each quotient rounded down.
struct Divisor {
    u32 divisor, multiplier, shift;

    Divisor() = default;

    // By `divisor`, from 1 to 2^31. Costs a division of 64 bits: once per thread, not per element.
    __device__ __forceinline__ explicit Divisor(u32 divisor_) : divisor(divisor_), shift(0) {
        while (shift < 31 && (1u << shift) < divisor) ++shift;
        multiplier = u32((u64((1u << shift) - divisor) << 32) / divisor) + 1;
    }

    // n / divisor, and the remainder.
    __device__ __forceinline__ u32 divide(u32 n, u32& remainder) const {
        const u32 quotient = (u32(u64(n) * multiplier >> 32) + n) >> shift;
        remainder = n - quotient * divisor;
        return quotient;
    }
};
