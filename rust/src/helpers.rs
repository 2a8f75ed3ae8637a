//! Threads that stay, and help with a piece of work if they come to run before it is done.
//!
//! Starting a thread costs as much as copying a tenth of a megabyte, and on a busy machine it may
//! not run for milliseconds. So nobody waits for a helper that has not begun: the owner of the
//! work does what is left itself. That also holds in a forked process, where the helpers are gone.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, Thread};

/// Set in `Job::inside` once nobody may begin any more.
const CLOSED: usize = 1 << (usize::BITS - 1);
/// Looks at a helper that is about to finish before sleeping until it does: some microseconds.
const SPINS: usize = 200;

/// Runs `work` on this thread, and at the same time on up to `helpers` others.
///
/// `work` must take its pieces from a common store, and return when none is left.
///
/// # Panics
///
/// If `work` does, on whichever thread.
pub fn share(helpers: usize, work: &(dyn Fn() + Sync)) {
    let pool = if helpers > 0 { Pool::of_process() } else { None };
    let Some(pool) = pool else { return work() };
    // SAFETY: only the lifetime is changed; `Open` below keeps `work` borrowed until it is closed
    // and nobody is inside, also when `work` panics on this thread.
    let work: &'static (dyn Fn() + Sync) = unsafe { std::mem::transmute(work) };
    let (inside, panicked) = (AtomicUsize::new(0), AtomicBool::new(false));
    let job = Arc::new(Job { work, inside, panicked, owner: thread::current() });
    let open = Open { pool: &pool, job: &job };
    pool.post(&job, helpers);
    (job.work)();
    drop(open);
    assert!(!job.panicked.load(Ordering::Relaxed), "a helper panicked");
}

/// A piece of work that helpers may join.
struct Job {
    work: &'static (dyn Fn() + Sync),
    /// How many helpers are inside, and `CLOSED`.
    inside: AtomicUsize,
    panicked: AtomicBool,
    owner: Thread,
}

impl Job {
    /// Helps, unless it is too late.
    fn help(&self) {
        let enter = |n: usize| (n & CLOSED == 0).then_some(n + 1);
        if self.inside.fetch_update(Ordering::Acquire, Ordering::Relaxed, enter).is_ok() {
            if catch_unwind(AssertUnwindSafe(self.work)).is_err() {
                self.panicked.store(true, Ordering::Relaxed);
            }
            self.inside.fetch_sub(1, Ordering::Release);
            self.owner.unpark();
        }
    }
}

/// A job while it can be joined; dropping it closes the job and waits for those inside.
struct Open<'a> {
    pool: &'a Pool,
    job: &'a Arc<Job>,
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.job.inside.fetch_or(CLOSED, Ordering::AcqRel);
        self.pool.withdraw(self.job);
        let mut spins = 0;
        while self.job.inside.load(Ordering::Acquire) != CLOSED {
            spins += 1;
            if spins < SPINS { std::hint::spin_loop() } else { thread::park() }
        }
    }
}

#[derive(Default)]
struct Pool {
    queue: Mutex<Queue>,
    wake: Condvar,
}

#[derive(Default)]
struct Queue {
    /// A job stands here once for each helper that it wants.
    jobs: Vec<Arc<Job>>,
    threads: usize,
}

/// The process that the threads belong to, and what they wait for.
static POOL: Mutex<(u32, Option<Arc<Pool>>)> = Mutex::new((0, None));

impl Pool {
    /// This process' helpers; None while somebody else asks, or did so when the process was forked.
    fn of_process() -> Option<Arc<Pool>> {
        let mut known = POOL.try_lock().ok()?;
        let process = std::process::id();
        if known.0 != process {
            *known = (process, Some(Arc::default()));
        }
        known.1.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn post(self: &Arc<Self>, job: &Arc<Job>, helpers: usize) {
        let mut queue = self.lock();
        while queue.threads < helpers {
            let pool = Arc::clone(self);
            let name = "promptkd-helper".to_owned();
            if thread::Builder::new().name(name).spawn(move || pool.serve()).is_err() {
                break; // as many as the system allows
            }
            queue.threads += 1;
        }
        let wanted = helpers.min(queue.threads);
        queue.jobs.extend(std::iter::repeat_n(Arc::clone(job), wanted));
        drop(queue);
        (0..wanted).for_each(|_| self.wake.notify_one());
    }

    /// Takes back what no helper has seen yet.
    fn withdraw(&self, job: &Arc<Job>) {
        self.lock().jobs.retain(|other| !Arc::ptr_eq(other, job));
    }

    fn serve(&self) {
        loop {
            let mut queue = self.lock();
            let job = loop {
                match queue.jobs.pop() {
                    Some(job) => break job,
                    None => {
                        queue = self.wake.wait(queue).unwrap_or_else(PoisonError::into_inner);
                    }
                }
            };
            drop(queue);
            job.help();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn each_piece_is_done_once_and_before_the_end() {
        for helpers in [0, 1, 3] {
            for count in [0, 1, 7, 5000] {
                let done: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
                let next = AtomicUsize::new(0);
                share(helpers, &|| {
                    while let Some(piece) = done.get(next.fetch_add(1, Ordering::Relaxed)) {
                        piece.fetch_add(1, Ordering::Relaxed);
                    }
                });
                assert!(done.iter().all(|n| n.load(Ordering::Relaxed) == 1));
            }
        }
    }

    /// Whether it becomes true within a second.
    fn soon(condition: impl Fn() -> bool) -> bool {
        let end = Instant::now() + Duration::from_secs(1);
        while !condition() && Instant::now() < end {
            thread::yield_now();
        }
        condition()
    }

    #[test]
    fn helpers_run_and_are_waited_for() {
        // Other tests may be asking for the helpers at the same moment: try again.
        let all_came = (0..20).any(|_| {
            let (begun, ended) = (AtomicUsize::new(0), AtomicUsize::new(0));
            share(2, &|| {
                begun.fetch_add(1, Ordering::SeqCst);
                soon(|| begun.load(Ordering::SeqCst) == 3);
                thread::sleep(Duration::from_millis(10));
                ended.fetch_add(1, Ordering::SeqCst);
            });
            assert_eq!(ended.load(Ordering::SeqCst), begun.load(Ordering::SeqCst));
            begun.load(Ordering::SeqCst) == 3
        });
        assert!(all_came);
    }

    #[test]
    fn several_owners_at_once() {
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        let left = AtomicUsize::new(20);
                        let take = |n: usize| n.checked_sub(1);
                        share(2, &|| {
                            let order = Ordering::Relaxed;
                            while left.fetch_update(order, order, take).is_ok() {}
                        });
                        assert_eq!(left.load(Ordering::Relaxed), 0);
                    }
                });
            }
        });
    }

    #[test]
    fn panics_wait_for_the_others_and_are_passed_on() {
        for owner_panics in [true, false] {
            let both_ran = (0..20).any(|_| {
                let owner = thread::current().id();
                let (begun, ended) = (AtomicUsize::new(0), AtomicUsize::new(0));
                let result = catch_unwind(AssertUnwindSafe(|| {
                    share(1, &|| {
                        begun.fetch_add(1, Ordering::SeqCst);
                        let both = soon(|| begun.load(Ordering::SeqCst) == 2);
                        assert!(!both || (thread::current().id() == owner) != owner_panics);
                        thread::sleep(Duration::from_millis(10));
                        ended.fetch_add(1, Ordering::SeqCst);
                    });
                }));
                let both = begun.load(Ordering::SeqCst) == 2;
                assert_eq!(result.is_err(), both);
                assert_eq!(ended.load(Ordering::SeqCst), 1);
                both
            });
            assert!(both_ran);
        }
    }
}
