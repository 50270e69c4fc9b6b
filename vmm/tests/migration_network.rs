// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Machines that move over TCP, with TLS: who may come, and what is left when the network is cut at a random point.
//! Between the two sides is a relay of the test, which stops carrying or closes everything. Seeds are printed;
//! another one comes from ATOLL_SEED, more of them from ATOLL_MIGRATION_SEEDS.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "helpers of tests fail by panicking, and say what they skip"
)]

mod guest;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{Builder, sleep};
use std::time::{Duration, Instant};

use atoll_vmm::memory::UserFault;
use atoll_vmm_protocol::api::{MachineState, MigrationInfo, MigrationStage, Request};
use guest::{Guest, Place, Random, eventually, kvm, moved, number, runs, shell, works};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};

/// Certificates of one authority, and what it has signed for 127.0.0.1.
struct Authority(tempfile::TempDir);

impl Authority {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        std::fs::write(folder.path().join("ca"), issuer.pem()).unwrap();
        for side in ["source", "target"] {
            let key = KeyPair::generate().unwrap();
            let params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
            let certificate = params.signed_by(&key, &issuer).unwrap();
            std::fs::write(folder.path().join(side), certificate.pem()).unwrap();
            std::fs::write(
                folder.path().join(format!("{side}.key")),
                key.serialize_pem(),
            )
            .unwrap();
        }
        Self(folder)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// The options that `side` needs.
    fn options(&self, side: &str) -> Vec<String> {
        let file = |name: &str| self.path(name).display().to_string();
        let (ca, certificate, key) = (file("ca"), file(side), file(&format!("{side}.key")));
        [
            "--tls-ca",
            &ca,
            "--tls-cert",
            &certificate,
            "--tls-key",
            &key,
        ]
        .map(str::to_owned)
        .to_vec()
    }
}

/// Whether these tests can run; says so when not.
fn relay_and_kvm() -> bool {
    relay() && kvm()
}

/// Whether there is the program that carries a machine through a network: one of another crate, which a build of this
/// crate alone does not make.
fn relay() -> bool {
    let path = Path::new(guest::BINARY).with_file_name("atoll-relay");
    let found = path.exists();
    if !found {
        println!(
            "ATOLL-SKIP: {} is missing: cargo build -p atoll-relay",
            path.display()
        );
    }
    found
}

/// A process that waits on the network for `source`'s machine, and where.
fn target_for(source: &Guest, options: &[String]) -> (Guest, String) {
    let place = Place::new();
    std::fs::remove_file(place.path("disk")).unwrap();
    std::fs::hard_link(source.path("disk"), place.path("disk")).unwrap();
    target_on(place, options)
}

/// The same with the disk of its place.
fn target_on(place: Place, options: &[String]) -> (Guest, String) {
    let mut arguments = vec!["receive", "--listen", "tcp:127.0.0.1:0"];
    arguments.extend(options.iter().map(String::as_str));
    let mut target = place.start(&arguments);
    let address = eventually("the target's address", || {
        if target.process.try_wait().unwrap().is_some() {
            panic!("{}", target.said());
        }
        let said = target.said();
        let (_, at) = said.split_once("at=\"tcp:")?;
        at.split_once('"').map(|(at, _)| at.to_owned())
    });
    (target, address)
}

/// `ctl migrate`, not waited for.
fn begin(source: &Guest, address: &str, options: &[String]) -> Child {
    source
        .place
        .command(&["ctl", "--api-socket", "api", "migrate", "--to"])
        .arg(format!("tcp:{address}"))
        .args(options)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn with(options: &[String], more: &[&str]) -> Vec<String> {
    let more = more.iter().map(|one| (*one).to_owned());
    options.iter().cloned().chain(more).collect()
}

#[test]
fn a_guest_at_work_moves_over_tls_and_without() {
    if !relay_and_kvm() {
        return;
    }
    let authority = Authority::new();
    let mut guest = Place::new().start(&shell("64", "2"));
    let mut serial = guest.serial();
    serial.start_load("");
    let mut done = serial.load_beyond(0);
    let insecure = [
        vec!["--insecure".to_owned()],
        with(&[], &["--insecure", "true"]),
    ];
    let tls = ["target", "source"].map(|side| authority.options(side));
    for (connections, [there, here]) in [("1", &tls), ("64", &tls), ("3", &insecure)] {
        let (mut target, address) = target_for(&guest, there);
        let here = with(here, &["--connections", connections]);
        let asker = begin(&guest, &address, &here);
        let info = moved(asker, &mut guest, &target);
        println!(
            "{connections}: {} ms, stood still for {} us, {} bytes",
            info.elapsed_ms, info.downtime_us, info.sent_bytes
        );
        serial = target.serial();
        done = serial.load_beyond(done);
        guest = target;
    }
    assert!(serial.end_load() >= done);
}

/// The rest of its memory comes while it runs there, also when who asked for the move is gone.
#[test]
fn a_guest_runs_before_its_memory_has_come_over_tls() {
    if !relay_and_kvm() {
        return;
    }
    if !faults() {
        return;
    }
    let authority = Authority::new();
    let [there, here] = ["target", "source"].map(|side| authority.options(side));
    let mut source = Place::new().start(&shell("64", "2"));
    let mut serial = source.serial();
    serial.start_load("");
    let done = serial.load_beyond(0);
    let (mut target, address) = target_for(&source, &there);
    let more = [
        "--when-late",
        "post-copy",
        "--max-bytes-per-second",
        "2000000",
    ];
    let here = with(&with(&here, &more), &["--connections", "2"]);
    let mut asker = begin(&source, &address, &here);
    eventually("the move's begin", || {
        source.ctl(&["switch-migration"]).ok()
    });
    eventually("post-copy", || {
        let info: MigrationInfo = source.client().ask(Request::Migration).ok()?;
        assert_ne!(info.stage, MigrationStage::Completed, "it was too fast");
        (info.stage == MigrationStage::PostCopy).then_some(())
    });
    asker.kill().unwrap();
    asker.wait().unwrap();
    eventually("all memory", || {
        let filling = target.client().info().ok()?.filling.unwrap();
        filling.complete.then_some(())
    });
    assert_eq!(source.ended().0.code(), Some(0));
    serial = target.serial();
    assert!(serial.load_beyond(done) > done);
    serial.end_load();
}

/// A machine with the content of its disk, through connections of their own.
#[test]
fn a_disk_moves_over_tls() {
    if !relay_and_kvm() {
        return;
    }
    let authority = Authority::new();
    let [there, here] = ["target", "source"].map(|side| authority.options(side));
    let mut guest = Place::new().start(&shell("32", "1"));
    let mut serial = guest.serial();
    serial.start_load("");
    let mut done = serial.load_beyond(0);
    for _ in 0..2 {
        let (mut target, address) = target_on(Place::new(), &there);
        let here = with(&here, &["--connections", "2", "--disks", "disk0"]);
        let info = moved(begin(&guest, &address, &here), &mut guest, &target);
        assert_eq!(info.disks.len(), 1);
        serial = target.serial();
        done = serial.load_beyond(done);
        guest = target;
    }
    assert!(serial.end_load() >= done);
}

/// The source goes on, and the target waits on, whoever comes.
#[test]
fn strangers_are_refused() {
    if !relay_and_kvm() {
        return;
    }
    let [authority, other] = [Authority::new(), Authority::new()];
    let mut source = Place::new().start(&shell("32", "1"));
    let mut serial = source.serial();
    serial.start_load("");
    let mut done = serial.load_beyond(0);
    let (mut target, address) = target_for(&source, &authority.options("target"));
    let mut refused = |options: &[String], expected: &str| {
        let output = begin(&source, &address, options)
            .wait_with_output()
            .unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.contains(expected), "{said}");
        assert_eq!(said.trim_end().lines().count(), 1, "{said}");
        done = serial.load_beyond(done);
        assert!(runs(&source));
    };
    refused(
        &[],
        "name --tls-ca, --tls-cert and --tls-key (or say --insecure,",
    );
    refused(
        &with(&[], &["--insecure", "true"]),
        "or only one side uses TLS",
    );
    refused(&other.options("source"), "invalid peer certificate: ");
    let ca = authority.path("ca").display().to_string();
    let mut unknown = other.options("source");
    unknown[1] = ca;
    refused(&unknown, "received fatal alert: ");
    let named = with(&authority.options("source"), &["--tls-name", "node2"]);
    refused(&named, "certificate not valid for name \"node2\"");
    // Noise, and nothing at all.
    let mut noise = TcpStream::connect(&address).unwrap();
    noise.write_all(&[0x16; 4096]).unwrap();
    let _silent = TcpStream::connect(&address).unwrap();
    let output = begin(&source, &address, &authority.options("source"));
    assert!(output.wait_with_output().unwrap().status.success());
    target.serial().load_beyond(done);
}

#[test]
fn a_target_without_protection_does_not_listen() {
    if !relay() {
        return;
    }
    let authority = Authority::new();
    for (options, expected) in [
        (
            vec![],
            "name --tls-ca, --tls-cert and --tls-key (or say --insecure,",
        ),
        (
            with(&authority.options("target"), &["--insecure"]),
            "--insecure does without TLS: leave out",
        ),
        (
            with(
                &[],
                &[
                    "--tls-ca",
                    "disk",
                    "--tls-cert",
                    "disk",
                    "--tls-key",
                    "disk",
                ],
            ),
            "TLS authority disk: ",
        ),
        (
            with(&authority.options("target")[..4], &["--tls-key", "nowhere"]),
            "TLS key nowhere: ",
        ),
    ] {
        let mut arguments = vec!["receive", "--listen", "tcp:127.0.0.1:0"];
        arguments.extend(options.iter().map(String::as_str));
        let mut wrong = Place::new().start(&arguments);
        let (status, said) = wrong.ended();
        assert!(said.contains(expected), "{said}");
        assert_eq!(
            (status.code(), said.trim_end().lines().count()),
            (Some(1), 1),
            "{said}"
        );
    }
}

/// A machine needs the program only if it moves over a network; who wants that is told what is missing.
#[test]
fn a_missing_relay_is_named() {
    let place = Place::new();
    let alone = place.path("atoll-vmm");
    std::fs::copy(guest::BINARY, &alone).unwrap();
    let listener = UnixListener::bind(place.path("api")).unwrap();
    for arguments in [
        "receive --listen tcp:127.0.0.1:0 --insecure",
        "ctl --api-socket api migrate --to tcp:127.0.0.1:1 --insecure true",
    ] {
        let output = place
            .command_of(&alone, &arguments.split(' ').collect::<Vec<_>>())
            .output()
            .unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        let path = place.path("atoll-relay");
        let expected = format!(
            "atoll-vmm: start {}, the program that carries a machine through a network: it has to be where atoll-vmm \
             is: No such file or directory (os error 2)\n",
            path.display()
        );
        assert_eq!((output.status.code(), said), (Some(1), expected));
    }
    drop(listener);
}

#[derive(Debug, Clone, Copy)]
enum Cut {
    /// Nothing is carried any more, and nobody is told.
    Silence,
    /// The same, but only for what the target says.
    Deaf,
    /// Every connection is closed.
    Close,
}

#[derive(Debug, Clone, Copy)]
enum When {
    /// After so much time.
    Moment(Duration),
    /// After so many bytes from the target on the first connection: that is where the hand-over is agreed upon.
    Answered(u64),
}

/// A network between the two sides.
struct Network {
    address: String,
    cut: Arc<AtomicBool>,
    shared: Arc<Wires>,
}

struct Wires {
    how: Cut,
    answers: AtomicU64,
    answers_max: u64,
    cut: Arc<AtomicBool>,
    sockets: Mutex<Vec<TcpStream>>,
    /// Connections that are made after the cut are carried again.
    heals: bool,
}

impl Network {
    fn to(target: &str, how: Cut, when: When, heals: bool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let cut = Arc::new(AtomicBool::new(false));
        let shared = Arc::new(Wires {
            how,
            answers: AtomicU64::new(0),
            answers_max: match when {
                When::Moment(_) => u64::MAX,
                When::Answered(bytes) => bytes,
            },
            cut: cut.clone(),
            sockets: Mutex::default(),
            heals,
        });
        let (wires, target) = (shared.clone(), target.to_owned());
        let accept = move || {
            for (index, near) in listener.incoming().enumerate() {
                let is_late = wires.cut.load(Ordering::SeqCst);
                if is_late && !wires.heals {
                    continue;
                }
                let near = near.unwrap();
                // A target that has ended listens no more.
                let Ok(far) = TcpStream::connect(&target) else {
                    continue;
                };
                wires.join(near, far, index == 0, is_late);
            }
        };
        // Ends with the test's process.
        drop(Builder::new().spawn(accept).unwrap());
        Self {
            address,
            cut,
            shared,
        }
    }

    fn cut(&self) {
        self.shared.cut_now();
    }
}

impl Wires {
    fn cut_now(&self) {
        if !self.cut.swap(true, Ordering::SeqCst)
            && let Cut::Close = self.how
        {
            for socket in self.sockets.lock().unwrap().drain(..) {
                let _ = socket.shutdown(Shutdown::Both);
            }
        }
    }

    fn join(self: &Arc<Self>, near: TcpStream, far: TcpStream, is_first: bool, is_late: bool) {
        let clone = |socket: &TcpStream| socket.try_clone().unwrap();
        self.sockets
            .lock()
            .unwrap()
            .extend([clone(&near), clone(&far)]);
        let ways = [(clone(&near), clone(&far), false), (far, near, true)];
        for (from, to, is_answer) in ways {
            let wires = self.clone();
            let counts = is_answer && is_first;
            let stays = is_late || !is_answer && matches!(self.how, Cut::Deaf);
            let carry = move || wires.carry(from, to, counts, stays);
            drop(Builder::new().spawn(carry).unwrap());
        }
    }

    /// One way, which `stays` when the network is cut.
    fn carry(&self, mut from: TcpStream, mut to: TcpStream, counts: bool, stays: bool) {
        let mut bytes = vec![0; 64 << 10];
        while let Ok(count @ 1..) = from.read(&mut bytes) {
            let mut count = count;
            if counts {
                let before = self.answers.fetch_add(count as u64, Ordering::SeqCst);
                let left = self.answers_max.saturating_sub(before);
                if left < count as u64 {
                    count = usize::try_from(left).unwrap();
                    let _ = to.write_all(&bytes[..count]);
                    self.cut_now();
                }
            }
            if self.cut.load(Ordering::SeqCst) && !stays {
                // Read on and forgotten, as by a network that loses everything.
                continue;
            }
            if to.write_all(&bytes[..count]).is_err() {
                break;
            }
        }
        if !self.cut.load(Ordering::SeqCst) || stays || matches!(self.how, Cut::Close) {
            let _ = to.shutdown(Shutdown::Write);
        }
    }
}

/// What happens to a migration.
#[derive(Debug)]
struct Scenario {
    how: Cut,
    when: When,
    heals: bool,
    is_tls: bool,
}

impl Scenario {
    fn of(seed: u64) -> Self {
        let mut random = Random::of(seed);
        let how = [Cut::Silence, Cut::Close][usize::try_from(random.below(2)).unwrap()];
        let heals = random.below(3) > 0;
        let is_tls = random.below(3) == 0;
        // Without TLS: verdict 5, Welcome 17, Ready 15, Taken 15, end 4, and beats of 4. With TLS 1.3 the same after the
        // handshake, in records.
        let answered = match is_tls {
            true => 720 + random.below(210),
            false => 5 + random.below(52),
        };
        let when = match random.below(2) {
            0 => When::Moment(Duration::from_micros(random.below(300_000))),
            _ => When::Answered(answered),
        };
        Self {
            how,
            when,
            heals,
            is_tls,
        }
    }

    /// Of the target and of the source.
    fn options(&self, authority: &Authority) -> [Vec<String>; 2] {
        let limit = ["--silence-limit-ms", "1500"];
        match self.is_tls {
            true => ["target", "source"].map(|side| with(&authority.options(side), &limit)),
            false => [&["--insecure"][..], &["--insecure", "true"]]
                .map(|word| with(&with(&[], word), &limit)),
        }
    }
}

/// One migration over a network that is cut.
fn cut(seed: u64, authority: &Authority) {
    let scenario = Scenario::of(seed);
    println!("seed {seed}: {scenario:?}");
    let Scenario {
        how, when, heals, ..
    } = scenario;
    let [there, here] = scenario.options(authority);
    let mut source = Place::new().start(&shell("64", "1"));
    let mut serial = source.serial();
    serial.start_load("");
    serial.load_beyond(0);
    let (mut target, address) = target_for(&source, &there);
    let network = Network::to(&address, how, when, heals);
    let asker = begin(
        &source,
        &network.address,
        &with(&here, &["--connections", "2"]),
    );
    if let When::Moment(moment) = when {
        sleep(moment);
        network.cut();
    }
    let began = Instant::now();
    let output = asker.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    let was_cut = network.cut.load(Ordering::SeqCst);
    println!(
        "seed {seed}: cut {was_cut}, {} bytes answered, after {:?}: {}",
        network.shared.answers.load(Ordering::SeqCst),
        began.elapsed(),
        said.trim_end()
    );
    let all = |source: &Guest, target: &Guest| {
        format!(
            "seed {seed}: {said}\nsource: {}\ntarget: {}",
            source.said(),
            target.said()
        )
    };
    if said.contains("and nobody answers at") {
        // The one who knows better decides: here the test, which can reach both.
        assert!(was_cut && !heals, "{}", all(&source, &target));
        let state = source.client().info().unwrap().state;
        assert_eq!(state, MachineState::Paused, "{}", all(&source, &target));
        let request = if works(&mut target) {
            "shutdown"
        } else {
            "resume"
        };
        source.ctl(&[request]).unwrap();
        assert_eq!(
            works(&mut source),
            request == "resume",
            "{}",
            all(&source, &target)
        );
        return;
    }
    let moved = output.status.success();
    if !target.said().contains("machine starts")
        && (said.contains("greet ") || said.contains("connect to "))
    {
        // Nothing has come: it may wait for another source.
        target.process.kill().unwrap();
    }
    assert_eq!(works(&mut target), moved, "{}", all(&source, &target));
    assert_eq!(works(&mut source), !moved, "{}", all(&source, &target));
}

/// See the head of the file.
fn each_seed(migration: fn(u64, &Authority)) {
    let authority = Authority::new();
    let first = number("ATOLL_SEED", u64::from(std::process::id()));
    for seed in first..first + number("ATOLL_MIGRATION_SEEDS", 5) {
        migration(seed, &authority);
    }
}

#[test]
fn exactly_one_runs_when_the_network_is_cut() {
    if !relay_and_kvm() {
        return;
    }
    each_seed(cut);
}

/// Pages that go from machine to machine, without TLS, have nobody on their way who would end with the one who asked.
#[test]
fn a_move_ends_with_whoever_asked_for_it() {
    if !relay_and_kvm() {
        return;
    }
    let authority = Authority::new();
    let tls = ["target", "source"].map(|side| authority.options(side));
    let insecure = [&["--insecure"][..], &["--insecure", "true"]].map(|word| with(&[], word));
    let mut source = Place::new().start(&shell("64", "1"));
    source.serial().start_load("");
    for [there, here] in [tls, insecure] {
        let (mut target, address) = target_for(&source, &there);
        // It would take years.
        let here = with(&here, &["--max-bytes-per-second", "8"]);
        let mut asker = begin(&source, &address, &here);
        eventually("a sender", || {
            source
                .threads()
                .contains(&"migrate-0".to_owned())
                .then_some(())
        });
        asker.kill().unwrap();
        asker.wait().unwrap();
        eventually("the end of the move", || {
            let info = source.ctl(&["migration"]).unwrap();
            (info["stage"] == "failed").then_some(())
        });
        assert!(works(&mut source) && !works(&mut target));
    }
}

/// One that has to end with post-copy, over a network that is cut.
fn cut_late(seed: u64, authority: &Authority) {
    let mut scenario = Scenario::of(seed);
    let moment = Duration::from_micros(Random::of(seed).below(1_000_000));
    scenario.when = When::Moment(moment);
    println!("seed {seed}: {scenario:?}");
    let [there, here] = scenario.options(authority);
    let mut source = Place::new().start(&shell("64", "1"));
    let mut serial = source.serial();
    serial.start_load("");
    serial.load_beyond(0);
    let (mut target, address) = target_for(&source, &there);
    let network = Network::to(&address, scenario.how, scenario.when, scenario.heals);
    let asker = begin(&source, &network.address, &with(&here, &LATE));
    eventually("the move's begin", || {
        source.ctl(&["switch-migration"]).ok()
    });
    sleep(moment);
    network.cut();
    let output = asker.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    println!("seed {seed}: {}", said.trim_end());
    let all = |source: &Guest, target: &Guest| {
        format!(
            "seed {seed}: {said}\nsource: {}\ntarget: {}",
            source.said(),
            target.said()
        )
    };
    let runs_there = works(&mut target);
    let is_lost = target.said().contains(LOST);
    if said.contains("and nobody answers at") {
        // The test can reach both. What the target had is not gone back to.
        let request = match runs_there || is_lost {
            true => "shutdown",
            false => "resume",
        };
        source.ctl(&[request]).unwrap();
        let runs_here = works(&mut source);
        assert_eq!(runs_here, request == "resume", "{}", all(&source, &target));
        return;
    }
    let runs_here = works(&mut source);
    let expected = match () {
        () if output.status.success() => [false, true, false],
        () if said.contains("the machine stays: ") => [true, false, false],
        () if said.contains(LOST) => [false, false, true],
        // It has not heard that all came.
        () => {
            let unheard = said.contains(UNHEARD) || said.contains(DOUBTED);
            assert!(unheard, "{}", all(&source, &target));
            [false, runs_there, !runs_there]
        }
    };
    let found = [runs_here, runs_there, is_lost];
    assert_eq!(found, expected, "{}", all(&source, &target));
    // One that was in doubt is told to end by whoever has asked the target.
    if !output.status.success() && !runs_here && !said.contains(DOUBTED) {
        let (status, told) = source.ended();
        assert!(!status.success(), "{}", all(&source, &target));
        assert!(told.contains(LOST) || told.contains(UNHEARD), "{told}");
    }
}

/// What a move is asked for that ends with post-copy, some of it after a while.
const LATE: [&str; 6] = [
    "--when-late",
    "post-copy",
    "--connections",
    "2",
    "--max-bytes-per-second",
    "4000000",
];
const LOST: &str = "the guest is lost: ";
const UNHEARD: &str = "the two sides lost each other before it said that all had come";
/// Of `ctl`, which has learnt that the target has the machine, of a source in doubt.
const DOUBTED: &str = "the target had taken the guest, and did not say that the last";

/// Whether this host has what post-copy needs; says so when not.
fn faults() -> bool {
    let faults = UserFault::open();
    if let Err(error) = &faults {
        println!("ATOLL-SKIP: {error}");
    }
    faults.is_ok()
}

#[test]
fn one_runs_or_both_tell_the_loss_when_the_network_is_cut_late() {
    if !relay_and_kvm() || !faults() {
        return;
    }
    each_seed(cut_late);
}

/// The target has all and runs, and its source has not heard so: it must not say that the guest is lost.
#[test]
fn a_target_that_is_not_heard_any_more_may_run() {
    if !relay_and_kvm() || !faults() {
        return;
    }
    let mut source = Place::new().start(&shell("64", "1"));
    let mut serial = source.serial();
    serial.start_load("");
    let done = serial.load_beyond(0);
    let limit = ["--silence-limit-ms", "10000"];
    let (mut target, address) = target_for(&source, &with(&with(&[], &["--insecure"]), &limit));
    let never = When::Moment(Duration::MAX);
    let network = Network::to(&address, Cut::Deaf, never, false);
    let here = with(&with(&[], &["--insecure", "true"]), &limit);
    let asker = begin(&source, &network.address, &with(&here, &LATE));
    eventually("the move's begin", || {
        source.ctl(&["switch-migration"]).ok()
    });
    eventually("post-copy", || {
        let info: MigrationInfo = source.client().ask(Request::Migration).ok()?;
        assert_ne!(info.stage, MigrationStage::Completed, "it was too fast");
        (info.stage == MigrationStage::PostCopy).then_some(())
    });
    network.cut();
    let output = asker.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains(UNHEARD), "{said} {}", target.said());
    let (status, told) = source.ended();
    assert!(!status.success() && told.contains(UNHEARD), "{told}");
    assert!(target.client().info().unwrap().filling.unwrap().complete);
    let mut serial = target.serial();
    serial.load_beyond(done);
    serial.end_load();
}

#[test]
fn a_silent_network_ends_both_sides_in_time() {
    if !relay_and_kvm() {
        return;
    }
    let mut source = Place::new().start(&shell("64", "1"));
    let mut serial = source.serial();
    serial.start_load("");
    let done = serial.load_beyond(0);
    let limit = ["--silence-limit-ms", "1500"];
    let (mut target, address) = target_for(&source, &with(&with(&[], &["--insecure"]), &limit));
    // Silent from the target's first answer on.
    let when = When::Answered(5);
    let network = Network::to(&address, Cut::Silence, when, false);
    let here = with(&with(&[], &["--insecure", "true"]), &limit);
    let output = begin(&source, &network.address, &here)
        .wait_with_output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("the machine stays: "), "{said}");
    assert!(said.contains("the other side is silent"), "{said}");
    assert_eq!(target.ended().0.code(), Some(1));
    serial.load_beyond(done);
    assert!(runs(&source));
}
