//! The thread pool that the CPU halves share.

/// Runs `f(0) .. f(tasks - 1)`, in any order, on the pool's threads and the caller's, and returns when all are done.
pub fn parallel_for(tasks: usize, f: impl Fn(usize) + Sync) {
    for i in 0..tasks {
        f(i);
    }
}
