// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! `openapi.json` says exactly what the types and the route table say. It is written by hand, since it is
//! documentation; this test is what keeps it true.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::collections::BTreeSet;

use atoll_vmm_protocol::api::*;
use atoll_vmm_protocol::services::VhostUserSocket;
use atoll_vmm_protocol::spec::{BackingSpec, DiskLimits, DiskSpec, NetSpec};
use serde_json::Value;

fn document() -> Value {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/openapi.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn paths_are_the_route_table() {
    let document = document();
    let mut listed = BTreeSet::new();
    for (path, methods) in document["paths"].as_object().unwrap() {
        for (method, operation) in methods.as_object().unwrap() {
            listed.insert((
                path.clone(),
                method.to_uppercase(),
                operation["summary"].as_str().unwrap().to_owned(),
                operation["responses"]["200"]["content"]["application/json"]["schema"]["$ref"]
                    .as_str()
                    .unwrap()
                    .to_owned(),
            ));
        }
    }
    let routes: BTreeSet<_> = ROUTES
        .iter()
        .map(|route| {
            (
                route.path.to_owned(),
                route.method.to_owned(),
                route.summary.to_owned(),
                format!("#/components/schemas/{}", route.answer),
            )
        })
        .collect();
    assert_eq!(listed, routes);
}

#[test]
fn bodies_are_the_parameters() {
    let document = document();
    for route in ROUTES {
        let operation = &document["paths"][route.path][route.method.to_lowercase()];
        let body = &operation["requestBody"]["content"]["application/json"]["schema"]["$ref"];
        let Some(reference) = body.as_str() else {
            assert!(route.parameters.is_empty(), "{}: no body", route.path);
            continue;
        };
        let schema = document.pointer(&reference[1..]).expect(reference);
        let mut described = BTreeSet::new();
        for (name, property) in schema["properties"].as_object().unwrap() {
            let required = schema["required"].as_array().unwrap();
            described.insert((
                name.as_str(),
                property["type"].as_str().unwrap(),
                required.iter().any(|one| one == name),
                property["description"].as_str().unwrap(),
            ));
        }
        let kind = |kind| match kind {
            ParameterKind::Integer => "integer",
            ParameterKind::Text => "string",
            ParameterKind::Switch => "boolean",
            ParameterKind::Texts => "array",
            ParameterKind::Disk | ParameterKind::Net => "object",
        };
        let parameters: BTreeSet<_> = route
            .parameters
            .iter()
            .map(|one| (one.name, kind(one.kind), one.required, one.summary))
            .collect();
        assert_eq!(described, parameters, "{}", route.path);
    }
}

/// Compares an instance, all of whose fields are set, with its schema: same names, matching types.
#[track_caller]
fn check(name: &str, instance: impl serde::Serialize) {
    let document = document();
    compare(
        &document,
        name,
        &document["components"]["schemas"][name],
        &serde_json::to_value(instance).unwrap(),
    );
}

#[track_caller]
fn compare(document: &Value, at: &str, schema: &Value, value: &Value) {
    if let Some(reference) = schema["$ref"].as_str() {
        let pointer = reference.strip_prefix('#').unwrap();
        let target = document.pointer(pointer);
        return compare(document, at, target.expect(reference), value);
    }
    let kinds: Vec<&str> = match &schema["type"] {
        Value::String(kind) => vec![kind],
        Value::Array(kinds) => kinds.iter().map(|kind| kind.as_str().unwrap()).collect(),
        other => panic!("{at}: type {other}"),
    };
    let kind = match value {
        Value::Object(_) => "object",
        Value::Array(_) => "array",
        Value::String(_) => "string",
        Value::Number(_) => "integer",
        Value::Bool(_) => "boolean",
        other => panic!("{at}: {other} in the example; set every field"),
    };
    assert!(kinds.contains(&kind), "{at}: {kind} is not in {kinds:?}");
    match value {
        Value::Object(fields) => {
            let properties = schema["properties"].as_object().unwrap();
            let documented: BTreeSet<_> = properties.keys().collect();
            assert_eq!(documented, fields.keys().collect(), "{at}: fields differ");
            for (field, value) in fields {
                compare(
                    document,
                    &format!("{at}.{field}"),
                    &properties[field],
                    value,
                );
            }
        }
        Value::Array(items) => compare(document, at, &schema["items"], &items[0]),
        Value::String(text) => {
            if let Some(allowed) = schema["enum"].as_array() {
                assert!(allowed.iter().any(|one| one == text), "{at}: {text}");
            }
        }
        _ => {}
    }
}

#[test]
fn schemas_are_the_types() {
    for state in [
        MachineState::Running,
        MachineState::Paused,
        MachineState::Stopped,
    ] {
        check("Acted", Acted { state });
    }
    let balloon = BalloonInfo {
        total_bytes: Some(1),
        free_bytes: Some(1),
        available_bytes: Some(1),
        cache_bytes: Some(1),
        swapped_in_bytes: Some(1),
        swapped_out_bytes: Some(1),
        major_faults: Some(1),
        minor_faults: Some(1),
        ..BalloonInfo::default()
    };
    check("BalloonInfo", balloon.clone());
    let device = DeviceInfo {
        id: "disk1".into(),
        slot: 1,
        target: Some(1),
        removable: true,
        leaving: true,
    };
    check("SetBalloon", SetBalloon { target_mib: 1 });
    check(
        "Info",
        Info {
            name: "n".into(),
            version: "1".into(),
            machine_version: 1,
            pid: 1,
            state: MachineState::Running,
            uptime_ms: 1,
            cpu_count: 1,
            cpu: "host".into(),
            memory_mib: 1,
            reset_count: 0,
            serial_path: Some("/p".into()),
            console_path: Some("/p".into()),
            balloon: Some(balloon.clone()),
            filling: Some(FillingInfo::default()),
            devices: vec![device.clone()],
        },
    );
    check("DeviceInfo", device);
    check(
        "Counters",
        Counters {
            uptime_ms: 1,
            resident_bytes: 1,
            vcpus: vec![VcpuCounters::default()],
            disks: vec![DiskCounters::default()],
            nets: vec![NetCounters::default()],
        },
    );
    check("Refused", Refused { error: "e".into() });
    check(
        "SetLink",
        SetLink {
            id: "net0".into(),
            up: true,
        },
    );
    check("SetNetLimits", SetNetLimits::default());
}

#[test]
fn schemas_of_disks_are_the_types() {
    check(
        "ResizeDisk",
        ResizeDisk {
            id: "disk0".into(),
            size_bytes: 1,
        },
    );
    check(
        "EjectDisk",
        EjectDisk {
            id: "disk0".into(),
            force: true,
        },
    );
    check(
        "InsertDisk",
        InsertDisk {
            id: "disk0".into(),
            path: "/d".into(),
            force: true,
        },
    );
    let mut limits = DiskLimits::default();
    limits.fields().for_each(|(_, value)| *value = Some(1));
    let id = "disk0".into();
    check("SetDiskLimits", SetDiskLimits { id, limits });
}

/// A disk whose every field is set.
fn disk() -> DiskSpec {
    let mut limits = DiskLimits::default();
    limits.fields().for_each(|(_, value)| *value = Some(1));
    DiskSpec {
        id: Some("disk1".into()),
        target: Some(1),
        backing: vec![BackingSpec {
            path: "/b".into(),
            format: Default::default(),
        }],
        serial: Some("s".into()),
        queue_count: Some(1),
        changes: Some("/c".into()),
        limits,
        boot_index: Some(1),
        ..DiskSpec::raw("/d")
    }
}

#[test]
fn schemas_of_devices_that_come_and_go_are_the_types() {
    check("AddDisk", AddDisk { disk: disk() });
    let net = NetSpec {
        id: Some("net1".into()),
        mac: Some("52:54:00:12:34:56".into()),
        mtu: Some(1500),
        queue_pairs: Some(1),
        boot_index: Some(1),
        vhost_user: Some(VhostUserSocket {
            path: "/s".into(),
            reconnect: true,
        }),
        ..NetSpec::tap("tap0")
    };
    check("AddNet", AddNet { net });
    let added = Added {
        id: "disk1".into(),
        slot: 1,
        target: Some(1),
    };
    check("Added", added);
    check(
        "RemoveDevice",
        RemoveDevice {
            id: "disk1".into(),
            force: true,
            timeout_ms: Some(1),
        },
    );
    for stage in [RemovalStage::Asked, RemovalStage::Gone] {
        check("Removal", Removal { stage });
    }
}

#[test]
fn schemas_of_exports_are_the_types() {
    let begin = BeginExport {
        socket: "/s".into(),
        disks: vec!["disk0".into()],
        fleece: "/f".into(),
        max_bytes_per_second: Some(1),
    };
    check("BeginExport", begin);
    let disk = ExportedDisk {
        id: "disk0".into(),
        size_bytes: 1,
        since: Some("c".into()),
        changed_bytes: 1,
        saved_bytes: 1,
        broken: Some("b".into()),
    };
    check("ExportedDisk", disk.clone());
    let exported = Exported {
        socket: "/s".into(),
        disks: vec![disk],
        connection_count: 1,
        held_us: 1,
    };
    check("Exported", exported);
    let checkpoint = Some("c".into());
    check("EndExport", EndExport { checkpoint });
}

#[test]
fn schemas_of_mirrors_are_the_types() {
    let begin = BeginMirror {
        id: "disk0".into(),
        to: disk(),
        bytes_per_second: Some(1),
    };
    check("BeginMirror", begin);
    let (id, downtime_limit_ms) = ("disk0".into(), Some(1));
    let complete = CompleteMirror {
        id,
        downtime_limit_ms,
    };
    check("CompleteMirror", complete);
    check("CancelMirror", CancelMirror { id: "disk0".into() });
    for stage in [
        MirrorStage::Copying,
        MirrorStage::Ready,
        MirrorStage::Switched,
        MirrorStage::Failed,
    ] {
        let mirror = MirrorInfo {
            id: "disk0".into(),
            path: "/p".into(),
            stage,
            size_bytes: 1,
            copied_bytes: 1,
            left_bytes: 1,
            bytes_per_second: 1,
            slowed_to_bytes_per_second: Some(1),
            held_us: 1,
            error: Some("e".into()),
        };
        check("MirrorInfo", mirror.clone());
        let mirrors = vec![mirror];
        check("Mirrors", Mirrors { mirrors });
    }
}

#[test]
fn schemas_of_moved_machines_are_the_types() {
    let migrate = Migrate {
        to: "s".into(),
        connections: Some(1),
        downtime_limit_ms: Some(1),
        relayed: Some(true),
        max_bytes_per_second: Some(1),
        throttle: Some(true),
        when_late: Some(WhenLate::GoOn),
        disks: vec!["disk0".into()],
        tls_ca: Some("a".into()),
        tls_cert: Some("c".into()),
        tls_key: Some("k".into()),
        tls_name: Some("n".into()),
        insecure: Some(true),
        silence_limit_ms: Some(1),
    };
    check("Migrate", migrate);
    let upgrade = Upgrade {
        to: "p".into(),
        pid_file: Some("f".into()),
        cgroup: vec!["d".into()],
        log_file: Some("l".into()),
        sandbox: Some("on".into()),
        seccomp: Some("on".into()),
        uid: Some(1),
        gid: Some(1),
    };
    check("Upgrade", upgrade);
    let disk = DiskMigration {
        id: "disk0".into(),
        size_bytes: 1,
        copied_bytes: 1,
        left_bytes: 1,
        bytes_per_second: 1,
    };
    check("DiskMigration", disk.clone());
    let info = MigrationInfo {
        stage: MigrationStage::InDoubt,
        rounds: 1,
        sent_bytes: 1,
        remaining_bytes: 1,
        elapsed_ms: 1,
        downtime_us: 1,
        throttle_percent: 1,
        disks: vec![disk],
        error: Some("e".into()),
    };
    check("MigrationInfo", info);
}

#[test]
fn schemas_of_saved_machines_are_the_types() {
    let snapshot = Snapshot {
        to: "d".into(),
        packed: Some(true),
        track: Some(true),
        parent: Some("../before".into()),
        live: Some(true),
        max_bytes_per_second: Some(1),
    };
    check("Snapshot", snapshot);
    let saving = SavingInfo {
        to: "d".into(),
        stage: SavingStage::Saving,
        memory_bytes: 1,
        remaining_bytes: 1,
        fault_count: 1,
        held_us: 1,
        elapsed_ms: 1,
        error: Some("e".into()),
    };
    check("SavingInfo", saving);
    let (memory_bytes, held_us) = (1, 1);
    let taken = SnapshotTaken {
        memory_bytes,
        held_us,
    };
    check("SnapshotTaken", taken);
}
