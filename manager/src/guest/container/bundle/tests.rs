// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Golden tests of bundles: a config as PVE writes it, and what the runtime is given.

use super::*;
use crate::guest::container::setup::Addressing;
use crate::id::GuestKind;

fn config(text: &str) -> GuestConfig {
    GuestConfig::parse(GuestKind::Container, text)
}

fn facts() -> Facts {
    let mut facts = Facts::default();
    let tun = HostDevice {
        kind: 'c',
        major: 10,
        minor: 200,
    };
    facts.devices.insert("/dev/net/tun".into(), tun);
    facts.present.insert("/dev/net/tun".into());
    facts
}

fn made(text: &str) -> Result<Bundle, Error> {
    let id = "101".parse().unwrap();
    bundle(id, &config(text), Path::new("/run/ct-101"), &facts())
}

fn built(text: &str) -> Value {
    made(text).unwrap().config
}

/// The mount at a place.
fn mount(bundle: &Value, destination: &str) -> Value {
    let mounts = bundle["mounts"].as_array().unwrap().iter();
    let mut at = mounts.filter(|mount| mount["destination"] == destination);
    at.next_back().cloned().unwrap_or_default()
}

#[test]
fn an_unprivileged_container_has_its_own_range() {
    let bundle = built(
        "unprivileged: 1\nhostname: web.example.org\nmemory: 256\nswap: 0\ncores: 2\ncpulimit: 1.5\n",
    );
    assert_eq!(bundle["linux"]["uidMappings"][0]["hostID"], 1_065_536);
    assert_eq!(bundle["annotations"]["dev.atoll.rootfs.idmap"], "container");
    assert_eq!(bundle["linux"]["namespaces"][0]["type"], "user");
    assert_eq!(bundle["hostname"], "web");
    let resources = &bundle["linux"]["resources"];
    assert_eq!(
        resources["memory"],
        json!({ "limit": 256 << 20, "swap": 256 << 20 })
    );
    assert_eq!(resources["cpu"]["quota"], 150_000);
    assert_eq!(resources["cpu"]["shares"], 1024);
    assert_eq!(resources["devices"][0]["allow"], false);
    assert_eq!(bundle["linux"]["maskedPaths"], json!(MASKED));
}

#[test]
fn a_privileged_one_says_so() {
    let bundle = built("unprivileged: 0\nfeatures: nesting=1\n");
    assert_eq!(bundle["linux"]["uidMappings"], Value::Null);
    assert_eq!(
        bundle["annotations"],
        json!({ "dev.atoll.terminals": "2" }),
        "no mapping"
    );
    assert_eq!(bundle["hostname"], "CT101");
    assert_eq!(bundle["linux"]["maskedPaths"], Value::Null);
    assert_eq!(bundle["linux"]["resources"]["cpu"]["quota"], Value::Null);
}

#[test]
fn mount_points_are_volumes_devices_or_folders() {
    let bundle = built(
        "unprivileged: 1\nrootfs: local:101/vm-101-disk-0.raw,ro=1\n\
         mp0: local:101/vm-101-disk-1.raw,mp=/srv,ro=1\n\
         mp1: /mnt/media,mp=/media\n\
         mp2: /dev/sdb1,mp=/data,mountoptions=noatime;discard,acl=0\n",
    );
    assert_eq!(bundle["root"]["readonly"], true);
    assert_eq!(
        mount(&bundle, "/srv"),
        json!({ "destination": "/srv", "type": "bind", "source": "/run/ct-101/mp0", "options": ["rbind", "rro", "idmap"] })
    );
    assert_eq!(
        mount(&bundle, "/media"),
        json!({ "destination": "/media", "type": "bind", "source": "/mnt/media", "options": ["rbind", "rw"] }),
        "the host's owners are shown as they are"
    );
    assert_eq!(mount(&bundle, "/data")["source"], "/run/ct-101/mp2");
    let points = volumes(&config(
        "rootfs: local:1\nmp2: /dev/sdb1,mp=/data,mountoptions=noatime;discard,acl=0\n",
    ));
    assert_eq!(points.unwrap()[1].options, ["noatime", "discard", "noacl"]);
    let with = volumes(&config(
        "rootfs: local:1,quota=1\nmp0: local:2,mp=/a,quota=1,ro=1\n",
    ))
    .unwrap();
    let journalled = "usrjquota=aquota.user,grpjquota=aquota.group,jqfmt=vfsv0";
    assert_eq!(
        (&*with[0].options, with[1].options.len()),
        (&[journalled.to_owned()][..], 0)
    );
}

#[test]
fn mount_points_have_maps_of_their_own() {
    let text = "mp0: local:1,mp=/a,idmap=u:1000:33:1\nmp1: /srv,mp=/b,idmap=passthrough\n\
                mp2: /srv,mp=/c,idmap=g:0:50:2\n";
    let bundle = built(&format!("unprivileged: 1\n{text}"));
    let users = json!([
        { "containerID": 0, "hostID": 1_065_536, "size": 33 },
        { "containerID": 33, "hostID": 1_066_536, "size": 1 },
        { "containerID": 34, "hostID": 1_065_570, "size": 966 },
        { "containerID": 1001, "hostID": 1_066_537, "size": 64_535 },
    ]);
    assert_eq!(mount(&bundle, "/a")["uidMappings"], users);
    let all = json!([{ "containerID": 0, "hostID": 1_065_536, "size": 65_536 }]);
    assert_eq!(mount(&bundle, "/a")["gidMappings"], all);
    let same = mount(&bundle, "/b");
    assert_eq!(
        (&same["options"][2], &same["uidMappings"]),
        (&json!("idmap"), &Value::Null)
    );
    let groups = json!([
        { "containerID": 50, "hostID": 1_065_536, "size": 2 },
        { "containerID": 1_065_538, "hostID": 1_065_538, "size": 65_534 },
    ]);
    assert_eq!(
        mount(&bundle, "/c")["gidMappings"],
        groups,
        "the host's ids besides"
    );
    let privileged = made(&format!("unprivileged: 0\n{text}")).unwrap();
    assert_eq!(mount(&privileged.config, "/a")["uidMappings"], Value::Null);
    assert_eq!(
        mount(&privileged.config, "/b")["options"],
        json!(["rbind", "rw"])
    );
    assert_eq!(privileged.notes.len(), 3);
    assert!(privileged.notes[0].starts_with("mp0: idmap: no effect"));
}

#[test]
fn devices_and_features() {
    let bundle = built(
        "unprivileged: 1\nfeatures: fuse=1,keyctl=1,force_rw_sys=1\n\
         dev0: /dev/net/tun,mode=0666,gid=5,deny-write=1\n",
    );
    assert_eq!(
        bundle["linux"]["devices"],
        json!([
            { "path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 0o666, "uid": 0, "gid": 0 },
            { "path": "/dev/net/tun", "type": "c", "major": 10, "minor": 200, "fileMode": 0o666, "uid": 0, "gid": 5 },
        ])
    );
    assert_eq!(
        bundle["linux"]["resources"]["devices"],
        json!([
            { "allow": false, "access": "rwm" },
            { "allow": true, "type": "c", "major": 10, "minor": 229, "access": "rwm" },
            { "allow": true, "type": "c", "major": 10, "minor": 200, "access": "rm" },
        ])
    );
    let mut facts = facts();
    let of_loop = HostDevice {
        kind: 'b',
        major: 7,
        minor: 3,
    };
    facts.quotas.insert("/dev/loop3".into(), of_loop);
    let (nodes, rules) = devices::all(&config(""), &facts).unwrap();
    assert_eq!(nodes[0]["path"], "/dev/loop3");
    let named = json!({ "allow": true, "type": "b", "major": 7, "minor": 3, "access": "m" });
    assert_eq!(rules[1..], [named], "it is not opened");
    assert!(
        mount(&bundle, "/sys")["options"]
            .to_string()
            .contains("\"rw\"")
    );
    let denied = |bundle: &Value| bundle["linux"]["seccomp"].to_string().contains("keyctl");
    assert!(!denied(&bundle) && denied(&built("unprivileged: 1\n")));
    assert!(!denied(&built("unprivileged: 0\n")), "PVE's rule");
    assert!(
        built("")["linux"]["seccomp"]
            .to_string()
            .contains("open_by_handle_at")
    );
    let asks = |bundle: &Value| bundle["linux"]["seccomp"]["listenerPath"].is_string();
    let helped = built("unprivileged: 1\nfeatures: mknod=1\n");
    assert!(asks(&helped) && helped["annotations"]["dev.atoll.mknod"] == "1");
    assert!(!asks(&built("unprivileged: 0\nfeatures: mknod=1\n")) && !asks(&bundle));
    let root = |text: &str| volumes(&config(text)).unwrap()[0].options.clone();
    let text = "unprivileged: 1\nfeatures: mknod=1\nrootfs: local:1,mountoptions=nodev\n";
    assert_eq!(root(text), ["dev", "nodev"], "mount(8) takes the last");
    let missing = made("dev3: /dev/none\n").unwrap_err().to_string();
    assert_eq!(missing, "dev3: /dev/none is no device of this host");
}

#[test]
fn a_program_of_its_own() {
    let bundle = built("entrypoint: /usr/bin/app --name 'two words'\nenv: A=1\0B=two words\n");
    assert_eq!(
        bundle["process"]["args"],
        json!(["/usr/bin/app", "--name", "two words"])
    );
    let env = bundle["process"]["env"].as_array().unwrap();
    assert_eq!(env[env.len() - 2..], [json!("A=1"), json!("B=two words")]);
    let terminals = &bundle["annotations"]["dev.atoll.terminals"];
    assert!(terminals.is_null(), "nobody opens a terminal");
    assert_eq!(built("")["process"]["args"], json!(["/sbin/init"]));
}

#[test]
fn lxcfs_lies_over_proc() {
    let bundle = |text: &str, views: &[&str]| {
        let mut facts = facts();
        let at = Path::new("/var/lib/lxcfs");
        facts.views = views.iter().map(|name| at.join(name)).collect();
        let id = "101".parse().unwrap();
        super::bundle(id, &config(text), Path::new("/run/ct-101"), &facts).unwrap()
    };
    let with = bundle("", &["proc/meminfo", "proc/stat"]).config;
    let meminfo = json!({
        "destination": "/proc/meminfo", "type": "bind", "source": "/var/lib/lxcfs/proc/meminfo",
        "options": ["bind", "nosuid", "noexec", "nodev"],
    });
    assert_eq!(mount(&with, "/proc/meminfo"), meminfo);
    assert_eq!(mount(&with, "/proc/uptime"), Value::Null);
    assert_eq!(mount(&with, "/dev/.lxc/proc"), Value::Null);
    let nesting = bundle("features: nesting=1\n", &["proc/meminfo"]).config;
    assert_eq!(mount(&nesting, "/dev/.lxc/proc")["type"], "proc");
    assert_eq!(mount(&nesting, "/dev/.lxc/sys")["type"], "sysfs");
    let without = bundle("features: nesting=1\n", &[]).config;
    assert_eq!(mount(&without, "/dev/.lxc/proc"), Value::Null);
}

#[test]
fn terminals_as_init_finds_them() {
    let bundle = built("console: 0\ntty: 3\n");
    assert_eq!(bundle["process"]["terminal"], false);
    assert_eq!(bundle["annotations"]["dev.atoll.terminals"], "3");
    let env = bundle["process"]["env"].to_string();
    assert!(
        env.contains("\"container_ttys=pts/0 pts/1 pts/2\""),
        "{env}"
    );
    let own = built("env: container_ttys=pts/7\n")["process"]["env"].to_string();
    assert!(own.contains("pts/7") && !own.contains("pts/1"), "{own}");
}

#[test]
fn cards_have_two_ends() {
    let config = config(
        "net0: name=eth0,bridge=vmbr0,hwaddr=BC:24:11:00:00:01,ip=10.0.0.2/24,gw=10.0.0.1\n\
         net1: name=lan,bridge=vmbr1,hwaddr=BC:24:11:00:00:02,ip=dhcp,tag=5,trunks=7;8,rate=1.5\n",
    );
    let cards = cards(&config).unwrap();
    assert_eq!(cards[0].attachment.bridge.as_deref(), Some("vmbr0"));
    assert!(cards[0].attachment.vlans.is_default() && cards[0].attachment.rate.is_none());
    let tagged = &cards[1].attachment;
    assert_eq!((tagged.card.as_str(), tagged.vlans.tag), ("net1", Some(5)));
    assert_eq!(tagged.vlans.trunks, [7..=8]);
    assert_eq!(tagged.rate, Some(3 << 19));
    assert_eq!(cards[0].inside.addresses, ["10.0.0.2/24"]);
    assert_eq!(cards[0].inside.gateways, ["10.0.0.1"]);
    assert_eq!(
        (
            cards[1].inside.name.as_str(),
            cards[1].inside.addresses.len()
        ),
        ("lan", 0)
    );
    let identity = identity("101".parse().unwrap(), &config, Some("10.0.0.1")).unwrap();
    assert_eq!(identity.nameservers, ["10.0.0.1"]);
    assert_eq!(identity.cards[1].ipv4, Addressing::Dhcp);
}
