//! Host code: one static library of all kernels.

pub fn build() {}
