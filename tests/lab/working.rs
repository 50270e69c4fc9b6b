// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A stock Debian guest at work (`atoll-strain`) on one of two hosts, and how it moves to the other one, over TLS.
//!
//! ```text
//! node1 (stays the home of disk and peer)              node2
//!   disk.sock ◄─ serve-disk ◄── socat ══ TCP ══ socat ─► disk.sock
//!   atoll-strain peer, 10.77.0.1 on br0 ═══ vxlan ═══ br0
//!                          tap0 ┘          tap0 ┘       the machine: on one of them
//!   local.raw ═══════ moves along with it ════════════► local.raw
//! ```
//! The bridges learn where the guest is, as switches do. (The lab's own network between hosts is no place for that: a
//! host hears there what it has sent itself.)

use std::path::Path;
use std::time::{Duration, Instant};

use atoll_tests::lab::{Host, Scratch};
use atoll_tests::strain::Report;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use serde_json::Value;

use crate::payload;
use crate::shell::{self, in_guest, on_host, wait_for};

/// Longest time in which everything that the guest does has to have gone on.
const WORK_SECONDS: u32 = 240;
/// Longest time that one move may take on a busy machine.
pub const MOVE_SECONDS: u32 = 240;

/// Joins the hosts' bridges, and makes the guest's tap, which outlives machines.
const NETWORK: &str = r#"
ip link add br0 type bridge; ip link set br0 up
ip link add vx0 type vxlan id 7 local 10.99.0.NEAR remote 10.99.0.FAR dstport 4789 dev eth1
ip link set vx0 master br0 up
ip tuntap add tap0 mode tap vnet_hdr; ip link set tap0 master br0 up
"#;

/// The disks: that for both hosts, and one of each host.
const HOME: &str = r#"
truncate -s 2M local.raw
ip address add 10.77.0.1/24 dev br0
back() { setsid "$@" </dev/null & }
back $vmm serve-disk --socket disk.sock --disk $root >>serve.log 2>&1
for i in $(seq 300); do [ -S disk.sock ] && break; sleep 0.1; done
back socat TCP-LISTEN:10809,fork,reuseaddr UNIX-CONNECT:/var/t/disk.sock >>serve.log 2>&1
"#;
const AWAY: &str = r#"
mkdir -p /var/t; cd /var/t
truncate -s 2M local.raw
setsid socat UNIX-LISTEN:/var/t/disk.sock,fork TCP:10.99.0.1:10809 </dev/null >>serve.log 2>&1 &
"#;

/// The other end of the guest's connection, and the guest.
const START: &str = r#"
[ ! -e peer.pid ] || kill $(cat peer.pid) || true
setsid /payload/bin/atoll-strain peer 10.77.0.1:9000 </dev/null >peer.log 2>&1 & echo $! >peer.pid
start $kernel --cmdline "$cmdline init_on_free=1" --cpus CPUS --memory 256 \
  --disk id=root,path=/var/t/disk.sock,format=nbd --disk id=tools,path=/payload/tools.img,format=raw,readonly \
  --disk id=local,path=/var/t/local.raw,format=raw \
  --net tap=tap0,mac=52:54:00:aa:00:01,vhost=on
"#;

/// The guest's work begins. Memory that it has freed is zeroed (`init_on_free`), so there is less of it to send.
const WORK: &str = "mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t tmpfs none /tmp; modprobe virtio_net; \
    for i in {1..100}; do [ -e /sys/class/net/eth0 ] && break; sleep 0.1; done; \
    ip link set eth0 mtu 1400 up; ip address add 10.77.0.2/24 dev eth0; ping -c 3 -W 10 10.77.0.1 >/dev/null; \
    mount -r /dev/vdb /mnt; echo 3 > /proc/sys/vm/drop_caches; \
    (export PATH=/mnt:$PATH LD_LIBRARY_PATH=/mnt; atoll-strain work 10.77.0.1:9000 /tmp /dev/vdc /strained >/tmp/said 2>&1; \
    echo $? >/tmp/end) </dev/null & disown; sleep 0.1";

/// Certificates of one authority, `tls/ca`, and what it has signed for each host: `tls/1`, `tls/1.key`.
fn add_certificates(payload: &Path) -> anyhow::Result<()> {
    let folder = payload.join("tls");
    std::fs::create_dir(&folder)?;
    let mut params = CertificateParams::new(Vec::new())?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
    std::fs::write(folder.join("ca"), issuer.pem())?;
    for host in ["1", "2"] {
        let key = KeyPair::generate()?;
        let params = CertificateParams::new(vec![format!("10.99.0.{host}")])?;
        let certificate = params.signed_by(&key, &issuer)?;
        std::fs::write(folder.join(host), certificate.pem())?;
        std::fs::write(folder.join(format!("{host}.key")), key.serialize_pem())?;
    }
    Ok(())
}

/// What the guest runs, on a disk of its own, and the program of the other end.
fn add_tools(payload: &Path) -> anyhow::Result<()> {
    let strain = atoll_tests::tree::binary("atoll-strain");
    std::fs::copy(&strain, payload.join("bin/atoll-strain"))?;
    let files = vec!["/usr/bin/fio".to_owned(), strain.display().to_string()];
    payload::add_disk_with(files, &payload.join("tools.img"))
}

/// The options that tell a host's files.
fn tls(host: &Host) -> String {
    let number = host.number();
    format!(
        "--tls-ca /payload/tls/ca --tls-cert /payload/tls/{number} --tls-key /payload/tls/{number}.key"
    )
}

/// A report among what the console shows besides: the prompt that a line was typed at on the other host.
#[track_caller]
fn parse(said: &str) -> Report {
    let (start, end) = (said.find('{').unwrap_or(0), said.rfind('}').unwrap_or(0));
    let report = said.get(start..=end).unwrap_or_default();
    serde_json::from_str(report).expect(said)
}

/// The guest's report, once everything in it has gone on since this was called.
#[track_caller]
pub fn works_on(host: &Host) -> Report {
    let before = report(host);
    let began = Instant::now();
    loop {
        let now = report(host);
        let goes_on = |(name, count): (&String, &u64)| now.counts[name] > *count;
        if before.counts.iter().all(goes_on) {
            return now;
        }
        let waited = began.elapsed();
        assert!(
            waited < Duration::from_secs(WORK_SECONDS.into()),
            "{now:?} after {before:?}"
        );
        std::thread::sleep(Duration::from_millis(500));
    }
}

/// What the guest tells; nothing may have gone wrong yet.
#[track_caller]
fn report(host: &Host) -> Report {
    let said = in_guest(host, "cat /tmp/report; cat /tmp/said", 120);
    assert!(!said.contains("atoll-strain: "), "{said}");
    parse(&said)
}

/// A process that waits for the machine; where it does. At a port of its own each time: one that has lost its source keeps
/// its port for a while, to tell what became of the machine.
#[track_caller]
pub fn receive(host: &Host) -> String {
    let number = host.number();
    let start = format!(
        r#"{prepare}
: > vmm.log
(code=0; setsid $vmm receive --listen tcp:10.99.0.{number}:0 {tls} --api-socket /var/t/api.sock --pid-file /var/t/pid \
  >>vmm.log 2>&1 || code=$?; echo $code > exit) </dev/null >/dev/null 2>&1 &
for i in $(seq 300); do sed -n '/waits for a machine/s/.*at="\(.*\)"/\1/p' vmm.log | grep . && exit; [ -e exit ] && break; sleep 0.1; done
cat vmm.log; exit 1"#,
        prepare = shell::PREPARE,
        tls = tls(host),
    );
    on_host(host, &start, 60)
}

/// The command that moves the machine to where one waits for it.
pub fn ask_to_move(from: &Host, to: &str, options: &str) -> String {
    format!(
        "/payload/bin/atoll-vmm ctl --api-socket /var/t/api.sock migrate --to {to} {} --disks local --downtime-limit-ms 1000 {options}",
        tls(from)
    )
}

/// A move that nothing disturbs; what the source says of it.
#[track_caller]
pub fn moves_to(from: &Host, to: &Host) -> Value {
    moved([from, to], |ask| ask)
}

/// The same, but the guest goes on there when half of its memory is there, and the rest follows (post-copy).
#[track_caller]
pub fn moves_late_to(from: &Host, to: &Host) -> Value {
    let info = moved([from, to], |ask| LATE.replace("ASK", &ask));
    wait_for(to, "grep 'memory is all here' vmm.log", 60);
    info
}

/// Asks for the move, has it switch after 50 MB of the 110 that it takes, and says what ASK has said.
const LATE: &str = r#"cd /var/t; ctl() { /payload/bin/atoll-vmm ctl --api-socket api.sock "$@"; }
ASK --when-late post-copy >moved 2>&1 & asked=$!
until ctl migration 2>/dev/null | grep -Eq '"sent_bytes": ([5-9][0-9]{7}|[0-9]{9})'; do [ -d /proc/$asked ] || break; sleep 0.1; done
ctl switch-migration >/dev/null
wait $asked && cat moved"#;

/// A move that `script` asks for, by the command that it is given.
#[track_caller]
fn moved([from, to]: [&Host; 2], script: impl FnOnce(String) -> String) -> Value {
    let place = receive(to);
    let ask = script(ask_to_move(from, &place, ""));
    let asked = from.run(&ask, Duration::from_secs(MOVE_SECONDS.into()));
    let asked = asked.unwrap();
    let logs = || {
        [from, to]
            .map(|host| on_host(host, "cat vmm.log", 30))
            .join("\n\n")
    };
    assert!(asked.code == 0, "{}\n{}", asked.text, logs());
    wait_for(from, "[ -e exit ]", 60);
    assert_eq!(on_host(from, "cat exit", 30), "0");
    serde_json::from_str(&asked.text).expect(&asked.text)
}

/// Two hosts with what the guest and its moves need, the first its home; in directories that go with the guards.
pub fn start_hosts() -> (Vec<Host>, [Scratch; 2]) {
    let (hosts, guards) = payload::start_with(2, |payload| {
        add_certificates(payload)?;
        add_tools(payload)
    });
    let [home, away] = &hosts[..] else {
        panic!("two hosts")
    };
    for (host, there) in [(home, away), (away, home)] {
        let network = NETWORK.replace("NEAR", &host.number().to_string());
        let network = network.replace("FAR", &there.number().to_string());
        let network = format!("set -e{network}");
        host.check(&network, Duration::from_secs(60)).unwrap();
    }
    away.check(AWAY, Duration::from_secs(60)).unwrap();
    on_host(home, &format!("{}{HOME}", shell::PREPARE), 60);
    (hosts, guards)
}

/// The guest starts at home, also once more, and is at work.
#[track_caller]
pub fn start_work(home: &Host, cpu_count: u8) {
    let start = START.replace("CPUS", &cpu_count.to_string());
    on_host(home, &format!("{}{start}", shell::PREPARE), 120);
    in_guest(home, "true", shell::BOOT_SECONDS);
    in_guest(home, WORK, 180);
    let wait = "for i in {1..60}; do [ -e /tmp/report ] && break; sleep 1; done; cat /tmp/report || cat /tmp/said";
    in_guest(home, wait, 120);
    let clock = "cat /sys/devices/system/clocksource/clocksource0/current_clocksource";
    println!("clock source {}", in_guest(home, clock, 60));
    println!("at work {:?}", works_on(home));
}

/// The guest's work ends, and every check of it was right.
#[track_caller]
pub fn end_work(host: &Host, home: &Host) {
    let stop = "touch /tmp/stop; while [ ! -s /tmp/end ]; do sleep 0.5; done; \
        cat /tmp/said; echo strain: $(cat /tmp/end)";
    let ended = in_guest(host, stop, 300);
    assert!(ended.ends_with("strain: 0"), "{ended}");
    let report = parse(&in_guest(host, "cat /tmp/report", 60));
    wait_for(home, "[ -s peer.log ]", 60);
    let echoed = on_host(home, "cat peer.log", 30);
    assert_eq!(echoed, format!("{} messages", report.counts["stream"]));
    assert!(report.verified_bytes > 0, "{report:?}");
    println!("in the end {report:?}");
}
