// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Arguments of `run` for what connects a guest with its host.

use std::path::PathBuf;

use atoll_vmm_protocol::services::{
    BalloonSpec, FaultAction, FilesystemSpec, GuestServices, MemoryBacking, PanicSpec, PortSpec,
    VhostUserSocket, VhostUserSpec, VsockSpec, WatchdogSpec,
};
use clap::Args;

use super::{keys, number};
use crate::check;

/// Their names, for `--spec`, which stands instead of them.
pub(super) const ARGUMENTS: [&str; 7] = [
    "port",
    "balloon",
    "vsock",
    "watchdog",
    "panic",
    "fs",
    "vhost_user",
];

/// See [`GuestServices`].
#[derive(Debug, Args)]
pub struct ServiceArguments {
    /// A channel to the guest: name=org.qemu.guest_agent.0,socket=PATH; may be repeated
    #[arg(long, value_name = "KEYS", value_parser = port)]
    pub port: Vec<PortSpec>,
    /// Adds a memory balloon: [target=MIB][,deflate-on-oom=on|off][,free-page-reporting=on|off], both on
    #[arg(long, value_name = "KEYS", value_parser = balloon, num_args = 0..=1, default_missing_value = "")]
    pub balloon: Option<BalloonSpec>,
    /// Adds a socket device: cid=N,socket=PATH. Connect to PATH and write "CONNECT PORT" to reach the guest; it
    /// reaches PATH_PORT. Or cid=N,vhost: the kernel's, for AF_VSOCK sockets of the host
    #[arg(long, value_name = "KEYS", value_parser = vsock)]
    pub vsock: Option<VsockSpec>,
    /// A directory of the host by virtio-fs: tag=NAME,socket=PATH (of virtiofsd); needs --memory SIZE,shared; may be
    /// repeated
    #[arg(long, value_name = "KEYS", value_parser = filesystem)]
    pub fs: Vec<FilesystemSpec>,
    /// Another device that another process serves: socket=PATH,type=blk|rng|scsi|VIRTIO'S NUMBER[,queues=N]
    /// [,config=BYTES][,reconnect]; needs --memory SIZE,shared; may be repeated
    #[arg(long, value_name = "KEYS", value_parser = vhost_user)]
    pub vhost_user: Vec<VhostUserSpec>,
    /// Adds a watchdog (i6300esb), and says what happens when the guest does not feed it:
    /// action=none|reset|shutdown|poweroff|pause
    #[arg(long, value_name = "KEYS", value_parser = action)]
    pub watchdog: Option<FaultAction>,
    /// Adds a panic device (pvpanic), and says what happens when the guest's kernel crashes: action=, as above
    #[arg(long, value_name = "KEYS", value_parser = action)]
    pub panic: Option<FaultAction>,
}

impl ServiceArguments {
    /// As the spec has them.
    pub(super) fn to_spec(&self, memory_backing: MemoryBacking) -> GuestServices {
        GuestServices {
            ports: self.port.clone(),
            balloon: self.balloon.clone(),
            vsock: self.vsock.clone(),
            watchdog: self.watchdog.map(|action| WatchdogSpec { action }),
            panic: self.panic.map(|action| PanicSpec { action }),
            memory_backing,
            filesystems: self.fs.clone(),
            vhost_user: self.vhost_user.clone(),
        }
    }
}

fn port(text: &str) -> Result<PortSpec, String> {
    let (mut name, mut path) = (None, None);
    keys(text, "name=, socket=", |key, value| {
        match (key, value) {
            ("name", Some(value)) => name = Some(value.to_owned()),
            ("socket", Some(value)) => path = Some(PathBuf::from(value)),
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    Ok(PortSpec {
        name: name.ok_or("name= is missing")?,
        path: path.ok_or("socket= is missing")?,
    })
}

fn vsock(text: &str) -> Result<VsockSpec, String> {
    let (mut cid, mut path) = (None, None);
    let mut vhost = false;
    keys(text, "cid=, socket=, vhost", |key, value| {
        match (key, value) {
            ("cid", Some(value)) => {
                let number = value.parse();
                cid = Some(number.map_err(|_| format!("cid={value}: expected a number"))?);
            }
            ("socket", Some(value)) => path = Some(PathBuf::from(value)),
            ("vhost", None) => vhost = true,
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    if path.is_none() && !vhost {
        return Err("socket= or vhost is missing".to_owned());
    }
    Ok(VsockSpec {
        cid: cid.ok_or("cid= is missing")?,
        path: path.unwrap_or_default(),
        vhost,
    })
}

fn filesystem(text: &str) -> Result<FilesystemSpec, String> {
    let (mut tag, mut path) = (None, None);
    keys(text, "tag=, socket=", |key, value| {
        match (key, value) {
            ("tag", Some(value)) => tag = Some(value.to_owned()),
            ("socket", Some(value)) => path = Some(PathBuf::from(value)),
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    Ok(FilesystemSpec {
        tag: tag.ok_or("tag= is missing")?,
        path: path.ok_or("socket= is missing")?,
    })
}

fn vhost_user(text: &str) -> Result<VhostUserSpec, String> {
    let (mut path, mut device_id) = (None, None);
    let (mut queue_count, mut config_bytes, mut reconnect) = (None, None, false);
    let known = "socket=, type=, queues=, config=, reconnect";
    keys(text, known, |key, value| {
        match (key, value) {
            ("socket", Some(value)) => path = Some(PathBuf::from(value)),
            ("type", Some(value)) => device_id = Some(check::device_number(value)?),
            ("queues", Some(value)) => queue_count = Some(number(key, value)?),
            ("config", Some(value)) => config_bytes = Some(number(key, value)?),
            ("reconnect", None) => reconnect = true,
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    Ok(VhostUserSpec {
        socket: VhostUserSocket {
            path: path.ok_or("socket= is missing")?,
            reconnect,
        },
        device_id: device_id.ok_or("type= is missing")?,
        queue_count,
        config_bytes,
    })
}

fn action(text: &str) -> Result<FaultAction, String> {
    match text.strip_prefix("action=") {
        Some("none") => Ok(FaultAction::None),
        Some("reset") => Ok(FaultAction::Reset),
        Some("shutdown") => Ok(FaultAction::Shutdown),
        Some("poweroff") => Ok(FaultAction::Poweroff),
        Some("pause") => Ok(FaultAction::Pause),
        _ => Err("expected action=none, reset, shutdown, poweroff or pause".to_owned()),
    }
}

fn balloon(text: &str) -> Result<BalloonSpec, String> {
    let mut spec = BalloonSpec::default();
    if text.is_empty() {
        return Ok(spec);
    }
    let known = "target=, deflate-on-oom=, free-page-reporting=";
    keys(text, known, |key, value| {
        let value = value.ok_or_else(|| format!("{key}= is missing its value"))?;
        match key {
            "target" => {
                let mib = value.parse();
                spec.target_mib = Some(mib.map_err(|_| format!("target={value}: expected MiB"))?);
            }
            "deflate-on-oom" => spec.deflate_on_oom = switch(key, value)?,
            "free-page-reporting" => spec.free_page_reporting = switch(key, value)?,
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    Ok(spec)
}

fn switch(key: &str, value: &str) -> Result<bool, String> {
    match value {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(format!("{key}={value}: expected on or off")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_become_a_spec() {
        let spec = port("name=a.0,socket=/run/a=b").unwrap();
        assert_eq!((spec.name.as_str(), spec.path), ("a.0", "/run/a=b".into()));
        assert!(port("socket=/a").unwrap_err().contains("name="));
        assert_eq!(balloon("").unwrap(), BalloonSpec::default());
        let spec = balloon("target=256,deflate-on-oom=off").unwrap();
        assert_eq!((spec.target_mib, spec.deflate_on_oom), (Some(256), false));
        assert!(balloon("deflate-on-oom=maybe").is_err());
        assert!(balloon("size=1").unwrap_err().contains("target="));
        let spec = vsock("cid=7,vhost").unwrap();
        assert!(spec.vhost && spec.path.as_os_str().is_empty());
        assert!(vsock("cid=7").unwrap_err().contains("socket= or vhost"));
        let spec = vhost_user("socket=/s,type=blk,queues=2,reconnect").unwrap();
        assert_eq!((spec.device_id, spec.queue_count), (2, Some(2)));
        assert!(spec.socket.reconnect);
        let spec = vhost_user("type=41,socket=/s,config=4").unwrap();
        assert_eq!((spec.device_id, spec.config_bytes), (41, Some(4)));
        assert!(
            vhost_user("socket=/s,type=disk")
                .unwrap_err()
                .contains("blk")
        );
    }
}
