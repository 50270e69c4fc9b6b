// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What the server adds to a config that a user left open: MAC addresses and a machine's identity.

use std::time::{SystemTime, UNIX_EPOCH};

use uuid::Uuid;

use crate::guest::config::GuestConfig;
use crate::guest::keys;
use crate::id::GuestKind;

/// First half of generated MAC addresses: the prefix that PVE's datacenter option `mac_prefix` has by default.
const MAC_PREFIX: &str = "BC:24:11";

/// Value of `vmgenid` that asks for a new one.
const NEW_GENERATION: &str = "1";

/// Makes the guest another one than it was, for its software to notice.
pub fn renew_generation(config: &mut GuestConfig) {
    if config.get("vmgenid").is_some_and(|id| id != "0") {
        config.set("vmgenid", Uuid::new_v4().to_string());
    }
}

/// Adds what is missing; what is there stays.
pub fn complete(config: &mut GuestConfig) {
    let kind = config.kind;
    let cards: Vec<(String, String)> = config
        .family("net[n]")
        .into_iter()
        .map(|(key, value)| (key.to_owned(), with_mac(kind, key, value)))
        .collect();
    for (key, value) in cards {
        config.set(key, value);
    }
    if kind == GuestKind::Vm {
        if config.get("vmgenid") == Some(NEW_GENERATION) {
            config.unset("vmgenid");
        }
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH);
        let seconds = seconds.map_or(0, |since| since.as_secs());
        let version = env!("CARGO_PKG_VERSION");
        for (key, value) in [
            ("vmgenid", Uuid::new_v4().to_string()),
            ("smbios1", format!("uuid={}", Uuid::new_v4())),
            (
                "meta",
                format!("creation-qemu=atoll-{version},ctime={seconds}"),
            ),
        ] {
            if config.get(key).is_none() {
                config.set(key, value);
            }
        }
    }
}

/// A network card's value with a MAC address; a value that its table refuses stays as it is.
pub fn with_mac(kind: GuestKind, key: &str, value: &str) -> String {
    let Ok(mut card) = keys::properties(kind, key, value) else {
        return value.to_owned();
    };
    let name = match kind {
        GuestKind::Vm => "macaddr",
        GuestKind::Container => "hwaddr",
    };
    if card.get(name).is_some() {
        return value.to_owned();
    }
    card.set(name, random_mac());
    if kind == GuestKind::Container && card.get("type").is_none() {
        card.set("type", "veth");
    }
    keys::print_properties(kind, key, &card)
}

fn random_mac() -> String {
    let bytes = Uuid::new_v4().into_bytes();
    format!(
        "{MAC_PREFIX}:{:02X}:{:02X}:{:02X}",
        bytes[0], bytes[1], bytes[2]
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_added_once() {
        let mut vm = GuestConfig::parse(GuestKind::Vm, "net0: virtio,bridge=vmbr0\n");
        complete(&mut vm);
        let first = vm.clone();
        assert!(
            first.get("net0").unwrap().starts_with("virtio=BC:24:11:"),
            "{first:?}"
        );
        assert!(first.get("net0").unwrap().ends_with(",bridge=vmbr0"));
        complete(&mut vm);
        assert_eq!(vm, first);
        let generation = |config: &GuestConfig| config.get("vmgenid").map(str::to_owned);
        vm.set("vmgenid", "1");
        complete(&mut vm);
        assert!(generation(&vm) != generation(&first) && generation(&vm).is_some());
        renew_generation(&mut vm);
        vm.set("vmgenid", "0");
        renew_generation(&mut vm);
        assert_eq!(vm.get("vmgenid"), Some("0"));
        let mut container =
            GuestConfig::parse(GuestKind::Container, "net0: name=eth0,bridge=vmbr0\n");
        complete(&mut container);
        let card = container.properties("net0").unwrap().unwrap();
        assert!(card.get("hwaddr").unwrap().starts_with(MAC_PREFIX));
        assert_eq!(
            (card.get("type"), container.get("vmgenid")),
            (Some("veth"), None)
        );
    }
}
