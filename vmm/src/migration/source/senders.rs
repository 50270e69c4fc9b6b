// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Threads that send pages, one a data connection, each its stripe of every round.

use std::io::{self, BufWriter};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use atoll_thread::Kind;
use rustix::event::PollFlags;

use super::{LOOK, MigrationError, Progress, ask};
use crate::kvm::dirty::WriteLog;
use crate::migration::has;
use crate::migration::pages::{self, BUFFER_BYTES, Dirty, Left, Stripe};
use crate::migration::socket::Socket;
use crate::saved::image::Touched;

enum Job {
    Round(Arc<Left>, Pass),
    End,
}

/// Where a round is in a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pass {
    /// All of memory, of which the target has nothing.
    First,
    /// What was written since.
    Again,
    /// The rest, of a guest that is held.
    Last,
    /// The rest, of a guest that runs at the target.
    Later,
}

/// One thread a data connection. They end when this is dropped, with their connections.
pub(super) struct Senders {
    /// The connection for messages.
    target: UnixStream,
    progress: Arc<Progress>,
    jobs: Vec<Sender<Job>>,
    results: Receiver<io::Result<()>>,
    threads: Vec<JoinHandle<()>>,
}

impl Senders {
    pub(super) fn start(
        data: Vec<Socket>,
        target: UnixStream,
        log: &Arc<WriteLog>,
        touched: Option<Arc<Touched>>,
        progress: &Arc<Progress>,
    ) -> Result<Self, MigrationError> {
        let count = data.len();
        let (result, results) = channel();
        let mut senders = Self {
            target,
            progress: progress.clone(),
            jobs: Vec::new(),
            results,
            threads: Vec::new(),
        };
        for (index, stream) in data.into_iter().enumerate() {
            let (job, jobs) = channel::<Job>();
            let (log, touched, sent) = (log.clone(), touched.clone(), progress.sent.clone());
            let switch = progress.switch.clone();
            let (result, pace) = (result.clone(), progress.pace.clone());
            let body = move || {
                let mut out = BufWriter::with_capacity(BUFFER_BYTES, stream);
                for job in jobs {
                    let done = match job {
                        Job::End => pages::send_end(&mut out),
                        Job::Round(left, pass) => {
                            let forget = |region, first_word, words: &[u64]| match pass {
                                Pass::Last | Pass::Later => Ok(()),
                                _ => log
                                    .forget(region, first_word, words)
                                    .map_err(io::Error::other),
                            };
                            let round = pages::Round {
                                ram: log.memory(),
                                left: &left,
                                stop: matches!(pass, Pass::First | Pass::Again).then_some(&switch),
                                eager: pass == Pass::Later,
                                first: (pass == Pass::First).then_some(touched.as_deref()),
                                sent: &sent,
                                pace: &pace,
                                forget: &forget,
                            };
                            pages::send(&round, Stripe { index, count }, &mut out)
                        }
                    };
                    if result.send(done).is_err() {
                        return;
                    }
                }
            };
            let name = format!("migrate-{index}");
            let thread = atoll_thread::spawn(Kind::Migration, &name, body);
            let thread = thread.map_err(MigrationError::connection("start a sender's thread"))?;
            senders.threads.push(thread);
            senders.jobs.push(job);
        }
        Ok(senders)
    }

    /// Sends pages; returns those that were not sent because the guest is to run at the target.
    pub(super) fn round(&self, dirty: Dirty, pass: Pass) -> Result<Dirty, MigrationError> {
        let left = Arc::new(pages::left(dirty));
        self.give(|| Job::Round(left.clone(), pass));
        self.wait()?;
        Ok(pages::rest(&left))
    }

    /// Begins to send pages, the last ones. Nobody waits for that: what has come is for the target to say.
    pub(super) fn begin(&self, left: &Arc<Left>) {
        self.give(|| Job::Round(left.clone(), Pass::Later));
        self.give(|| Job::End);
    }

    pub(super) fn end(&self) -> Result<(), MigrationError> {
        self.give(|| Job::End);
        self.wait()
    }

    /// An error, and the end of all connections, if `happened` has to the one for messages.
    fn listen(&self, happened: PollFlags) -> Result<(), MigrationError> {
        if !has(&self.target, happened) {
            return Ok(());
        }
        let said = ask(&self.target);
        self.progress.cut();
        said.and(Err(MigrationError::Unexpected("that the target goes on")))
    }

    fn give(&self, job: impl Fn() -> Job) {
        for sender in &self.jobs {
            // A thread lives as long as its channel.
            let _ = sender.send(job());
        }
    }

    /// Waits for the job that was given, as long as there is a target.
    fn wait(&self) -> Result<(), MigrationError> {
        let mut failed = None;
        let mut count = 0;
        while count < self.jobs.len() {
            match self.results.recv_timeout(LOOK) {
                Ok(result) => {
                    count += 1;
                    failed = failed.or(result.err());
                }
                Err(_) => self.listen(PollFlags::RDHUP)?,
            }
        }
        match failed {
            None => Ok(()),
            Some(source) => {
                // Why the target ended it, if it has said so.
                self.listen(PollFlags::IN)?;
                Err(MigrationError::Connection {
                    what: "send memory",
                    source,
                })
            }
        }
    }
}

impl Drop for Senders {
    fn drop(&mut self) {
        self.jobs.clear();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
