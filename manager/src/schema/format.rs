// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The forms of text that parameters have, under PVE's names.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use super::Format;

macro_rules! formats {
    ($($(#[$doc:meta])* $constant:ident = $name:literal, $check:expr;)*) => {
        $($(#[$doc])* pub const $constant: Format = Format { name: $name, check: $check };)*
    };
}

formats! {
    /// A guest's number.
    VMID = "pve-vmid", |text| parses::<crate::id::GuestId>(text, "VM ID");
    /// Several guests' numbers.
    VMID_LIST = "pve-vmid-list", |text| each(text, VMID);
    /// A node's name.
    NODE = "pve-node", |text| crate::id::check_node_name(text)
        .map_err(|_| "value does not look like a valid node name".to_owned());
    /// Name of a config key.
    CONFIG_ID = "pve-configid", |text| is_config_id(text).then_some(())
        .ok_or_else(|| format!("invalid configuration ID '{text}'"));
    /// Name of a snapshot.
    SNAPSHOT_NAME = "pve-configid", |text| match text.len() {
        0..=40 => (CONFIG_ID.check)(text),
        _ => Err("value may only be 40 characters long".to_owned()),
    };
    /// Several names of config keys.
    CONFIG_ID_LIST = "pve-configid-list", |text| each(text, CONFIG_ID);
    /// Name of a storage.
    STORAGE_ID = "pve-storage-id", |text| is_storage_id(text).then_some(())
        .ok_or_else(|| format!("storage ID '{text}' contains illegal characters"));
    /// A volume, `STORAGE:NAME`.
    VOLUME_ID = "pve-volume-id", |text| holds(is_volume_id(text), "volume ID");
    /// A volume, or the path of something on the host.
    VOLUME_OR_PATH = "pve-volume-id-or-absolute-path",
        |text| holds(is_volume_id(text) || text.starts_with('/'), "volume ID");
    /// A user, `name@realm`.
    USER_ID = "pve-userid", |text| parses::<crate::access::UserId>(text, "user name");
    /// An Ethernet address of one card.
    MAC = "mac-addr", |text| holds(is_mac(text), "unicast MAC address");
    /// A bridge.
    BRIDGE = "pve-bridge-id", |text| holds(is_interface(text), "bridge name");
    /// Several VLANs, and ranges of them.
    VLANS = "pve-vlan-id-or-range-list", |text| crate::network::vlan::parse_trunks(text).map(drop);
    /// A network interface.
    INTERFACE = "pve-iface", |text| holds(is_interface(text), "network interface name");
    /// An IPv4 address.
    IPV4 = "ipv4", |text| parses::<Ipv4Addr>(text, "IPv4 address");
    /// An IPv6 address.
    IPV6 = "ipv6", |text| parses::<Ipv6Addr>(text, "IPv6 address");
    /// An address of either kind.
    IP = "ip", |text| parses::<IpAddr>(text, "IP address");
    /// Several addresses.
    ADDRESS_LIST = "address-list", |text| each(text, IP);
    /// An IPv4 address with prefix length, or how to get one.
    IPV4_CONFIG = "pve-ipv4-config",
        |text| holds(["dhcp", "manual"].contains(&text) || is_cidr::<Ipv4Addr>(text, 32), "IPv4 configuration");
    /// An IPv6 address with prefix length, or how to get one.
    IPV6_CONFIG = "pve-ipv6-config", |text| holds(
        ["dhcp", "manual", "auto"].contains(&text) || is_cidr::<Ipv6Addr>(text, 128), "IPv6 configuration");
    /// A DNS name.
    DNS_NAME = "dns-name", |text| holds(is_dns_name(text), "DNS name");
    /// Several DNS names or addresses.
    SEARCH_DOMAINS = "dns-name-list", |text| each(text, DNS_NAME);
    /// A size in bytes with an optional unit, `32G`.
    DISK_SIZE = "disk-size", |text| parse_size(text).map(drop)
        .ok_or_else(|| format!("value does not look like a valid disk size: {text}"));
    /// Tags, divided by semicolons.
    TAGS = "pve-tag-list", |text| each(text, TAG);
    /// One tag.
    TAG = "pve-tag", |text| is_tag(text).then_some(()).ok_or_else(|| "invalid characters in tag".to_owned());
    /// Name of a realm.
    REALM = "pve-realm", |text| holds(is_word(text, 2), "realm");
    /// Name of a group.
    GROUP_ID = "pve-groupid", |text| is_word(text, 1).then_some(())
        .ok_or_else(|| format!("group name '{text}' contains invalid characters"));
    /// Name of a role.
    ROLE_ID = "pve-roleid", |text| is_word(text, 1).then_some(())
        .ok_or_else(|| format!("role name '{text}' contains invalid characters"));
    /// Several names of roles.
    ROLE_ID_LIST = "pve-roleid-list", |text| each(text, ROLE_ID);
    /// Name of a token.
    TOKEN_ID = "pve-tokenid-subid", |text| holds(is_word(text, 1), "token ID");
    /// Several privileges.
    PRIVILEGE_LIST = "pve-priv-list", |text| {
        let unknown = super::split_list(text).find(|p| crate::access::Privilege::from_name(p).is_none());
        unknown.map_or(Ok(()), |p| Err(format!("invalid privilege '{p}'")))
    };
}

/// A size such as `32G` in bytes: a number, fractions allowed, and one of `K M G T` in powers of 1024.
pub fn parse_size(text: &str) -> Option<u64> {
    let (digits, factor) = match text.as_bytes().last()? {
        b'K' => (&text[..text.len() - 1], 1u64 << 10),
        b'M' => (&text[..text.len() - 1], 1 << 20),
        b'G' => (&text[..text.len() - 1], 1 << 30),
        b'T' => (&text[..text.len() - 1], 1 << 40),
        _ => (text, 1),
    };
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let is_digits = |part: &str| part.bytes().all(|b| b.is_ascii_digit());
    if whole.is_empty() || !is_digits(whole) || !is_digits(fraction) || fraction.len() > 6 {
        return None;
    }
    let bytes = whole.parse::<u64>().ok()?.checked_mul(factor)?;
    if fraction.is_empty() {
        return Some(bytes);
    }
    let scale = 10u64.pow(u32::try_from(fraction.len()).ok()?);
    let part = u128::from(fraction.parse::<u64>().ok()?) * u128::from(factor) / u128::from(scale);
    bytes.checked_add(u64::try_from(part).ok()?)
}

/// The size as configs show it: the largest unit that divides it.
pub fn print_size(bytes: u64) -> String {
    for (unit, shift) in [("T", 40), ("G", 30), ("M", 20), ("K", 10)] {
        if bytes > 0 && bytes.is_multiple_of(1u64 << shift) {
            return format!("{}{unit}", bytes >> shift);
        }
    }
    bytes.to_string()
}

fn holds(fits: bool, what: &str) -> Result<(), String> {
    if fits {
        Ok(())
    } else {
        Err(format!("value does not look like a valid {what}"))
    }
}

fn parses<T: FromStr>(text: &str, what: &str) -> Result<(), String> {
    holds(text.parse::<T>().is_ok(), what)
}

fn each(text: &str, format: Format) -> Result<(), String> {
    super::split_list(text).try_for_each(format.check)
}

fn is_config_id(text: &str) -> bool {
    text.len() >= 2
        && text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
}

fn is_storage_id(text: &str) -> bool {
    let inner = |b: u8| b.is_ascii_alphanumeric() || b"_.-".contains(&b);
    text.len() >= 2
        && text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.ends_with(|c: char| c.is_ascii_alphanumeric())
        && text.bytes().all(inner)
}

/// `STORAGE:NAME`; a name never leaves its storage.
fn is_volume_id(text: &str) -> bool {
    let Some((storage, name)) = text.split_once(':') else {
        return false;
    };
    let part_fits = |part: &str| !part.is_empty() && part != "." && part != "..";
    is_storage_id(storage)
        && !name.contains(|c: char| c.is_control() || c == ',')
        && name.split('/').all(part_fits)
}

fn is_mac(text: &str) -> bool {
    let bytes: Vec<&str> = text.split(':').collect();
    let hex = |part: &&str| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
    // Bit 0 of the first byte marks a group address, which no card has (IEEE 802).
    let unicast = |first: &str| u8::from_str_radix(first, 16).is_ok_and(|byte| byte & 1 == 0);
    bytes.len() == 6 && bytes.iter().all(hex) && unicast(bytes[0])
}

/// Linux limits names of interfaces to 15 bytes (`IFNAMSIZ`).
fn is_interface(text: &str) -> bool {
    (1..=15).contains(&text.len())
        && text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b))
}

fn is_cidr<A: FromStr>(text: &str, prefix_max: u8) -> bool {
    let Some((address, prefix)) = text.split_once('/') else {
        return false;
    };
    address.parse::<A>().is_ok() && prefix.parse::<u8>().is_ok_and(|p| p <= prefix_max)
}

fn is_dns_name(text: &str) -> bool {
    text.len() <= 253
        && text
            .split('.')
            .all(|label| crate::id::check_node_name(label).is_ok())
}

fn is_tag(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"_+.-".contains(&b))
}

fn is_word(text: &str, length_min: usize) -> bool {
    text.len() >= length_min
        && text.len() <= 64
        && text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse_size("32G"), Some(32 << 30));
        assert_eq!(parse_size("0.5T"), Some(512 << 30));
        assert_eq!(parse_size("512"), Some(512));
        for bad in ["", "G", "-1G", "1X", "1.G5", "99999999999T", ".5G"] {
            assert_eq!(parse_size(bad), None, "{bad}");
        }
        assert_eq!(print_size(32 << 30), "32G");
        assert_eq!(print_size(1536 << 20), "1536M");
        assert_eq!(print_size(0), "0");
    }

    #[track_caller]
    fn check(format: Format, good: &[&str], bad: &[&str]) {
        for text in good {
            assert_eq!((format.check)(text), Ok(()), "{text}");
        }
        for text in bad {
            assert!((format.check)(text).is_err(), "{text}");
        }
    }

    #[test]
    fn forms_of_text() {
        check(
            VMID,
            &["100", "999999999"],
            &["99", "1000000000", "abc", "", "+100"],
        );
        check(
            VOLUME_ID,
            &["local:100/vm-100-disk-0.raw", "s1:x"],
            &["local:", "x", "local:../x", "local:a/../b"],
        );
        check(
            MAC,
            &["BC:24:11:00:00:01"],
            &["BD:24:11:00:00:01", "BC:24:11", "BC:24:11:00:00:0g"],
        );
        check(
            IPV4_CONFIG,
            &["dhcp", "10.0.0.2/24"],
            &["10.0.0.2", "10.0.0.2/33", "auto"],
        );
        check(TAGS, &["a;b-c;d_1", ""], &["ä", "-a"]);
        check(VLANS, &["2;5;10-20"], &["", "5-2", "0"]);
        check(BRIDGE, &["vmbr0"], &["averyveryverylong", "0x", "a/b"]);
        check(PRIVILEGE_LIST, &["VM.Audit,Sys.Audit"], &["VM.Nothing"]);
    }
}
