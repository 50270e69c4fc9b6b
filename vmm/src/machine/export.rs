// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Requests that let a backup read the disks as they are at one moment, while the guest goes on.
//!
//! ```text
//! begin-export   hold ─► each disk: changes taken, frozen ─► release ─► NBD on a socket that came with the request
//! end-export     NBD ends ─► thawed ─► with a checkpoint: changes count from that moment on; without: as if not begun
//! ```
//! All disks of one export show the same moment. How a disk is frozen and its changes are recorded: `atoll_disk`.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use atoll_disk::Frozen;
use atoll_disk::changes::{BlockSet, Changes, CheckpointId};
use atoll_disk::nbd::{self, NbdServer};
use atoll_vmm_protocol::api::{Acted, BeginExport, EndExport, Exported, ExportedDisk};
use uuid::Uuid;

use super::RunError;
use super::disks::{self, Disk};
use super::owner::Machine;
use crate::api::{self, Answer, Asked};
use crate::resources::{CHANGE_BYTES, Record};

/// Name of the metadata context that tells the changed blocks: `qemu:dirty-bitmap:changes`.
const CONTEXT: &str = "changes";

/// An export that is under way. Dropping it ends its clients; the disks stay frozen until they are thawed.
pub(super) struct Export {
    server: NbdServer,
    socket: String,
    disks: Vec<Exporting>,
    held_us: u64,
}

/// One disk of it.
struct Exporting {
    id: String,
    frozen: Arc<Frozen>,
    since: Option<CheckpointId>,
    changed_bytes: u64,
}

/// A disk that is frozen, before there is a server.
struct Begun {
    id: String,
    frozen: Arc<Frozen>,
    since: Option<CheckpointId>,
    blocks: BlockSet,
}

impl Machine {
    /// Freezes the disks that the request names, and serves them.
    pub(super) fn begin_export(&mut self, asked: Asked) -> Result<Answer, RunError> {
        let (body, listener, fleeces) = match self.export_request(asked) {
            Ok(request) => request,
            Err(refused) => return Ok(refused),
        };
        let (begun, held_us) = self.while_held(|machine| machine.freeze(&body.disks, fleeces))?;
        let rate = body.max_bytes_per_second;
        let served = begun.and_then(|begun| serve(listener, begun, body.socket, rate, held_us));
        Ok(match served {
            Ok(export) => {
                let told = export.told();
                tracing::info!(name = self.spec.name, disks = ?body.disks, held_us, ?rate, "export begins");
                self.export = Some(export);
                api::json(200, &told)
            }
            Err(refused) => {
                self.thaw(&body.disks, None);
                refused
            }
        })
    }

    /// The request's body and files, if it can be done at all.
    fn export_request(
        &self,
        mut asked: Asked,
    ) -> Result<(BeginExport, UnixListener, Vec<File>), Answer> {
        self.refuse_while_exporting()?;
        let body: BeginExport = api::body(std::mem::take(&mut asked.body))?;
        if body.disks.is_empty() {
            return Err(api::refusal(400, "an export has at least one disk"));
        }
        if body.max_bytes_per_second == Some(0) {
            let text =
                "max_bytes_per_second is 0, and nothing would be read: leave it out for no limit";
            return Err(api::refusal(400, text));
        }
        for (index, id) in body.disks.iter().enumerate() {
            if body.disks[..index].contains(id) {
                return Err(api::refusal(400, format!("{id} is named twice")));
            }
            disks::find(&self.parts, id).and_then(|disk| match disk.backup() {
                Some(_) => Ok(()),
                None => Err(api::refusal(
                    409,
                    format!("{id} is a drive: only a disk can be exported"),
                )),
            })?;
        }
        let listener = UnixListener::from(OwnedFd::from(asked.file("the listening socket")?));
        let fleece = |id: &String| asked.file(&format!("the fleece of {id}"));
        let fleeces = body.disks.iter().map(fleece).collect::<Result<_, _>>()?;
        Ok((body, listener, fleeces))
    }

    /// What ends with the export's process, or can be but once, has to wait for the export's end.
    pub(super) fn refuse_while_exporting(&self) -> Result<(), Answer> {
        match &self.export {
            None => Ok(()),
            Some(Export { socket, .. }) => {
                let text = format!("an export is under way on {socket}: end-export first");
                Err(api::refusal(409, text))
            }
        }
    }

    /// Of a held machine.
    fn freeze(&mut self, ids: &[String], fleeces: Vec<File>) -> Result<Vec<Begun>, Answer> {
        let mut begun = Vec::new();
        for (id, fleece) in ids.iter().zip(fleeces) {
            let disk = disks::find_mut(&mut self.parts, id)?;
            let backup = disk.backup_mut().expect("looked at before");
            let freezable = backup.freezable.clone();
            // Opens a queue, which may be an io_uring.
            let frozen = atoll_thread::in_starter(move || freezable.freeze(fleece));
            let frozen =
                frozen.map_err(|error| api::refusal(500, format!("freeze {id}: {error}")))?;
            let changes = match &mut backup.record {
                Some(record) => record
                    .recorder
                    .begin()
                    .map_err(|error| api::refusal(409, format!("{id}: {error}")))?,
                None => Changes {
                    since: None,
                    blocks: BlockSet::all(frozen.size_bytes(), CHANGE_BYTES),
                },
            };
            begun.push(Begun {
                id: id.clone(),
                frozen,
                since: changes.since,
                blocks: changes.blocks,
            });
        }
        Ok(begun)
    }

    /// Ends the export that is under way.
    pub(super) fn end_export(&mut self, asked: Asked) -> Result<Acted, Answer> {
        let EndExport { checkpoint } = api::body(asked.body)?;
        let Some(export) = &self.export else {
            return Err(api::refusal(409, "no export is under way"));
        };
        let parse = |text: &String| {
            let parsed = Uuid::parse_str(text).ok().filter(|uuid| !uuid.is_nil());
            parsed
                .ok_or_else(|| api::refusal(400, format!("{text}: a checkpoint's name is a UUID")))
        };
        let checkpoint = checkpoint.as_ref().map(parse).transpose()?;
        let broken = export
            .disks
            .iter()
            .find_map(|disk| Some((&disk.id, disk.frozen.broken()?)));
        if let (Some(_), Some((id, reason))) = (checkpoint, broken) {
            let text = format!(
                "{id} was not readable to the end ({reason}): end-export without a checkpoint"
            );
            return Err(api::refusal(409, text));
        }
        let ids: Vec<_> = export.disks.iter().map(|disk| disk.id.clone()).collect();
        // Its clients first: none may find a thawed disk.
        self.export = None;
        self.thaw(&ids, checkpoint.map(|uuid| CheckpointId(uuid.into_bytes())));
        tracing::info!(name = self.spec.name, ?checkpoint, "export ends");
        Ok(Acted { state: self.state })
    }

    /// How the export is.
    pub(super) fn exported(&self) -> Result<Exported, Answer> {
        match &self.export {
            Some(export) => Ok(export.told()),
            None => Err(api::refusal(404, "no export is under way")),
        }
    }

    /// Ends what [`Machine::freeze`] has begun, as far as it came.
    fn thaw(&mut self, ids: &[String], checkpoint: Option<CheckpointId>) {
        for id in ids {
            let Ok(disk) = disks::find_mut(&mut self.parts, id) else {
                continue;
            };
            let Some(backup) = disk.backup_mut() else {
                continue;
            };
            backup.freezable.thaw();
            if let Some(record) = &mut backup.record {
                // An error says that nothing was begun.
                let _ = match checkpoint {
                    Some(checkpoint) => record.recorder.commit(checkpoint),
                    None => record.recorder.abort(),
                };
            }
        }
    }

    /// Whether a device that is to be removed is being read.
    pub(super) fn is_exported(&self, id: &str) -> bool {
        let export = self.export.as_ref();
        export.is_some_and(|export| export.disks.iter().any(|disk| disk.id == id))
    }

    /// Keeps every disk's changes for the next run. Of a held machine that will not go on; not of one that goes on in
    /// another process, whose record this is no more.
    pub(super) fn close_records(&mut self) {
        self.export = None;
        self.mirrors.clear();
        for disk in std::mem::take(&mut self.parts.disks) {
            self.close_record(disk);
        }
    }

    /// Keeps the changes of a disk whose queues are gone.
    pub(super) fn close_record(&self, mut disk: Disk) {
        let record = disk.backup_mut().and_then(|backup| backup.record.take());
        if let Some(Err(error)) = record.map(Record::close) {
            tracing::warn!(
                name = self.spec.name,
                disk = disk.id(),
                "its changes are not kept, the next backup reads all of it: {error}"
            );
        }
    }
}

fn serve(
    listener: UnixListener,
    begun: Vec<Begun>,
    socket: String,
    bytes_per_second: Option<u64>,
    held_us: u64,
) -> Result<Export, Answer> {
    let disks = begun.iter().map(|disk| Exporting {
        id: disk.id.clone(),
        frozen: disk.frozen.clone(),
        since: disk.since,
        changed_bytes: disk.blocks.total_bytes(),
    });
    let disks = disks.collect();
    let exports = begun.into_iter().map(|disk| nbd::Export {
        name: disk.id,
        content: nbd::Content::Frozen(disk.frozen),
        changed: Some((CONTEXT.to_owned(), disk.blocks)),
    });
    let server = NbdServer::start_at_most(listener, exports.collect(), bytes_per_second);
    let server = server.map_err(|error| api::refusal(500, format!("serve {socket}: {error}")))?;
    Ok(Export {
        server,
        socket,
        disks,
        held_us,
    })
}

impl Export {
    fn told(&self) -> Exported {
        let disks = self.disks.iter().map(|disk| ExportedDisk {
            id: disk.id.clone(),
            size_bytes: disk.frozen.size_bytes(),
            since: disk.since.map(|id| Uuid::from_bytes(id.0).to_string()),
            changed_bytes: disk.changed_bytes,
            saved_bytes: disk.frozen.saved_bytes(),
            broken: disk.frozen.broken().map(str::to_owned),
        });
        Exported {
            socket: self.socket.clone(),
            disks: disks.collect(),
            connection_count: u32::try_from(self.server.connection_count()).unwrap_or(u32::MAX),
            held_us: self.held_us,
        }
    }
}
