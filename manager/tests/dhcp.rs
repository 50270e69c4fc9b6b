// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! DHCP by the host in a container made from an image that has no client: dnsmasq on the bridge, busybox's client in the
//! container's network namespace.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test")]

mod world;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use atoll_manager::guest::{Action, ConfigUpdate};
use atoll_manager::id::GuestKind;
use atoll_manager::{Node, Settings};
use serde_json::json;
use tokio_util::sync::CancellationToken;
use world::ground::{Ground, busybox};
use world::image::{Sample, file, layer};

const KIND: GuestKind = GuestKind::Container;
const CARD: &str = "name=eth0,bridge=vmbr0,ip=dhcp,host-managed=1,hwaddr=BC:24:11:00:00:07";

/// A container of an image without a DHCP client and without a resolver's file, not started.
async fn ground() -> Option<Ground> {
    let (ground, lowest) = (Ground::new().await?, busybox()?);
    let top = layer(&[file("srv/version", "1\n")]);
    let run =
        json!({ "Cmd": ["/bin/sh", "-c", "while :; do sleep 1; done"], "Env": ["PATH=/bin"] });
    std::fs::create_dir_all(ground.archive("x").parent().unwrap()).unwrap();
    Sample::new(&[lowest, top], run).write(&ground.archive("app.tar"));
    create(&ground, &[("net0", CARD)]).await;
    Some(ground)
}

async fn create(ground: &Ground, more: &[(&str, &str)]) {
    let params = [
        ("ostemplate", "local:vztmpl/app.tar"),
        ("rootfs", "local:0.0625"),
        ("memory", "64"),
        ("hostname", "box"),
    ];
    let params = [&params[..], more].concat();
    assert_eq!(ground.create(ground.id, &params).await.0, "OK");
}

/// Processes of this test's world that are DHCP clients: pid, user, effective capabilities.
fn clients() -> Vec<(u32, String, String)> {
    let folders = std::fs::read_dir("/proc").unwrap().flatten();
    let read = |folder: std::fs::DirEntry| {
        let pid = folder.file_name().to_str()?.parse().ok()?;
        let command = std::fs::read(folder.path().join("cmdline")).ok()?;
        let status = std::fs::read_to_string(folder.path().join("status")).ok()?;
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.unwrap().split_whitespace().next().unwrap().to_owned()
        };
        let is_client = command.starts_with(b"busybox\0udhcpc\0") && field("State:") != "Z";
        is_client.then(|| (pid, field("Uid:"), field("CapEff:")))
    };
    folders.filter_map(read).collect()
}

/// The one client. It comes by way of nsenter and its like, and is two for the moment in which it starts its script.
fn one_client() -> (u32, String, String) {
    let mut found = Vec::new();
    world::until("one client", || {
        found = clients();
        found.len() == 1
    });
    found.remove(0)
}

async fn addresses(ground: &Ground) -> Vec<String> {
    let interfaces = ground.node.guests().interfaces(ground.id).await.unwrap();
    let card = interfaces.into_iter().find(|card| card.name == "eth0");
    card.map_or(Vec::new(), |card| card.ipv4)
}

async fn gets_an_address(ground: &Ground) -> String {
    let deadline = Instant::now() + world::PATIENCE;
    loop {
        if let Some(address) = addresses(ground).await.pop() {
            return address;
        }
        assert!(Instant::now() < deadline, "no address");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn set(ground: &Ground, set: &[(&str, &str)], delete: &[&str]) {
    let set = set.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
    let delete = delete.iter().map(|key| (*key).to_owned()).collect();
    let update = ConfigUpdate::new(KIND, set.collect(), delete, BTreeSet::new(), None).unwrap();
    let guests = ground.node.guests();
    guests.update(KIND, ground.id, update).await.unwrap();
}

fn runs(node: &Node) -> (CancellationToken, tokio::task::JoinHandle<()>) {
    let (node, stop) = (node.clone(), CancellationToken::new());
    let inner = stop.clone();
    let running = tokio::spawn(async move { node.run(inner).await.unwrap() });
    (stop, running)
}

#[test]
fn the_host_asks_for_an_image() {
    world::isolated("the_host_asks_for_an_image", async || {
        let Some(ground) = ground().await else { return };
        let id = ground.id;
        let (stop, running) = runs(&ground.node);
        assert_eq!(ground.act(id, Action::Start).await, "OK");
        let address = gets_an_address(&ground).await;
        assert!(
            address.starts_with("10.64.0.") && address.ends_with("/24"),
            "{address}"
        );
        let said = "nameserver 10.64.0.1\n";
        world::until("the name server", || {
            ground.sh(id, "cat /etc/resolv.conf").contains(said)
        });
        let route = ground.sh(id, "cat /proc/net/route");
        assert!(route.contains("eth0\t00000000\t0100400A"), "{route}");

        let (client, user, capabilities) = one_client();
        let base = 1_000_000 + (u32::from(id) - 100) * 65_536;
        assert_eq!(user, (base + 65_535).to_string());
        // CAP_NET_BIND_SERVICE is 10, CAP_NET_RAW 13.
        assert_eq!(capabilities, "0000000000002400");
        let inside = std::fs::read_link(format!("/proc/{client}/ns/net")).unwrap();
        assert_ne!(inside, std::fs::read_link("/proc/self/ns/net").unwrap());

        the_lease_changes(&ground).await;

        // A daemon that ends leaves the client, and the next one has the same; it starts one again that has died.
        stop.cancel();
        running.await.unwrap();
        let Ground { node, state, id } = ground;
        drop(node);
        one_client();
        let mut settings = Settings::new("n1", state.path());
        settings.bin_dir = world::bin_dir();
        let node = Node::open(settings).await.unwrap();
        let (stop, running) = runs(&node);
        let ground = Ground { node, state, id };
        let client = client.to_string();
        world::run("kill", &["-9", &client]);
        world::until("another client", || {
            clients()
                .iter()
                .any(|(pid, _, _)| pid.to_string() != client)
        });
        assert_eq!(gets_an_address(&ground).await, address);

        unplugged_and_plugged(&ground).await;

        // Whatever ends the container ends the client.
        let status = ground.node.guests().status(KIND, id).await.unwrap();
        world::run("kill", &["-9", &status.pid.unwrap().to_string()]);
        let folder = ground.state.path().join(format!("run/ct-{id}"));
        world::until("the reconciler to clean up", || !folder.exists());
        assert_eq!(clients(), []);
        let links = world::run("ip", &["-o", "link"]);
        assert!(!links.contains("veth"), "{links}");
        stop.cancel();
        running.await.unwrap();
        ground.node.network().teardown().await.unwrap();
    });
}

/// What the client's script would write when the network tells it something else, down to nothing at all.
async fn the_lease_changes(ground: &Ground) {
    let id = ground.id;
    let file = ground.state.path().join(format!("run/ct-{id}/dhcp-net0"));
    let says = |event: &str, ip: &str, router: &str| {
        let rest = "dns 10.64.0.2\ndomain lan.example\nend";
        let text = format!("event {event}\nip {ip}\nmask 24\nrouter {router}\n{rest}\n");
        std::fs::write(&file, text).unwrap();
    };
    let has = async |address: &[&str], gateway: &str| {
        let deadline = Instant::now() + world::PATIENCE;
        loop {
            let now = addresses(ground).await;
            let routes = ground.sh(id, "cat /proc/net/route");
            let default = format!("eth0\t00000000\t{gateway}");
            let is_routed = routes.contains(&default) != gateway.is_empty();
            if now == address && is_routed {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "{address:?} {gateway}: {now:?} {routes}"
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    says("renew", "10.64.0.201", "10.64.0.3");
    has(&["10.64.0.201/24"], "0300400A").await;
    let resolver = "search lan.example\nnameserver 10.64.0.2\n";
    world::until("the name server", || {
        ground.sh(id, "cat /etc/resolv.conf") == resolver
    });
    says("renew", "10.64.0.201", "");
    has(&["10.64.0.201/24"], "").await;
    says("renew", "10.64.0.202", "10.64.0.1");
    has(&["10.64.0.202/24"], "0100400A").await;
    says("deconfig", "", "");
    has(&[], "").await;
}

async fn unplugged_and_plugged(ground: &Ground) {
    set(ground, &[], &["net0"]).await;
    assert_eq!(clients(), []);
    set(ground, &[("net0", CARD)], &[]).await;
    one_client();
    gets_an_address(ground).await;
    let fixed = "name=eth0,bridge=vmbr0,ip=10.64.0.9/24,hwaddr=BC:24:11:00:00:07";
    set(ground, &[("net0", fixed)], &[]).await;
    assert_eq!(clients(), []);
    assert_eq!(addresses(ground).await, ["10.64.0.9/24"]);
    set(ground, &[("net0", CARD)], &[]).await;
    gets_an_address(ground).await;
}

/// Without an answer it starts all the same, and has its address when a server comes.
#[test]
fn no_server_is_no_hindrance() {
    world::isolated("no_server_is_no_hindrance", async || {
        let Some(mut ground) = ground().await else {
            return;
        };
        let id = ground.id;
        atoll_manager::network::dhcp::stop(ground.node.network())
            .await
            .unwrap();
        let started = ground
            .node
            .guests()
            .act(KIND, id, Action::Start, "root@pam");
        let (status, log) = ground.done(started).await;
        assert_eq!(status, "OK");
        assert!(log.contains("no answer to DHCP yet"), "{log}");
        assert_eq!(addresses(&ground).await, [""; 0]);
        // The node's own look at its network brings the server back.
        let (stop, running) = runs(&ground.node);
        gets_an_address(&ground).await;
        stop.cancel();
        running.await.unwrap();
        assert_eq!(ground.act(id, Action::Stop).await, "OK");
        assert_eq!(clients(), []);
        ground.id = world::more_numbers()[0].try_into().unwrap();
        plugged_in_later(&ground).await;
        ground.node.network().teardown().await.unwrap();
    });
}

/// What a router announces reaches a container of an image without any program for it; DHCPv6 is refused by name.
#[test]
fn routers_announce_an_ipv6_address() {
    world::isolated("routers_announce_an_ipv6_address", async || {
        let Some(ground) = ground().await else { return };
        let id = ground.id;
        world::run(
            "ip",
            &["address", "add", "fd64::1/64", "dev", "vmbr0", "nodad"],
        );
        let _router = Router::start(ground.state.path());
        let refused = CARD.replace("host-managed", "ip6=dhcp,host-managed");
        set(&ground, &[("net0", &refused)], &[]).await;
        let status = ground.act(id, Action::Start).await;
        assert!(
            status.starts_with("net0: the host has no client for ip6=dhcp"),
            "{status}"
        );
        let auto = "name=eth0,bridge=vmbr0,ip6=auto,hwaddr=BC:24:11:00:00:07";
        set(&ground, &[("net0", auto)], &[]).await;
        assert_eq!(ground.act(id, Action::Start).await, "OK");
        let deadline = Instant::now() + world::PATIENCE;
        loop {
            let interfaces = ground.node.guests().interfaces(id).await.unwrap();
            let mut all = interfaces.into_iter().flat_map(|card| card.ipv6);
            if all.any(|address| address == "fd64::be24:11ff:fe00:7/64") {
                break;
            }
            assert!(Instant::now() < deadline, "no address");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        assert_eq!(ground.act(id, Action::Stop).await, "OK");
        ground.node.network().teardown().await.unwrap();
    });
}

/// A dnsmasq that only announces the bridge's prefix.
struct Router(std::process::Child);

impl Router {
    fn start(folder: &std::path::Path) -> Self {
        let leases = folder.join("router.leases");
        let mut dnsmasq = std::process::Command::new("dnsmasq");
        dnsmasq
            .args([
                "--keep-in-foreground",
                "--conf-file=/dev/null",
                "--port=0",
                "--enable-ra",
            ])
            .args([
                "--interface=vmbr0",
                "--bind-interfaces",
                "--dhcp-range=fd64::,ra-only",
            ])
            .arg("--pid-file=")
            .arg(format!("--dhcp-leasefile={}", leases.display()));
        Self(dnsmasq.spawn().unwrap())
    }
}

impl Drop for Router {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// A card that comes to a container that was started without any brings its name server.
async fn plugged_in_later(ground: &Ground) {
    create(ground, &[]).await;
    assert_eq!(ground.act(ground.id, Action::Start).await, "OK");
    let (stop, running) = runs(&ground.node);
    set(ground, &[("net0", CARD)], &[]).await;
    let said = "nameserver 10.64.0.1\n";
    world::until("the name server", || {
        ground.sh(ground.id, "cat /etc/resolv.conf").contains(said)
    });
    stop.cancel();
    running.await.unwrap();
    assert_eq!(ground.act(ground.id, Action::Stop).await, "OK");
    assert_eq!(clients(), []);
}
