// Between storage (f32, bf16, f16) and arithmetic (f32), rounding to nearest even.
#pragma once
#include <string.h>

#include <type_traits>

#include "common/kernel.cuh"

// The same bits as another type.
template <class To, class From> __device__ __forceinline__ To bits_as(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(bf16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(f16 value) { return __half2float(value); }
__device__ __forceinline__ float to_float(u8 value) { return float(value); }

template <class T> __device__ __forceinline__ T from_float(float value);
template <> __device__ __forceinline__ float from_float<float>(float value) { return value; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float value) { return __float2bfloat16_rn(value); }
template <> __device__ __forceinline__ f16 from_float<f16>(float value) { return __float2half_rn(value); }

// Two values in one register, `low` in bits 0 to 15: neighbours in memory, low first.
template <class T> __device__ __forceinline__ u32 pack(float low, float high) {
    static_assert(sizeof(T) == 2);
#ifdef __CUDACC__
    u32 pair;
    if constexpr (std::is_same_v<T, bf16>) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    }
    return pair;
#else
    return u32(bits_as<u16>(from_float<T>(low))) | u32(bits_as<u16>(from_float<T>(high))) << 16;
#endif
}

// The low value of a pair as f32.
template <class T> __device__ __forceinline__ float unpack_low(u32 pair) {
    if constexpr (std::is_same_v<T, bf16>) {
        return bits_as<float>(pair << 16);
    } else {
        return to_float(bits_as<T>(static_cast<u16>(pair)));
    }
}

// The high value of a pair as f32.
template <class T> __device__ __forceinline__ float unpack_high(u32 pair) {
    if constexpr (std::is_same_v<T, bf16>) {
        return bits_as<float>(pair & 0xFFFF0000u);
    } else {
        return to_float(bits_as<T>(static_cast<u16>(pair >> 16)));
    }
}
