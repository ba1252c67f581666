//! The emulator behind the seam.
