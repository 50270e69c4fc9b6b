// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Tests of guest configs: files of PVE, round trips, updates of stopped and running guests.

use super::*;
use proptest::prelude::*;

const VM: &str = "\
#Line one%3A with a colon
#%C3%A4
boot: order=scsi0
cores: 2
memory: 2048
name: web
net0: virtio=BC:24:11:00:00:01,bridge=vmbr0,firewall=1
scsi0: local:100/vm-100-disk-0.raw,size=8G

[PENDING]
delete: net1
cores: 4

[before]
#snap notes
cores: 1
snaptime: 1700000000

[special:cloudinit]
name: web
";

const CONTAINER: &str = "\
hostname: c1
memory: 512
rootfs: local:101/vm-101-disk-0.raw,size=8G
unprivileged: 1
lxc.idmap: u 0 1065536 65536
lxc.idmap: g 0 1065536 65536
what is this

[pve:pending]
net0: name=eth0
";

fn update(set: &[(&str, &str)], delete: &[&str], revert: &[&str]) -> Result<ConfigUpdate, Error> {
    let set = set.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
    let keys = |list: &[&str]| list.iter().map(|k| (*k).to_owned()).collect();
    ConfigUpdate::new(
        GuestKind::Vm,
        set.collect(),
        keys(delete),
        keys(revert),
        None,
    )
}

#[test]
fn files_survive_reading_and_writing() {
    let vm = GuestConfig::parse(GuestKind::Vm, VM);
    assert_eq!(vm.print(), VM);
    assert_eq!(vm.get("description"), Some("Line one: with a colon\nä\n"));
    assert_eq!(vm.pending.delete, BTreeSet::from(["net1".to_owned()]));
    assert_eq!(vm.sections["before"].values["snaptime"], "1700000000");
    let container = GuestConfig::parse(GuestKind::Container, CONTAINER);
    assert_eq!(container.print(), CONTAINER);
    assert_eq!(container.current.raw.len(), 2);
    assert_eq!(container.current.unread, ["what is this"]);
}

#[test]
fn a_value_is_never_a_second_line() {
    let mut config = GuestConfig::new(GuestKind::Container);
    let hostile = "/x\nlxc.hook.pre-start: /bin/evil\r\nmemory: 1".to_owned();
    config
        .current
        .raw
        .push(("lxc.init.cwd".to_owned(), hostile.clone()));
    config.set("hostname", hostile);
    let read = GuestConfig::parse(GuestKind::Container, &config.print());
    assert_eq!(
        (read.current.raw.len(), read.current.values.len()),
        (1, 1),
        "{read:?}"
    );
}

#[test]
fn the_digest_is_sha1_of_the_file() {
    let empty = GuestConfig::new(GuestKind::Vm);
    assert_eq!(empty.digest, "da39a3ee5e6b4b0d3255bfef95601890afd80709");
    let config = GuestConfig::parse(GuestKind::Vm, "cores: 1\n");
    config.check_digest(None).unwrap();
    config.check_digest(Some(&config.digest)).unwrap();
    let stale = |config: &GuestConfig| config.check_digest(Some("0")).unwrap_err().to_string();
    assert_eq!(
        stale(&config),
        "checksum mismatch (file change by other user?)"
    );
    assert_eq!(
        stale(&GuestConfig::new(GuestKind::Container)),
        "detected modified configuration - file changed by other user? Try again."
    );
}

#[test]
fn values_with_defaults_and_families() {
    let config = GuestConfig::parse(GuestKind::Vm, "net10: virtio\nnet2: virtio\nonboot: 1\n");
    assert_eq!(config.number::<u32>("cores"), Some(1));
    assert!(config.is_set("onboot") && !config.is_set("protection"));
    let names: Vec<&str> = config
        .family("net[n]")
        .into_iter()
        .map(|(key, _)| key)
        .collect();
    assert_eq!(names, ["net2", "net10"]);
    let broken = GuestConfig::parse(GuestKind::Vm, "net0: bogus=1\n");
    assert!(broken.properties("net0").is_err());
}

#[test]
fn a_stopped_guest_changes_at_once() {
    let mut config = GuestConfig::parse(GuestKind::Vm, VM);
    let wish = update(&[("cores", "8"), ("onboot", "yes")], &["name"], &[]).unwrap();
    let applied = config.apply(&wish, Reach::Everything).unwrap();
    assert_eq!(applied.pending, [""; 0]);
    assert_eq!(applied.now.len(), 3);
    assert_eq!(
        (config.get("cores"), config.get("onboot")),
        (Some("8"), Some("1"))
    );
    assert_eq!(config.get("name"), None);
    assert!(!config.pending.values.contains_key("cores"));
}

#[test]
fn a_running_guest_gets_some_later() {
    let mut config = GuestConfig::parse(GuestKind::Vm, "cores: 2\nname: a\nnet0: virtio\n");
    let wish = update(&[("cores", "4"), ("name", "b")], &["net0"], &[]).unwrap();
    let applied = config.apply(&wish, Reach::FIXED).unwrap();
    assert_eq!(applied.pending, ["net0", "cores"]);
    assert_eq!(config.get("name"), Some("b"));
    assert_eq!(
        config.print(),
        "cores: 2\nname: b\nnet0: virtio\n\n[PENDING]\ndelete: net0\ncores: 4\n"
    );
    let rows = config.pending_rows();
    assert_eq!(rows[0].pending.as_deref(), Some("4"));
    assert!(rows[2].delete);
    let mut reverted = config.clone();
    reverted
        .apply(&update(&[], &[], &["cores", "net0"]).unwrap(), Reach::FIXED)
        .unwrap();
    assert!(reverted.pending.is_empty());
    let mut same = config.clone();
    same.apply(&update(&[("cores", "2")], &[], &[]).unwrap(), Reach::FIXED)
        .unwrap();
    assert!(!same.pending.values.contains_key("cores"));
    config.apply_pending();
    assert_eq!(config.print(), "cores: 4\nname: b\n");
}

#[test]
fn wishes_that_contradict_themselves() {
    let text = |result: Result<ConfigUpdate, Error>| match result.unwrap_err() {
        Error::Invalid(errors) => format!("{}: {}", errors[0].0, errors[0].1),
        other => other.to_string(),
    };
    assert!(text(update(&[("cores", "1")], &["cores"], &[])).starts_with("delete: you can't use"));
    assert!(text(update(&[("cores", "1")], &[], &["cores"])).starts_with("revert: you can't use"));
    assert_eq!(
        text(update(&[], &["bogus"], &[])),
        "delete: unknown option 'bogus'"
    );
    assert!(
        text(update(&[("bogus", "1")], &[], &[])).starts_with("bogus: property is not defined")
    );
}

#[test]
fn notes_end_with_a_line_feed_and_stay_one_value_when_pending() {
    let mut config = GuestConfig::new(GuestKind::Vm);
    let wish = update(&[("description", "a\nb: 100%")], &[], &[]).unwrap();
    config.apply(&wish, Reach::FIXED).unwrap();
    assert_eq!(config.print(), "#a\n#b%3A 100%25\n");
    assert_eq!(
        GuestConfig::parse(GuestKind::Vm, &config.print()).current,
        config.current
    );
    config
        .pending
        .values
        .insert("description".into(), "x\ny\n".into());
    assert_eq!(
        GuestConfig::parse(GuestKind::Vm, &config.print()).pending,
        config.pending
    );
}

fn value() -> impl Strategy<Value = String> {
    "[!-~]([ -~ä]{0,20}[!-~])?"
}

fn section() -> impl Strategy<Value = Section> {
    let keys = proptest::collection::btree_map("[a-z][a-z_-]{0,8}[0-9]{0,2}", value(), 0..6);
    let notes = proptest::option::of("\\PC{0,10}(\n\\PC{0,10}){0,2}");
    let raw = proptest::collection::vec(("lxc\\.[a-z.]{1,8}", "[!-~]{1,10}"), 0..3);
    (keys, notes, raw).prop_map(|(mut values, notes, raw)| {
        values.remove("description");
        if let Some(notes) = notes {
            values.insert("description".to_owned(), notes + "\n");
        }
        let unread = Vec::new();
        Section {
            values,
            raw,
            unread,
        }
    })
}

proptest! {
    #[test]
    fn any_config_survives(
        current in section(),
        pending in proptest::collection::btree_map("[a-c]{2,4}", value(), 0..3),
        delete in proptest::collection::btree_set("[d-f]{2,4}", 0..3),
        snapshots in proptest::collection::btree_map("s[a-z]{1,5}", section(), 0..3),
    ) {
        let mut config = GuestConfig::new(GuestKind::Container);
        config.current = current;
        config.pending = Pending { values: pending, delete };
        config.sections = snapshots;
        let text = config.print();
        let mut again = GuestConfig::parse(GuestKind::Container, &text);
        prop_assert_eq!(again.print(), text);
        again.digest = config.digest.clone();
        prop_assert_eq!(again, config);
    }

    #[test]
    fn any_text_is_read_without_panic(text in "\\PC*", kind in 0..2usize) {
        let kind = GuestKind::ALL[kind];
        let config = GuestConfig::parse(kind, &text);
        let printed = config.print();
        prop_assert_eq!(GuestConfig::parse(kind, &printed).print(), printed);
    }
}

#[test]
fn devices_come_and_go_as_hotplug_says() {
    let check = |hotplug: &str, expected: &[&str]| {
        let text = format!("{hotplug}net1: virtio\nscsi0: local:100/vm-100-disk-0.raw\n");
        let mut config = GuestConfig::parse(GuestKind::Vm, &text);
        let set = [
            ("scsi1", "local:100/vm-100-disk-1.raw"),
            ("net0", "virtio"),
            ("scsi0", "local:100/vm-100-disk-2.raw"),
        ];
        let wish = update(&set, &["net1"], &[]).unwrap();
        let reach = config.reach();
        let applied = config.apply(&wish, reach).unwrap();
        let now: Vec<_> = applied.now.iter().map(|(key, ..)| key.as_str()).collect();
        assert_eq!(now, expected, "{hotplug}");
        assert!(
            applied.pending.contains(&"scsi0".to_owned()),
            "another disk"
        );
    };
    check("", &["net1", "net0", "scsi1"]);
    check("hotplug: disk\n", &["scsi1"]);
    check("hotplug: 0\n", &[]);
}

#[test]
fn what_did_not_reach_the_guest_waits() {
    let mut config = GuestConfig::parse(GuestKind::Vm, "net1: virtio\n");
    let wish = update(&[("net0", "virtio")], &["net1"], &[]).unwrap();
    let reach = config.reach();
    let mut applied = config.apply(&wish, reach).unwrap();
    for key in ["net0", "net1"] {
        config.postpone(key, &mut applied);
    }
    assert_eq!(
        (config.get("net0"), config.get("net1")),
        (None, Some("virtio"))
    );
    assert!(applied.now.is_empty() && config.pending.delete.contains("net1"));
    assert_eq!(config.pending.values["net0"], "virtio");
}
