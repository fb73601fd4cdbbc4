//! The thread pool of the CPU halves.
//!
//! A decode step runs a few hundred short parallel regions, a few microseconds apart. General-purpose pools wake sleeping workers
//! for each region, which costs more than the region itself. A worker of this pool therefore spins for some tens of
//! microseconds after a region before it sleeps. An idle process uses no CPU.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};
use std::thread::{self, Thread};
use std::{any::Any, hint, ptr};

/// Spins of a worker between regions before it sleeps: about 50 microseconds of pause instructions.
const SPINS: usize = 2_000;

/// Threads of a region, the caller's included. 0 until set or first used.
static THREADS: AtomicUsize = AtomicUsize::new(0);

/// Sets the number of threads. Has no effect once a region has run.
pub fn set_threads(threads: usize) {
    THREADS.store(threads.max(1), Ordering::Relaxed);
}

/// The number of threads of a region, the caller's included.
pub fn threads() -> usize {
    match THREADS.load(Ordering::Relaxed) {
        0 => {
            // Stored, because `available_parallelism` reads system files, which takes longer than a short region.
            let threads = thread::available_parallelism().map_or(1, usize::from);
            let set = THREADS.compare_exchange(0, threads, Ordering::Relaxed, Ordering::Relaxed);
            set.map_or_else(|other| other, |_| threads)
        }
        threads => threads,
    }
}

/// One parallel region, on the caller's stack while it runs.
struct Region<'a> {
    task: &'a (dyn Fn(usize) + Sync),
    tasks: usize,
    /// Next task to claim.
    next: AtomicUsize,
    /// The first panic of a task, which the caller raises again.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

impl Region<'_> {
    fn work(&self) {
        loop {
            let i = self.next.fetch_add(1, Ordering::Relaxed);
            if i >= self.tasks {
                return;
            }
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| (self.task)(i))) {
                self.panic.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(panic);
            }
        }
    }
}

/// The state that workers watch.
struct PoolState {
    /// The current region, or null. Its lifetime is erased: see [`parallel_for`].
    region: AtomicPtr<Region<'static>>,
    /// Counts regions, so that a worker enters each one once.
    epoch: AtomicUsize,
    /// Workers inside the current region.
    inside: AtomicUsize,
    /// Of each worker: whether it sleeps and must be woken.
    asleep: Vec<AtomicBool>,
}

struct Pool {
    shared: &'static PoolState,
    workers: Vec<Thread>,
    /// Held while a region runs. A second caller runs its region alone instead of waiting.
    busy: Mutex<()>,
}

fn pool() -> &'static Pool {
    static POOL: OnceLock<Pool> = OnceLock::new();
    POOL.get_or_init(|| {
        let workers = threads() - 1;
        let shared: &'static PoolState = Box::leak(Box::new(PoolState {
            region: AtomicPtr::new(ptr::null_mut()),
            epoch: AtomicUsize::new(0),
            inside: AtomicUsize::new(0),
            asleep: (0..workers).map(|_| AtomicBool::new(false)).collect(),
        }));
        let workers = (0..workers)
            .map(|i| {
                let spawned = thread::Builder::new().name(format!("ops-{i}")).spawn(move || worker(shared, i));
                // The process cannot work without its threads, and they are spawned once, at the start.
                spawned.expect("the system gives a thread").thread().clone()
            })
            .collect();
        Pool { shared, workers, busy: Mutex::new(()) }
    })
}

fn worker(shared: &'static PoolState, index: usize) {
    let mut seen = 0;
    loop {
        let mut spins = 0;
        while shared.epoch.load(Ordering::Acquire) == seen {
            spins += 1;
            if spins < SPINS {
                hint::spin_loop();
                continue;
            }
            shared.asleep[index].store(true, Ordering::SeqCst);
            while shared.epoch.load(Ordering::SeqCst) == seen {
                thread::park();
            }
            shared.asleep[index].store(false, Ordering::SeqCst);
        }
        seen = shared.epoch.load(Ordering::Acquire);
        // Enter before reading the pointer: the caller clears the pointer first and then waits until no worker is inside.
        shared.inside.fetch_add(1, Ordering::SeqCst);
        let region = shared.region.load(Ordering::SeqCst);
        if !region.is_null() {
            // SAFETY: the caller keeps the region alive until `inside` is zero after it has cleared the pointer. This worker
            // incremented `inside` before it read the pointer.
            unsafe { &*region }.work();
        }
        shared.inside.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Runs `task(0) .. task(tasks - 1)`, in any order, on the pool's threads and the caller's, and returns when all are done. Panics if
/// a task panics. Calls from within a task, and calls while another thread's region runs, use the calling thread alone.
pub fn parallel_for(tasks: usize, task: impl Fn(usize) + Sync) {
    let alone = || (0..tasks).for_each(&task);
    if tasks <= 1 || threads() == 1 {
        return alone();
    }
    let pool = pool();
    let Ok(busy) = pool.busy.try_lock() else { return alone() };
    let region = Region { task: &task, tasks, next: AtomicUsize::new(0), panic: Mutex::new(None) };
    let shared = pool.shared;
    shared.region.store(ptr::from_ref(&region).cast_mut().cast(), Ordering::SeqCst);
    shared.epoch.fetch_add(1, Ordering::SeqCst);
    for (thread, asleep) in pool.workers.iter().zip(&shared.asleep).take(tasks - 1) {
        if asleep.load(Ordering::SeqCst) {
            thread.unpark();
        }
    }
    region.work();
    // From here on no worker can enter the region. Wait for those inside.
    shared.region.store(ptr::null_mut(), Ordering::SeqCst);
    let mut spins = 0;
    while shared.inside.load(Ordering::SeqCst) != 0 {
        spins += 1;
        if spins < SPINS {
            hint::spin_loop();
        } else {
            // The worker may be descheduled: give it this processor.
            thread::yield_now();
        }
    }
    // Released before unwinding, which would poison the lock and leave every later region to its caller alone.
    drop(busy);
    if let Some(panic) = region.panic.into_inner().unwrap_or_else(|e| e.into_inner()) {
        resume_unwind(panic);
    }
}

/// A pointer to a buffer, through which the tasks of a region write disjoint parts of it.
#[derive(Clone, Copy)]
pub struct SharedMut<T>(*mut T);

// SAFETY: it is only a pointer; each use is an unsafe call whose caller promises disjoint ranges.
unsafe impl<T: Send> Send for SharedMut<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SharedMut<T> {}

impl<T> SharedMut<T> {
    /// Shares a buffer among the tasks of a region.
    pub fn new(buffer: &mut [T]) -> Self {
        Self(buffer.as_mut_ptr())
    }

    /// `buffer[start..start + len]`.
    ///
    /// # Safety
    /// The range lies in the buffer, the buffer outlives the slice, and no other live slice overlaps the range.
    #[allow(clippy::mut_from_ref)] // The caller promises exclusive access, which the borrow checker cannot see.
    pub unsafe fn slice(&self, start: usize, len: usize) -> &mut [T] {
        // SAFETY: promised by the caller.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(start), len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU64;

    #[test]
    fn every_task_runs_once_even_when_nested() {
        for tasks in [0, 1, 2, 3, 7, 64, 1000] {
            let counts: Vec<AtomicU64> = (0..tasks).map(|_| AtomicU64::new(0)).collect();
            parallel_for(tasks, |i| {
                parallel_for(3, |_| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
            });
            assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 3));
        }
    }

    #[test]
    fn regions_of_several_callers_complete() {
        let total = AtomicU64::new(0);
        thread::scope(|s| {
            for _ in 0..4 {
                s.spawn(|| {
                    for _ in 0..500 {
                        parallel_for(5, |i| {
                            total.fetch_add(i as u64, Ordering::Relaxed);
                        });
                    }
                });
            }
        });
        assert_eq!(total.into_inner(), 4 * 500 * 10);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_goes_on() {
        let result = catch_unwind(|| parallel_for(8, |i| assert!(i != 5, "task five")));
        assert!(result.is_err());
        assert!(threads() == 1 || !pool().busy.is_poisoned());
        let sum = AtomicU64::new(0);
        parallel_for(8, |i| {
            sum.fetch_add(i as u64, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 28);
    }
}
