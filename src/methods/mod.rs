//! Published methods, whole: what is trained, what is measured, what is proved.

pub mod finite_aggregation;
