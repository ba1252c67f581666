//! The pictures that a training run leaves behind, as self-contained SVG files.
//!
//! Each function takes plain data, draws one picture and writes it atomically: a reader finds the old file or the new
//! one, never half of one. The same data gives the same bytes.
//!
//! - [`training_curves`]: loss and accuracy over the epochs;
//! - [`prediction_sheet`]: pictures with the network's guesses beside the truth;
//! - [`attention_sheet`]: where the heads of a transformer look;
//! - [`certified_curves`]: how much accuracy is certified against poisoning, by size of attack.
//!
//! ```
//! use gridgrad::report::{EpochRecord, training_curves};
//! let epoch = |epoch, train_loss, accuracy| EpochRecord {
//!     epoch,
//!     train_loss,
//!     held_out_accuracy: Some(accuracy),
//!     ..EpochRecord::default()
//! };
//! let folder = tempfile::tempdir().unwrap();
//! let epochs = [epoch(1, 2.1, 0.4), epoch(2, 1.2, 0.7), epoch(3, 0.6, 0.9)];
//! training_curves(folder.path().join("curves.svg"), "A run", &epochs, &[])?;
//! # Ok::<(), gridgrad::Error>(())
//! ```

mod attention;
mod axis;
mod certified;
mod curves;
mod picture;
mod predictions;
mod svg;
#[cfg(test)]
mod tests;

pub use attention::{AttentionView, attention_sheet};
pub use certified::{CertifiedCurve, certified_curves};
pub use curves::{EpochRecord, StepRecord, training_curves};
pub use picture::ImageView;
pub use predictions::{PredictionView, prediction_sheet};
