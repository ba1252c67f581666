//! The GPU kernels that were compiled into the crate.

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// The code of `kernels/<module>.cu` for all targets, as a fatbin; `None` where there is no such file, or the crate was
/// built without nvcc.
pub(crate) fn image(module: &str) -> Option<&'static [u8]> {
    KERNELS.iter().find(|(name, _)| *name == module).map(|(_, image)| *image)
}

/// Whether this build of the crate holds GPU kernels. Without nvcc, or without the feature `cuda`, it holds none.
pub fn kernels_built() -> bool {
    !KERNELS.is_empty()
}
