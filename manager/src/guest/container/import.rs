// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A container's config file from PVE, `/etc/pve/lxc/N.conf`, as parameters of a creation here. Pure.

use crate::error::Error;
use crate::guest::config::GuestConfig;
use crate::guest::container::lxc;
use crate::guest::create::Params;
use crate::guest::disks;
use crate::guest::keys::{self, Effect};
use crate::id::GuestKind;
use crate::schema::format::parse_size;

/// The parameter with the file's text.
pub const PARAMETER: &str = "pve-config";

/// What a file says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Imported {
    /// Its keys. Volumes of the other host are asked for anew, in their sizes.
    pub keys: Params,
    /// Its raw lines.
    pub raw: Vec<(String, String)>,
}

/// Reads a file. Snapshots and pending changes are left behind; a line that means nothing is refused by name, and so
/// is a raw line that a start would refuse.
pub fn import(text: &str, storage: &str) -> Result<Imported, Error> {
    let config = GuestConfig::parse(GuestKind::Container, text);
    let wrong = |text: String| Error::invalid(PARAMETER, text);
    if let Some(line) = config.current.unread.first() {
        return Err(wrong(format!("this line is not understood: {line}")));
    }
    lxc::check(&config.current.raw).map_err(|error| wrong(error.to_string()))?;
    let mut keys = Params::new();
    for (key, value) in config.current.values {
        let row = keys::find(GuestKind::Container, &key);
        let row = row.ok_or_else(|| wrong(format!("the key '{key}' is not known")))?;
        if row.effect == Effect::Server {
            continue;
        }
        let value = match disks::is_disk(GuestKind::Container, &key) {
            true => anew(&key, &value, storage)?,
            false => value,
        };
        keys.insert(key, value);
    }
    // A file without the key is from before containers were unprivileged.
    keys.entry("unprivileged".to_owned())
        .or_insert_with(|| "0".to_owned());
    Ok(Imported {
        keys,
        raw: config.current.raw,
    })
}

/// A mount point with a new volume of the same size in place of the other host's.
fn anew(key: &str, value: &str, storage: &str) -> Result<String, Error> {
    let mut point = keys::properties(GuestKind::Container, key, value)?;
    if point
        .get("volume")
        .is_some_and(|volume| volume.starts_with('/'))
    {
        return Ok(value.to_owned());
    }
    let size = point.get("size").and_then(parse_size);
    let size = size.ok_or_else(|| Error::invalid(PARAMETER, format!("{key} has no size")))?;
    #[expect(
        clippy::cast_precision_loss,
        reason = "sizes are whole MiB, far below 2^53 of them"
    )]
    let gib = size.div_ceil(1 << 20) as f64 / 1024.0;
    point.remove("size");
    point.set("volume", format!("{storage}:{gib}"));
    Ok(keys::print_properties(GuestKind::Container, key, &point))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "\
#Web%3A front
arch: amd64
cores: 2
features: nesting=1,keyctl=1
hostname: web
memory: 2048
mp0: tank:subvol-105-disk-1,mp=/srv,backup=1,size=512M
mp1: /mnt/media,mp=/media,ro=1
net0: name=eth0,bridge=vmbr0,firewall=1,gw=10.0.0.1,hwaddr=BC:24:11:00:00:01,ip=10.0.0.5/24,type=veth
onboot: 1
ostype: debian
parent: before
rootfs: local-lvm:vm-105-disk-0,size=8G
swap: 512
unused0: tank:subvol-105-disk-9
lxc.cgroup2.devices.allow: c 10:200 rwm
lxc.mount.entry: /dev/net/tun dev/net/tun none bind,create=file
lxc.cap.drop:

[before]
cores: 1
rootfs: local-lvm:vm-105-disk-0,size=8G
";

    #[test]
    fn a_file_becomes_a_creation() {
        let imported = import(FILE, "local").unwrap();
        let get = |key: &str| imported.keys.get(key).map(String::as_str);
        assert_eq!(get("rootfs"), Some("local:8"));
        assert_eq!(get("mp0"), Some("local:0.5,mp=/srv,backup=1"));
        assert_eq!(get("mp1"), Some("/mnt/media,mp=/media,ro=1"));
        assert_eq!(get("unprivileged"), Some("0"));
        assert_eq!(get("description"), Some("Web: front\n"));
        assert_eq!((get("parent"), get("unused0")), (None, None));
        assert_eq!(imported.raw.len(), 3);
        keys::check(GuestKind::Container, &imported.keys).unwrap();
    }

    #[test]
    fn what_is_not_understood_is_named() {
        for (line, named) in [
            ("lxc.bogus: 1", "lxc.bogus"),
            ("lxc.hook.mount: /x", "lxc.hook.mount"),
            ("bogus: 1", "'bogus'"),
            ("what is this", "what is this"),
            ("rootfs: local-lvm:vm-105-disk-0", "rootfs has no size"),
            ("lxc.idmap: u 0 100000 65536", "lxc.idmap"),
        ] {
            let error = import(line, "local").unwrap_err();
            let Error::Invalid(errors) = &error else {
                panic!("{error:?}");
            };
            assert!(errors[0].1.contains(named), "{line}: {errors:?}");
        }
    }
}
