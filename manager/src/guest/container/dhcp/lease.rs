// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What a DHCP client has written about its lease, parsed: the network has said it, and any host there may be lying.

use std::fmt;
use std::net::Ipv4Addr;

use crate::schema::format::DNS_NAME;

/// Most name servers that are taken over: resolv.conf(5), MAXNS.
const SERVERS_MAX: usize = 3;

/// A lease; the default is none.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Lease {
    /// Address with the length of its prefix, 1 to 32 bits.
    pub address: Option<(Ipv4Addr, u8)>,
    /// Where the default route leads.
    pub router: Option<Ipv4Addr>,
    /// Name servers, at most three.
    pub servers: Vec<Ipv4Addr>,
    /// The network's domain.
    pub domain: Option<String>,
}

impl Lease {
    /// What the client's script has written, one `name value` a line. `None` when it is not complete, or not that; an
    /// option that no host could use is left out.
    pub fn parse(text: &str) -> Option<Self> {
        let mut lines = text.strip_suffix("end\n")?.lines();
        let mut value = |name: &str| lines.next()?.strip_prefix(name)?.strip_prefix(' ');
        let event = value("event")?;
        let (ip, mask) = (value("ip")?, value("mask")?);
        let (router, dns, domain) = (value("router")?, value("dns")?, value("domain")?);
        match event {
            "bound" | "renew" => {}
            "deconfig" | "leasefail" | "nak" => return Some(Self::default()),
            _ => return None,
        }
        let (ip, prefix): (Ipv4Addr, u8) = (ip.parse().ok()?, mask.parse().ok()?);
        if !is_host(ip) || !(1..=32).contains(&prefix) {
            return None;
        }
        let hosts = |text: &str| -> Vec<Ipv4Addr> {
            let addresses = text.split(' ').filter_map(|word| word.parse().ok());
            addresses
                .filter(|address| is_host(*address))
                .take(SERVERS_MAX)
                .collect()
        };
        Some(Self {
            address: Some((ip, prefix)),
            router: hosts(router).first().copied(),
            servers: hosts(dns),
            domain: (DNS_NAME.check)(domain).is_ok().then(|| domain.to_owned()),
        })
    }
}

/// The same form again.
impl fmt::Display for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (event, ip, mask) = match self.address {
            Some((ip, prefix)) => ("bound", ip.to_string(), prefix.to_string()),
            None => ("deconfig", String::new(), String::new()),
        };
        let router = self
            .router
            .map(|router| router.to_string())
            .unwrap_or_default();
        let servers: Vec<String> = self.servers.iter().map(ToString::to_string).collect();
        let (dns, domain) = (
            servers.join(" "),
            self.domain.as_deref().unwrap_or_default(),
        );
        write!(
            f,
            "event {event}\nip {ip}\nmask {mask}\nrouter {router}\ndns {dns}\ndomain {domain}\nend\n"
        )
    }
}

/// Whether one host can have that address.
fn is_host(address: Ipv4Addr) -> bool {
    let is_other = address.is_unspecified()
        || address.is_loopback()
        || address.is_multicast()
        || address.is_broadcast();
    !is_other && address.octets()[0] != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(ip: &str, mask: &str, router: &str, dns: &str, domain: &str) -> String {
        format!(
            "event bound\nip {ip}\nmask {mask}\nrouter {router}\ndns {dns}\ndomain {domain}\nend\n"
        )
    }

    #[test]
    fn a_lease_is_read_and_written() {
        let said = text(
            "10.0.0.5",
            "24",
            "10.0.0.1 10.0.0.2",
            "10.0.0.1 9.9.9.9",
            "lan.example",
        );
        let lease = Lease::parse(&said).unwrap();
        assert_eq!(lease.address, Some((Ipv4Addr::new(10, 0, 0, 5), 24)));
        assert_eq!(lease.router, Some(Ipv4Addr::new(10, 0, 0, 1)));
        assert_eq!(lease.servers.len(), 2);
        assert_eq!(lease.domain.as_deref(), Some("lan.example"));
        assert_eq!(Lease::parse(&lease.to_string()), Some(lease));
        let none = Lease::default();
        assert_eq!(Lease::parse(&none.to_string()), Some(none.clone()));
        let lost = said.replace("bound", "deconfig");
        assert_eq!(Lease::parse(&lost), Some(none));
    }

    #[test]
    fn lies_are_left_out() {
        for (ip, mask) in [
            ("127.0.0.1", "8"),
            ("224.0.0.1", "24"),
            ("0.0.0.0", "24"),
            ("255.255.255.255", "32"),
            ("10.0.0.5", "0"),
            ("10.0.0.5", "33"),
            ("10.0.0.5", ""),
            ("10.0.0.5 dev lo", "24"),
            ("-h", "24"),
            ("", ""),
        ] {
            assert_eq!(
                Lease::parse(&text(ip, mask, "", "", "")),
                None,
                "{ip}/{mask}"
            );
        }
        let servers = "10.0.0.1;id 127.0.0.53 1.1.1.1 1.1.1.2 1.1.1.3 1.1.1.4";
        let lease = text("10.0.0.5", "24", "default 0.0.0.0", servers, "a b\tc");
        let lease = Lease::parse(&lease).unwrap();
        assert_eq!((lease.router, lease.domain), (None, None));
        assert_eq!(lease.servers.len(), 3);
        assert!(lease.servers.iter().all(|server| server.octets()[0] == 1));
    }

    #[test]
    fn what_is_not_complete_is_no_lease() {
        let whole = text("10.0.0.5", "24", "10.0.0.1", "10.0.0.1", "lan");
        for length in 0..whole.len() {
            assert_eq!(Lease::parse(&whole[..length]), None, "{length}");
        }
        let forged = text("10.0.0.5", "24", "", "", "lan\nevent bound");
        assert_eq!(
            Lease::parse(&forged).unwrap().domain.as_deref(),
            Some("lan")
        );
        assert_eq!(Lease::parse(&whole.replace("router", "route")), None);
    }
}
