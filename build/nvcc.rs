//! Device code: one fatbin for each kernel file.

pub fn build() {}
