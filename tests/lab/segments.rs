// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Large UDP segments (USO) between a Linux guest and the taps of its host, both with a kernel that has them: two cards,
//! one whose packets the VMM moves, one with vhost-net. Each has a network of its own:
//!
//! ```text
//! guest: ethI ── tapI ── bridge brI ── vethI ══ far end, in network namespace nI
//!                 │ counts                 │ leaves no segments and no checksums to the far end
//! ```
//! What the guest sends at once comes to the tap at once, and the host's kernel cuts it by what its header says.

use std::ops::RangeInclusive;
use std::time::Duration;

use atoll_tests::lab::{Host, HostKernel};

use crate::payload;
use crate::shell::{self, BOOT_SECONDS, in_guest, on_host};

/// What answers of `datagrams.pl` say: of 40 datagrams that were sent at once.
const EACH: &str = "40 right, 0 wrong, 40 reads";
const AT_ONCE: &str = "40 right, 0 wrong, 1 reads";
/// As many packets at the tap, and some that networks have besides, for neighbors.
const TOGETHER: RangeInclusive<u64> = 1..=10;
const APART: RangeInclusive<u64> = 40..=50;
/// Bits that the guest's driver has to accept, VIRTIO 1.3 §5.1.3: GUEST_UFO and HOST_UFO (which Linux takes, but has not
/// sent since 4.14), GUEST_USO4, GUEST_USO6 and HOST_USO.
const FEATURES: [usize; 5] = [10, 14, 54, 55, 56];

/// The networks, a program each in their far ends, and the guest's second disk: what it needs for the test.
const NETWORKS: &str = r#"
for i in 0 1; do
  ip netns add n$i; ip tuntap add tap$i mode tap vnet_hdr
  ip link add br$i type bridge; ip link add veth$i type veth peer name far netns n$i
  for link in tap$i veth$i br$i; do
    [ $link = br$i ] || ip link set $link master br$i
    sysctl -qw net.ipv6.conf.$link.disable_ipv6=1; ip link set $link up
  done
  ethtool -K veth$i tx off >/dev/null
  ip -n n$i link set lo up; ip -n n$i link set far up
  ip -n n$i address add 10.77.$i.1/24 dev far; ip -n n$i address add fd77:$i::1/64 dev far nodad
  setsid ip netns exec n$i perl /payload/lab/datagrams.pl answer 7000 </dev/null >far$i.log 2>&1 &
  until grep -q answering far$i.log; do sleep 0.1; done
done
mkdir tools; cp /usr/sbin/ethtool /payload/lab/datagrams.pl tools/; mke2fs -q -d tools tools.raw 8M
"#;

const START: &str = r#"
start --kernel /payload/next/vmlinux --initrd /payload/next/guest.img --memory 512 \
  --cmdline 'console=ttyS0 net.ifnames=0 quiet mitigations=off start=/bin/bash' \
  --disk $root --disk path=/var/t/tools.raw,format=raw,readonly \
  --net tap=tap0,vhost=off --net tap=tap1,vhost=on
"#;

/// Addresses, and who answers at port 7000 (each datagram for itself) and 7001 (as the card has received them).
const IN_GUEST: &str = "mount -t ext2 -o ro /dev/vdb /mnt; for i in 0 1; do ip link set eth$i up; \
    ip address add 10.77.$i.2/24 dev eth$i; ip address add fd77:$i::2/64 dev eth$i nodad; done; \
    perl /mnt/datagrams.pl answer 7000 >/tmp/answers0 2>&1 & perl /mnt/datagrams.pl answer 7001 gro >/tmp/answers1 2>&1 & \
    for i in {1..60}; do [ $(cat /tmp/answers* | grep -c answering) = 2 ] && break; sleep 1; done; cat /tmp/answers*; \
    for i in 0 1; do ping -c 3 -W 30 10.77.$i.1 && ping -c 3 -W 30 fd77:$i::1 || echo T-LOST; done";

/// Counts what goes through a card's tap while something is done.
fn packets(host: &Host, card: u8, counter: &str, act: impl FnOnce()) -> u64 {
    let read = || {
        let file = format!("cat /sys/class/net/tap{card}/statistics/{counter}");
        on_host(host, &file, 30).parse::<u64>().unwrap()
    };
    let before = read();
    act();
    read() - before
}

/// Both ways, by IPv4 and IPv6: all arrives as it was sent, in as many packets at the tap as are wanted.
fn exchange(host: &Host, card: u8, wanted: &RangeInclusive<u64>) {
    for network in [format!("10.77.{card}."), format!("fd77:{card}::")] {
        let sent = packets(host, card, "rx_packets", || {
            let line = format!("perl /mnt/datagrams.pl send {network}1 7000");
            assert_eq!(in_guest(host, &line, 120), EACH);
        });
        let received = packets(host, card, "tx_packets", || {
            assert_eq!(far_end_sends(host, card, &network, 7000), EACH);
        });
        println!("{network}: {sent} packets from the guest, {received} to it");
        assert!(
            wanted.contains(&sent) && wanted.contains(&received),
            "{network}: {sent} packets from the guest, {received} to it, wanted {wanted:?}"
        );
    }
}

/// Gives the guest's answer.
fn far_end_sends(host: &Host, card: u8, network: &str, port: u16) -> String {
    let line = format!(
        "ip netns exec n{card} perl /payload/lab/datagrams.pl send {network}2 {port} || {{ tail vmm.log; exit 1; }}"
    );
    on_host(host, &line, 120)
}

/// The driver has accepted all that there is.
fn features(host: &Host, card: u8) {
    let accepted = in_guest(
        host,
        &format!("cat /sys/class/net/eth{card}/device/features"),
        60,
    );
    println!("eth{card}: {accepted}");
    for bit in FEATURES {
        assert_eq!(&accepted[bit..=bit], "1", "feature {bit} of {accepted}");
    }
}

fn set_offloads(host: &Host, card: u8, value: &str) {
    let line = format!(
        "/mnt/ethtool -K eth{card} tx-udp-segmentation {value} rx-gro-hw {value} && \
         /mnt/ethtool -k eth{card} | grep -Ec '^\\s*(tx-udp-segmentation|rx-gro-hw): {value}$'"
    );
    assert_eq!(in_guest(host, &line, 60), "2");
}

#[test]
fn linux_sends_and_receives_large_udp_segments() {
    let (hosts, _guard) = payload::start_on(HostKernel::Backports, 1, payload::add_next_kernel);
    let host = &hosts[0];
    let prepare = format!("{}{NETWORKS}{START}", shell::PREPARE);
    host.check(&prepare, Duration::from_secs(180)).unwrap();
    let reached = in_guest(host, IN_GUEST, BOOT_SECONDS);
    assert!(!reached.contains("T-LOST"), "{reached}");
    for card in [0, 1] {
        features(host, card);
        // The driver has the sending of them off at first.
        set_offloads(host, card, "on");
        exchange(host, card, &TOGETHER);
        // To a socket that takes them so, the kernel gives what the card has received.
        for network in [format!("10.77.{card}."), format!("fd77:{card}::")] {
            assert_eq!(far_end_sends(host, card, &network, 7001), AT_ONCE);
        }
        set_offloads(host, card, "off");
        exchange(host, card, &APART);
        set_offloads(host, card, "on");
        exchange(host, card, &TOGETHER);
    }
    shell::end(host);
}
