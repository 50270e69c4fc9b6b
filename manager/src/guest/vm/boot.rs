// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! How a machine boots: a kernel that the VMM loads, or UEFI firmware with variables of the guest's own.
//!
//! Legacy BIOS boot is not offered. PVE's default is just that, so a new guest without `kernel` and `bios` gets
//! `bios: ovmf` and variables beside its first disk, written into its config for everybody to see
//! ([`complete`]); a config that comes from elsewhere is not guessed at, and its start says what to set.

use std::path::{Path, PathBuf};

use atoll_disk::Format;
use atoll_vmm_protocol::spec::{BootSpec, FirmwareSpec, IdentitySpec, KernelSpec};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::resolve::Places;
use crate::error::Error;
use crate::guest::config::GuestConfig;
use crate::guest::create::Params;
use crate::guest::disks;
use crate::guest::keys::drive::is_cdrom;
use crate::guest::site::Seat;
use crate::id::{GuestId, GuestKind};
use crate::schema::Properties;
use crate::storage::name::{Content, StorageName, VolumeId};

/// The key that holds the firmware's variables.
pub const VARIABLES: &str = "efidisk0";
/// The key by which guests of one kernel share its pages.
const SHARE_KERNEL: &str = "sharekernel";
/// Firmware code, in the folder of Debian's package `ovmf`. The build without SMM, see the README.
const CODE: &str = "OVMF_CODE_4M.fd";
/// What new variables are copies of: empty, and with Secure Boot's keys.
const TEMPLATE: &str = "OVMF_VARS_4M.fd";
const TEMPLATE_WITH_KEYS: &str = "OVMF_VARS_4M.ms.fd";
/// Size of the firmware that these files are for.
const EFI_TYPE: &str = "4m";

/// A way to boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// The VMM loads a kernel.
    Kernel,
    /// UEFI firmware finds something to boot.
    Firmware,
}

/// How this machine boots.
pub fn way(id: GuestId, config: &GuestConfig) -> Result<Way, Error> {
    if config.get("kernel").is_some() {
        return Ok(Way::Kernel);
    }
    match config.value("bios") {
        Some("ovmf") => Ok(Way::Firmware),
        _ => Err(Error::refused(format!(
            "VM {id}: legacy BIOS boot (bios: seabios, the default) is not offered: set 'bios: ovmf' and \
             '{VARIABLES}: STORAGE:1' to boot by UEFI, or 'kernel' to boot a Linux kernel"
        ))),
    }
}

/// What boots, with the paths of its files.
pub fn spec(id: GuestId, config: &GuestConfig, places: &Places) -> Result<BootSpec, Error> {
    let shared = config.is_set(SHARE_KERNEL);
    if way(id, config)? == Way::Firmware {
        if shared {
            return Err(Error::refused(format!(
                "VM {id}: '{SHARE_KERNEL}' is for a guest with a 'kernel', firmware loads its own: delete one, or set \
                 the other"
            )));
        }
        return Ok(BootSpec::Firmware(FirmwareSpec {
            code: places.firmware.join(CODE),
            vars: match variables(config) {
                Some(volume) => places.find(&volume)?,
                None => temporary_variables(places),
            },
            menu_ms: None,
            log: None,
        }));
    }
    if shared && config.get("hugepages").is_some() {
        return Err(Error::refused(format!(
            "VM {id}: '{SHARE_KERNEL}' and 'hugepages' exclude each other: delete one of them"
        )));
    }
    let path = |key: &str| config.get(key).map(|volume| places.find(volume));
    Ok(BootSpec::Kernel(KernelSpec {
        image: path("kernel").expect("it is the way to boot")?,
        initrd: path("initrd").transpose()?,
        cmdline: config.get("cmdline").unwrap_or_default().to_owned(),
        shared,
    }))
}

/// The volume with the firmware's variables.
pub fn variables(config: &GuestConfig) -> Option<String> {
    let value = config.get(VARIABLES)?;
    Some(disks::volume_of(value).to_owned())
}

/// Where variables are that last for one run, of a guest that has no volume for them.
pub fn temporary_variables(places: &Places) -> PathBuf {
    places.run_folder.join("efivars.fd")
}

/// What the firmware tries, first to last: keys of disks, drives and cards.
pub fn order(config: &GuestConfig) -> Result<Vec<String>, Error> {
    let boot = config.properties("boot")?.unwrap_or_default();
    if let Some(order) = boot.get("order") {
        let keys = order.split(';').filter(|key| !key.is_empty());
        return Ok(keys.map(str::to_owned).collect());
    }
    let (mut discs, mut drives, mut cards) = (Vec::new(), Vec::new(), Vec::new());
    for (key, _) in config.current.values.iter() {
        if !disks::is_disk(GuestKind::Vm, key) || key == VARIABLES {
            continue;
        }
        match is_cdrom(&config.properties(key)?.unwrap_or_default()) {
            true => drives.push(key.clone()),
            false => discs.push(key.clone()),
        }
    }
    cards.extend(config.family("net[n]").into_iter().map(|(key, _)| key));
    let mut order = Vec::new();
    for letter in boot.get("legacy").unwrap_or("cdn").chars() {
        match letter {
            'c' => order.append(&mut discs),
            'd' => order.append(&mut drives),
            'n' => order.extend(cards.drain(..).map(str::to_owned)),
            // A floppy drive.
            _ => {}
        }
    }
    Ok(order)
}

/// What the guest reads about its board: the key `smbios1`.
pub fn identity(config: &GuestConfig) -> Result<IdentitySpec, Error> {
    let given = config.properties("smbios1")?.unwrap_or_default();
    let text = |key: &str| -> Result<Option<String>, Error> {
        let Some(text) = given.get(key) else {
            return Ok(None);
        };
        if !given.is_set("base64") {
            return Ok(Some(text.to_owned()));
        }
        let bytes = STANDARD.decode(text).ok();
        let text = bytes.and_then(|bytes| String::from_utf8(bytes).ok());
        let wrong = || Error::invalid("smbios1", format!("'{key}' is not text in Base64"));
        Ok(Some(text.ok_or_else(wrong)?))
    };
    Ok(IdentitySpec {
        uuid: given.get("uuid").map(str::to_owned),
        manufacturer: text("manufacturer")?,
        product: text("product")?,
        version: text("version")?,
        serial: text("serial")?,
        sku: text("sku")?,
        family: text("family")?,
        options: Vec::new(),
    })
}

/// Makes a volume with fresh variables for a guest. Returns it, its size, and the key's value to store.
pub async fn make_variables(
    seat: &Seat,
    storage: StorageName,
    mut wish: Properties,
) -> Result<(VolumeId, u64, Properties), Error> {
    let template = read_template(seat, &wish).await?;
    let target = seat.site.storage.open_for(&storage, Content::Images)?;
    let size = template.len() as u64;
    let name = target.allocate(seat.id, size, Format::Raw).await?;
    let written = async {
        let path = target.path(&name).await?;
        tokio::fs::write(&path, &template)
            .await
            .map_err(|e| Error::failed(format!("write {}", path.display()), e))
    };
    if let Err(error) = written.await {
        target.free(&name).await?;
        return Err(error);
    }
    wish.set("efitype", EFI_TYPE);
    Ok((VolumeId { storage, name }, size, wish))
}

/// Writes fresh variables for one run.
pub async fn write_temporary(seat: &Seat, places: &Places) -> Result<(), Error> {
    let template = read_template(seat, &Properties::default()).await?;
    let path = temporary_variables(places);
    tokio::fs::write(&path, template)
        .await
        .map_err(|e| Error::failed(format!("write {}", path.display()), e))
}

async fn read_template(seat: &Seat, wish: &Properties) -> Result<Vec<u8>, Error> {
    let path = seat.site.settings.firmware_dir.join(template(wish));
    tokio::fs::read(&path).await.map_err(|e| {
        let what = format!("read {} (of the package ovmf)", path.display());
        Error::failed(what, e)
    })
}

fn template(wish: &Properties) -> &'static str {
    match wish.is_set("pre-enrolled-keys") {
        true => TEMPLATE_WITH_KEYS,
        false => TEMPLATE,
    }
}

/// Adds what a new guest's keys leave open about how it boots; says what it added. Without a disk, or without firmware
/// in `firmware_dir`, there is no place for variables, or nothing to make them from.
pub fn complete(keys: &mut Params, firmware_dir: &Path) -> Option<String> {
    if ["kernel", "bios", VARIABLES]
        .iter()
        .any(|key| keys.contains_key(*key))
    {
        return None;
    }
    keys.insert("bios".to_owned(), "ovmf".to_owned());
    let is_disk = |key: &str| disks::is_disk(GuestKind::Vm, key);
    let mut volumes = keys
        .iter()
        .filter(|(key, value)| is_disk(key) && !value.contains("media=cdrom"))
        .filter_map(|(_, value)| disks::volume_of(value).split_once(':'));
    let beside = volumes.next().map(|(storage, _)| storage);
    let beside = beside.map(str::to_owned);
    let beside = beside.filter(|_| firmware_dir.join(TEMPLATE).exists());
    let Some(beside) = beside else {
        return Some("bios: ovmf, since there is no kernel".to_owned());
    };
    let value = format!("{beside}:1,efitype={EFI_TYPE}");
    let said = format!("bios: ovmf and {VARIABLES}: {value}, since there is no kernel");
    keys.insert(VARIABLES.to_owned(), value);
    Some(said)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> GuestConfig {
        GuestConfig::parse(GuestKind::Vm, text)
    }

    #[track_caller]
    fn check_order(text: &str, expected: &[&str]) {
        assert_eq!(order(&config(text)).unwrap(), expected, "{text}");
    }

    #[test]
    fn the_order_is_as_asked_for_or_disks_discs_cards() {
        let devices = "scsi1: local:100/vm-100-disk-1.raw\nvirtio0: local:100/vm-100-disk-0.raw\n\
             ide2: local:iso/x.iso,media=cdrom\nnet0: virtio\nefidisk0: local:100/vm-100-disk-2.raw\n";
        check_order(devices, &["scsi1", "virtio0", "ide2", "net0"]);
        check_order(
            &format!("{devices}boot: order=ide2;scsi1\n"),
            &["ide2", "scsi1"],
        );
        check_order(
            &format!("{devices}boot: ndc\n"),
            &["net0", "ide2", "scsi1", "virtio0"],
        );
    }

    #[test]
    fn new_guests_boot_by_firmware_unless_they_say_how() {
        let given = |keys: &[(&str, &str)]| -> Params {
            let keys = keys.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
            keys.collect()
        };
        let mut keys = given(&[("ide2", "iso:iso/x.iso,media=cdrom"), ("scsi0", "big:8")]);
        let firmware = tempfile::tempdir().unwrap();
        std::fs::write(firmware.path().join(TEMPLATE), "").unwrap();
        let complete = |keys: &mut Params| complete(keys, firmware.path());
        assert!(complete(&mut keys).is_some());
        assert_eq!(keys["bios"], "ovmf");
        assert_eq!(keys["efidisk0"], "big:1,efitype=4m");
        let mut bare = given(&[]);
        assert!(complete(&mut bare).is_some());
        assert_eq!(bare, given(&[("bios", "ovmf")]));
        for said in [("kernel", "local:snippets/k"), ("bios", "seabios")] {
            let mut keys = given(&[said]);
            assert_eq!(complete(&mut keys), None);
            assert_eq!(keys, given(&[said]));
        }
    }

    #[test]
    fn the_board_tells_who_it_is() {
        let spec = identity(&config(
            "smbios1: base64=1,family=QSBi,uuid=12345678-1234-1234-1234-123456789abc\n",
        ));
        let spec = spec.unwrap();
        assert_eq!(spec.family.as_deref(), Some("A b"));
        assert_eq!(
            spec.uuid.as_deref(),
            Some("12345678-1234-1234-1234-123456789abc")
        );
        assert!(identity(&config("smbios1: base64=1,family=%\n")).is_err());
    }
}
