//! The pictures that a training run leaves behind, as self-contained SVG files.
//!
//! Each function takes plain data, draws one picture and writes it atomically: a reader finds the old file or the new
//! one, never half of one. The same data gives the same bytes.
//!
//! - [`training_curves`]: loss and accuracy over the epochs;
//! - [`prediction_sheet`]: pictures with the network's guesses beside the truth;
//! - [`attention_sheet`]: where the heads of a transformer look.

mod attention;
mod axis;
mod curves;
mod picture;
mod predictions;
mod svg;
#[cfg(test)]
mod tests;

pub use attention::{AttentionView, attention_sheet};
pub use curves::{EpochRecord, StepRecord, training_curves};
pub use picture::ImageView;
pub use predictions::{PredictionView, prediction_sheet};
