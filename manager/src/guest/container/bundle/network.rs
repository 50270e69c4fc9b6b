// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A container's network cards: both ends of each pair, and what the container's files say about them.

use crate::error::Error;
use crate::guest::config::GuestConfig;
use crate::guest::container::setup::{Addressing, Card, Identity};
use crate::guest::vm::drives::bytes_of_mib;
use crate::id::GuestId;
use crate::network::link::{Attachment, Inside};
use crate::network::vlan::Vlans;
use crate::schema::Properties;

/// A card as both sides see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Number of the card.
    pub index: u16,
    /// What the host's end is connected to.
    pub attachment: Attachment,
    /// The container's end.
    pub inside: Inside,
    /// Whether the host asks for its IPv4 address by DHCP.
    pub asks_dhcp: bool,
    /// Whether it is meant to ask for its IPv6 address, too, which it cannot.
    asks_dhcp6: bool,
}

/// All cards, by number.
pub fn cards(config: &GuestConfig) -> Result<Vec<Link>, Error> {
    let keys = config.family("net[n]");
    let cards = keys.into_iter().map(|(key, _)| {
        let card = config.properties(key)?.unwrap_or_default();
        Link::new(key, &card)
    });
    cards.collect()
}

impl Link {
    /// The card that a key's value describes.
    pub fn new(key: &str, card: &Properties) -> Result<Self, Error> {
        let mac = card
            .get("hwaddr")
            .ok_or_else(|| Error::refused(format!("{key}: no 'hwaddr'")))?;
        let (addresses, gateways) = [("ip", "gw"), ("ip6", "gw6")]
            .into_iter()
            .filter_map(|(ip, gateway)| match addressing(card, ip, gateway) {
                Addressing::Static { address, gateway } => Some((address, gateway)),
                _ => None,
            })
            .unzip::<_, _, Vec<_>, Vec<_>>();
        let attachment = Attachment {
            card: key.to_owned(),
            bridge: card.get("bridge").map(str::to_owned),
            vlans: Vlans::new(key, card.get("tag"), card.get("trunks"))?,
            mtu: card.number("mtu"),
            link_down: card.is_set("link_down"),
            multi_queue: false,
            rate: card
                .number("rate")
                .filter(|rate| *rate > 0.0)
                .map(|rate| bytes_of_mib(rate).max(1)),
        };
        let inside = Inside {
            name: name_of(card, key),
            mac: mac.to_owned(),
            addresses,
            gateways: gateways.into_iter().flatten().collect(),
        };
        Ok(Self {
            index: index_of(key),
            attachment,
            inside,
            asks_dhcp: asks_dhcp(card),
            asks_dhcp6: card.is_set("host-managed") && card.get("ip6") == Some("dhcp"),
        })
    }

    /// Refuses a card that this host cannot manage.
    pub fn demand(&self) -> Result<(), Error> {
        match self.asks_dhcp6 {
            true => Err(Error::refused(format!(
                "{}: the host has no client for ip6=dhcp: use ip6=auto, which the kernel does, or a fixed address, or leave \
                 out host-managed if the container has a client",
                self.attachment.card
            ))),
            false => Ok(()),
        }
    }
}

/// What the container's files say about it. `resolver` is the node's own name server, used when the config has none.
pub fn identity(
    id: GuestId,
    config: &GuestConfig,
    resolver: Option<&str>,
) -> Result<Identity, Error> {
    let words = |key: &str| -> Vec<String> {
        let text = config.get(key).unwrap_or_default();
        crate::schema::split_list(text).map(str::to_owned).collect()
    };
    let mut cards = Vec::new();
    for (key, _) in config.family("net[n]") {
        let card = config.properties(key)?.unwrap_or_default();
        cards.push(Card {
            name: name_of(&card, key),
            // Two clients would disturb each other.
            ipv4: match asks_dhcp(&card) {
                true => Addressing::Manual,
                false => addressing(&card, "ip", "gw"),
            },
            ipv6: addressing(&card, "ip6", "gw6"),
        });
    }
    let mut nameservers = words("nameserver");
    // A card with DHCP learns its name server there.
    if nameservers.is_empty()
        && cards
            .iter()
            .any(|c| matches!(c.ipv4, Addressing::Static { .. }))
    {
        nameservers.extend(resolver.map(str::to_owned));
    }
    Ok(Identity {
        hostname: super::hostname(id, config),
        cards,
        nameservers,
        search_domains: words("searchdomain"),
        timezone: config.get("timezone").map(str::to_owned),
    })
}

fn asks_dhcp(card: &Properties) -> bool {
    card.is_set("host-managed") && card.get("ip") == Some("dhcp")
}

/// Name of a card in the container.
fn name_of(card: &Properties, key: &str) -> String {
    let name = card.get("name").map(str::to_owned);
    name.unwrap_or_else(|| format!("eth{}", index_of(key)))
}

/// Number of a card, from a key that the family's table has checked.
fn index_of(key: &str) -> u16 {
    key.trim_start_matches("net").parse().unwrap_or_default()
}

fn addressing(card: &Properties, ip: &str, gateway: &str) -> Addressing {
    match card.get(ip) {
        None | Some("manual") => Addressing::Manual,
        Some("dhcp") => Addressing::Dhcp,
        Some("auto") => Addressing::Auto,
        Some(address) => Addressing::Static {
            address: address.to_owned(),
            gateway: card.get(gateway).map(str::to_owned),
        },
    }
}
