// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The node's own network: one bridge with an address, NAT to the outside, DHCP and DNS for the guests on it.
//!
//! ```text
//! guest ── tap100i0 / veth101i0 ── vmbr0 (10.64.0.1/24) ── nftables: masquerade ── uplink
//!                                    └─ dnsmasq: DHCP and DNS, on the bridge only
//! ```
//!
//! Everything here is idempotent: `ensure` makes what is missing and leaves the rest alone, `teardown` removes
//! what is there. It drives iproute2, nft and dnsmasq, in whatever network namespace this process lives.

pub mod cidr;
pub mod dhcp;
pub mod interfaces;
pub mod link;
pub mod rate;
mod shown;
pub mod vlan;
mod vlan_bridge;

use std::path::PathBuf;

use crate::error::Error;
use crate::exec::Program;
use crate::network::cidr::Cidr;

/// Where the kernel says whether it forwards between interfaces.
const FORWARD: &str = "/proc/sys/net/ipv4/ip_forward";
/// Our table in nftables; nothing outside of it is read or changed.
const TABLE: &str = "inet atoll";

/// What the node's network is to be.
#[derive(Debug, Clone)]
pub struct Network {
    /// Name of the bridge.
    pub bridge: String,
    /// Address of the node on it, with the length of the guests' prefix.
    pub address: Cidr,
    /// Folder for leases, process id and log of the DHCP server.
    pub folder: PathBuf,
}

impl Network {
    /// Brings the network up, or what is missing of it. A running guest's traffic is not disturbed.
    pub async fn ensure(&self) -> Result<(), Error> {
        let created = link::ensure_bridge(&self.bridge).await?;
        Program::new("ip")
            .args([
                "address",
                "replace",
                &self.address.to_string(),
                "dev",
                &self.bridge,
            ])
            .run()
            .await?;
        link::up(&self.bridge).await?;
        vlan_bridge::sweep().await;
        self.ensure_nat().await?;
        dhcp::ensure(self, created).await
    }

    /// Takes down what [`Network::ensure`] made; interfaces of guests on the bridge stay, without a bridge.
    pub async fn teardown(&self) -> Result<(), Error> {
        dhcp::stop(self).await?;
        Program::new("nft")
            .arg("-f-")
            .stdin(format!("add table {TABLE}\ndelete table {TABLE}\n"))
            .run()
            .await?;
        link::remove(&self.bridge).await
    }

    async fn ensure_nat(&self) -> Result<(), Error> {
        let forwards = tokio::fs::read_to_string(FORWARD).await.unwrap_or_default();
        if forwards.trim() != "1" {
            tokio::fs::write(FORWARD, "1\n")
                .await
                .map_err(|error| Error::failed(format!("write {FORWARD}"), error))?;
        }
        // One transaction: the table is emptied and filled again, and connections that are up stay up.
        let (bridge, subnet) = (&self.bridge, self.address.subnet());
        let rules = format!(
            "add table {TABLE}\n\
             delete table {TABLE}\n\
             table {TABLE} {{\n\
               chain postrouting {{\n\
                 type nat hook postrouting priority srcnat; policy accept;\n\
                 ip saddr {subnet} oifname != \"{bridge}\" masquerade\n\
               }}\n\
             }}\n"
        );
        Program::new("nft").arg("-f-").stdin(rules).run().await?;
        Ok(())
    }
}
