//! Batches decoded in the background, in order, a bounded number of them ahead.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

/// Does jobs on a thread of its own; results come back in the order of the jobs.
///
/// Nothing is done before it is asked for, and no more than `depth` jobs wait or lie finished, so
/// memory is bounded whatever the speeds. Dropping it stops the job in progress.
pub struct Background<J, R> {
    jobs: Option<SyncSender<J>>,
    results: Receiver<R>,
    thread: Option<JoinHandle<()>>,
    cancel: Arc<AtomicBool>,
    depth: usize,
    pending: usize,
    process: u32,
}

/// Why there is no result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Absent {
    /// Not yet.
    Pending,
    /// No job was submitted.
    Nothing,
    /// The thread has ended, or belongs to the process that this one was forked from.
    Gone,
}

impl<J: Send + 'static, R: Send + 'static> Background<J, R> {
    /// `work` gets each job, and a flag that tells it to give up.
    pub fn new(depth: usize, mut work: impl FnMut(J, &AtomicBool) -> R + Send + 'static) -> Self {
        let (jobs, todo) = sync_channel::<J>(depth);
        let (done, results) = sync_channel(depth);
        let cancel = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&cancel);
        let thread = std::thread::spawn(move || {
            while let Ok(job) = todo.recv() {
                if flag.load(Ordering::Relaxed) || done.send(work(job, &flag)).is_err() {
                    return;
                }
            }
        });
        let process = std::process::id();
        Background {
            jobs: Some(jobs),
            results,
            thread: Some(thread),
            cancel,
            depth,
            pending: 0,
            process,
        }
    }

    /// Jobs whose results have not been taken.
    pub fn pending(&self) -> usize {
        self.pending
    }

    fn is_ours(&self) -> bool {
        self.process == std::process::id()
    }

    /// Takes a job if there is room.
    pub fn submit(&mut self, job: J) -> Result<(), Absent> {
        if !self.is_ours() {
            return Err(Absent::Gone);
        }
        if self.pending == self.depth {
            return Err(Absent::Pending);
        }
        let jobs = self.jobs.as_ref().ok_or(Absent::Gone)?;
        jobs.try_send(job).map_err(|_| Absent::Gone)?;
        self.pending += 1;
        Ok(())
    }

    /// The next result, if it comes within `wait`.
    pub fn take(&mut self, wait: Duration) -> Result<R, Absent> {
        if self.pending == 0 {
            return Err(Absent::Nothing);
        }
        if !self.is_ours() {
            return Err(Absent::Gone);
        }
        match self.results.recv_timeout(wait) {
            Ok(result) => {
                self.pending -= 1;
                Ok(result)
            }
            Err(RecvTimeoutError::Timeout) => Err(Absent::Pending),
            Err(RecvTimeoutError::Disconnected) => Err(Absent::Gone),
        }
    }
}

impl<J, R> Drop for Background<J, R> {
    fn drop(&mut self) {
        self.cancel.store(true, Ordering::Relaxed);
        self.jobs = None;
        // Room for what is being finished, so that the thread never waits on us.
        while self.results.try_recv().is_ok() {}
        let thread = self.thread.take();
        if self.process == std::process::id() {
            let _ = thread.map(JoinHandle::join);
        } else {
            // After a fork there is no such thread here; waiting would never end.
            std::mem::forget(thread);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    #[test]
    fn results_come_in_order_and_bounded() {
        let mut background = Background::new(2, |job: u32, _: &AtomicBool| job * 10);
        assert_eq!(background.take(LONG), Err(Absent::Nothing));
        background.submit(1).unwrap();
        background.submit(2).unwrap();
        assert_eq!(background.submit(3), Err(Absent::Pending));
        assert_eq!(background.take(LONG), Ok(10));
        background.submit(3).unwrap();
        assert_eq!((background.take(LONG), background.take(LONG)), (Ok(20), Ok(30)));
        assert_eq!(background.pending(), 0);
    }

    #[test]
    fn dropping_stops_the_work() {
        let mut background = Background::new(3, |(): (), cancel: &AtomicBool| {
            while !cancel.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        background.submit(()).unwrap();
        background.submit(()).unwrap();
        assert_eq!(background.take(Duration::from_millis(5)), Err(Absent::Pending));
        drop(background);
    }

    #[test]
    fn a_thread_that_panics_is_gone() {
        let mut background = Background::new(1, |(): (), _: &AtomicBool| panic!("on purpose"));
        background.submit(()).unwrap();
        assert_eq!(background.take(LONG), Err::<(), _>(Absent::Gone));
    }
}
