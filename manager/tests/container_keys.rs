// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Config keys of containers in real ones: a config file of PVE, devices, directories and limits of the host, hook
//! scripts; mount points and network cards that come and go while the container runs.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test")]

mod world;

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use atoll_manager::error::Error;
use atoll_manager::guest::container::lxcfs;
use atoll_manager::guest::{Action, Applied, ConfigUpdate};
use atoll_manager::id::{GuestId, GuestKind};
use atoll_manager::task::Upid;
use atoll_manager::{Node, Settings};

const USER: &str = "root@pam";
const KIND: GuestKind = GuestKind::Container;

struct Ground {
    node: Node,
    state: tempfile::TempDir,
    id: GuestId,
}

impl Ground {
    /// A node with a template; `None` where containers cannot be run.
    async fn new() -> Option<Self> {
        if !world::has_binary("atoll-ct") {
            return None;
        }
        let state = tempfile::Builder::new().prefix("at").tempdir().unwrap();
        let template = state.path().join("storage/template/cache/busybox.tar.gz");
        if !world::make_template(&template) {
            return None;
        }
        let mut settings = Settings::new("n1", state.path());
        settings.bin_dir = world::bin_dir();
        settings.lxcfs_dir = state.path().join("lxcfs");
        let node = Node::open(settings).await.unwrap();
        let storage = node.settings().storage_dir();
        node.storage().ensure_local(&storage).await.unwrap();
        node.network().ensure().await.unwrap();
        let id = world::guest_number().try_into().unwrap();
        Some(Self { node, state, id })
    }

    async fn done(&self, upid: Result<Upid, Error>) -> (String, String) {
        let upid = upid.unwrap();
        let status = self.node.tasks().wait(&upid).await.unwrap();
        let log = format!("{:?}", self.node.tasks().log(&upid, 0, 0).unwrap());
        println!("{upid}: {log}");
        (status, log)
    }

    async fn create(&self, params: &[(&str, &str)]) -> (String, String) {
        let given = [("ostemplate", "local:vztmpl/busybox.tar.gz")];
        let all = given.iter().chain(params);
        let all = all.map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        let created = self
            .node
            .guests()
            .create(KIND, self.id, all.collect(), USER);
        self.done(created).await
    }

    async fn act(&self, action: Action) -> (String, String) {
        let upid = self.node.guests().act(KIND, self.id, action, USER);
        self.done(upid).await
    }

    async fn update(&self, set: &[(&str, &str)], delete: &[&str]) -> Result<Applied, Error> {
        let set = set.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
        let delete = delete.iter().map(|key| (*key).to_owned()).collect();
        let update = ConfigUpdate::new(KIND, set.collect(), delete, BTreeSet::new(), None)?;
        self.node.guests().update(KIND, self.id, update).await
    }

    /// What a shell in the container says, errors included.
    fn sh(&self, script: &str) -> String {
        let output = Command::new(world::bin_dir().join("atoll-ct"))
            .arg("--root")
            .arg(self.path("run/ct"))
            .args(["exec", &format!("ct-{}", self.id), "sh", "-c", script])
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        text + &String::from_utf8_lossy(&output.stderr)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.state.path().join(name)
    }

    /// What the container's run has left on the host: mounts and links.
    fn left(&self) -> String {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let name = format!("ct-{}", self.id);
        let mounts = mounts.lines().filter(|line| line.contains(&name));
        let links = world::run("ip", &["-o", "link"]);
        let links = links.lines().filter(|line| line.contains("veth"));
        mounts.chain(links).collect::<Vec<_>>().join("\n")
    }
}

/// A hook script that writes down what it is called with.
fn plant_script(ground: &Ground) {
    let script = ground.path("storage/snippets/hook.sh");
    std::fs::create_dir_all(script.parent().unwrap()).unwrap();
    let log = ground.path("hooks");
    let text = format!(
        "#!/bin/sh\necho \"$1 $2\" >> {}\necho told\n",
        log.display()
    );
    std::fs::write(&script, text).unwrap();
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn a_config_of_pve_starts_unchanged() {
    world::isolated("a_config_of_pve_starts_unchanged", async || {
        let Some(ground) = Ground::new().await else {
            return;
        };
        let media = ground.path("media");
        std::fs::create_dir_all(media.join("inner")).unwrap();
        std::fs::write(media.join("file"), "of the host\n").unwrap();
        std::os::unix::fs::chown(&media, Some(1000), Some(1000)).unwrap();
        plant_script(&ground);
        let media = media.display();
        // As PVE writes it; the volume is the other host's.
        let text = format!(
            "#A container%3A as it was\narch: amd64\ncores: 1\ndev0: /dev/net/tun,mode=0666\nfeatures: nesting=1,fuse=1\n\
             hookscript: local:snippets/hook.sh\nhostname: old\nmemory: 64\nmp0: {media},mp=/media,ro=1\n\
             net0: name=eth0,bridge=vmbr0,firewall=1,hwaddr=BC:24:11:00:00:01,ip=10.64.0.10/24,type=veth\n\
             ostype: unmanaged\nrootfs: local-lvm:vm-105-disk-0,size=64M\nswap: 0\nunprivileged: 1\n\
             lxc.idmap: u 0 1200000 1000\nlxc.idmap: g 0 1200000 1000\nlxc.idmap: u 1000 1000 1\n\
             lxc.idmap: g 1000 1000 1\nlxc.idmap: u 1001 1201001 64535\nlxc.idmap: g 1001 1201001 64535\n\
             lxc.mount.entry: {media}/inner mnt/made none bind,create=dir,optional 0 0\n\
             lxc.mount.entry: /none/such mnt/none none bind,create=dir,optional 0 0\n\
             lxc.cgroup2.pids.max: 77\nlxc.environment: COLOR=blue green\nlxc.prlimit.nofile: 100:200\n\
             lxc.sysctl.net.ipv4.ip_forward: 1\nlxc.cap.drop:\nlxc.cap.drop: sys_boot\nlxc.log.level: 1\n"
        );
        let (status, _) = ground
            .create(&[("pve-config", &text), ("hostname", "new")])
            .await;
        assert_eq!(status, "OK");
        let (status, log) = ground.act(Action::Start).await;
        assert_eq!(status, "OK");
        assert!(
            log.contains("lxc.log.level: no effect") && log.contains("/none/such is not there"),
            "{log}"
        );
        assert!(log.contains("told"), "the script's output: {log}");
        inside(&ground);
        let (status, _) = ground.act(Action::Stop).await;
        assert_eq!(status, "OK");
        let hooks = std::fs::read_to_string(ground.path("hooks")).unwrap();
        let moments: Vec<_> = hooks
            .lines()
            .map(|line| line.split_once(' ').unwrap())
            .collect();
        let expected = ["pre-start", "post-start", "pre-stop", "post-stop"];
        assert_eq!(
            moments
                .iter()
                .map(|(_, moment)| *moment)
                .collect::<Vec<_>>(),
            expected
        );
        assert_eq!(moments[0].0, ground.id.to_string());
        assert_eq!(ground.left(), "");
        std::fs::write(
            ground.path("storage/snippets/hook.sh"),
            "#!/bin/sh\nexit 3\n",
        )
        .unwrap();
        let (status, _) = ground.act(Action::Start).await;
        assert!(
            status.contains("host program failed"),
            "a script can refuse a start: {status}"
        );
        assert_eq!(ground.left(), "");
        ground.node.network().teardown().await.unwrap();
    });
}

/// lxcfs, ended with the test.
struct Lxcfs(std::process::Child, PathBuf);

impl Lxcfs {
    /// Mounted in that folder; nothing where it cannot run.
    fn start(folder: &Path) -> Option<Self> {
        if !Path::new("/usr/bin/lxcfs").exists() || !Path::new("/dev/fuse").exists() {
            println!("ATOLL-SKIP: no lxcfs or no FUSE here (apt-get install lxcfs)");
            return None;
        }
        std::fs::create_dir(folder).unwrap();
        let pid_file = folder.with_extension("pid");
        let mut lxcfs = Command::new("/usr/bin/lxcfs");
        lxcfs
            .args(["-f", "--enable-cfs", "-p"])
            .arg(pid_file)
            .arg(folder);
        let lxcfs = Self(lxcfs.spawn().unwrap(), folder.to_owned());
        world::until("lxcfs", || folder.join("proc/meminfo").exists());
        Some(lxcfs)
    }
}

impl Drop for Lxcfs {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
        // As its unit does when it ends; what is bound in containers stays.
        world::run("umount", &[self.1.to_str().unwrap()]);
        std::fs::remove_dir(&self.1).unwrap();
    }
}

#[test]
fn proc_tells_the_containers_own_limits() {
    world::isolated("proc_tells_the_containers_own_limits", async || {
        let Some(ground) = Ground::new().await else {
            return;
        };
        let params = [
            ("rootfs", "local:0.0625"),
            ("memory", "64"),
            ("cores", "1"),
            ("features", "nesting=1"),
        ];
        assert_eq!(ground.create(&params).await.0, "OK");
        let (status, log) = ground.act(Action::Start).await;
        assert!(
            status == "OK" && log.contains("lxcfs is not running"),
            "{log}"
        );
        let total = |ground: &Ground| ground.sh("grep MemTotal /proc/meminfo");
        let host = std::fs::read_to_string("/proc/meminfo").unwrap();
        assert!(host.contains(&total(&ground)), "the host's");
        assert_eq!(ground.act(Action::Stop).await.0, "OK");

        let Some(lxcfs) = Lxcfs::start(&ground.path("lxcfs")) else {
            return;
        };
        let (status, log) = ground.act(Action::Start).await;
        assert!(status == "OK" && !log.contains("lxcfs"), "{log}");
        let words: Vec<String> = total(&ground)
            .split_whitespace()
            .map(str::to_owned)
            .collect();
        assert_eq!(words, ["MemTotal:", "65536", "kB"]);
        assert_eq!(ground.sh("grep -c ^processor /proc/cpuinfo"), "1\n");
        assert_eq!(ground.sh("grep -c '^cpu[0-9]' /proc/stat"), "1\n");
        let uptime = ground.sh("cat /proc/uptime");
        let uptime: f64 = uptime.split(' ').next().unwrap().parse().unwrap();
        assert!(uptime < 3600.0, "its own: {uptime}");
        // The kernel still lets it mount a proc for a container of its own.
        let inner = ground.sh("busybox unshare -Upfr --mount-proc true && echo mounted");
        assert_eq!(inner, "mounted\n");

        // Another daemon takes its place: the first is dead in the container, and the reconciler binds the second's.
        drop(lxcfs);
        assert!(total(&ground).contains("not connected"));
        let seat = ground.node.guests().site().seat(KIND, ground.id);
        lxcfs::mend(&seat).await.unwrap();
        assert!(host.contains(&total(&ground)), "the kernel's meanwhile");
        let lxcfs = Lxcfs::start(&ground.path("lxcfs")).unwrap();
        lxcfs::mend(&seat).await.unwrap();
        assert!(total(&ground).contains(" 65536 kB"), "{}", total(&ground));
        lxcfs::mend(&seat).await.unwrap();
        assert_eq!(ground.sh("grep -c lxcfs /proc/mounts"), "8\n");
        assert_eq!(ground.act(Action::Stop).await.0, "OK");
        drop(lxcfs);
        let (status, log) = ground.act(Action::Start).await;
        assert!(
            status == "OK" && log.contains("lxcfs is not running"),
            "{log}"
        );
        assert!(host.contains(&total(&ground)), "a dead one is passed over");
        assert_eq!(ground.act(Action::Stop).await.0, "OK");
        assert_eq!(ground.left(), "");
        ground.node.network().teardown().await.unwrap();
    });
}

/// What the lines have made of the container.
fn inside(ground: &Ground) {
    assert_eq!(ground.sh("hostname"), "new\n");
    assert_eq!(ground.sh("cat /media/file"), "of the host\n");
    assert!(ground.sh("touch /media/file").contains("Read-only"));
    // A map of its own lets one user of the host through.
    assert_eq!(ground.sh("stat -c %u /media"), "1000\n");
    assert_eq!(ground.sh("ls -d /mnt/*"), "/mnt/made\n");
    assert!(
        ground
            .sh("stat -c '%t:%T %a' /dev/net/tun")
            .starts_with("a:c8 666")
    );
    assert!(
        ground.sh("cat /dev/net/tun").contains("bad state"),
        "open(2) is allowed, read(2) not yet"
    );
    assert!(ground.sh("stat -c %t:%T /dev/fuse").starts_with("a:e5"));
    assert_eq!(ground.sh("cat /proc/sys/net/ipv4/ip_forward"), "1\n");
    assert!(
        ground
            .sh("tr '\\0' '\\n' < /proc/1/environ")
            .contains("COLOR=blue green\n")
    );
    let limits = ground.sh("grep 'open files' /proc/1/limits");
    assert_eq!(limits.split_whitespace().nth(3), Some("100"), "{limits}");
    let bounding = ground.sh("grep CapBnd /proc/1/status");
    let bounding = u64::from_str_radix(bounding.split_whitespace().nth(1).unwrap(), 16).unwrap();
    assert_eq!(bounding & (1 << 22), 0, "sys_boot is dropped");
    assert_ne!(bounding & (1 << 16), 0, "sys_module is not, any more");
    let limit = ["pids/atoll/ct-ID/pids.max", "atoll/ct-ID/pids.max"]
        .iter()
        .find_map(|path| {
            let path = path.replace("ID", &ground.id.to_string());
            std::fs::read_to_string(format!("/sys/fs/cgroup/{path}")).ok()
        });
    assert_eq!(limit.as_deref().map(str::trim), Some("77"));
    assert!(ground.sh("grep Seccomp: /proc/1/status").contains('2'));
}

#[test]
fn mount_points_and_cards_come_and_go() {
    world::isolated("mount_points_and_cards_come_and_go", async || {
        let Some(ground) = Ground::new().await else {
            return;
        };
        let params = [
            ("rootfs", "local:0.0625"),
            ("memory", "64"),
            ("hostname", "box"),
            ("net0", "name=eth0,bridge=vmbr0,ip=10.64.0.10/24"),
        ];
        assert_eq!(ground.create(&params).await.0, "OK");
        assert_eq!(ground.act(Action::Start).await.0, "OK");
        volumes(&ground).await;
        folders(&ground).await;
        cards(&ground).await;
        devices(&ground).await;
        ground
            .update(&[("nameserver", "10.64.0.1")], &[])
            .await
            .unwrap();
        assert_eq!(ground.sh("cat /etc/resolv.conf"), "nameserver 10.64.0.1\n");
        assert_eq!(ground.act(Action::Stop).await.0, "OK");
        assert_eq!(ground.left(), "");
        ground.node.network().teardown().await.unwrap();
    });
}

#[test]
fn an_unprivileged_container_makes_harmless_nodes() {
    world::isolated(
        "an_unprivileged_container_makes_harmless_nodes",
        async || {
            let Some(ground) = Ground::new().await else {
                return;
            };
            let params = [
                ("rootfs", "local:0.0625"),
                ("memory", "64"),
                ("unprivileged", "1"),
                ("features", "mknod=1"),
            ];
            assert_eq!(ground.create(&params).await.0, "OK");
            assert_eq!(ground.act(Action::Start).await.0, "OK");
            let made = "busybox mknod -m 666 /own c 1 5 && busybox head -c 4 /own | busybox wc -c";
            assert_eq!(ground.sh(made), "4\n", "it works");
            let refused = ground.sh("busybox mknod /mem c 1 1");
            assert!(refused.contains("Operation not permitted"), "{refused}");
            assert_eq!(ground.act(Action::Stop).await.0, "OK");
            assert_eq!(ground.left(), "");
            ground.node.network().teardown().await.unwrap();
        },
    );
}

/// The file system is mounted with quotas, and the container can name its device but not open it. Kernels without
/// quotas say so.
#[test]
fn a_privileged_container_has_quotas() {
    world::isolated("a_privileged_container_has_quotas", async || {
        let Some(ground) = Ground::new().await else {
            return;
        };
        let params = [
            ("rootfs", "local:0.0625,quota=1"),
            ("mp0", "local:0.0625,mp=/srv"),
            ("memory", "64"),
            ("unprivileged", "0"),
        ];
        assert_eq!(ground.create(&params).await.0, "OK");
        let (status, _) = ground.act(Action::Start).await;
        if status == "OK" {
            let root = ground.sh("grep ' / ' /proc/mounts");
            assert!(root.contains("usrjquota=aquota.user"), "{root}");
            let device = root.split(' ').next().unwrap();
            assert!(ground.sh(&format!("test -b {device} && echo block")) == "block\n");
            let refused = ground.sh(&format!("cat {device}"));
            assert!(refused.contains("Operation not permitted"), "{refused}");
            let other = ground.sh("grep ' /srv ' /proc/mounts");
            assert!(!other.contains("quota"), "{other}");
            assert_eq!(ground.act(Action::Stop).await.0, "OK");
        } else if status.contains("capset") {
            println!(
                "ATOLL-SKIP: no privileged containers here: this host's root lacks capabilities"
            );
        } else {
            let reason = "rootfs: quota=1: this host's kernel has no quotas (module quota_v2)";
            assert!(status.starts_with(reason), "{status}");
        }
        assert_eq!(ground.left(), "");
        ground.node.network().teardown().await.unwrap();
    });
}

/// A volume that is made, mounted, written to, and taken out again.
async fn volumes(ground: &Ground) {
    let applied = ground
        .update(&[("mp0", "local:0.0625,mp=/srv/data")], &[])
        .await
        .unwrap();
    assert_eq!((applied.now.len(), applied.pending.len()), (1, 0));
    assert_eq!(
        ground.sh("echo kept > /srv/data/file; stat -c %u /srv/data/file"),
        "0\n"
    );
    let applied = ground
        .update(&[("mp0", "local:0.0625,mp=/elsewhere")], &[])
        .await
        .unwrap();
    assert_eq!(applied.pending, ["mp0"], "a change waits");
    let plugged = ground.update(&[("mp8", "local:0.0625,mp=/a,quota=1")], &[]);
    let refused = plugged.await.unwrap_err().to_string();
    assert!(refused.starts_with("mp8: one with quota=1"), "{refused}");
    ground.update(&[], &["mp0"]).await.unwrap();
    assert!(ground.sh("cat /srv/data/file").contains("No such file"));
    assert!(!ground.left().contains("mp0"), "{}", ground.left());
    let config = ground
        .node
        .guests()
        .site()
        .seat(KIND, ground.id)
        .config()
        .unwrap();
    let unused = config.get("unused0").unwrap().to_owned();
    let back = format!("{unused},mp=/back,ro=1");
    ground
        .update(&[("mp3", &back)], &["unused0"])
        .await
        .unwrap();
    assert_eq!(ground.sh("cat /back/file"), "kept\n");
    assert!(ground.sh("rm /back/file").contains("Read-only"));
}

/// A directory of the host; one that is not there leaves everything as it was.
async fn folders(ground: &Ground) {
    let folder = ground.path("shared");
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(folder.join("file"), "shared\n").unwrap();
    let value = format!("{},mp=/shared", folder.display());
    ground.update(&[("mp1", &value)], &[]).await.unwrap();
    assert_eq!(ground.sh("cat /shared/file"), "shared\n");
    let wishes = [
        ("mp4", "local:0.0625,mp=/four"),
        ("mp5", "/none/such,mp=/five"),
    ];
    let refused = ground.update(&wishes, &[]).await.unwrap_err();
    assert!(
        refused.to_string().contains("/none/such is no directory"),
        "{refused}"
    );
    assert!(!ground.left().contains("mp4") && ground.sh("grep /four /proc/mounts").is_empty());
    let local = ground
        .node
        .storage()
        .open(&"local".parse().unwrap())
        .unwrap();
    assert_eq!(
        local.list().await.unwrap().len(),
        4,
        "the volume made for mp4 is gone again"
    );
    ground.update(&[], &["mp1"]).await.unwrap();
    assert_eq!(
        std::fs::read_to_string(folder.join("file")).unwrap(),
        "shared\n"
    );
    // A user of the host stands for root inside.
    let owner = (Some(1000), Some(1001));
    std::os::unix::fs::chown(&folder, owner.0, owner.1).unwrap();
    let mapped = format!("{value},idmap=u:0:1000:1;g:0:1001:1");
    ground.update(&[("mp1", &mapped)], &[]).await.unwrap();
    assert_eq!(
        ground.sh("stat -c %u:%g /shared /shared/file"),
        "0:0\n65534:65534\n"
    );
    assert_eq!(
        ground.sh("echo own > /shared/own; chown 7 /shared/own; stat -c %u:%g /shared/own"),
        "7:0\n"
    );
    let made = std::fs::metadata(folder.join("own")).unwrap();
    let base = 1_000_000 + (u32::from(ground.id) - 100) * 65_536;
    assert_eq!((made.uid(), made.gid()), (base + 7, 1001));
    ground.update(&[], &["mp1"]).await.unwrap();
}

/// A device of the host comes, with its owner and mode, changes, and goes.
async fn devices(ground: &Ground) {
    let opens = || ground.sh("exec 3</dev/net/tun && echo opened") == "opened\n";
    let applied = ground
        .update(&[("dev0", "/dev/net/tun,mode=0600,uid=7")], &[])
        .await
        .unwrap();
    assert_eq!((applied.now.len(), applied.pending.len()), (1, 0));
    let stat = || ground.sh("stat -c %t:%T-%a-%u /dev/net/tun");
    assert_eq!(stat(), "a:c8-600-7\n");
    assert!(opens());
    let value = "/dev/net/tun,mode=0666,deny-write=1";
    ground.update(&[("dev0", value)], &[]).await.unwrap();
    assert_eq!(stat(), "a:c8-666-0\n");
    assert!(
        opens()
            && !ground
                .sh("exec 3<>/dev/net/tun && echo opened")
                .starts_with("opened")
    );
    let refused = ground.update(&[("dev0", "/dev/none")], &[]).await;
    let refused = refused.unwrap_err().to_string();
    assert!(refused.contains("/dev/none is no device"), "{refused}");
    assert!(opens(), "the former has come back");
    ground.update(&[], &["dev0"]).await.unwrap();
    assert!(!opens() && stat().contains("No such file"));
}

/// A second card comes, loses its link, gets another address, and goes.
async fn cards(ground: &Ground) {
    let names = async || {
        let all = ground.node.guests().interfaces(ground.id).await.unwrap();
        let all = all.into_iter().filter(|card| card.name != "lo");
        all.map(|card| (card.name, card.ipv4.join(" ")))
            .collect::<BTreeMap<_, _>>()
    };
    let value = "name=lan,bridge=vmbr0,hwaddr=BC:24:11:00:00:09,ip=10.64.0.20/24";
    let applied = ground.update(&[("net1", value)], &[]).await.unwrap();
    assert!(applied.pending.is_empty());
    assert_eq!(names().await["lan"], "10.64.0.20/24");
    let link = format!("veth{}i1", ground.id);
    assert!(world::run("ip", &["-o", "link", "show", &link]).contains("master vmbr0"));
    tags_and_rates(ground, value, &link).await;
    ground
        .update(&[("net1", &format!("{value},link_down=1"))], &[])
        .await
        .unwrap();
    let state = world::run("ip", &["-o", "link", "show", &link]);
    assert!(!state.contains(",UP"), "{state}");
    assert_eq!(
        names().await["lan"],
        "10.64.0.20/24",
        "the card itself stays"
    );
    ground
        .update(&[("net1", &value.replace(".20/", ".21/"))], &[])
        .await
        .unwrap();
    assert_eq!(names().await["lan"], "10.64.0.21/24");
    // One whose address the host asks for has somewhere to put its name servers.
    ground.sh("rm /etc/resolv.conf");
    let asks = value.replace("10.64.0.20/24", "dhcp,host-managed=1");
    ground.update(&[("net1", &asks)], &[]).await.unwrap();
    assert_eq!(ground.sh("stat -c %u:%a /etc/resolv.conf"), "0:644\n");
    ground.update(&[], &["net1"]).await.unwrap();
    assert_eq!(names().await.len(), 1);
    let wrong = ground
        .update(&[("net2", "name=x,bridge=vmbr99")], &[])
        .await
        .unwrap_err();
    assert!(wrong.to_string().contains("vmbr99"), "{wrong}");
    assert_eq!(names().await.len(), 1);
}

/// What the bridge or this host's kernel cannot do is refused in one line, and the card stays as it was.
async fn tags_and_rates(ground: &Ground, value: &str, link: &str) {
    let refused = async |key: &str, value: &str| {
        let refused = ground.update(&[(key, value)], &[]).await.unwrap_err();
        refused.to_string()
    };
    let text = refused("net1", &format!("{value},tag=5")).await;
    assert!(
        text.starts_with("net1: tag=5: there is no physical interface on bridge 'vmbr0'"),
        "{text}"
    );
    let state = world::run("ip", &["-o", "link", "show", link]);
    assert!(
        state.contains(",UP") && state.contains("master vmbr0"),
        "{state}"
    );
    let text = refused("net2", "name=x,bridge=vmbr0,trunks=5;7-9").await;
    assert!(text.starts_with("net2: trunks needs"), "{text}");
    let links = world::run("ip", &["-o", "link", "show", "type", "veth"]);
    assert!(!links.contains(&link.replace("i1", "i2")), "{links}");

    // Not every kernel can.
    let queues = || world::run("tc", &["qdisc", "show", "dev", link]);
    match ground
        .update(&[("net1", &format!("{value},rate=1.5"))], &[])
        .await
    {
        Ok(_) => {
            let limited = queues();
            assert!(
                limited.contains("tbf") && limited.contains("ingress"),
                "{limited}"
            );
            ground.update(&[("net1", value)], &[]).await.unwrap();
        }
        Err(error) => assert!(
            error.to_string().contains("does this host's kernel have"),
            "{error}"
        ),
    }
    let free = queues();
    assert!(!free.contains("tbf") && !free.contains("ingress"), "{free}");
}
