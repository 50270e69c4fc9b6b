// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! VLANs (IEEE 802.1Q) of a guest's card: which ones the host's end of it carries as a port of a VLAN-aware bridge.
//!
//! As in PVE: frames of the card's `tag` cross it without a tag, those of its `trunks` with theirs. A card that has
//! neither is in VLAN 1 and carries all others with their tags. On a bridge that is not VLAN-aware, such a card is
//! connected as ever, one with a tag is on a bridge of its VLAN (`vlan_bridge`), and one with trunks is refused. Called
//! by `link`, which connects cards.

use std::ops::RangeInclusive;

use crate::error::Error;
use crate::exec::Program;
use crate::network::shown::Awareness;

/// Numbers of VLANs; 0 and 4095 are reserved (IEEE 802.1Q, table 9-2).
const IDS: RangeInclusive<u16> = 1..=4094;

/// The VLAN of frames without a tag, on cards and bridges for which nobody said another.
const DEFAULT_ID: u16 = 1;

/// What a config says about the VLANs of a card.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Vlans {
    /// VLAN of the frames that the guest sends and receives without a tag.
    pub tag: Option<u16>,
    /// VLANs whose frames it sends and receives with their tags; in order, without overlaps.
    pub trunks: Vec<RangeInclusive<u16>>,
}

/// The VLANs of a list such as `2;5;10-20`: in order, what overlaps or adjoins as one. PVE's property `trunks`.
pub fn parse_trunks(text: &str) -> Result<Vec<RangeInclusive<u16>>, String> {
    let mut ranges = Vec::new();
    for part in text.split(';') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let range = id(first)?..=id(last)?;
        if range.is_empty() {
            return Err(format!("invalid range of VLANs '{part}'"));
        }
        ranges.push(range);
    }
    ranges.sort_by_key(|range| *range.start());
    let mut merged: Vec<RangeInclusive<u16>> = Vec::new();
    for range in ranges {
        match merged.last_mut() {
            Some(last) if *range.start() <= *last.end() + 1 => {
                *last = *last.start()..=*last.end().max(range.end());
            }
            _ => merged.push(range),
        }
    }
    Ok(merged)
}

/// What a card needs beyond being a port of its bridge.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Need {
    /// Nothing.
    Nothing,
    /// Its VLANs as a port of a VLAN-aware bridge.
    Filter,
    /// The bridge of its VLAN, `vlan_bridge`; and what helps where that cannot be.
    Bridge { tag: u16, remedy: String },
}

/// How a bridge is made VLAN-aware: now, and for its next start.
fn remedy(bridge: &str, awareness: Awareness) -> String {
    match awareness {
        Awareness::Impossible => format!(
            "'{bridge}' cannot be VLAN-aware, this host's kernel has no VLAN filtering \
             (CONFIG_BRIDGE_VLAN_FILTERING)"
        ),
        _ => format!(
            "make it VLAN-aware: ip link set dev {bridge} type bridge vlan_filtering 1 \
             (in /etc/network/interfaces: bridge-vlan-aware yes)"
        ),
    }
}

fn id(text: &str) -> Result<u16, String> {
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    let id = text.parse().ok().filter(|id| digits && IDS.contains(id));
    id.ok_or_else(|| format!("invalid VLAN '{text}': a number from 1 to 4094 is expected"))
}

impl Vlans {
    /// What the properties `tag` and `trunks` of a card (`net0`) say. Nothing of them is passed over: a card in another
    /// VLAN than its owner believes would be a hole.
    pub fn new(card: &str, tag: Option<&str>, trunks: Option<&str>) -> Result<Self, Error> {
        let refuse = |error| Error::refused(format!("{card}: {error}"));
        let trunks = trunks.map(parse_trunks).transpose().map_err(refuse)?;
        Ok(Self {
            tag: tag.map(id).transpose().map_err(refuse)?,
            trunks: trunks.unwrap_or_default(),
        })
    }

    /// Neither a tag nor trunks.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// What a card (`net0`) with these on a bridge needs, beyond being its port.
    pub(super) fn need(
        &self,
        card: &str,
        bridge: &str,
        awareness: Awareness,
    ) -> Result<Need, Error> {
        let remedy = remedy(bridge, awareness);
        match (awareness, self.tag) {
            (Awareness::Aware, _) => Ok(Need::Filter),
            _ if !self.trunks.is_empty() => Err(Error::refused(format!(
                "{card}: trunks needs a VLAN-aware bridge, and '{bridge}' is none: {remedy}"
            ))),
            (_, None) => Ok(Need::Nothing),
            (_, Some(tag)) => Ok(Need::Bridge { tag, remedy }),
        }
    }

    /// Arguments of bridge(8) that give a port of a VLAN-aware bridge these VLANs and no others. At no moment does it
    /// carry one that it is not to have.
    fn commands(&self, port: &str) -> Vec<Vec<String>> {
        let command = |verb: &str, ids: &RangeInclusive<u16>, flags: &[&str]| {
            let ids = match ids.start() == ids.end() {
                true => ids.start().to_string(),
                false => format!("{}-{}", ids.start(), ids.end()),
            };
            let words = ["vlan", verb, "dev", port, "vid", &ids];
            let words = words.iter().chain(flags);
            words.map(|word| (*word).to_owned()).collect::<Vec<_>>()
        };
        let all = [DEFAULT_ID + 1..=*IDS.end()];
        let trunks = match self.is_default() {
            true => &all[..],
            false => &self.trunks,
        };
        let untagged = self.tag.unwrap_or(DEFAULT_ID);
        let mut commands = vec![command("del", &IDS, &[])];
        commands.extend(trunks.iter().map(|ids| command("add", ids, &[])));
        // Last: the same VLAN as a member of the trunks would get its tag.
        commands.push(command(
            "add",
            &(untagged..=untagged),
            &["pvid", "untagged"],
        ));
        commands
    }

    /// Gives a port of a VLAN-aware bridge these VLANs and no others.
    pub(super) async fn set(&self, port: &str) -> Result<(), Error> {
        for command in self.commands(port) {
            Program::new("bridge").args(command).run().await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trunks_are_read_in_order_and_without_overlaps() {
        let good = [
            ("5", vec![5..=5]),
            ("10-20;2;5", vec![2..=2, 5..=5, 10..=20]),
            ("7;5-6;6-9;4094", vec![5..=9, 4094..=4094]),
            ("1-4094;7", vec![1..=4094]),
        ];
        for (text, expected) in good {
            assert_eq!(parse_trunks(text).unwrap(), expected, "{text}");
        }
        for bad in [
            "", ";", "5;", "0", "4095", "20-10", "1-", "-1", "+5", "5,6", "a", "1-2-3", " 5",
            "99999",
        ] {
            assert!(parse_trunks(bad).is_err(), "{bad}");
        }
    }

    #[track_caller]
    fn commands(tag: Option<&str>, trunks: Option<&str>, expected: &[&str]) {
        let commands = Vlans::new("net0", tag, trunks)
            .unwrap()
            .commands("tap100i0");
        let told: Vec<String> = commands.iter().map(|words| words.join(" ")).collect();
        assert_eq!(told, expected);
    }

    #[test]
    fn a_port_has_what_its_card_says_and_nothing_else() {
        let none = "vlan del dev tap100i0 vid 1-4094";
        let own = "vlan add dev tap100i0 vid 5 pvid untagged";
        let default = "vlan add dev tap100i0 vid 1 pvid untagged";
        commands(Some("5"), None, &[none, own]);
        commands(
            None,
            None,
            &[none, "vlan add dev tap100i0 vid 2-4094", default],
        );
        let (two, many) = (
            "vlan add dev tap100i0 vid 2",
            "vlan add dev tap100i0 vid 4-20",
        );
        commands(Some("5"), Some("2;4-20"), &[none, two, many, own]);
        commands(None, Some("4-20;2"), &[none, two, many, default]);
    }

    #[test]
    fn what_cannot_be_read_is_refused() {
        for (tag, trunks) in [(Some("0"), None), (Some("5"), Some("x")), (Some(""), None)] {
            let refused = Vlans::new("net2", tag, trunks).unwrap_err().to_string();
            assert!(refused.starts_with("net2: invalid VLAN '"), "{refused}");
        }
    }

    #[test]
    fn a_tag_needs_a_filter_or_a_bridge_and_trunks_a_filter() {
        let need = |tag, trunks: &[RangeInclusive<u16>], awareness| {
            let trunks = trunks.to_vec();
            let need = Vlans { tag, trunks }.need("net3", "vmbr7", awareness);
            need.map_err(|error| error.to_string())
        };
        assert_eq!(need(Some(5), &[2..=9], Awareness::Aware), Ok(Need::Filter));
        assert_eq!(need(None, &[], Awareness::Aware), Ok(Need::Filter));
        for awareness in [Awareness::Unaware, Awareness::Impossible] {
            assert_eq!(need(None, &[], awareness), Ok(Need::Nothing));
            let tagged = need(Some(5), &[], awareness).unwrap();
            assert!(matches!(tagged, Need::Bridge { tag: 5, .. }), "{tagged:?}");
        }
        let unaware = need(Some(5), &[2..=9], Awareness::Unaware).unwrap_err();
        assert!(
            unaware.starts_with("net3: trunks needs ")
                && unaware.contains("vmbr7 type bridge vlan"),
            "{unaware}"
        );
        let impossible = need(None, &[2..=9], Awareness::Impossible).unwrap_err();
        assert!(
            impossible.starts_with("net3: trunks ") && impossible.contains("kernel"),
            "{impossible}"
        );
    }
}
