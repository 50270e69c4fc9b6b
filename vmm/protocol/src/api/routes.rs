// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The one list of what can be asked, as a table; its types are in `api`.

use super::{Parameter, ParameterKind, Request, Route};

/// Every request of the control API.
pub const ROUTES: &[Route] = &[
    Route {
        request: Request::Info,
        method: "GET",
        path: "/info",
        summary: "What the machine is and what it is doing",
        parameters: &[],
        answer: "Info",
    },
    Route {
        request: Request::Counters,
        method: "GET",
        path: "/counters",
        summary: "What vCPUs, disks and network cards have done since the machine was built",
        parameters: &[],
        answer: "Counters",
    },
    Route {
        request: Request::Pause,
        method: "PUT",
        path: "/pause",
        summary: "Hold the vCPUs and the devices' queues; a paused machine stays paused",
        parameters: &[],
        answer: "Acted",
    },
    Route {
        request: Request::Resume,
        method: "PUT",
        path: "/resume",
        summary: "Let a paused machine go on; a running machine goes on running",
        parameters: &[],
        answer: "Acted",
    },
    Route {
        request: Request::PowerButton,
        method: "PUT",
        path: "/power-button",
        summary: "Press the ACPI power button: the guest decides what to do about it",
        parameters: &[],
        answer: "Acted",
    },
    Route {
        request: Request::Reset,
        method: "PUT",
        path: "/reset",
        summary: "Start the machine again from its first instruction",
        parameters: &[],
        answer: "Acted",
    },
    Route {
        request: Request::Shutdown,
        method: "PUT",
        path: "/shutdown",
        summary: "End the machine and its process now, without asking the guest",
        parameters: &[],
        answer: "Acted",
    },
    Route {
        request: Request::Snapshot,
        method: "PUT",
        path: "/snapshot",
        summary: "Write the machine to a directory; it is held meanwhile (go on: run --restore)",
        parameters: &[Parameter {
            name: "to",
            kind: ParameterKind::Text,
            required: true,
            summary: "The directory, which is made",
        }],
        answer: "SnapshotTaken",
    },
    Route {
        request: Request::Migrate,
        method: "PUT",
        path: "/migrate",
        summary: "Move the running machine to another process, which waits for it (receive)",
        parameters: &[
            Parameter {
                name: "to",
                kind: ParameterKind::Text,
                required: true,
                summary: "Where the other process listens: a Unix socket's path",
            },
            Parameter {
                name: "connections",
                kind: ParameterKind::Integer,
                required: false,
                summary: "Connections for memory, 1 to 15; 1 when absent",
            },
            Parameter {
                name: "downtime_limit_ms",
                kind: ParameterKind::Integer,
                required: false,
                summary: "How long the guest may stand still; 300 when absent",
            },
            Parameter {
                name: "relayed",
                kind: ParameterKind::Switch,
                required: false,
                summary: "Whether the connections are a tunnel's, whose end is not the other process's end",
            },
        ],
        answer: "MigrationInfo",
    },
    Route {
        request: Request::Migration,
        method: "GET",
        path: "/migration",
        summary: "How far the move to another process is, or how it ended",
        parameters: &[],
        answer: "MigrationInfo",
    },
    Route {
        request: Request::CancelMigration,
        method: "PUT",
        path: "/cancel-migration",
        summary: "Stay here; too late once the machine has been handed over",
        parameters: &[],
        answer: "MigrationInfo",
    },
    Route {
        request: Request::SetLink,
        method: "PUT",
        path: "/set-link",
        summary: "Pull a network card's plug, or put it in",
        parameters: &[
            Parameter {
                name: "id",
                kind: ParameterKind::Text,
                required: true,
                summary: "The card, as info names it: net0 is the first of the spec",
            },
            Parameter {
                name: "up",
                kind: ParameterKind::Switch,
                required: true,
                summary: "Whether the plug is in",
            },
        ],
        answer: "Acted",
    },
    Route {
        request: Request::SetNetLimits,
        method: "PUT",
        path: "/set-net-limits",
        summary: "Limit what a network card carries from now on; what is not given is not limited",
        parameters: &[
            Parameter {
                name: "id",
                kind: ParameterKind::Text,
                required: true,
                summary: "The card, as info names it: net0 is the first of the spec",
            },
            Parameter {
                name: "receive_bytes_per_second",
                kind: ParameterKind::Integer,
                required: false,
                summary: "What the guest receives, on average; 0 is no limit",
            },
            Parameter {
                name: "receive_burst_bytes",
                kind: ParameterKind::Integer,
                required: false,
                summary: "What an idle card may receive at once; 0 is a tenth of a second's worth",
            },
            Parameter {
                name: "send_bytes_per_second",
                kind: ParameterKind::Integer,
                required: false,
                summary: "What the guest sends, on average; 0 is no limit",
            },
            Parameter {
                name: "send_burst_bytes",
                kind: ParameterKind::Integer,
                required: false,
                summary: "What an idle card may send at once; 0 is a tenth of a second's worth",
            },
        ],
        answer: "Acted",
    },
    Route {
        request: Request::Announce,
        method: "PUT",
        path: "/announce",
        summary: "Tell the network where the guest's cards are, as after a migration",
        parameters: &[],
        answer: "Acted",
    },
    Route {
        request: Request::SetBalloon,
        method: "PUT",
        path: "/set-balloon",
        summary: "Ask the guest to give back all memory but so much; info tells how far it is",
        parameters: &[Parameter {
            name: "target_mib",
            kind: ParameterKind::Integer,
            required: true,
            summary: "Memory that the guest is to keep, in MiB",
        }],
        answer: "Acted",
    },
    Route {
        request: Request::ResizeDisk,
        method: "PUT",
        path: "/resize-disk",
        summary: "Grow a disk's image, and tell the guest",
        parameters: &[
            DISK_ID,
            Parameter {
                name: "size_bytes",
                kind: ParameterKind::Integer,
                required: true,
                summary: "New size; a disk in use can only grow",
            },
        ],
        answer: "Acted",
    },
    Route {
        request: Request::SetDiskLimits,
        method: "PUT",
        path: "/set-disk-limits",
        summary: "Hold a disk to these rates from now on; what is not given is without limit",
        parameters: &[
            DISK_ID,
            limit(
                "bytes_per_second",
                "Bytes a second, both directions together",
            ),
            limit("bytes_burst", "Bytes that may come at once after idleness"),
            limit(
                "operations_per_second",
                "Requests a second, both directions together",
            ),
            limit(
                "operations_burst",
                "Requests that may come at once after idleness",
            ),
            limit("read_bytes_per_second", "Bytes read a second"),
            limit(
                "read_bytes_burst",
                "Bytes that may be read at once after idleness",
            ),
            limit("read_operations_per_second", "Read requests a second"),
            limit(
                "read_operations_burst",
                "Read requests that may come at once",
            ),
            limit("write_bytes_per_second", "Bytes written a second"),
            limit(
                "write_bytes_burst",
                "Bytes that may be written at once after idleness",
            ),
            limit("write_operations_per_second", "Write requests a second"),
            limit(
                "write_operations_burst",
                "Write requests that may come at once",
            ),
        ],
        answer: "Acted",
    },
    Route {
        request: Request::EjectDisk,
        method: "PUT",
        path: "/eject-disk",
        summary: "Take the disc out of a CD-ROM drive",
        parameters: &[DISK_ID, FORCE],
        answer: "Acted",
    },
    Route {
        request: Request::InsertDisk,
        method: "PUT",
        path: "/insert-disk",
        summary: "Put a disc into a CD-ROM drive, in place of the one that is there",
        parameters: &[
            DISK_ID,
            Parameter {
                name: "path",
                kind: ParameterKind::Text,
                required: true,
                summary: "The disc, a raw image",
            },
            FORCE,
        ],
        answer: "Acted",
    },
    Route {
        request: Request::AddDisk,
        method: "PUT",
        path: "/add-disk",
        summary: "Plug a disk in, on a slot of its own or as a unit of the SCSI host",
        parameters: &[Parameter {
            name: "disk",
            kind: ParameterKind::Disk,
            required: true,
            summary: "The disk, as run --disk takes it",
        }],
        answer: "Added",
    },
    Route {
        request: Request::AddNet,
        method: "PUT",
        path: "/add-net",
        summary: "Plug a network card in",
        parameters: &[Parameter {
            name: "net",
            kind: ParameterKind::Net,
            required: true,
            summary: "The card, as run --net takes it",
        }],
        answer: "Added",
    },
    Route {
        request: Request::RemoveDevice,
        method: "PUT",
        path: "/remove-device",
        summary: "Ask the guest to let a disk or a network card go, and take it away once it has",
        parameters: &[
            Parameter {
                name: "id",
                kind: ParameterKind::Text,
                required: true,
                summary: "The disk or card, as info names it",
            },
            Parameter {
                name: "force",
                kind: ParameterKind::Switch,
                required: false,
                summary: "Take it now, whatever the guest does with it: like pulling a card",
            },
            Parameter {
                name: "timeout_ms",
                kind: ParameterKind::Integer,
                required: false,
                summary: "How long the asker waits for the guest; 30000 when absent",
            },
        ],
        answer: "Removal",
    },
    Route {
        request: Request::BeginExport,
        method: "PUT",
        path: "/begin-export",
        summary: "Let backup programs read disks as they are now, over NBD, while the guest goes on",
        parameters: &[
            Parameter {
                name: "socket",
                kind: ParameterKind::Text,
                required: true,
                summary: "Unix socket that is created for them, for this user only",
            },
            Parameter {
                name: "disks",
                kind: ParameterKind::Texts,
                required: true,
                summary: "The disks, as info names them: all of one moment",
            },
            Parameter {
                name: "fleece",
                kind: ParameterKind::Text,
                required: true,
                summary: "Directory with room for what the guest overwrites meanwhile",
            },
        ],
        answer: "Exported",
    },
    Route {
        request: Request::Export,
        method: "GET",
        path: "/export",
        summary: "What is exported, and how much the guest has overwritten meanwhile",
        parameters: &[],
        answer: "Exported",
    },
    Route {
        request: Request::EndExport,
        method: "PUT",
        path: "/end-export",
        summary: "End the export, its socket and its clients",
        parameters: &[Parameter {
            name: "checkpoint",
            kind: ParameterKind::Text,
            required: false,
            summary: "A UUID, once the copy is complete and safe: the next export tells the changes since this one",
        }],
        answer: "Acted",
    },
    Route {
        request: Request::BeginMirror,
        method: "PUT",
        path: "/begin-mirror",
        summary: "Copy a disk to another place while the guest goes on, and keep the copy up to date",
        parameters: &[
            DISK_ID,
            Parameter {
                name: "to",
                kind: ParameterKind::Disk,
                required: true,
                summary: "Where it is to be: path, format, backing and cache as run --disk takes them; the image exists",
            },
            Parameter {
                name: "bytes_per_second",
                kind: ParameterKind::Integer,
                required: false,
                summary: "Most that is copied in a second; without limit when absent",
            },
        ],
        answer: "MirrorInfo",
    },
    Route {
        request: Request::Mirrors,
        method: "GET",
        path: "/mirrors",
        summary: "How far the copies of disks are, or how they ended",
        parameters: &[],
        answer: "Mirrors",
    },
    Route {
        request: Request::CompleteMirror,
        method: "PUT",
        path: "/complete-mirror",
        summary: "Store the disk at the target from now on, once little is left to copy",
        parameters: &[
            DISK_ID,
            Parameter {
                name: "downtime_limit_ms",
                kind: ParameterKind::Integer,
                required: false,
                summary: "How long the guest may stand still; 1000 when absent",
            },
        ],
        answer: "MirrorInfo",
    },
    Route {
        request: Request::CancelMirror,
        method: "PUT",
        path: "/cancel-mirror",
        summary: "Leave the disk where it is, also after the switch of a machine that has been paused since",
        parameters: &[DISK_ID],
        answer: "Acted",
    },
];

/// Which disk a request is about.
const DISK_ID: Parameter = Parameter {
    name: "id",
    kind: ParameterKind::Text,
    required: true,
    summary: "The disk, as info names it: disk0 is the first of the spec",
};

/// What a guest may forbid.
const FORCE: Parameter = Parameter {
    name: "force",
    kind: ParameterKind::Switch,
    required: false,
    summary: "Also when the guest has locked the tray; else it is asked to open it",
};

const fn limit(name: &'static str, summary: &'static str) -> Parameter {
    Parameter {
        name,
        kind: ParameterKind::Integer,
        required: false,
        summary,
    }
}
