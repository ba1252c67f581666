//! All tests that run on `GRIDGRAD_TEST_DEVICE` in one executable, for `scripts/bundle.sh`: every executable holds all
//! kernels. `cargo test` builds the three targets by themselves instead.

#[path = "gpu.rs"]
mod gpu;
#[allow(dead_code, reason = "benchmarks use the rest")]
#[path = "ops/main.rs"]
mod ops;
#[path = "train/main.rs"]
mod train;

// Where the modules of `ops` look for it.
use ops::harness;
