// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Devices that another process serves, with real processes: a network card that sends everything back, made of crate
//! `vhost-user-backend`, and QEMU's storage daemon. They are killed, stopped and started again, and note which pages they
//! write. (`testpmd`: the same card with a process that others wrote.)

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use atoll_devices::memory::{self, PAGE_BYTES, WORD_PAGES};
use atoll_devices::state::DeviceState;
use atoll_devices::testing::{Driver, Segment};
use atoll_devices::virtio::net::{HostEnd, Net, NetOptions};
use atoll_devices::virtio::vhost_user::{
    BackendOptions, DeviceKind, Layout, PATIENCE, VhostUser, VhostUserError,
};
use atoll_devices::virtio::{Act, VirtioDevice, device_id};
use vhost_user_backend::bitmap::BitmapMmapRegion;
use vhost_user_backend::{VhostUserBackendMut, VhostUserDaemon, VringRwLock, VringT};
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::{
    GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
};
use vmm_sys_util::epoll::EventSet;

const DATA: u64 = 0x10_0000;
/// Where the card's process finds its socket; without it, it is a test that does nothing.
const SOCKET: &str = "ATOLL_TEST_ECHO_SOCKET";
/// Whether it does not know how to note which pages it writes.
const FORGETFUL: &str = "ATOLL_TEST_ECHO_FORGETFUL";
pub const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// Another process, ended with its test.
pub struct Server(pub Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Server {
    pub fn start(command: &mut Command) -> std::io::Result<Self> {
        command.stdout(Stdio::null()).stderr(Stdio::null());
        command.spawn().map(Self)
    }

    fn signal(&self, signal: &str) {
        let mut kill = Command::new("kill");
        kill.args([signal, &self.0.id().to_string()]);
        assert!(kill.status().unwrap().success());
    }
}

/// Waits until somebody listens.
pub fn connect(socket: &Path) -> UnixStream {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        if let Ok(stream) = UnixStream::connect(socket) {
            return stream;
        }
        assert!(Instant::now() < deadline, "nobody listens");
        std::thread::yield_now();
    }
}

pub fn options(stream: UnixStream, reconnect: Option<PathBuf>) -> BackendOptions {
    BackendOptions {
        name: "test0".to_owned(),
        stream,
        reconnect,
        patience: PATIENCE,
    }
}

/// Whether writes to memory, of whoever makes them, are logged from now on.
pub fn log_writes(driver: &Driver, on: bool) {
    let ram = driver.memory.memory();
    ram.iter().for_each(|region| memory::log(region).switch(on));
    driver.device.log_writes(on).unwrap();
}

/// Addresses of the pages that were written since the last call.
pub fn written(driver: &Driver) -> BTreeSet<u64> {
    driver.device.note_writes();
    let mut pages = BTreeSet::new();
    for region in driver.memory.memory().iter() {
        let count = usize::try_from(region.len()).unwrap() / PAGE_BYTES;
        let mut words = vec![0; count.div_ceil(WORD_PAGES)];
        memory::log(region).take(&mut words);
        let start = region.start_addr().0;
        pages.extend(memory::pages_of(words).map(|page| start + (page * PAGE_BYTES) as u64));
    }
    pages
}

/// The page of a queue's used ring, which is written by nobody but the device.
pub fn used_ring(queue: u64) -> u64 {
    0x1_3000 + 0x4000 * queue
}

type EchoMemory = GuestMemoryAtomic<GuestMemoryMmap<BitmapMmapRegion>>;
type EchoRing = VringRwLock<EchoMemory>;

/// A card of two pairs: what is sent on one comes back on the same.
struct Echo {
    memory: EchoMemory,
    is_forgetful: bool,
}

impl VhostUserBackendMut for Echo {
    type Bitmap = BitmapMmapRegion;
    type Vring = EchoRing;

    fn num_queues(&self) -> usize {
        4
    }

    fn max_queue_size(&self) -> usize {
        256
    }

    fn features(&self) -> u64 {
        // Version 1, both ring features, protocol features; checksums, TSO, merged buffers.
        let features = 1 << 32 | 1 << 30 | 1 << 29 | 1 << 28 | 1 | 1 << 11 | 1 << 15;
        features | u64::from(!self.is_forgetful) << 26
    }

    fn protocol_features(&self) -> vhost::vhost_user::VhostUserProtocolFeatures {
        use vhost::vhost_user::VhostUserProtocolFeatures as Features;
        Features::MQ | Features::REPLY_ACK | Features::LOG_SHMFD
    }

    fn set_event_idx(&mut self, _enabled: bool) {}

    fn update_memory(&mut self, memory: EchoMemory) -> std::io::Result<()> {
        self.memory = memory;
        Ok(())
    }

    fn handle_event(
        &mut self,
        _event: u16,
        _events: EventSet,
        vrings: &[EchoRing],
        _thread: usize,
    ) -> std::io::Result<()> {
        let memory = self.memory.memory();
        let used = |pair: &&[EchoRing]| pair.iter().all(|ring| ring.get_ref().is_enabled());
        for pair in vrings.chunks(2).filter(used) {
            loop {
                let next = |vring: &EchoRing| {
                    let mut vring = vring.get_mut();
                    vring.get_queue_mut().pop_descriptor_chain(memory.clone())
                };
                let Some(buffer) = next(&pair[0]) else { break };
                let Some(packet) = next(&pair[1]) else {
                    let mut vring = pair[0].get_mut();
                    vring.get_queue_mut().go_to_previous_position();
                    break;
                };
                let (to, from) = (buffer.head_index(), packet.head_index());
                let mut bytes = Vec::new();
                let mut reader = packet.reader(&memory).unwrap();
                reader.read_to_end(&mut bytes).unwrap();
                let mut writer = buffer.writer(&memory).unwrap();
                writer.write_all(&bytes).unwrap();
                for (vring, head, size) in [(&pair[1], from, 0), (&pair[0], to, bytes.len())] {
                    let size = u32::try_from(size).unwrap();
                    vring.add_used(head, size).unwrap();
                    vring.signal_used_queue().unwrap();
                }
            }
        }
        Ok(())
    }
}

/// Not a test: the process that serves the others' cards, when it is told where.
#[test]
fn echo_process() {
    let Some(socket) = std::env::var_os(SOCKET) else {
        return;
    };
    let memory = EchoMemory::new(GuestMemoryMmap::new());
    let echo = Echo {
        memory: memory.clone(),
        is_forgetful: std::env::var_os(FORGETFUL).is_some(),
    };
    let echo = Arc::new(std::sync::RwLock::new(echo));
    let mut daemon = VhostUserDaemon::new("echo".to_owned(), echo, memory).unwrap();
    let mut listener = vhost::vhost_user::Listener::new(socket, true).unwrap();
    daemon.start(&mut listener).unwrap();
    let _ = daemon.wait();
    // Dropping it would wait for its threads, which nobody ends.
    std::process::exit(0);
}

fn start_echo(socket: &Path) -> Server {
    start_echo_with(socket, &[])
}

fn start_echo_with(socket: &Path, variables: &[(&str, &str)]) -> Server {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "vhost_user::echo_process", "--nocapture"]);
    let command = command.env(SOCKET, socket).envs(variables.iter().copied());
    Server::start(command).unwrap()
}

/// A card of two pairs and its process, which sends everything back.
pub struct Rig {
    pub driver: Driver,
    pub net: Arc<Net>,
    pub server: Option<Server>,
    pub socket: PathBuf,
    _directory: tempfile::TempDir,
}

fn rig(reconnects: bool, patience: Duration) -> Rig {
    let directory = tempfile::tempdir().unwrap();
    let server = start_echo(&directory.path().join("s"));
    rig_with(server, directory, reconnects, patience)
}

/// A card whose process listens, or will, on the directory's socket `s`. Another one is looked for there when that has
/// ended, if the test `reconnects`.
pub fn rig_with(
    server: Server,
    directory: tempfile::TempDir,
    reconnects: bool,
    patience: Duration,
) -> Rig {
    let socket = directory.path().join("s");
    let backend = BackendOptions {
        patience,
        ..options(connect(&socket), reconnects.then(|| socket.clone()))
    };
    let net = Net::new(NetOptions {
        name: "net0".to_owned(),
        host: HostEnd::Backend {
            options: backend,
            pair_count: 2,
        },
        mac: MAC,
        mtu: Some(1500),
    });
    let net = Arc::new(net.unwrap());
    let mut driver = Driver::with_shared_memory(net.clone());
    driver.start(u64::MAX);
    Rig {
        driver,
        net,
        server: Some(server),
        socket,
        _directory: directory,
    }
}

impl Rig {
    /// Sends `text` on a pair, and expects it back.
    pub fn echo(&mut self, pair: usize, text: &str) {
        self.offer(pair);
        self.send(pair, text);
        self.expect(pair, text);
    }

    /// Where a pair's packet is; behind it, its buffer.
    pub fn place(pair: usize) -> u64 {
        DATA + 0x1_0000 * (1 + u64::try_from(pair).unwrap())
    }

    pub fn offer(&mut self, pair: usize) {
        let buffer = Segment::writable(Self::place(pair) + 0x8000, 2048);
        self.driver.add(2 * pair, &[buffer]);
        self.driver.kick(2 * pair);
    }

    pub fn send(&mut self, pair: usize, text: &str) {
        let place = Self::place(pair);
        self.driver
            .put(place, &[&[0; 12], text.as_bytes()].concat());
        let size = u32::try_from(12 + text.len()).unwrap();
        let packet = Segment::readable(place, size);
        self.driver.add(2 * pair + 1, &[packet]);
        self.driver.kick(2 * pair + 1);
    }

    #[track_caller]
    pub fn expect(&mut self, pair: usize, text: &str) {
        let (_, written) = self.driver.wait_used(2 * pair);
        let size = usize::try_from(written).unwrap();
        let seen = self.driver.get(Self::place(pair) + 0x8000, size);
        assert_eq!(seen[12..], *text.as_bytes());
        self.driver.wait_used(2 * pair + 1);
    }

    /// How many pairs the driver uses.
    pub fn use_pairs(&mut self, count: u8) {
        self.driver.put(DATA, &[4, 0, count, 0]);
        let chain = [
            Segment::readable(DATA, 4),
            Segment::writable(DATA + 0x100, 1),
        ];
        self.driver.add(4, &chain);
        self.driver.kick(4);
        self.driver.wait_used(4);
        assert_eq!(self.driver.get(DATA + 0x100, 1), [0]);
    }

    fn link(&self) -> u8 {
        self.driver.device_config::<1>(6)[0]
    }

    #[track_caller]
    pub fn wait_link(&mut self, up: bool) {
        self.driver.wait_until("change of the link", |driver| {
            driver.device_config::<1>(6)[0] & 1 == u8::from(up)
        });
    }
}

#[test]
fn a_card_of_another_process_carries_packets() {
    let mut rig = rig(false, PATIENCE);
    // Address, link, two pairs.
    assert_eq!(rig.driver.device_config::<6>(0), MAC);
    assert_eq!(rig.driver.device_config::<4>(6), [1, 0, 2, 0]);
    let offered = rig.driver.offered();
    // What the backend has, what the card has, and nothing that needs both: no UDP segments, no offload commands.
    assert_eq!(
        offered & (1 << 11 | 1 << 15 | 1 << 22),
        1 << 11 | 1 << 15 | 1 << 22
    );
    assert_eq!(offered & (1 << 56 | 1 << 2 | 1 << 7), 0);
    rig.echo(0, "first");
    // The second pair is not looked at before the driver says that it uses it.
    rig.offer(1);
    rig.send(1, "early");
    rig.echo(0, "second");
    assert!(rig.driver.used(2).is_none());
    rig.use_pairs(2);
    rig.expect(1, "early");
    // A pause takes the queues back, a resume gives them away again, where they stood.
    rig.driver.device.pause();
    rig.driver.device.resume().unwrap();
    rig.echo(0, "third");
    rig.echo(1, "fourth");
    // Without a plug nobody looks at packets.
    rig.net.set_link(false);
    assert_eq!(rig.link(), 0);
    rig.offer(0);
    rig.send(0, "fifth");
    rig.net.set_link(true);
    rig.expect(0, "fifth");
    rig.driver.reset();
    rig.driver.start(u64::MAX);
    rig.echo(0, "sixth");
}

#[test]
fn a_card_outlives_its_process() {
    let mut rig = rig(true, PATIENCE);
    rig.echo(0, "before");
    rig.offer(0);
    rig.driver.interrupts.take(0);
    drop(rig.server.take());
    rig.wait_link(false);
    assert!(rig.driver.interrupts.wait(0, Duration::from_secs(20)));
    assert_eq!(rig.driver.status() & 0x40, 0, "its driver goes on");
    rig.send(0, "meanwhile");
    // Held and let go while nobody is there.
    rig.driver.device.pause();
    rig.driver.device.resume().unwrap();
    rig.server = Some(start_echo(&rig.socket));
    rig.wait_link(true);
    rig.expect(0, "meanwhile");
    rig.echo(0, "after");
}

#[test]
fn nobody_waits_for_a_process_that_hangs() {
    let mut rig = rig(false, Duration::from_millis(300));
    rig.echo(0, "before");
    rig.server.as_ref().unwrap().signal("-STOP");
    rig.driver.reset();
    assert_eq!(rig.driver.status(), 0);
    rig.driver.start(u64::MAX);
    assert_eq!(rig.link(), 0, "cut off for good");
    rig.server.as_ref().unwrap().signal("-CONT");
}

/// Has a card's pair 0 send and receive, and looks for what its process writes: a buffer, and two used rings.
#[track_caller]
pub fn echo_is_logged(rig: &mut Rig, text: &str, expected: bool) {
    written(&rig.driver);
    rig.echo(0, text);
    let pages = written(&rig.driver);
    for page in [Rig::place(0) + 0x8000, used_ring(0), used_ring(1)] {
        assert_eq!(pages.contains(&page), expected, "{page:#x} of {pages:x?}");
    }
}

#[test]
fn a_cards_process_notes_what_it_writes() {
    let mut rig = rig(true, PATIENCE);
    // Before it has been given anything.
    log_writes(&rig.driver, true);
    echo_is_logged(&mut rig, "first", true);
    assert_eq!(written(&rig.driver), BTreeSet::new(), "once");
    rig.driver.device.pause();
    rig.driver.device.resume().unwrap();
    echo_is_logged(&mut rig, "second", true);
    rig.driver.reset();
    rig.driver.start(u64::MAX);
    echo_is_logged(&mut rig, "third", true);

    // What it had done when it ended may be noted but for the end of it; its successor notes, too.
    written(&rig.driver);
    drop(rig.server.take());
    rig.wait_link(false);
    let pages = written(&rig.driver);
    assert!(pages.is_superset(&BTreeSet::from([used_ring(0), used_ring(1)])));
    rig.server = Some(start_echo(&rig.socket));
    rig.wait_link(true);
    echo_is_logged(&mut rig, "fourth", true);

    // While it works, off and on.
    log_writes(&rig.driver, false);
    rig.echo(0, "fifth");
    log_writes(&rig.driver, true);
    echo_is_logged(&mut rig, "sixth", true);
}

#[test]
fn a_process_that_notes_nothing_has_no_place_where_that_is_wanted() {
    let forgetful = |rig: &Rig| start_echo_with(&rig.socket, &[(FORGETFUL, "")]);
    let mut rig = rig(true, PATIENCE);
    rig.echo(0, "first");
    assert_eq!(rig.net.obstacle(Act::Migration), None);
    drop(rig.server.take());
    rig.wait_link(false);
    rig.server = Some(forgetful(&rig));
    rig.wait_link(true);
    rig.echo(0, "second");
    let text = rig.net.obstacle(Act::Migration).unwrap();
    assert_eq!(
        text,
        "what its vhost-user backend writes into memory is not logged, since it lacks VHOST_F_LOG_ALL or \
         VHOST_USER_PROTOCOL_F_LOG_SHMFD: unplug it"
    );
    let refused = rig.driver.device.log_writes(true).unwrap_err();
    assert!(refused.to_string().contains("does not log"), "{refused}");
    rig.driver.device.log_writes(false).unwrap();
    rig.echo(0, "it goes on");

    drop(rig.server.take());
    rig.wait_link(false);
    log_writes(&rig.driver, true);
    rig.server = Some(forgetful(&rig));
    // It ends with its connection, when it has been greeted and refused.
    rig.server.as_mut().unwrap().0.wait().unwrap();
    assert_eq!(rig.link() & 1, 0);
    log_writes(&rig.driver, false);
    rig.server = Some(forgetful(&rig));
    rig.wait_link(true);
    rig.echo(0, "third");
}

#[test]
fn what_a_card_of_another_process_can_take_part_in() {
    let rig = rig(false, PATIENCE);
    assert_eq!(rig.net.obstacle(Act::Snapshot), None);
    assert_eq!(rig.net.obstacle(Act::Migration), None);
    let text = rig.net.obstacle(Act::LiveSnapshot).unwrap();
    assert!(text.contains("leave out --live, or unplug it"), "{text}");
    assert!(rig.net.limit_refusal().is_some());
    rig.driver.device.pause();
    let saved = rig.driver.device.save();
    rig.driver.reset();
    rig.driver.device.restore(&saved).unwrap();
}

#[test]
fn a_backend_that_is_none_is_refused() {
    let kind = DeviceKind::of(device_id::RNG);
    let ask = |serve: &mut dyn FnMut(UnixStream)| {
        let (here, there) = UnixStream::pair().unwrap();
        serve(there);
        let options = BackendOptions {
            patience: Duration::from_millis(200),
            ..options(here, None)
        };
        VhostUser::new(kind, Layout::default(), options).err()
    };
    let closed = ask(&mut drop);
    assert!(matches!(closed, Some(VhostUserError::Refused { .. })));
    let mut kept = Vec::new();
    let silent = ask(&mut |stream| kept.push(stream));
    assert!(matches!(silent, Some(VhostUserError::Refused { .. })));
    let noise = ask(&mut |mut stream| {
        stream.write_all(&[0xa5; 200]).unwrap();
        kept.push(stream);
    });
    assert!(matches!(noise, Some(VhostUserError::Refused { .. })));
    // An answer to "what are your features": none.
    let old = ask(&mut |mut stream| {
        let words = [1_u32, 5, 8, 0, 0].map(u32::to_ne_bytes);
        stream.write_all(words.as_flattened()).unwrap();
        kept.push(stream);
    });
    assert!(
        matches!(old, Some(VhostUserError::Features { .. })),
        "{old:?}"
    );
}

/// A disk of 1 MiB in QEMU's storage daemon.
fn start_disk(directory: &Path) -> Option<Server> {
    let image = directory.join("disk");
    if !image.exists() {
        std::fs::write(&image, vec![0; 1 << 20]).unwrap();
    }
    let socket = directory.join("s");
    let mut command = Command::new("qemu-storage-daemon");
    command
        .args(["--blockdev", &format!("driver=file,node-name=f,filename={}", image.display())])
        .arg("--export")
        .arg(format!(
            "type=vhost-user-blk,id=e,node-name=f,writable=on,num-queues=2,addr.type=unix,addr.path={}",
            socket.display()
        ));
    match Server::start(&mut command) {
        Ok(server) => Some(server),
        Err(error) => {
            println!("ATOLL-SKIP: qemu-storage-daemon: {error}");
            None
        }
    }
}

/// One request, and its status.
fn request(driver: &mut Driver, queue: usize, kind: u32, data: Segment) -> u8 {
    let header = [kind.to_le_bytes(), [0; 4], [0; 4], [0; 4]].concat();
    driver.put(DATA, &header);
    driver.put(DATA + 0x100, &[0xee]);
    let status = Segment::writable(DATA + 0x100, 1);
    driver.add(queue, &[Segment::readable(DATA, 16), data, status]);
    driver.kick(queue);
    driver.wait_used(queue);
    driver.get(DATA + 0x100, 1)[0]
}

fn write_and_read(driver: &mut Driver, queue: usize, byte: u8) {
    driver.put(DATA + 0x1000, &[byte; 512]);
    let data = Segment::readable(DATA + 0x1000, 512);
    assert_eq!(request(driver, queue, 1, data), 0);
    let data = Segment::writable(DATA + 0x2000, 512);
    assert_eq!(request(driver, queue, 0, data), 0);
    assert_eq!(driver.get(DATA + 0x2000, 512), [byte; 512]);
}

#[test]
fn a_disk_of_qemus_storage_daemon() {
    let directory = tempfile::tempdir().unwrap();
    let Some(server) = start_disk(directory.path()) else {
        return;
    };
    let socket = directory.path().join("s");
    let layout = Layout {
        queue_count: Some(2),
        config_bytes: None,
    };
    let options = options(connect(&socket), Some(socket));
    let disk = VhostUser::new(DeviceKind::of(device_id::BLOCK), layout, options);
    let disk = Arc::new(disk.unwrap());
    let mut driver = Driver::with_shared_memory(disk.clone());
    // Sectors, and queues: two.
    assert_eq!(driver.device_config::<8>(0), (1_u64 << 11).to_le_bytes());
    assert_eq!(driver.device_config::<2>(34), [2, 0]);
    driver.start(u64::MAX);
    write_and_read(&mut driver, 0, 0x11);
    write_and_read(&mut driver, 1, 0x22);
    // Its write cache is the driver's to turn off and on.
    for writeback in [0, 1] {
        driver.set_device_config(32, &[writeback]);
        assert_eq!(driver.device_config::<1>(32), [writeback]);
        write_and_read(&mut driver, 0, 0x30 | writeback);
    }
    driver.device.pause();
    for act in [Act::Snapshot, Act::Migration] {
        assert_eq!(disk.obstacle(act), None);
    }
    let text = disk.obstacle(Act::LiveSnapshot).unwrap();
    assert!(text.contains("start the machine without it"), "{text}");
    driver.device.resume().unwrap();
    write_and_read(&mut driver, 0, 0x33);

    for on in [true, false] {
        log_writes(&driver, on);
        write_and_read(&mut driver, 1, 0x33);
        let pages = written(&driver);
        // What is read, and that it has been: not the status, whose page is the driver's, too.
        for page in [DATA + 0x2000, used_ring(1)] {
            assert_eq!(pages.contains(&page), on, "{page:#x} of {pages:x?}");
        }
    }

    drop(server);
    driver.wait_broken();
    assert!(driver.interrupts.wait(0, PATIENCE));
    // Held and let go: the rings stay where nobody touches them.
    driver.device.pause();
    driver.device.resume().unwrap();
    driver.reset();
    let _server = start_disk(directory.path()).unwrap();
    // A driver that comes before the other process has to come again.
    driver.wait_until("another disk", |driver| {
        driver.start(u64::MAX);
        let broken = driver.status() & 0x40 != 0;
        if broken {
            driver.reset();
        }
        !broken
    });
    let data = Segment::writable(DATA + 0x2000, 512);
    assert_eq!(request(&mut driver, 0, 0, data), 0);
    assert_eq!(driver.get(DATA + 0x2000, 512), [0x33; 512]);
}

/// A disk of one queue.
fn start_driver(directory: &Path) -> Driver {
    let options = options(connect(&directory.join("s")), None);
    let kind = DeviceKind::of(device_id::BLOCK);
    let disk = VhostUser::new(kind, Layout::default(), options).unwrap();
    let mut driver = Driver::with_shared_memory(Arc::new(disk));
    driver.start(u64::MAX);
    driver
}

/// QEMU hangs up when it comes to the end of a request whose ring it has let go of.
#[test]
fn requests_in_flight_are_done_when_a_disk_is_held() {
    let directory = tempfile::tempdir().unwrap();
    let Some(_server) = start_disk(directory.path()) else {
        return;
    };
    let mut driver = start_driver(directory.path());
    for _ in 0..50 {
        let data = Segment::readable(DATA + 0x1000, 0x8000);
        assert_eq!(request(&mut driver, 0, 1, data), 0);
        // A flush of that, which takes its time.
        driver.put(DATA, &[4, 0, 0, 0]);
        let status = Segment::writable(DATA + 0x100, 1);
        driver.add(0, &[Segment::readable(DATA, 16), status]);
        driver.kick(0);
        driver.device.pause();
        assert!(driver.used(0).is_some());
        driver.device.resume().unwrap();
    }
    assert_eq!(driver.status() & 0x40, 0);
}

/// The log comes and goes while requests are in flight.
#[test]
fn a_disk_works_on_while_its_log_comes_and_goes() {
    let directory = tempfile::tempdir().unwrap();
    let Some(_server) = start_disk(directory.path()) else {
        return;
    };
    let mut driver = start_driver(directory.path());
    let device = driver.device.clone();
    let over = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(std::sync::atomic::Ordering::Relaxed) {
                for on in [true, false] {
                    device.log_writes(on).unwrap();
                    device.note_writes();
                }
            }
        });
        for round in 0..2000_u16 {
            write_and_read(&mut driver, 0, round.to_le_bytes()[0]);
        }
        over.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}

#[test]
fn a_disk_with_more_queues_than_its_process() {
    let directory = tempfile::tempdir().unwrap();
    let Some(_server) = start_disk(directory.path()) else {
        return;
    };
    let layout = Layout {
        queue_count: Some(3),
        config_bytes: None,
    };
    let options = options(connect(&directory.path().join("s")), None);
    let refused = VhostUser::new(DeviceKind::of(device_id::BLOCK), layout, options);
    let text = refused.err().unwrap().to_string();
    assert_eq!(text, "the backend has 2 queues, 3 are wanted");
}

/// Whatever a backend says, at whatever point: an error, and no panic.
#[test]
fn a_hostile_backend_gets_nowhere() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("s");
    let listener = UnixListener::bind(&socket).unwrap();
    // The first byte is the number of good answers before the noise; xorshift for the rest.
    for seed in 1..40_u64 {
        let stream = UnixStream::connect(&socket).unwrap();
        let (mut other, _) = listener.accept().unwrap();
        let hostile = std::thread::Builder::new().spawn(move || {
            let good = [[1_u32, 5, 8], [15, 5, 8]];
            let values = [1_u64 << 32 | 1 << 30 | 1 << 29 | 1 << 28, 9];
            for (header, value) in good
                .iter()
                .zip(values)
                .take(usize::try_from(seed % 3).unwrap())
            {
                let _ = other.write_all(header.map(u32::to_ne_bytes).as_flattened());
                let _ = other.write_all(&value.to_ne_bytes());
            }
            let mut noise = seed;
            for _ in 0..64 {
                noise ^= noise << 13;
                noise ^= noise >> 7;
                noise ^= noise << 17;
                let _ = other.write_all(&noise.to_ne_bytes());
            }
            let _ = other.shutdown(std::net::Shutdown::Write);
            let _ = std::io::copy(&mut other, &mut std::io::sink());
        });
        let kind = DeviceKind::of(device_id::RNG);
        drop(VhostUser::new(
            kind,
            Layout::default(),
            options(stream, None),
        ));
        hostile.unwrap().join().unwrap();
    }
}
