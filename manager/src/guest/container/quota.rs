// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Quotas of users and groups inside a container: `quota=1` of its root or of a mount point.
//!
//! As in PVE the file system is mounted with the options for quotas, and everything else is the container's: it makes
//! the files (quotacheck), turns them on and sets limits. It names the file system by its device to quotactl(2), and
//! gets the device's node for that, which it may not open.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::bundle::{self, HostDevice, Mount, Source};
use super::{image, unescape};
use crate::error::Error;
use crate::exec::Program;
use crate::guest::config::GuestConfig;

/// Options of mount(8): PVE's, so that a volume of its has its quotas here, too.
pub const OPTIONS: &str = "usrjquota=aquota.user,grpjquota=aquota.group,jqfmt=vfsv0";

/// The kernel's module for the format `vfsv0`.
const MODULE: &str = "quota_v2";

/// Refuses quotas that would not work, before anything is mounted.
pub async fn demand(config: &GuestConfig, points: &[Mount]) -> Result<(), Error> {
    check(config, points)?;
    let Some(point) = points.iter().find(|point| point.quota) else {
        return Ok(());
    };
    let loaded = Program::new("modprobe").args(["-q", MODULE]).run().await;
    let lacks = format!(
        "{}: quota=1: this host's kernel has no quotas (module {MODULE}): install its modules, or set quota=0",
        point.key
    );
    loaded
        .map(drop)
        .map_err(|error| Error::failed(lacks, error))
}

/// Where a container can have quotas. Their limits are set by CAP_SYS_ADMIN of the host, which an unprivileged one lacks:
/// quotactl(2).
fn check(config: &GuestConfig, points: &[Mount]) -> Result<(), Error> {
    for Mount { key, source, .. } in points.iter().filter(|point| point.quota) {
        let refused = |reason: &str| Err(Error::refused(format!("{key}: quota=1: {reason}")));
        if bundle::is_unprivileged(config) {
            return refused("quotas are not supported by unprivileged containers");
        }
        match source {
            Source::Folder(_) => return refused("a directory of the host has the host's quotas"),
            Source::Volume(_) if key == "rootfs" && config.get(image::KEY).is_some() => {
                return refused(
                    "the root of an image is an overlay, which has none; a mount point can",
                );
            }
            Source::Volume(_) | Source::Device(_) => {}
        }
    }
    Ok(())
}

/// Devices of the file systems with quotas that are mounted below the run folder, under the names that the container
/// sees in its list of mounts.
pub fn devices(folder: &Path, points: &[Mount]) -> BTreeMap<PathBuf, HostDevice> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let points = points.iter().filter(|point| point.quota);
    points
        .filter_map(|point| device(&mounts, &folder.join(&point.key)))
        .collect()
}

/// The device that is mounted at a place: proc_pid_mountinfo(5).
fn device(mounts: &str, place: &Path) -> Option<(PathBuf, HostDevice)> {
    let of_place = |line: &&str| line.split(' ').nth(4).map(unescape).as_deref() == Some(place);
    let (head, tail) = mounts.lines().rfind(of_place)?.split_once(" - ")?;
    let (major, minor) = head.split(' ').nth(2)?.split_once(':')?;
    let device = HostDevice {
        kind: 'b',
        major: major.parse().ok()?,
        minor: minor.parse().ok()?,
    };
    Some((unescape(tail.split(' ').nth(1)?), device))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::GuestKind;

    fn refusal(text: &str) -> Option<String> {
        let config = GuestConfig::parse(GuestKind::Container, text);
        let points = bundle::volumes(&config).unwrap();
        check(&config, &points).err().map(|error| error.to_string())
    }

    #[test]
    fn what_has_no_quotas_is_refused_by_name() {
        let good = "unprivileged: 0\nrootfs: local:1,quota=1\nmp0: /dev/sdb1,mp=/a,quota=1\nmp1: /srv,mp=/b\n";
        assert_eq!(refusal(good), None);
        for (text, expected) in [
            (
                good.replace("unprivileged: 0", "unprivileged: 1"),
                "rootfs: quota=1: quotas are not supported by unprivileged containers",
            ),
            (
                format!("{}mp2: /srv,mp=/c,quota=1\n", good.replace(",quota=1", "")),
                "mp2: quota=1: a directory of the host has the host's quotas",
            ),
            (
                format!("{good}image: sha256:00\n"),
                "rootfs: quota=1: the root of an image is an overlay, which has none; a mount point can",
            ),
        ] {
            assert_eq!(refusal(&text).as_deref(), Some(expected));
        }
        let readonly = "unprivileged: 1\nrootfs: local:1,quota=1,ro=1\n";
        assert_eq!(refusal(readonly), None, "nobody stores anything there");
    }

    #[test]
    fn the_device_is_found_by_its_place() {
        let mounts = "30 1 8:1 / / rw - ext4 /dev/sda1 rw\n\
                      40 30 7:3 / /run/a\\040b/rootfs rw,nodev shared:1 - ext4 /dev/loop3 rw,jqfmt=vfsv0\n";
        let found = device(mounts, Path::new("/run/a b/rootfs"));
        let expected = HostDevice {
            kind: 'b',
            major: 7,
            minor: 3,
        };
        assert_eq!(found, Some((PathBuf::from("/dev/loop3"), expected)));
        assert_eq!(device(mounts, Path::new("/run/a b")), None);
    }
}
