// Functions of one value, y_i = f(x_i), and their gradients, dx_i = f'(x_i) dy_i in one pass.
//
// f' is taken at the input, or at the output where that is cheaper (sqrt, recip, exp, tanh, sigmoid). The functions and
// their special values are those of src/ops/elementwise/cpu.rs; NaN stays NaN.
//
// Tiling: a thread for each 4 elements; all threads of a launch take the same function.
// Bytes: 2 values per element forward, 3 backward. 1 to about 40 FLOPs per element: bound by memory.

#include "common/kernel.cuh"

#include "common/index.cuh"
#include "common/vector.cuh"

constexpr u32 THREADS = 256;
// Elements of a thread: 8 or 16 bytes.
constexpr int V = 4;

// As `code` of src/ops/elementwise/gpu.rs.
enum class Unary : u32 {
    Neg,
    Abs,
    Square,
    Sqrt,
    Recip,
    Exp,
    Ln,
    Sin,
    Cos,
    Tanh,
    Sigmoid,
    Erf,
    Relu,
    LeakyRelu,
    Silu,
    Gelu,
    Softplus,
    Scale,
    Shift,
    Powf,
    Clamp
};

// Beyond, the logistic function and the normal distribution are 0 or 1: products with them are taken inside, so that
// an infinity times 0 does not become NaN.
constexpr float LIMIT = 1e4f;

__device__ __forceinline__ float at_least(float x, float low) { return x < low ? low : x; }
__device__ __forceinline__ float at_most(float x, float high) { return x > high ? high : x; }
__device__ __forceinline__ float limited(float x) { return at_most(at_least(x, -LIMIT), LIMIT); }
__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
__device__ __forceinline__ float normal_cdf(float x) { return fmaf(0.5f, erff(x * 0.707106781186547524f), 0.5f); }
__device__ __forceinline__ float normal_pdf(float x) { return expf(-0.5f * x * x) * 0.398942280401432678f; }

// 0, 0, then the bits of 2/pi behind the binary point.
__device__ constexpr u32 TWO_OVER_PI[] = {0,          0,          0xA2F9836E, 0x4E441529, 0xFC2757D1,
                                          0xF534DDC0, 0xDB629599, 0x3C439041, 0xFE5163AB};

// sin(x + quarters pi/2), of any finite x to about 2 units in the last place, with the reduction of Payne and Hanek
// (1983): of x 2/pi, only the bits of 2/pi matter that make up the last two bits before the point and those behind it.
// (The library's own keeps an array of the product in local memory.)
__device__ __forceinline__ float sine(float x, u32 quarters) {
    const u32 bits = bits_as<u32>(x), exponent = bits >> 23 & 0xFF;
    float rest = x;
    if (exponent == 0xFF) return x - x;
    if (exponent > 112) {  // below 2^-14, x is in its first quarter
        const u32 mantissa = (bits & 0x7FFFFF) | 0x800000;
        // |x| = mantissa 2^e; bits of 2/pi before this position contribute multiples of 4.
        const int position = int(exponent) - 150 - 2, word = (position >> 5) + 2;
        const u32 shift = position & 31;
        const auto window = [=](int i) {
            return u32(((u64(TWO_OVER_PI[word + i]) << 32 | TWO_OVER_PI[word + i + 1]) << shift) >> 32);
        };
        const u64 low = u64(mantissa) * window(2);
        const u64 middle = u64(mantissa) * window(1) + (low >> 32);
        const u32 high = mantissa * window(0) + u32(middle >> 32);
        // In units of 2^-62, modulo 4.
        const u64 product = u64(high) << 32 | u32(middle);
        const u32 nearest = u32((product + (1ull << 61)) >> 62);
        rest = float(i64(product << 2)) * 8.515303e-20f;  // pi/2 2^-64
        rest = x < 0 ? -rest : rest;
        quarters += x < 0 ? 0u - nearest : nearest;
    }
    const float square = rest * rest;
    float value;
    if (quarters & 1) {
        value = fmaf(fmaf(fmaf(2.4433157e-5f, square, -1.3887316e-3f), square, 4.1666646e-2f), square * square,
                     fmaf(-0.5f, square, 1.0f));
    } else {
        value = fmaf(fmaf(fmaf(-1.951529589e-4f, square, 8.3321609e-3f), square, -1.6666655e-1f), square * rest, rest);
    }
    return quarters & 2 ? -value : value;
}

__device__ __forceinline__ void apply(Unary function, float (&values)[V], float p, float q) {
    const auto each = [&](auto f) {
#pragma unroll
        for (int i = 0; i < V; ++i) values[i] = f(values[i]);
    };
    switch (function) {
        case Unary::Neg:
            return each([](float x) { return -x; });
        case Unary::Abs:
            return each([](float x) { return fabsf(x); });
        case Unary::Square:
            return each([](float x) { return x * x; });
        case Unary::Sqrt:
            return each([](float x) { return sqrtf(x); });
        case Unary::Recip:
            return each([](float x) { return 1.0f / x; });
        case Unary::Exp:
            return each([](float x) { return expf(x); });
        case Unary::Ln:
            return each([](float x) { return logf(x); });
        case Unary::Sin:
        case Unary::Cos:
            return each([=](float x) { return sine(x, function == Unary::Cos); });
        case Unary::Tanh:
            return each([](float x) { return tanhf(x); });
        case Unary::Sigmoid:
            return each([](float x) { return sigmoid(x); });
        case Unary::Erf:
            return each([](float x) { return erff(x); });
        case Unary::Relu:
            return each([](float x) { return at_least(x, 0); });
        case Unary::LeakyRelu:
            return each([=](float x) { return x < 0 ? p * x : x; });
        case Unary::Silu:
            return each([](float x) { return at_least(x, -LIMIT) * sigmoid(x); });
        case Unary::Gelu:
            return each([](float x) { return at_least(x, -LIMIT) * normal_cdf(x); });
        case Unary::Softplus:
            return each([](float x) { return at_least(x, 0) + log1pf(expf(-fabsf(x))); });
        case Unary::Scale:
            return each([=](float x) { return x * p; });
        case Unary::Shift:
            return each([=](float x) { return x + p; });
        case Unary::Powf:
            return each([=](float x) { return powf(x, p); });
        case Unary::Clamp:
            return each([=](float x) { return at_most(at_least(x, p), q); });
    }
}

// Turns output gradients into input gradients. `values` are the inputs or outputs. The power comes with the exponent of
// its derivative, p - 1 rounded once.
__device__ __forceinline__ void differentiate(Unary function, const float (&values)[V], float (&gradients)[V], float p,
                                              float q) {
    const auto each = [&](auto f) {
#pragma unroll
        for (int i = 0; i < V; ++i) gradients[i] = f(values[i], gradients[i]);
    };
    switch (function) {
        case Unary::Neg:
            return each([](float, float dy) { return -dy; });
        case Unary::Abs:
            return each([](float x, float dy) { return x > 0 ? dy : x < 0 ? -dy : x * 0.0f; });
        case Unary::Square:
            return each([](float x, float dy) { return 2.0f * x * dy; });
        case Unary::Sqrt:
            return each([](float y, float dy) { return 0.5f * dy / y; });
        case Unary::Recip:
            return each([](float y, float dy) { return -(y * y) * dy; });
        case Unary::Exp:
            return each([](float y, float dy) { return y * dy; });
        case Unary::Ln:
            return each([](float x, float dy) { return dy / x; });
        case Unary::Sin:
        case Unary::Cos:
            return each([=](float x, float dy) { return sine(x, function == Unary::Sin ? 1 : 2) * dy; });
        case Unary::Tanh:
            return each([](float y, float dy) { return (1.0f - y * y) * dy; });
        case Unary::Sigmoid:
            return each([](float y, float dy) { return y * (1.0f - y) * dy; });
        case Unary::Erf:
            return each([](float x, float dy) { return 1.12837916709551257f * expf(-x * x) * dy; });
        case Unary::Relu:
            return each([](float x, float dy) { return x > 0 ? dy : x != x ? x : 0.0f; });
        case Unary::LeakyRelu:
            return each([=](float x, float dy) { return x > 0 ? dy : x != x ? x : p * dy; });
        case Unary::Silu:
            return each([](float x, float dy) {
                const float share = sigmoid(x);
                return share * (1.0f + limited(x) * (1.0f - share)) * dy;
            });
        case Unary::Gelu:
            return each([](float x, float dy) {
                x = limited(x);
                return fmaf(x, normal_pdf(x), normal_cdf(x)) * dy;
            });
        case Unary::Softplus:
            return each([](float x, float dy) { return sigmoid(x) * dy; });
        case Unary::Scale:
            return each([=](float, float dy) { return p * dy; });
        case Unary::Shift:
            return;
        case Unary::Powf:
            return each([=](float x, float dy) { return p * powf(x, q) * dy; });
        case Unary::Clamp:
            return each([=](float x, float dy) { return x < p || x > q ? 0.0f : x != x ? x : dy; });
    }
}

template <class T>
__device__ __forceinline__ void unary_forward(T* output, const T* input, u64 elements, Unary function, float p,
                                              float q) {
    for (u64 i = grid_thread() * V; i < elements; i += grid_threads() * V) {
        float x[V];
        load_as_float_tail(x, input + i, i64(elements - i), 1.0f);
        apply(function, x, p, q);
        store_from_float_tail(output + i, x, i64(elements - i));
    }
}

template <class T>
__device__ __forceinline__ void unary_backward(T* input_gradient, const T* saved, const T* output_gradient,
                                               u64 elements, Unary function, float p, float q) {
    for (u64 i = grid_thread() * V; i < elements; i += grid_threads() * V) {
        float x[V], dy[V];
        load_as_float_tail(x, saved + i, i64(elements - i), 1.0f);
        load_as_float_tail(dy, output_gradient + i, i64(elements - i), 0.0f);
        differentiate(function, x, dy, p, q);
        store_from_float_tail(input_gradient + i, dy, i64(elements - i));
    }
}

#define INSTANCE(suffix, T)                                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                            \
        unary_forward_##suffix(T* output, const T* input, u64 elements, u32 function, float p, float q) {            \
        unary_forward(output, input, elements, Unary(function), p, q);                                               \
    }                                                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS) unary_backward_##suffix(                                   \
        T* input_gradient, const T* saved, const T* output_gradient, u64 elements, u32 function, float p, float q) { \
        unary_backward(input_gradient, saved, output_gradient, elements, Unary(function), p, q);                     \
    }
FOR_EACH_FLOAT(INSTANCE)

KERNELS(unary, KERNEL_FLOATS(unary_forward), KERNEL_FLOATS(unary_backward))
