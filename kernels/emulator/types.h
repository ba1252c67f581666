// CUDA's vector types, with its alignments, and its 16-bit floats, with its conversions.
#pragma once

#include <bit>
#include <stdint.h>

#define EMULATOR_VECTOR(element, prefix, alignment2, alignment4)                                \
    struct alignas(alignment2) prefix##2 { element x, y; };                                     \
    struct prefix##3 { element x, y, z; };                                                      \
    struct alignas(alignment4) prefix##4 { element x, y, z, w; };                               \
    constexpr prefix##2 make_##prefix##2(element x, element y) { return {x, y}; }               \
    constexpr prefix##3 make_##prefix##3(element x, element y, element z) { return {x, y, z}; } \
    constexpr prefix##4 make_##prefix##4(element x, element y, element z, element w) { return {x, y, z, w}; }

EMULATOR_VECTOR(char, char, 2, 4)
EMULATOR_VECTOR(unsigned char, uchar, 2, 4)
EMULATOR_VECTOR(short, short, 4, 8)
EMULATOR_VECTOR(unsigned short, ushort, 4, 8)
EMULATOR_VECTOR(int, int, 8, 16)
EMULATOR_VECTOR(unsigned, uint, 8, 16)
EMULATOR_VECTOR(long long, longlong, 16, 16)
EMULATOR_VECTOR(unsigned long long, ulonglong, 16, 16)
EMULATOR_VECTOR(float, float, 8, 16)
EMULATOR_VECTOR(double, double, 16, 16)

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

namespace emulator {

constexpr uint16_t float_to_bfloat16(float value) {
    uint32_t bits = std::bit_cast<uint32_t>(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

constexpr float bfloat16_to_float(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

constexpr uint16_t float_to_half(float value) {
    uint32_t bits = std::bit_cast<uint32_t>(value), magnitude = bits & 0x7fffffff, sign = bits >> 16 & 0x8000;
    if (magnitude > 0x7f800000) return 0x7fff;
    if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 and above round to infinity
    if (magnitude >= 0x38800000) {                                             // normal: 2^-14 and above
        uint32_t rebiased = magnitude - (112u << 23);
        return static_cast<uint16_t>(sign | (rebiased + 0xfff + (rebiased >> 13 & 1)) >> 13);
    }
    uint32_t exponent = magnitude >> 23;
    if (exponent < 102) return static_cast<uint16_t>(sign);  // below 2^-25, half of the smallest subnormal
    uint32_t mantissa = (magnitude & 0x7fffff) | 0x800000, shift = 126 - exponent;
    uint32_t half = 1u << (shift - 1), kept = mantissa >> shift;
    return static_cast<uint16_t>(sign | (mantissa + half - 1 + (kept & 1)) >> shift);
}

constexpr float half_to_float(uint16_t bits) {
    uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, exponent = bits >> 10 & 31, mantissa = bits & 0x3ff;
    if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000 | mantissa << 13);
    if (exponent != 0) return std::bit_cast<float>(sign | (exponent + 112) << 23 | mantissa << 13);
    float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
}

}  // namespace emulator

// Sums, products and quotients of 16-bit floats are those of `float`, rounded: with 24 bits in between, rounding twice
// gives what rounding once does.
#define EMULATOR_FLOAT16(type, from_float, to_float)                               \
    struct type {                                                                  \
        uint16_t bits;                                                             \
        type() = default;                                                          \
        constexpr type(float value) : bits(emulator::from_float(value)) {}         \
        constexpr operator float() const { return emulator::to_float(bits); }      \
        type& operator+=(type other);                                              \
        type& operator-=(type other);                                              \
        type& operator*=(type other);                                              \
    };                                                                             \
    constexpr type operator-(type a) { return type(-float(a)); }                   \
    constexpr type operator+(type a, type b) { return type(float(a) + float(b)); } \
    constexpr type operator-(type a, type b) { return type(float(a) - float(b)); } \
    constexpr type operator*(type a, type b) { return type(float(a) * float(b)); } \
    constexpr type operator/(type a, type b) { return type(float(a) / float(b)); } \
    inline type& type::operator+=(type other) { return *this = *this + other; }    \
    inline type& type::operator-=(type other) { return *this = *this - other; }    \
    inline type& type::operator*=(type other) { return *this = *this * other; }    \
    struct alignas(4) type##2 { type x, y; };

EMULATOR_FLOAT16(__nv_bfloat16, float_to_bfloat16, bfloat16_to_float)
EMULATOR_FLOAT16(__half, float_to_half, half_to_float)
using half = __half;
using half2 = __half2;

constexpr __nv_bfloat16 __float2bfloat16_rn(float value) { return __nv_bfloat16(value); }
constexpr __nv_bfloat16 __float2bfloat16(float value) { return __nv_bfloat16(value); }
constexpr float __bfloat162float(__nv_bfloat16 value) { return float(value); }
constexpr __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return std::bit_cast<__nv_bfloat16>(bits); }
constexpr unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }
constexpr __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__nv_bfloat16(x), __nv_bfloat16(y)}; }
constexpr __nv_bfloat162 __float22bfloat162_rn(float2 value) { return __floats2bfloat162_rn(value.x, value.y); }
constexpr __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
constexpr float2 __bfloat1622float2(__nv_bfloat162 value) { return {float(value.x), float(value.y)}; }
constexpr float __low2float(__nv_bfloat162 value) { return float(value.x); }
constexpr float __high2float(__nv_bfloat162 value) { return float(value.y); }

constexpr __half __float2half_rn(float value) { return __half(value); }
constexpr __half __float2half(float value) { return __half(value); }
constexpr float __half2float(__half value) { return float(value); }
constexpr __half __ushort_as_half(unsigned short bits) { return std::bit_cast<__half>(bits); }
constexpr unsigned short __half_as_ushort(__half value) { return value.bits; }
constexpr __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
constexpr __half2 __float22half2_rn(float2 value) { return __floats2half2_rn(value.x, value.y); }
constexpr __half2 __halves2half2(__half x, __half y) { return {x, y}; }
constexpr float2 __half22float2(__half2 value) { return {float(value.x), float(value.y)}; }
constexpr float __low2float(__half2 value) { return float(value.x); }
constexpr float __high2float(__half2 value) { return float(value.y); }
