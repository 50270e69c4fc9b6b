// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A chain as a SCSI request, VIRTIO 1.2 §5.6.6.1. Reads the 51 bytes of its header once; touches no data.

use crate::scsi::{CDB_BYTES, Sense};
use crate::virtio::{Chain, GuestBuffers, QueueError};

/// Room for sense data in a response, as configured.
pub(super) const SENSE_BYTES: usize = 96;
/// Bytes of `struct virtio_scsi_req_cmd` that the device reads before data: unit, id, attributes, command.
const HEADER_BYTES: usize = 19 + CDB_BYTES;
/// Bytes that it writes before data.
pub(super) const RESPONSE_BYTES: usize = 12 + SENSE_BYTES;

/// Value of the field `response`, §5.6.6.1.3.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Outcome {
    /// It reached the unit; its status says more.
    Ok = 0,
    /// The guest's buffers are too small for the data.
    Overrun = 1,
    /// No such target.
    BadTarget = 3,
}

/// Address of a unit, §5.6.6.1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Address {
    /// Unit 0 of a target.
    Unit(u8),
    /// Another unit of a target, where none is.
    Other(u8),
    /// Not an address of this controller.
    Nowhere,
}

impl Address {
    pub(super) fn parse(lun: [u8; 8]) -> Self {
        match lun {
            // The well-known unit of REPORT LUNS tells the same as unit 0; no target is in its address.
            [1, target, 0 | 0x40, 0, 0, 0, 0, 0] => Self::Unit(target),
            [1, target, ..] => Self::Other(target),
            _ => Self::Nowhere,
        }
    }

    /// Unit 0 of a target in the eight bytes of the address, by the method for peripheral devices: Linux takes the third
    /// and fourth byte of an event for the unit's number, whatever the method (`virtscsi_handle_transport_reset`).
    pub(super) fn bytes(target: u8) -> [u8; 8] {
        [1, target, 0, 0, 0, 0, 0, 0]
    }
}

/// A parsed request.
#[derive(Clone, Copy)]
pub(super) struct Request<'a> {
    pub(super) address: Address,
    pub(super) cdb: [u8; CDB_BYTES],
    /// Where the response goes.
    pub(super) response: GuestBuffers<'a>,
    /// What the unit reads.
    pub(super) data_out: GuestBuffers<'a>,
    /// What the unit writes.
    pub(super) data_in: GuestBuffers<'a>,
}

impl<'a> Request<'a> {
    /// Parses `chain`. An error means that there is not even a place for an answer.
    pub(super) fn parse(chain: &'a Chain) -> Result<Self, QueueError> {
        let (readable, writable) = (chain.readable(), chain.writable());
        let mut header = [0; HEADER_BYTES];
        if readable.read(&mut header) != HEADER_BYTES {
            return Err(chain.malformed("no SCSI request"));
        }
        let room = RESPONSE_BYTES as u64;
        let (Some(response), Some(data_in)) = (writable.take(room), writable.skip(room)) else {
            return Err(chain.malformed("no room for a SCSI response"));
        };
        let data_out = readable
            .skip(HEADER_BYTES as u64)
            .expect("the header was read from it");
        let (lun, _) = header.split_at(8);
        let (_, cdb) = header.split_at(19);
        Ok(Self {
            address: Address::parse(lun.try_into().expect("8 bytes")),
            cdb: cdb.try_into().expect("the rest is the command"),
            response,
            data_out,
            data_in,
        })
    }
}

/// The response's bytes: sense data, what was not transferred, status.
pub(super) fn response(
    outcome: Outcome,
    sense: Option<Sense>,
    residual: u32,
) -> [u8; RESPONSE_BYTES] {
    /// CHECK CONDITION, SAM-5 §5.3.1.
    const CHECK_CONDITION: u8 = 2;
    let mut bytes = [0; RESPONSE_BYTES];
    bytes[4..8].copy_from_slice(&residual.to_le_bytes());
    bytes[11] = outcome as u8;
    if let Some(sense) = sense {
        let length = u32::try_from(Sense::BYTES).expect("18");
        bytes[..4].copy_from_slice(&length.to_le_bytes());
        bytes[10] = CHECK_CONDITION;
        bytes[12..12 + Sense::BYTES].copy_from_slice(&sense.bytes());
    }
    bytes
}
