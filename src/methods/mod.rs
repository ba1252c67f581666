//! The papers' methods: what is built of networks, data and training, and is more than one network.

pub mod finite_aggregation;
