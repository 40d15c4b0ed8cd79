//! The decisions of the patterns: data in, data out, no client in scope.
//!
//! What a broker does with a decision is in `src/bin/<pattern>_<broker>.rs`.

pub mod task_queue;
