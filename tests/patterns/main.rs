//! Tests of the patterns, by their binaries, against real brokers.

mod task_queue;
