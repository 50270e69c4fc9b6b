// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Links as ip(8) shows them: the one reader of that output. Callers: `interfaces`, `vlan` and who connects cards.

use serde::Deserialize;
use serde_json::Value;

use crate::error::Error;
use crate::exec::Program;
use crate::network::{link, vlan_bridge};

/// One link, of `ip -json -details address show`.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Link {
    #[serde(rename = "ifname")]
    pub(super) name: String,
    #[serde(default)]
    pub(super) flags: Vec<String>,
    #[serde(default)]
    pub(super) mtu: u32,
    #[serde(default)]
    pub(super) address: String,
    #[serde(default)]
    pub(super) link_type: String,
    /// The bridge, or the bond, that it is a port of.
    pub(super) master: Option<String>,
    /// The link that it is a VLAN of.
    link: Option<String>,
    #[serde(default)]
    group: String,
    #[serde(default)]
    linkinfo: Details,
    #[serde(default)]
    pub(super) addr_info: Vec<Address>,
}

#[derive(Debug, Clone, Default, Deserialize)]
struct Details {
    info_kind: Option<String>,
    /// Each kind has its own.
    #[serde(default)]
    info_data: Value,
}

/// An address of a link.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Address {
    pub(super) family: String,
    pub(super) local: String,
    pub(super) prefixlen: u8,
    #[serde(default)]
    pub(super) scope: String,
}

/// What a bridge does with the tags of frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Awareness {
    /// It keeps VLANs apart, each port has some of them.
    Aware,
    /// It forwards frames whatever their tags are.
    Unaware,
    /// The same, and the kernel was built without the other.
    Impossible,
}

impl Link {
    /// Kind of a virtual link, `bridge`; none for a card of the host's.
    pub(super) fn kind(&self) -> Option<&str> {
        self.linkinfo.info_kind.as_deref()
    }

    /// Whether it is a link that `vlan_bridge` has made.
    pub(super) fn is_ours(&self) -> bool {
        self.group == vlan_bridge::GROUP
    }

    /// Whether it is a tap, or the host's end of a container's pair.
    pub(super) fn is_of_guest(&self) -> bool {
        self.kind() == Some("tun") || link::owner(&self.name).is_some()
    }

    /// The link that it is a VLAN of, and which.
    pub(super) fn vlan(&self) -> Option<(&str, u16)> {
        let id = self.setting("id").filter(|_| self.kind() == Some("vlan"))?;
        Some((self.link.as_deref()?, id.try_into().ok()?))
    }

    /// A setting of its kind, if it has one of that name.
    pub(super) fn setting(&self, name: &str) -> Option<u64> {
        self.linkinfo.info_data[name].as_u64()
    }

    /// What it does with tags; none when it is no bridge.
    pub(super) fn awareness(&self) -> Option<Awareness> {
        if self.kind() != Some("bridge") {
            return None;
        }
        Some(if self.setting("vlan_filtering") == Some(1) {
            Awareness::Aware
        } else if self.setting("vlan_default_pvid").is_none() {
            // A kernel without the filter shows it as off, and has none of its settings (net/bridge/br_netlink.c).
            Awareness::Impossible
        } else {
            Awareness::Unaware
        })
    }
}

/// Every link.
pub(super) async fn all() -> Result<Vec<Link>, Error> {
    show(&[]).await
}

/// The link of that name; none when there is none.
pub(super) async fn one(name: &str) -> Option<Link> {
    show(&["dev", name]).await.ok()?.pop()
}

async fn show(which: &[&str]) -> Result<Vec<Link>, Error> {
    let shown = Program::new("ip")
        .args(["-json", "-details", "address", "show"])
        .args(which)
        .run()
        .await?;
    parse(&shown).map_err(|error| Error::failed("read what ip printed", error))
}

pub(super) fn parse(shown: &str) -> Result<Vec<Link>, serde_json::Error> {
    serde_json::from_str(shown)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bridge_tells_what_it_does_with_tags() {
        let awareness = |kind: &str, data: &str| {
            let text = format!(
                r#"[{{"ifname":"b","linkinfo":{{"info_kind":"{kind}","info_data":{{{data}}}}}}}]"#
            );
            parse(&text).unwrap()[0].awareness()
        };
        let pvid = r#""vlan_default_pvid":1"#;
        let aware = awareness("bridge", &format!(r#""vlan_filtering":1,{pvid}"#));
        assert_eq!(aware, Some(Awareness::Aware));
        let unaware = awareness("bridge", &format!(r#""vlan_filtering":0,{pvid}"#));
        assert_eq!(unaware, Some(Awareness::Unaware));
        let impossible = awareness("bridge", r#""vlan_filtering":0"#);
        assert_eq!(impossible, Some(Awareness::Impossible));
        assert_eq!(awareness("vlan", r#""vlan_filtering":1"#), None);
        assert_eq!(parse(r#"[{"ifname":"lo"}]"#).unwrap()[0].awareness(), None);
        assert!(parse("").is_err());
    }
}
