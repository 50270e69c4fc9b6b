// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The config keys of guests: one table a kind, from which parsing, validation, rights, the API's schema, the forms of
//! the web page and the manual derive.
//!
//! PVE's clients always send some keys that mean nothing on this board (`ostype`, `scsihw`, …): those are accepted,
//! and their row says that they have no effect. Keys whose silence would mislead (`args`, passthrough, …) are
//! refused by their row, with a text that says what is missing.

mod container;
pub mod drive;
mod shared;
mod vm;

use crate::access::Privilege;
use crate::error::Error;
use crate::id::GuestKind;
use crate::schema::{Kind, Param, Properties, UNKNOWN, split_list};

pub use container::CONTAINER;
pub use vm::VM;

/// One config key.
#[derive(Debug, Clone, Copy)]
pub struct Key {
    /// Name, values, description.
    pub param: Param,
    /// What changing it demands.
    pub right: Right,
    /// When a change reaches a running guest.
    pub apply: Apply,
    /// What it does here.
    pub effect: Effect,
    /// Properties whose change alone reaches a running guest at once, whatever `apply` says.
    pub live: &'static [&'static str],
    /// What kind of device it holds, which may come and go while the guest runs.
    pub plug: Option<Plug>,
    /// What is wrong with a property string whose members each fit.
    pub rule: fn(&Properties) -> Result<(), String>,
    /// Atoll's own; PVE does not have it.
    pub own: bool,
}

/// What changing a key demands of the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Right {
    /// A privilege on `/vms/ID`.
    Guest(Privilege),
    /// One of two privileges on `/vms/ID`.
    Either(Privilege, Privilege),
    /// `VM.Config.CDROM` for drives with `media=cdrom`, `VM.Config.Disk` for others.
    Drive,
    /// `VM.Allocate` on `/vms/ID`, and, for anything but `nesting`, `Sys.Modify` on `/`.
    Features,
    /// `VM.Allocate` on `/vms/ID`, and, for a privileged container, whose root is the host's, `Sys.Modify` on `/`.
    Unprivileged,
    /// `VM.Config.Disk` on `/vms/ID`, and, for a path of the host, `Sys.Modify` on `/`.
    MountPoint,
    /// A privilege on `/vms/ID`, and `Sys.Modify` on `/`. PVE asks for `root@pam` in person for most of these, which
    /// keeps them from tokens and from other administrators; the privilege says the same and can be given.
    System(Privilege),
}

/// When a change reaches a running guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Apply {
    /// At once.
    Now,
    /// At its next start; until then it is pending.
    Restart,
}

/// Kinds of devices that may come and go while a guest runs; the config's key `hotplug` says which of them do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plug {
    /// Disks and drives.
    Disk,
    /// Network cards.
    Network,
}

impl Plug {
    /// PVE's word for it, in `hotplug`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Disk => "disk",
            Self::Network => "network",
        }
    }
}

/// What a key does on this board.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// What its description says.
    Full,
    /// Nothing; the text says why.
    None(&'static str),
    /// Only the server sets it.
    Server,
    /// It cannot be set yet; the text says what is missing.
    Unavailable(&'static str),
}

impl Key {
    const fn new(param: Param, right: Right) -> Self {
        Self {
            param,
            right,
            apply: Apply::Restart,
            effect: Effect::Full,
            live: &[],
            plug: None,
            rule: |_| Ok(()),
            own: false,
        }
    }

    const fn now(mut self) -> Self {
        self.apply = Apply::Now;
        self
    }

    const fn live(mut self, properties: &'static [&'static str]) -> Self {
        self.live = properties;
        self
    }

    const fn plug(mut self, plug: Plug) -> Self {
        self.plug = Some(plug);
        self
    }

    const fn rule(mut self, rule: fn(&Properties) -> Result<(), String>) -> Self {
        self.rule = rule;
        self
    }

    const fn own(mut self) -> Self {
        self.own = true;
        self
    }

    const fn server(mut self) -> Self {
        self.effect = Effect::Server;
        self.apply = Apply::Now;
        self
    }

    /// Accepted, kept and shown, without effect.
    const fn no_effect(mut self, why: &'static str) -> Self {
        self.effect = Effect::None(why);
        self.apply = Apply::Now;
        self
    }

    /// Known to PVE and refused here.
    const fn unavailable(name: &'static str, count: u16, why: &'static str) -> Self {
        let kind = Kind::Text { length_max: 1024 };
        let param = Param::new(name, kind, why).family(count);
        let mut key = Self::new(param, Right::Guest(Privilege::VmConfigHwType));
        key.effect = Effect::Unavailable(why);
        key
    }

    /// Whether a change from `former` to `value` reaches a running guest at once.
    pub fn is_live(&self, former: Option<&str>, value: Option<&str>) -> bool {
        if self.apply == Apply::Now {
            return true;
        }
        let fixed = |text: &str| {
            let name = self.param.name;
            let mut properties = Properties::parse(&self.param.kind, name, text).ok()?;
            let disc = match drive::is_cdrom(&properties) {
                true => drive::DISC_LIVE,
                false => &[],
            };
            for property in self.live.iter().chain(disc) {
                properties.remove(property);
            }
            Some(properties.print(&self.param.kind))
        };
        match (former, value) {
            (Some(former), Some(value)) if !self.live.is_empty() => {
                fixed(former).is_some_and(|former| Some(former) == fixed(value))
            }
            _ => false,
        }
    }

    /// What is wrong with a value that a client gives for `name`, this key or one of its family, in PVE's words.
    pub fn check(&self, name: &str, value: &str) -> Result<(), String> {
        match self.effect {
            Effect::Server => Err("set by the server, not by clients".to_owned()),
            Effect::Unavailable(why) => Err(why.to_owned()),
            Effect::Full | Effect::None(_) => {
                self.param.check(name, value)?;
                match self.param.kind {
                    Kind::PropertyString { .. } => {
                        let properties = Properties::parse(&self.param.kind, name, value)?;
                        (self.rule)(&properties)
                    }
                    _ => Ok(()),
                }
            }
        }
    }

    /// Whether a mount point's value names a directory or device of the host; one that does not parse may.
    fn names_host_path(&self, value: &str) -> bool {
        let value = Properties::parse(&self.param.kind, self.param.name, value);
        value.map_or(true, |value| {
            value
                .get("volume")
                .is_none_or(|volume| volume.starts_with('/'))
        })
    }

    /// The one form in which a value is stored: booleans as 1 or 0, property strings in PVE's order, tags sorted.
    pub fn normalize(&self, value: &str) -> String {
        match self.param.kind {
            Kind::PropertyString { .. } => {
                Properties::parse(&self.param.kind, self.param.name, value)
                    .map_or_else(|_| value.to_owned(), |p| p.print(&self.param.kind))
            }
            Kind::Format(format) if format.name == crate::schema::format::TAGS.name => {
                let mut tags: Vec<String> =
                    split_list(value).map(str::to_ascii_lowercase).collect();
                tags.sort();
                tags.dedup();
                tags.join(";")
            }
            kind => kind.normalize(value),
        }
    }

    /// The privileges that setting or removing it demands: (path, any of these) each. `value` is the new one, or the
    /// present one when it is removed.
    pub fn rights(&self, guest: u32, value: &str) -> Vec<(String, Vec<Privilege>)> {
        let on_guest = |privileges: &[Privilege]| (format!("/vms/{guest}"), privileges.to_vec());
        let system = ("/".to_owned(), vec![Privilege::SysModify]);
        match self.right {
            Right::Guest(privilege) => vec![on_guest(&[privilege])],
            Right::Either(one, other) => vec![on_guest(&[one, other])],
            Right::Drive if value.contains("media=cdrom") => {
                vec![on_guest(&[Privilege::VmConfigCdrom])]
            }
            Right::Drive => vec![on_guest(&[Privilege::VmConfigDisk])],
            Right::Unprivileged if crate::schema::parse_boolean(value) == Some(true) => {
                vec![on_guest(&[Privilege::VmAllocate])]
            }
            Right::Unprivileged => vec![on_guest(&[Privilege::VmAllocate]), system],
            Right::MountPoint if self.names_host_path(value) => {
                vec![on_guest(&[Privilege::VmConfigDisk]), system]
            }
            Right::MountPoint => vec![on_guest(&[Privilege::VmConfigDisk])],
            Right::Features if value.split(',').all(|item| item.starts_with("nesting=")) => {
                vec![on_guest(&[Privilege::VmAllocate])]
            }
            Right::Features => vec![on_guest(&[Privilege::VmAllocate]), system],
            Right::System(privilege) => vec![on_guest(&[privilege]), system],
        }
    }
}

/// The table of a kind of guest.
pub fn table(kind: GuestKind) -> &'static [Key] {
    match kind {
        GuestKind::Vm => VM,
        GuestKind::Container => CONTAINER,
    }
}

/// The row of a key: `net3` has that of `net[n]`.
pub fn find(kind: GuestKind, name: &str) -> Option<&'static Key> {
    table(kind).iter().find(|key| key.param.covers(name))
}

/// The parsed value of a key that is a property string.
pub fn properties(kind: GuestKind, name: &str, value: &str) -> Result<Properties, Error> {
    let key = find(kind, name).ok_or_else(|| Error::invalid(name, UNKNOWN))?;
    Properties::parse(&key.param.kind, name, value).map_err(|text| Error::invalid(name, text))
}

/// A property string again, by the key's row.
pub fn print_properties(kind: GuestKind, name: &str, properties: &Properties) -> String {
    find(kind, name).map_or_else(String::new, |key| properties.print(&key.param.kind))
}

/// Checks all values that a client gives; every one that does not fit is named.
pub fn check<'a>(
    kind: GuestKind,
    values: impl IntoIterator<Item = (&'a String, &'a String)>,
) -> Result<(), Error> {
    let mut errors = Vec::new();
    for (name, value) in values {
        let result = match find(kind, name) {
            Some(key) => key.check(name, value),
            None => Err(UNKNOWN.to_owned()),
        };
        if let Err(text) = result {
            errors.push((name.clone(), text));
        }
    }
    if errors.is_empty() {
        Ok(())
    } else {
        Err(Error::Invalid(errors))
    }
}

/// Name of the format of members of property strings that cannot be set yet; its check says why.
pub const UNAVAILABLE: &str = "unavailable";

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::{BTreeMap, HashSet};

    #[test]
    fn the_tables_are_sound() {
        for kind in GuestKind::ALL {
            let mut names = HashSet::new();
            for key in table(kind) {
                let name = key.param.name;
                assert!(names.insert(name), "{name} twice");
                assert_eq!(name.ends_with("[n]"), key.param.count > 0, "{name}");
                let is_known = !matches!(key.effect, Effect::Unavailable(_));
                let sentence = key.param.description.ends_with('.');
                assert_eq!(
                    sentence, is_known,
                    "{name}: sentences describe, texts refuse"
                );
                if let Some(default) = key.param.default {
                    assert_eq!(key.param.check(name, default), Ok(()), "default of {name}");
                    assert_eq!(key.normalize(default), default, "default of {name}");
                }
            }
        }
    }

    #[track_caller]
    fn check_value(kind: GuestKind, name: &str, value: &str, expected: Result<&str, &str>) {
        let key = find(kind, name).unwrap();
        let result = key.check(name, value).map(|()| key.normalize(value));
        assert_eq!(
            result.as_ref().map(String::as_str).map_err(String::as_str),
            expected
        );
    }

    #[test]
    fn values_of_vms() {
        let check = |name, value, expected| check_value(GuestKind::Vm, name, value, expected);
        check(
            "net0",
            "bridge=vmbr0,virtio=BC:24:11:00:00:01,firewall=on",
            Ok("virtio=BC:24:11:00:00:01,bridge=vmbr0,firewall=1"),
        );
        check(
            "net0",
            "trunks=10-20;2,rate=1.5,virtio,tag=5",
            Ok("virtio,rate=1.5,tag=5,trunks=10-20;2"),
        );
        check(
            "net0",
            "virtio,tag=4095",
            Err(
                "invalid format - format error\nnet0.tag: value must have a maximum value of 4094\n",
            ),
        );
        check(
            "net0",
            "virtio,trunks=2;5-3",
            Err(
                "invalid format - format error\nnet0.trunks: invalid format - invalid range of VLANs '5-3'\n\n",
            ),
        );
        check("memory", "2048", Ok("2048"));
        check("memory", "current=512", Ok("512"));
        check("scsi0", "local:8", Ok("local:8"));
        check(
            "scsi0",
            "file=local:100/vm-100-disk-0.raw,iothread=1,size=8G",
            Ok("local:100/vm-100-disk-0.raw,iothread=1,size=8G"),
        );
        check("ide2", "none,media=cdrom", Ok("none,media=cdrom"));
        check(
            "scsi0",
            "/dev/sda",
            Err(
                "invalid format - format error\nscsi0.file: invalid format - unable to parse volume ID '/dev/sda'\n\n",
            ),
        );
    }

    #[test]
    fn values_of_a_vms_board() {
        let check = |name, value, expected| check_value(GuestKind::Vm, name, value, expected);
        check(
            "sata1",
            "local:iso/x.iso,media=cdrom",
            Ok("local:iso/x.iso,media=cdrom"),
        );
        check("ide2", "local:cloudinit", Ok("local:cloudinit"));
        check(
            "ide0",
            "local:8",
            Err(
                "IDE and SATA hold CD-ROM drives only (media=cdrom): use scsi0 or virtio0 for a disk",
            ),
        );
        check("efidisk0", "local:1,efitype=4m", Ok("local:1,efitype=4m"));
        check(
            "cpu",
            "x86-64-v3,flags=+pcid;-aes",
            Ok("x86-64-v3,flags=+pcid;-aes"),
        );
        check(
            "watchdog",
            "model=i6300esb,action=reset",
            Ok("i6300esb,action=reset"),
        );
        check("rng0", "source=/dev/urandom", Ok("/dev/urandom"));
        check("machine", "pc-q35-9.0", Ok("pc-q35-9.0"));
        check("vga", "serial0", Ok("serial0"));
        check(
            "scsihw",
            "lsi",
            Err(
                "value 'lsi' does not have a value in the enumeration 'virtio-scsi-pci, virtio-scsi-single'",
            ),
        );
        check("tags", "b;A,b", Ok("a;b"));
        check("onboot", "yes", Ok("1"));
        check("meta", "x=1", Err("set by the server, not by clients"));
        check(
            "args",
            "-x",
            Err("QEMU arguments mean nothing to atoll-vmm"),
        );
    }

    #[test]
    fn values_of_containers() {
        let check =
            |name, value, expected| check_value(GuestKind::Container, name, value, expected);
        check(
            "net0",
            "name=eth0,ip=dhcp,bridge=vmbr0",
            Ok("name=eth0,bridge=vmbr0,ip=dhcp"),
        );
        check(
            "net0",
            "name=eth0,rate=0.5,trunks=5,tag=1",
            Ok("name=eth0,rate=0.5,tag=1,trunks=5"),
        );
        check("rootfs", "volume=local:8", Ok("local:8"));
        check("features", "nesting=1", Ok("nesting=1"));
        check("unprivileged", "on", Ok("1"));
        check(
            "mp0",
            "/srv/x,mp=/x,mountoptions=noatime;nosuid",
            Ok("/srv/x,mp=/x,mountoptions=noatime;nosuid"),
        );
        check(
            "dev0",
            "/dev/net/tun,mode=0666",
            Ok("/dev/net/tun,mode=0666"),
        );
        check("timezone", "Europe/Vienna", Ok("Europe/Vienna"));
        for (name, wrong) in [
            ("mp0", "/srv/../etc,mp=/x"),
            ("mp0", "local:1,mp=/x,mountoptions=suid"),
            ("dev0", "/etc/passwd"),
            ("dev0", "/dev/../etc/passwd"),
            ("dev0", "/dev/fuse,mode=4666"),
            ("timezone", "../../etc/passwd"),
            ("timezone", "/etc/passwd"),
            ("features", "mknod=2"),
        ] {
            let key = find(GuestKind::Container, name).unwrap();
            assert!(key.check(name, wrong).is_err(), "{name}: {wrong}");
        }
    }

    #[test]
    fn all_errors_are_reported_at_once() {
        let values = BTreeMap::from([
            ("bogus".to_owned(), "1".to_owned()),
            ("cores".to_owned(), "x".to_owned()),
            ("name".to_owned(), "good".to_owned()),
        ]);
        let Err(Error::Invalid(errors)) = check(GuestKind::Vm, &values) else {
            panic!("expected errors");
        };
        assert_eq!(errors.len(), 2);
        assert_eq!(errors[0], ("bogus".to_owned(), UNKNOWN.to_owned()));
    }

    #[test]
    fn a_disc_changes_at_once_a_disk_does_not() {
        let is_live = |key: &str, former: &str, value: &str| {
            find(GuestKind::Vm, key)
                .unwrap()
                .is_live(Some(former), Some(value))
        };
        let (disc, none) = ("local:iso/x.iso,media=cdrom,size=1M", "none,media=cdrom");
        assert!(is_live("ide2", none, disc) && is_live("scsi3", disc, none));
        let (one, other) = ("local:100/vm-100-disk-0.raw", "local:100/vm-100-disk-1.raw");
        assert!(!is_live("scsi0", one, other) && !is_live("scsi0", disc, one));
        assert!(is_live("scsi0", one, &format!("{one},mbps=5")));
        let card = "virtio=BC:24:11:00:00:01,bridge=vmbr0,tag=5";
        assert!(is_live("net0", card, &format!("{card},trunks=7,rate=2")));
        assert!(is_live("net0", card, &card.replace("tag=5", "tag=6")));
        assert!(!is_live("net0", card, &card.replace("vmbr0", "vmbr1")));
    }

    #[test]
    fn rights_of_keys() {
        let rights = |name: &str, value: &str| find(GuestKind::Vm, name).unwrap().rights(7, value);
        assert_eq!(
            rights("cores", "2"),
            [("/vms/7".to_owned(), vec![Privilege::VmConfigCpu])]
        );
        assert_eq!(
            rights("ide2", "none,media=cdrom")[0].1,
            [Privilege::VmConfigCdrom]
        );
        assert_eq!(rights("ide2", "local:8")[0].1, [Privilege::VmConfigDisk]);
        assert_eq!(rights("startup", "1").len(), 2);
        let rights = |value: &str| {
            find(GuestKind::Container, "unprivileged")
                .unwrap()
                .rights(7, value)
                .len()
        };
        assert_eq!((rights("1"), rights("yes"), rights("0")), (1, 1, 2));
        let rights = |value: &str| find(GuestKind::Container, "mp0").unwrap().rights(7, value);
        assert_eq!(rights("local:1,mp=/x").len(), 1);
        for of_the_host in [
            "/etc,mp=/x",
            "mp=/x,volume=/etc",
            "mp=/x, volume = /etc",
            "mp=/x,nonsense",
        ] {
            assert_eq!(rights(of_the_host).len(), 2, "{of_the_host}");
        }
    }
}
