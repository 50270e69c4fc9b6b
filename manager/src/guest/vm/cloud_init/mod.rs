// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The cloud-init drive: what a fresh guest reads at its first start about itself, its user and its network. NoCloud: a
//! CD with the label `cidata` and the files `meta-data`, `user-data` and `network-config`.
//!
//! The drive is a volume of its own, `vm-100-cloudinit.raw`, made by `ide2: local:cloudinit` and written anew at each
//! start from the keys `ci…`, `ipconfig…`, `sshkeys`, `nameserver` and `searchdomain`.

mod iso;

use serde_json::{Value, json};

use crate::error::Error;
use crate::guest::config::GuestConfig;
use crate::id::GuestId;
use crate::percent;
use crate::schema::{Properties, split_list};
use crate::storage::name::VolumeName;

/// What the volume is called behind `vm-100-`, and what is written in place of a size to ask for it.
pub const NAME: &str = "cloudinit";
/// Label that cloud-init looks for.
const LABEL: &str = "cidata";
/// Size of the volume, in bytes. PVE's.
pub const SIZE_BYTES: u64 = 4 << 20;

/// Whether a volume is a guest's cloud-init drive.
pub fn is_drive(volume: &VolumeName) -> bool {
    matches!(volume, VolumeName::Image { guest, file } if *file == format!("vm-{guest}-{NAME}.raw"))
}

/// The drive's content, of its full size.
pub fn image(id: GuestId, config: &GuestConfig) -> Result<Vec<u8>, Error> {
    let (user, network) = (user_data(id, config), network_config(config)?);
    // A guest sets itself up again when this changes.
    let both = aws_lc_rs::digest::digest(
        &aws_lc_rs::digest::SHA1_FOR_LEGACY_USE_ONLY,
        format!("{user}{network}").as_bytes(),
    );
    let instance: String = both.as_ref().iter().map(|b| format!("{b:02x}")).collect();
    let meta = format!("instance-id: {instance}\n");
    let files: [(&str, &[u8]); 3] = [
        ("meta-data", meta.as_bytes()),
        ("network-config", network.as_bytes()),
        ("user-data", user.as_bytes()),
    ];
    let image = iso::image(LABEL, &files);
    let mut image = image.ok_or_else(|| Error::refused("the cloud-init data is too large"))?;
    let size = usize::try_from(SIZE_BYTES).unwrap_or(usize::MAX);
    if image.len() > size {
        return Err(Error::refused("the cloud-init data is too large"));
    }
    image.resize(size, 0);
    Ok(image)
}

/// The user's part. JSON is YAML, and quotes what YAML would take for something else.
fn user_data(id: GuestId, config: &GuestConfig) -> String {
    let name = config
        .get("name")
        .map_or_else(|| format!("VM{id}"), str::to_owned);
    let mut data = json!({
        "hostname": name.split('.').next(),
        "fqdn": name,
        "manage_etc_hosts": true,
        "chpasswd": { "expire": false },
        "users": ["default"],
        "package_upgrade": config.is_set("ciupgrade"),
    });
    if let Some(user) = config.get("ciuser") {
        data["user"] = json!(user);
    }
    if let Some(password) = config.get("cipassword") {
        data["password"] = json!(password);
    }
    let keys: Vec<String> = config
        .get("sshkeys")
        .map(|keys| percent::decode(keys).lines().map(str::to_owned).collect())
        .unwrap_or_default();
    let keys: Vec<&String> = keys.iter().filter(|key| !key.trim().is_empty()).collect();
    if !keys.is_empty() {
        data["ssh_authorized_keys"] = json!(keys);
    }
    format!("#cloud-config\n{data:#}\n")
}

/// The network's part, version 2: cards are found by their addresses.
fn network_config(config: &GuestConfig) -> Result<String, Error> {
    let mut cards = serde_json::Map::new();
    for (key, _) in config.family("net[n]") {
        let number = key.trim_start_matches("net");
        let card = config.properties(key)?.unwrap_or_default();
        let wanted = config.properties(&format!("ipconfig{number}"))?;
        let (Some(mac), Some(wanted)) = (card.get("macaddr"), wanted) else {
            continue;
        };
        let mut shape = shape(&wanted);
        shape["match"] = json!({ "macaddress": mac.to_lowercase() });
        shape["set-name"] = json!(format!("eth{number}"));
        let servers: Vec<&str> = split_list(config.get("nameserver").unwrap_or_default()).collect();
        let search: Vec<&str> =
            split_list(config.get("searchdomain").unwrap_or_default()).collect();
        if !servers.is_empty() || !search.is_empty() {
            shape["nameservers"] = json!({ "addresses": servers, "search": search });
        }
        cards.insert(format!("eth{number}"), shape);
    }
    let data = json!({ "version": 2, "ethernets": cards });
    Ok(format!("{data:#}\n"))
}

/// One card's addresses and routes.
fn shape(wanted: &Properties) -> Value {
    let mut shape = json!({});
    let (mut addresses, mut routes) = (Vec::new(), Vec::new());
    for (address, gateway, dhcp) in [("ip", "gw", "dhcp4"), ("ip6", "gw6", "dhcp6")] {
        match wanted.get(address) {
            Some("dhcp") => shape[dhcp] = json!(true),
            Some("auto") => shape["accept-ra"] = json!(true),
            Some(fixed) if fixed.contains('/') => addresses.push(fixed.to_owned()),
            _ => {}
        }
        if let Some(via) = wanted.get(gateway) {
            let to = if address == "ip" { "0.0.0.0/0" } else { "::/0" };
            routes.push(json!({ "to": to, "via": via }));
        }
    }
    if !addresses.is_empty() {
        shape["addresses"] = json!(addresses);
    }
    if !routes.is_empty() {
        shape["routes"] = json!(routes);
    }
    shape
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::GuestKind;

    #[test]
    fn a_guest_is_told_its_name_user_and_network() {
        let config = GuestConfig::parse(
            GuestKind::Vm,
            "name: web.example.org\nciuser: ops\nsshkeys: ssh-ed25519%20AAAA%20me%0A\nnameserver: 10.0.0.1\n\
             net0: virtio=BC:24:11:00:00:01,bridge=vmbr0\nipconfig0: ip=10.0.0.5/24,gw=10.0.0.1,ip6=auto\n",
        );
        let user = user_data("100".parse().unwrap(), &config);
        let (head, data) = user.split_once('\n').unwrap();
        assert_eq!(head, "#cloud-config");
        let data: Value = serde_json::from_str(data).unwrap();
        assert_eq!(
            (&data["hostname"], &data["user"]),
            (&json!("web"), &json!("ops"))
        );
        assert_eq!(data["ssh_authorized_keys"], json!(["ssh-ed25519 AAAA me"]));
        let network: Value = serde_json::from_str(&network_config(&config).unwrap()).unwrap();
        assert_eq!(
            network["ethernets"]["eth0"],
            json!({
                "match": { "macaddress": "bc:24:11:00:00:01" }, "set-name": "eth0", "accept-ra": true,
                "addresses": ["10.0.0.5/24"], "routes": [{ "to": "0.0.0.0/0", "via": "10.0.0.1" }],
                "nameservers": { "addresses": ["10.0.0.1"], "search": [] },
            })
        );
        let image = image("100".parse().unwrap(), &config).unwrap();
        assert_eq!(image.len() as u64, SIZE_BYTES);
        assert!(is_drive(&"100/vm-100-cloudinit.raw".parse().unwrap()));
        assert!(!is_drive(&"100/vm-100-disk-0.raw".parse().unwrap()));
    }
}
