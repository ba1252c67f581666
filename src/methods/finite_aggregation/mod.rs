//! Certified defence against data poisoning by Finite Aggregation (Wang, Levine and Feizi, ICML 2022).

pub mod learner;
