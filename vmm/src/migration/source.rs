// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The source's side: rounds over RAM while the guest runs, then the hand-over. Runs on the thread `migrate`, with
//! one thread a data connection (`senders`).

mod senders;

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use atoll_devices::memory::PAGE_BYTES;
use atoll_thread::Kind;
use atoll_vmm_protocol::api::{MigrationInfo, MigrationStage};
use senders::{Pass, Senders};

use super::converge::{Convergence, Next, Round, Rounds};
use super::disks::{self, Course, Following, Moving, Target};
use super::pages::{self, Dirty, Left, Pace};
use super::postcopy::{self, Service};
use super::socket::Socket;
use super::{Hello, Message, MigrationError, receive, send};
use crate::kvm::KvmError;
use crate::kvm::dirty::WriteLog;
use crate::saved::MachineState;
use crate::saved::image::Touched;

/// How long the target may take to build the machine, and then to say that it has it.
const PATIENCE: Duration = Duration::from_secs(60);
/// In every one of these periods a vCPU that is slowed down rests once.
const BRAKE_PERIOD: Duration = Duration::from_millis(50);
/// How often it is looked how much is left to send, while that is waited for.
pub(super) const LOOK: Duration = Duration::from_millis(100);

/// Whose decision it is that the source goes on.
const OPEN: u8 = 0;
const COMMITTED: u8 = 1;
const CANCELLED: u8 = 2;

/// What is asked of a migration: where to, over how many connections, how long the guest may stand still.
pub struct Plan {
    /// The connection for messages.
    pub control: UnixStream,
    /// Connections for pages, which are shared out among them.
    pub data: Vec<Socket>,
    /// Connections for pages that the guest waits for; if there are any, the move may end with post-copy.
    pub lines: Vec<UnixStream>,
    /// Disks whose content moves along.
    pub disks: Vec<Moving>,
    /// When the guest is held for the last pages, and what is done to get there.
    pub convergence: Convergence,
    /// The connections are a tunnel's: their end is not the end of the target.
    pub relayed: bool,
}

/// How far a migration is; also the way to cancel it.
pub struct Progress {
    started: Instant,
    decision: AtomicU8,
    rounds: AtomicU32,
    /// Percent of their time that vCPUs rest.
    throttle: AtomicU8,
    sent: Arc<AtomicU64>,
    /// Ended by a cancellation, like the sockets.
    pace: Arc<Pace>,
    remaining: AtomicU64,
    downtime_us: AtomicU64,
    /// Leaf lock: stage, and why it failed.
    stage: Mutex<(MigrationStage, Option<String>)>,
    disks: Course,
    /// The guest is to run there now, whatever is left.
    switch: Arc<AtomicBool>,
    may_switch: bool,
    /// Ended by a cancellation, so that nobody goes on waiting for them.
    sockets: Vec<Socket>,
}

impl Progress {
    /// The progress of a migration that begins now: no round, no byte, not cancelled.
    pub fn new(plan: &Plan) -> io::Result<Self> {
        let others = std::iter::once(&plan.control).chain(&plan.lines);
        let others = others.map(|stream| stream.try_clone().map(Socket::from));
        let data = plan.data.iter().map(Socket::try_clone);
        Ok(Self {
            started: Instant::now(),
            decision: AtomicU8::new(OPEN),
            rounds: AtomicU32::new(0),
            throttle: AtomicU8::new(0),
            sent: Arc::default(),
            pace: Arc::new(Pace::new(plan.convergence.max_bytes_per_second)),
            remaining: AtomicU64::new(0),
            downtime_us: AtomicU64::new(0),
            stage: Mutex::new((MigrationStage::Copying, None)),
            switch: Arc::default(),
            may_switch: !plan.lines.is_empty(),
            sockets: others.chain(data).collect::<io::Result<_>>()?,
            disks: Course::new(&plan.disks)?,
        })
    }

    /// Cancels it; false when the machine is the target's already.
    pub fn cancel(&self) -> bool {
        let cancelled = self.decide(CANCELLED);
        if cancelled {
            self.cut();
            self.disks.cut();
        }
        cancelled || self.decision.load(Ordering::SeqCst) == CANCELLED
    }

    /// Ends the connections, for the other side, too.
    pub(super) fn cut(&self) {
        self.sockets.iter().for_each(Socket::end);
        // Whoever holds pages back finds that out at once.
        self.pace.end();
    }

    /// Has the guest run there as soon as that is possible; false when the move was not begun like that.
    pub fn switch(&self) -> bool {
        if self.may_switch {
            self.switch.store(true, Ordering::SeqCst);
        }
        self.may_switch
    }

    /// Has the machine be the target's; false when it was cancelled before.
    pub(super) fn commit(&self) -> bool {
        self.decide(COMMITTED)
    }

    /// Notes for how long the guest has stood still.
    pub(super) fn note_downtime(&self, time: Duration) {
        self.downtime_us
            .store(microseconds(time), Ordering::Relaxed);
    }

    fn decide(&self, decision: u8) -> bool {
        self.decision
            .compare_exchange(OPEN, decision, Ordering::SeqCst, Ordering::SeqCst)
            .is_ok()
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.decision.load(Ordering::SeqCst) == CANCELLED
    }

    pub(super) fn disks(&self) -> &Course {
        &self.disks
    }

    /// Notes the stage for whoever asks, and why it failed if it did.
    pub fn set_stage(&self, stage: MigrationStage, error: Option<String>) {
        *self.stage.lock().unwrap_or_else(PoisonError::into_inner) = (stage, error);
    }

    /// How far it is, as the control API tells it. Never waits for the migration.
    pub fn info(&self) -> MigrationInfo {
        let stage = self.stage.lock().unwrap_or_else(PoisonError::into_inner);
        let elapsed = self.started.elapsed().as_millis();
        MigrationInfo {
            stage: stage.0,
            rounds: self.rounds.load(Ordering::Relaxed),
            sent_bytes: self.sent.load(Ordering::Relaxed),
            remaining_bytes: self.remaining.load(Ordering::Relaxed),
            elapsed_ms: u64::try_from(elapsed).unwrap_or(u64::MAX),
            downtime_us: self.downtime_us.load(Ordering::Relaxed),
            throttle_percent: self.throttle.load(Ordering::Relaxed),
            disks: self.disks.told(),
            error: stage.1.clone(),
        }
    }
}

/// What the machine's owner does for its move, asked from this module's threads.
pub trait Owner: Clone + Send + 'static {
    /// Makes its vCPUs rest for a while, and does not wait for that.
    fn rest(&self, time: Duration);

    /// Begins to copy disks to the target, all of them as they are at one moment and what is written to them afterwards.
    fn follow(&self, targets: Vec<Target>) -> Result<Vec<Following>, MigrationError>;

    /// Logs from now on what is written to its memory.
    fn log(&self) -> Result<WriteLog, MigrationError>;

    /// Has its disks keep what the guest has written, so that little is left of that when it is held; a failure is for
    /// that to find.
    fn flush(&self);

    /// Stops it and takes its state. It stays held, whatever becomes of the migration: the owner lets it go on when that
    /// ends with an error other than [`MigrationError::Doubt`].
    fn hold(&self) -> Result<MachineState, MigrationError>;

    /// Tells it that the machine is the target's, and that its memory is still needed here.
    fn taken(&self);
}

/// Moves the machine.
pub fn run(
    plan: Plan,
    hello: Hello,
    touched: Option<Arc<Touched>>,
    progress: &Arc<Progress>,
    owner: &impl Owner,
) -> Result<(), MigrationError> {
    let migrated = attempt(plan, hello, touched, progress, owner);
    if migrated.is_err() {
        // A target that is silent keeps nobody.
        progress.disks.cut();
        progress.disks.end();
        // The target is to know, too, and whoever sends to it.
        progress.cut();
    }
    match migrated {
        Err(_) if progress.is_cancelled() => Err(MigrationError::Cancelled),
        migrated => migrated,
    }
}

fn attempt(
    plan: Plan,
    hello: Hello,
    touched: Option<Arc<Touched>>,
    progress: &Arc<Progress>,
    owner: &impl Owner,
) -> Result<(), MigrationError> {
    let Plan {
        mut control,
        data,
        lines,
        disks: moving,
        convergence,
        relayed,
    } = plan;
    let broken = MigrationError::connection;
    let limited = control.set_read_timeout(Some(PATIENCE));
    limited.map_err(broken("limit the wait for the target"))?;
    send(&mut control, &Message::Hello(Box::new(hello))).map_err(broken("greet the target"))?;
    match ask(&control)? {
        Message::Welcome => {}
        _ => return Err(MigrationError::Unexpected("a welcome")),
    }
    disks::follow(moving, progress, owner)?;
    let log = Arc::new(owner.log()?);
    let again = control.try_clone();
    let again = again.map_err(broken("keep the connection"))?;
    let senders = Senders::start(data, again, &log, touched, progress)?;
    let brake = Brake::start(progress.clone(), owner.clone())?;
    let (last, end) = copy_while_running(&senders, &log, progress, convergence, owner)?;
    drop(brake);
    let later = match end {
        End::Whole => None,
        End::PostCopy => Some(lines),
    };

    let held = Instant::now();
    let (done, service) = switch(&mut control, &senders, last, later, &log, progress, owner);
    // Also of a hand-over in doubt.
    if progress.decision.load(Ordering::SeqCst) == COMMITTED {
        let (time, limit) = (held.elapsed(), convergence.downtime_limit);
        let downtime_us = microseconds(time);
        progress.downtime_us.store(downtime_us, Ordering::Relaxed);
        if time > limit {
            let limit_us = microseconds(limit);
            tracing::warn!(
                downtime_us,
                limit_us,
                "the guest stood still for longer than was allowed"
            );
        }
    }
    let done = match service {
        Some((service, left)) => finish(done, service, &left, relayed, progress, owner)?,
        None => {
            progress.remaining.store(0, Ordering::Relaxed);
            done
        }
    };
    match done {
        Ok(()) => Ok(()),
        Err(Switch::Failed(error)) => Err(error),
        Err(Switch::Broke(error)) if !relayed && has_ended(&error) => {
            Err(MigrationError::Connection {
                what: "the target ended before it took the machine",
                source: error,
            })
        }
        Err(Switch::Broke(_)) => Err(MigrationError::Doubt),
    }
}

/// Why the machine is not the target's, as far as is known.
enum Switch {
    /// It is this process's; or that is in doubt, and the error says so.
    Failed(MigrationError),
    /// The connection broke when the machine had been handed over.
    Broke(io::Error),
}

impl From<MigrationError> for Switch {
    fn from(error: MigrationError) -> Self {
        Self::Failed(error)
    }
}

/// How the copying of memory ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// What is left is sent while the guest is held.
    Whole,
    /// It is sent while the guest runs there.
    PostCopy,
}

/// Pages that are still to be sent, and who answers for those that are waited for.
type Remaining = (Service, Arc<Left>);

/// Holds the machine, sends the rest of it or begins to, and hands it over.
fn switch(
    control: &mut UnixStream,
    senders: &Senders,
    last: Dirty,
    later: Option<Vec<UnixStream>>,
    log: &WriteLog,
    progress: &Progress,
    owner: &impl Owner,
) -> (Result<(), Switch>, Option<Remaining>) {
    progress.set_stage(MigrationStage::Switching, None);
    let mut remaining = None;
    let sent = || {
        let started = Instant::now();
        let mut last = last;
        let state = owner.hold()?;
        disks::settle(progress)?;
        pages::merge(&mut last, &log.look().map_err(|error| refused(&error))?);
        let bytes = pages::size_bytes(&last);
        progress.remaining.store(bytes, Ordering::Relaxed);
        let state = Message::State(Box::new(state));
        let hold_us = microseconds(started.elapsed());
        match later {
            None => send_whole(control, senders, &state, last)?,
            Some(lines) => {
                remaining = Some(send_later(
                    control, senders, &state, last, lines, log, progress,
                )?);
            }
        }
        let send_us = microseconds(started.elapsed()) - hold_us;
        match ask(control)? {
            Message::Ready => {}
            _ => return Err(MigrationError::Unexpected("that the target is ready")),
        }
        let build_us = microseconds(started.elapsed()) - hold_us - send_us;
        tracing::info!(hold_us, send_us, build_us, bytes, "the target is ready");
        Ok(())
    };
    let done = sent().map_err(Switch::Failed);
    (done.and_then(|()| hand_over(control, progress)), remaining)
}

fn send_whole(
    control: &mut UnixStream,
    senders: &Senders,
    state: &Message,
    last: Dirty,
) -> Result<(), MigrationError> {
    // The target takes it to pieces while the pages come.
    let sent = send(control, state);
    sent.map_err(MigrationError::connection("send the machine's state"))?;
    senders.round(last, Pass::Last)?;
    senders.end()
}

/// Sends the state and what is missing, and begins to send that.
fn send_later(
    control: &mut UnixStream,
    senders: &Senders,
    state: &Message,
    last: Dirty,
    lines: Vec<UnixStream>,
    log: &WriteLog,
    progress: &Progress,
) -> Result<Remaining, MigrationError> {
    let broken = MigrationError::connection;
    senders.end()?;
    send(control, &Message::Remaining)
        .and_then(|()| postcopy::send_bitmap(control, &last))
        .and_then(|()| send(control, state))
        .map_err(broken("send the machine's state"))?;
    let left = Arc::new(pages::left(last));
    let service = Service::start(lines, log.memory(), &left, &progress.sent)?;
    senders.begin(&left);
    Ok((service, left))
}

/// Makes the machine the target's, unless the move is cancelled.
fn hand_over(control: &mut UnixStream, progress: &Progress) -> Result<(), Switch> {
    if !progress.decide(COMMITTED) {
        return Err(MigrationError::Cancelled.into());
    }
    // What was not written whole cannot be read as a Commit: the target has not taken it.
    let sent = send(control, &Message::Commit);
    sent.map_err(MigrationError::connection("hand the machine over"))?;
    match receive(control) {
        Ok(Message::Taken) => Ok(()),
        // Says so before it would run.
        Ok(Message::Failed { reason }) => Err(MigrationError::Other(reason).into()),
        Ok(_) => Err(MigrationError::Doubt.into()),
        Err(error) => Err(Switch::Broke(error)),
    }
}

/// Sends what is left until the target has all, if it has the machine or may have it.
fn finish(
    done: Result<(), Switch>,
    service: Service,
    left: &Left,
    relayed: bool,
    progress: &Progress,
    owner: &impl Owner,
) -> Result<Result<(), Switch>, MigrationError> {
    let mut served = Ok(());
    let look = || {
        let bytes = pages::size_bytes(&pages::rest(left));
        progress.remaining.store(bytes, Ordering::Relaxed);
    };
    match &done {
        Ok(()) => {
            owner.taken();
            progress.set_stage(MigrationStage::PostCopy, None);
            served = service.wait(look);
        }
        // It may run there: whoever knows more is told how much is missing. What was sent last may not have come.
        Err(Switch::Broke(_) | Switch::Failed(MigrationError::Doubt)) => {
            let missing = match service.wait(look) {
                Ok(()) => 0,
                Err(_) => pages::size_bytes(&pages::rest(left)).max(PAGE_BYTES as u64),
            };
            progress.remaining.store(missing, Ordering::Relaxed);
        }
        Err(Switch::Failed(_)) => {}
    }
    progress.cut();
    service.end();
    let missing = pages::size_bytes(&pages::rest(left));
    served.map_err(|source| match missing {
        0 if relayed => MigrationError::Unheard(source),
        _ => MigrationError::Lost {
            missing_kib: missing >> 10,
            source,
        },
    })?;
    if done.is_ok() {
        progress.remaining.store(0, Ordering::Relaxed);
    }
    Ok(done)
}

fn microseconds(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// Whether the process at the other end of a Unix socket is gone.
pub(super) fn has_ended(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
    )
}

/// The target's next message; its refusal is an error.
pub(super) fn ask(mut control: &UnixStream) -> Result<Message, MigrationError> {
    match receive(&mut control) {
        Ok(Message::Failed { reason }) => Err(MigrationError::Other(reason)),
        Ok(message) => Ok(message),
        Err(source) => Err(MigrationError::Connection {
            what: "wait for the target",
            source,
        }),
    }
}

fn refused(error: &KvmError) -> MigrationError {
    MigrationError::Refused(error.to_string())
}

/// Sends what was written since the last round, until so little is left that the guest may be held for it: the
/// pages that are returned.
fn copy_while_running(
    senders: &Senders,
    log: &WriteLog,
    progress: &Progress,
    convergence: Convergence,
    owner: &impl Owner,
) -> Result<(Dirty, End), MigrationError> {
    let mut dirty = pages::all(log.memory());
    let mut rounds = Rounds::new(convergence);
    let mut is_flushed = false;
    loop {
        if progress.is_cancelled() {
            return Err(MigrationError::Cancelled);
        }
        let (before, started) = (progress.sent.load(Ordering::Relaxed), Instant::now());
        let written = pages::size_bytes(&dirty);
        progress.remaining.store(written, Ordering::Relaxed);
        let pass = match rounds.count() {
            0 => Pass::First,
            _ => Pass::Again,
        };
        let unsent = senders.round(dirty, pass)?;
        let time = started.elapsed();
        if progress.switch.load(Ordering::SeqCst) {
            disks::wait_until_ready(progress)?;
            return Ok((unsent, End::PostCopy));
        }
        dirty = log.look().map_err(|error| refused(&error))?;
        let left = pages::size_bytes(&dirty);
        progress.remaining.store(left, Ordering::Relaxed);
        let next = rounds.after(&Round {
            written,
            sent: progress.sent.load(Ordering::Relaxed) - before,
            time,
            left,
        });
        progress.rounds.store(rounds.count(), Ordering::Relaxed);
        match next {
            Next::Switch if !progress.disks.is_ready()? => disks::wait_until_ready(progress)?,
            // What is written meanwhile goes with one more round.
            Next::Switch if !is_flushed => {
                owner.flush();
                is_flushed = true;
            }
            Next::Switch => return Ok((dirty, End::Whole)),
            Next::PostCopy if !progress.disks.is_ready()? => disks::wait_until_ready(progress)?,
            Next::PostCopy => return Ok((dirty, End::PostCopy)),
            Next::Throttle(percent) => progress.throttle.store(percent, Ordering::Relaxed),
            Next::GoOn => {}
            Next::GiveUp(error) => return Err(error),
        }
    }
}

/// Makes vCPUs rest, as much as the progress says. Ends when it is dropped.
struct Brake {
    _released: Sender<()>,
}

impl Brake {
    fn start(progress: Arc<Progress>, owner: impl Owner) -> Result<Self, MigrationError> {
        let (released, waits) = channel();
        let body = move || {
            while let Err(RecvTimeoutError::Timeout) = waits.recv_timeout(BRAKE_PERIOD) {
                match progress.throttle.load(Ordering::Relaxed) {
                    0 => {}
                    percent => owner.rest(BRAKE_PERIOD * u32::from(percent) / 100),
                }
            }
        };
        let thread = atoll_thread::spawn(Kind::Migration, "migrate-brake", body);
        thread.map_err(MigrationError::connection("start the brake's thread"))?;
        Ok(Self {
            _released: released,
        })
    }
}
