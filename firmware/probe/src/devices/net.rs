// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! virtio-net: an address (given, or by DHCP), the peer's hardware address by ARP, pings to it; afterwards it
//! answers the ARP requests and pings of others.
#![expect(
    unsafe_code,
    reason = "the receive buffer is lent to the device between two calls"
)]

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;

use virtio_drivers::device::net::VirtIONetRaw;

use super::Device;
use crate::clock::Clock;
use crate::cpu;
use crate::interrupts;
use crate::measure::median;
use crate::memory::Dma;
use crate::net_packet::{BROADCAST, Dhcp, Ip, Kind, Mac, Packet, arp, dhcp, echo, parse};
use crate::options::Options;
use crate::report::Report;
use crate::transport::MsixTransport;

const QUEUE_SIZE: usize = 16;
/// One Ethernet frame of the usual size and its virtio header.
const BUFFER_BYTES: usize = 2048;
/// About a second each: a bridge may forward nothing for the first moments of a new port, and a DHCP server may
/// look for three seconds whether an address is taken.
const TRIES: usize = 6;
const PINGS: u16 = 16;
const PING_BYTES: usize = 56;

struct Net {
    driver: VirtIONetRaw<Dma, MsixTransport, QUEUE_SIZE>,
    buffer: Box<[u8]>,
    token: u16,
    ip: Option<Ip>,
}

pub fn open(transport: MsixTransport) -> virtio_drivers::Result<Box<dyn Device>> {
    let mut driver = VirtIONetRaw::new(transport)?;
    let mut buffer = vec![0; BUFFER_BYTES].into_boxed_slice();
    // SAFETY: the buffer lives as long as the driver, and is read in `receive` only after the device used it.
    let token = unsafe { driver.receive_begin(&mut buffer) }?;
    Ok(Box::new(Net {
        driver,
        buffer,
        token,
        ip: None,
    }))
}

impl Net {
    fn me(&self) -> (Mac, Ip) {
        (self.driver.mac_address(), self.ip.unwrap_or_default())
    }

    /// The next frame that came in; questions to us are answered on the way.
    fn receive(&mut self) -> Option<Vec<u8>> {
        self.driver.poll_receive()?;
        // SAFETY: the buffer that this token was given for.
        let (header, length) =
            unsafe { self.driver.receive_complete(self.token, &mut self.buffer) }.ok()?;
        let frame = Vec::from(self.buffer.get(header..header + length)?);
        // SAFETY: as in `open`.
        self.token = unsafe { self.driver.receive_begin(&mut self.buffer) }.ok()?;
        self.answer(&frame);
        Some(frame)
    }

    fn answer(&mut self, frame: &[u8]) {
        let me = self.me();
        let answer = match parse(frame) {
            Some(Packet::Arp {
                kind: Kind::Request,
                mac,
                ip,
                target,
            }) if self.ip == Some(target) => arp(Kind::Reply, me, (mac, ip)),
            Some(Packet::Echo {
                kind: Kind::Request,
                mac,
                from,
                to,
                body,
            }) if self.ip == Some(to) => echo(Kind::Reply, me, (mac, from), body),
            _ => return,
        };
        let _ = self.driver.send(&answer);
    }

    /// Sends `question` and looks at what comes in until `wanted` finds its answer, a few times over.
    fn ask<T>(&mut self, question: &[u8], wanted: impl Fn(Packet<'_>) -> Option<T>) -> Option<T> {
        for _ in 0..TRIES {
            self.driver.send(question).ok()?;
            let mut answer = None;
            interrupts::wait(|| {
                while answer.is_none() {
                    let Some(frame) = self.receive() else { break };
                    answer = parse(&frame).and_then(&wanted);
                }
                answer.is_some()
            });
            if answer.is_some() {
                return answer;
            }
        }
        None
    }

    /// An address and the router's (or the server's) from DHCP.
    fn lease(&mut self) -> Option<(Ip, Ip)> {
        let mac = self.driver.mac_address();
        let transaction = (cpu::time_stamp() as u32).to_be_bytes();
        let answer = |expected: Dhcp| {
            move |packet: Packet<'_>| match packet {
                Packet::Dhcp {
                    message,
                    transaction: theirs,
                    ours,
                    server,
                    router,
                } if message == expected as u8 && theirs == transaction => {
                    Some((ours, server, router))
                }
                _ => None,
            }
        };
        let discover = dhcp(Dhcp::Discover, mac, transaction, None);
        let (offered, server, _) = self.ask(&discover, answer(Dhcp::Offer))?;
        let request = dhcp(Dhcp::Request, mac, transaction, Some((offered, server)));
        let (ours, server, router) = self.ask(&request, answer(Dhcp::Acknowledge))?;
        Some((ours, router.unwrap_or(server)))
    }

    fn ping(&mut self, clock: &Clock, peer: (Mac, Ip), report: &mut Report) {
        let mut samples = Vec::new();
        for sequence in 0..PINGS {
            let mut body = vec![0xa7; PING_BYTES + 4];
            body[2..4].copy_from_slice(&sequence.to_be_bytes());
            let question = echo(Kind::Request, self.me(), peer, &body);
            let start = clock.now_ns();
            let same = |packet: Packet<'_>| match packet {
                Packet::Echo {
                    kind: Kind::Reply,
                    body: theirs,
                    ..
                } if theirs == body => Some(()),
                _ => None,
            };
            if self.ask(&question, same).is_none() {
                return report.fail("no answer to a ping");
            }
            samples.push(clock.now_ns() - start);
        }
        report.number("pings", u64::from(PINGS));
        report.number("ping_ns", median(samples));
    }
}

impl Device for Net {
    fn name(&self) -> &'static str {
        "net"
    }

    fn check(&mut self, report: &mut Report, clock: &Clock, options: &Options) {
        let [a, b, c, d, e, f] = self.driver.mac_address();
        report.text(
            "mac",
            format_args!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}"),
        );
        let peer = match (options.ip, options.peer) {
            (Some(ip), Some(peer)) => {
                self.ip = Some(ip);
                peer
            }
            _ => {
                let Some((ip, router)) = self.lease() else {
                    return report.fail("no DHCP server answers");
                };
                self.ip = Some(ip);
                router
            }
        };
        let [a, b, c, d] = self.me().1;
        report.text("ip", format_args!("{a}.{b}.{c}.{d}"));
        let [a, b, c, d] = peer;
        report.text("peer", format_args!("{a}.{b}.{c}.{d}"));
        let question = arp(Kind::Request, self.me(), (BROADCAST, peer));
        let mac = self.ask(&question, |packet| match packet {
            Packet::Arp {
                kind: Kind::Reply,
                mac,
                ip,
                ..
            } if ip == peer => Some(mac),
            _ => None,
        });
        match mac {
            Some(mac) => self.ping(clock, (mac, peer), report),
            None => report.fail("the peer does not answer ARP"),
        }
    }

    fn serve(&mut self) {
        while self.receive().is_some() {}
    }

    fn address(&self) -> Option<Ip> {
        self.ip
    }
}
