//! The GPU kernels that were compiled into the crate.

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// The code of `kernels/<module>.cu` for all targets, as a fatbin; `None` where there is no such file, or the crate was
/// built without nvcc.
pub(crate) fn image(module: &str) -> Option<&'static [u8]> {
    KERNELS.iter().find(|(name, _)| *name == module).map(|(_, image)| *image)
}

/// Every module with its code.
pub(crate) fn images() -> impl Iterator<Item = (&'static str, &'static [u8])> {
    KERNELS.iter().copied()
}

/// Whether this build of the crate holds GPU kernels. Without nvcc, or without the feature `cuda`, it holds none.
pub fn kernels_built() -> bool {
    !KERNELS.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_aligned_fatbins_and_found_by_name() {
        for (name, bytes) in KERNELS {
            assert_eq!(bytes.as_ptr().align_offset(64), 0, "{name}");
            assert_eq!(bytes[..4], 0xBA55_ED50u32.to_le_bytes(), "{name} does not begin as a fatbin does");
            assert_eq!(image(name), Some(*bytes));
        }
        assert_eq!(image("no_such_module"), None);
        assert_eq!(kernels_built(), !KERNELS.is_empty());
    }
}
