// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! An IPv4 address with the length of its prefix, and what follows from it.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use crate::id::InvalidId;

/// Shortest prefix that a bridge may have.
const PREFIX_MIN: u8 = 8;
/// Longest prefix that leaves room for guests beside the node and the two reserved addresses.
const PREFIX_MAX: u8 = 29;

/// An address such as `10.64.0.1/24`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cidr {
    address: Ipv4Addr,
    prefix: u8,
}

impl Cidr {
    /// The address itself.
    pub fn address(self) -> Ipv4Addr {
        self.address
    }

    /// Length of the prefix in bits.
    pub fn prefix(self) -> u8 {
        self.prefix
    }

    /// The mask, `255.255.255.0`.
    pub fn netmask(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(u32::MAX << (32 - self.prefix))
    }

    /// The network that the address is in, `10.64.0.0/24`.
    pub fn subnet(self) -> Self {
        Self {
            address: Ipv4Addr::from_bits(self.address.to_bits() & self.netmask().to_bits()),
            prefix: self.prefix,
        }
    }

    /// First and last address that DHCP gives out: the upper half of the subnet. The lower half is for addresses
    /// that people set by hand.
    pub fn dhcp_range(self) -> (Ipv4Addr, Ipv4Addr) {
        let base = self.subnet().address.to_bits();
        let size = 1_u32 << (32 - self.prefix);
        (
            Ipv4Addr::from_bits(base + size / 2),
            Ipv4Addr::from_bits(base + size - 2),
        )
    }
}

impl FromStr for Cidr {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let parsed = text.split_once('/').and_then(|(address, prefix)| {
            Some(Self {
                address: address.parse().ok()?,
                prefix: prefix.parse().ok()?,
            })
        });
        parsed
            .filter(|cidr| (PREFIX_MIN..=PREFIX_MAX).contains(&cidr.prefix))
            .ok_or_else(|| InvalidId {
                text: text.to_owned(),
                what: "IPv4 address with a prefix of 8 to 29 bits",
            })
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_follows_from_an_address() {
        let cidr: Cidr = "10.64.0.1/24".parse().unwrap();
        assert_eq!(cidr.subnet().to_string(), "10.64.0.0/24");
        assert_eq!(cidr.netmask().to_string(), "255.255.255.0");
        let (first, last) = cidr.dhcp_range();
        assert_eq!(
            (first.to_string(), last.to_string()),
            ("10.64.0.128".to_owned(), "10.64.0.254".to_owned())
        );
        let small: Cidr = "192.168.7.1/29".parse().unwrap();
        let (first, last) = small.dhcp_range();
        assert_eq!(
            (first.to_string(), last.to_string()),
            ("192.168.7.4".to_owned(), "192.168.7.6".to_owned())
        );
    }

    #[test]
    fn other_texts_are_refused() {
        for text in [
            "10.64.0.1",
            "10.64.0/24",
            "10.64.0.1/31",
            "::1/64",
            "10.64.0.1/0",
            "x/24",
        ] {
            assert!(text.parse::<Cidr>().is_err(), "{text}");
        }
    }
}
