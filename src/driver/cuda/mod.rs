//! The NVIDIA driver behind the seam.
