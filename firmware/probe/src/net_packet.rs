// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The few packets that the probe speaks: ARP (RFC 826), ICMP echo (RFC 792), DHCP (RFC 2131). Pure functions
//! on bytes; no fragments, no options beyond those used.

use alloc::vec::Vec;

/// Address of a network card.
pub type Mac = [u8; 6];
/// Address of the Internet protocol, version 4.
pub type Ip = [u8; 4];

/// Everyone on the wire.
pub const BROADCAST: Mac = [0xff; 6];
const NOBODY: Ip = [0; 4];
const EVERYONE: Ip = [255; 4];

const ETHERTYPE_IP: [u8; 2] = [0x08, 0x00];
const ETHERTYPE_ARP: [u8; 2] = [0x08, 0x06];
const IP_HEADER_BYTES: usize = 20;
const PROTOCOL_ICMP: u8 = 1;
const PROTOCOL_UDP: u8 = 17;
const DHCP_MAGIC: [u8; 4] = [99, 130, 83, 99];

/// Which way an ARP or an echo goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Asks.
    Request,
    /// Answers.
    Reply,
}

/// DHCP messages that we send or expect, by their numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dhcp {
    /// Is there a server?
    Discover = 1,
    /// A server's offer.
    Offer = 2,
    /// We take it.
    Request = 3,
    /// It is ours.
    Acknowledge = 5,
}

/// A packet that came in and means something to us.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Packet<'a> {
    /// ARP: who speaks, and about whom.
    Arp {
        kind: Kind,
        mac: Mac,
        ip: Ip,
        target: Ip,
    },
    /// ICMP echo; `body` is identifier, sequence and data.
    Echo {
        kind: Kind,
        mac: Mac,
        from: Ip,
        to: Ip,
        body: &'a [u8],
    },
    /// A DHCP server's answer to us.
    Dhcp {
        message: u8,
        transaction: [u8; 4],
        ours: Ip,
        server: Ip,
        router: Option<Ip>,
    },
}

fn checksum(bytes: &[u8]) -> [u8; 2] {
    let sum = bytes.chunks(2).fold(0_u32, |sum, pair| {
        sum + (u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)))
    });
    let folded = (sum & 0xffff) + (sum >> 16);
    (!((folded & 0xffff) + (folded >> 16)) as u16).to_be_bytes()
}

fn frame(to: Mac, from: Mac, ethertype: [u8; 2]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(512);
    bytes.extend(to);
    bytes.extend(from);
    bytes.extend(ethertype);
    bytes
}

/// An ARP packet; a request goes to everyone.
pub fn arp(kind: Kind, (mac, ip): (Mac, Ip), (peer_mac, peer): (Mac, Ip)) -> Vec<u8> {
    let mut bytes = frame(peer_mac, mac, ETHERTYPE_ARP);
    bytes.extend([
        0,
        1,
        8,
        0,
        6,
        4,
        0,
        if kind == Kind::Request { 1 } else { 2 },
    ]);
    bytes.extend(mac);
    bytes.extend(ip);
    bytes.extend(if kind == Kind::Request {
        [0; 6]
    } else {
        peer_mac
    });
    bytes.extend(peer);
    bytes
}

fn ip_packet(
    (mac, ip): (Mac, Ip),
    (peer_mac, peer): (Mac, Ip),
    protocol: u8,
    payload: &[u8],
) -> Vec<u8> {
    let mut bytes = frame(peer_mac, mac, ETHERTYPE_IP);
    let length = ((IP_HEADER_BYTES + payload.len()) as u16).to_be_bytes();
    let mut header = [
        0x45, 0, length[0], length[1], 0, 0, 0x40, 0, 64, protocol, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ];
    header[12..16].copy_from_slice(&ip);
    header[16..20].copy_from_slice(&peer);
    let sum = checksum(&header);
    header[10..12].copy_from_slice(&sum);
    bytes.extend(header);
    bytes.extend(payload);
    bytes
}

/// An ICMP echo.
pub fn echo(kind: Kind, from: (Mac, Ip), to: (Mac, Ip), body: &[u8]) -> Vec<u8> {
    let mut message = Vec::from([if kind == Kind::Request { 8 } else { 0 }, 0, 0, 0]);
    message.extend(body);
    let sum = checksum(&message);
    message[2..4].copy_from_slice(&sum);
    ip_packet(from, to, PROTOCOL_ICMP, &message)
}

/// A DHCP message to everyone; `offer` is the offered address and its server.
pub fn dhcp(message: Dhcp, mac: Mac, transaction: [u8; 4], offer: Option<(Ip, Ip)>) -> Vec<u8> {
    let mut bootp = Vec::from([1, 1, 6, 0]);
    bootp.extend(transaction);
    // Seconds, then flags: the answer goes to everyone, as we have no address yet.
    bootp.extend([0, 0, 0x80, 0]);
    bootp.resize(28, 0);
    bootp.extend(mac);
    bootp.resize(236, 0);
    bootp.extend(DHCP_MAGIC);
    bootp.extend([53, 1, message as u8]);
    if let Some((address, server)) = offer {
        bootp.extend([50, 4]);
        bootp.extend(address);
        bootp.extend([54, 4]);
        bootp.extend(server);
    }
    bootp.extend([55, 2, 1, 3, 255]);
    bootp.resize(300, 0);
    let mut udp = Vec::from([0, 68, 0, 67]);
    udp.extend(((8 + bootp.len()) as u16).to_be_bytes());
    // No checksum: allowed in version 4 (RFC 768).
    udp.extend([0, 0]);
    udp.extend(bootp);
    ip_packet((mac, NOBODY), (BROADCAST, EVERYONE), PROTOCOL_UDP, &udp)
}

fn array<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..offset + N)?.try_into().ok()
}

/// Understands a frame, or `None` when it is nothing to us.
pub fn parse(bytes: &[u8]) -> Option<Packet<'_>> {
    let mac = array(bytes, 6)?;
    let content = bytes.get(14..)?;
    match array(bytes, 12)? {
        ETHERTYPE_ARP => {
            let kind = match array(content, 6)? {
                [0, 1] => Kind::Request,
                [0, 2] => Kind::Reply,
                _ => return None,
            };
            Some(Packet::Arp {
                kind,
                mac: array(content, 8)?,
                ip: array(content, 14)?,
                target: array(content, 24)?,
            })
        }
        ETHERTYPE_IP => {
            let header_bytes = usize::from(content.first()? & 0xf) * 4;
            let length = usize::from(u16::from_be_bytes(array(content, 2)?));
            let payload = content.get(header_bytes..length)?;
            let (from, to) = (array(content, 12)?, array(content, 16)?);
            match *content.get(9)? {
                PROTOCOL_ICMP => {
                    let kind = match payload.first()? {
                        8 => Kind::Request,
                        0 => Kind::Reply,
                        _ => return None,
                    };
                    Some(Packet::Echo {
                        kind,
                        mac,
                        from,
                        to,
                        body: payload.get(4..)?,
                    })
                }
                PROTOCOL_UDP if array(payload, 2)? == [0, 68] => {
                    parse_dhcp(payload.get(8..)?, from)
                }
                _ => None,
            }
        }
        _ => None,
    }
}

fn parse_dhcp(bootp: &[u8], from: Ip) -> Option<Packet<'_>> {
    if bootp.first()? != &2 || array(bootp, 236)? != DHCP_MAGIC {
        return None;
    }
    let mut options = bootp.get(240..)?;
    let (mut message, mut server, mut router) = (0, from, None);
    while let [code, rest @ ..] = options {
        match code {
            0 => options = rest,
            255 => break,
            _ => {
                let length = usize::from(*rest.first()?);
                let value = rest.get(1..1 + length)?;
                match code {
                    53 => message = *value.first()?,
                    54 => server = array(value, 0)?,
                    3 => router = array(value, 0),
                    _ => {}
                }
                options = rest.get(1 + length..)?;
            }
        }
    }
    Some(Packet::Dhcp {
        message,
        transaction: array(bootp, 4)?,
        ours: array(bootp, 16)?,
        server,
        router,
    })
}
