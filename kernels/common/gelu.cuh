// The exact GELU (Hendrycks and Gimpel 2016): x Φ(x), with Φ the distribution function of the standard normal.
#pragma once
#include "common/kernel.cuh"

// Beyond ±1e4 Φ is 0 or 1: the bound keeps an infinity times 0 from becoming NaN. NaN stays.
__device__ __forceinline__ float gelu(float x) {
    const float cdf = fmaf(0.5f, erff(x * 0.70710678f), 0.5f);
    return (x < -1e4f ? -1e4f : x) * cdf;
}

// Φ(x) + x φ(x)
__device__ __forceinline__ float gelu_derivative(float x) {
    x = x < -1e4f ? -1e4f : x > 1e4f ? 1e4f : x;
    const float cdf = fmaf(0.5f, erff(x * 0.70710678f), 0.5f);
    return fmaf(x, expf(-0.5f * x * x) * 0.39894228f, cdf);
}
