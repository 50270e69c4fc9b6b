// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What a unit tells about itself, in the bytes of SPC-4, SBC-3 and MMC-5.

use super::command::{ModeSense, ReadToc};
use super::target::TargetKind;

/// What is told.
pub(super) struct Unit<'a> {
    pub(super) kind: TargetKind,
    pub(super) serial: &'a str,
    /// A write may be lost until a flush.
    pub(super) write_cache: bool,
    pub(super) medium: Option<Medium>,
}

/// What is in the drive.
#[derive(Debug, Clone, Copy)]
pub(super) struct Medium {
    pub(super) block_bytes: u32,
    pub(super) block_count: u64,
    pub(super) read_only: bool,
    /// Blocks that may be unmapped together: the unit is thinly provisioned.
    pub(super) unmap_blocks: Option<u32>,
    /// Longest range that one command unmaps or zeroes.
    pub(super) range_blocks_max: u32,
}

const VENDOR: &[u8; 8] = b"ATOLL   ";

impl Unit<'_> {
    fn type_byte(&self) -> u8 {
        match self.kind {
            TargetKind::Disk => 0,
            TargetKind::Cdrom => 5,
        }
    }

    /// Standard INQUIRY data. SPC-4 §6.6.2.
    pub(super) fn identity(&self) -> Vec<u8> {
        let mut data = vec![0; 36];
        data[0] = self.type_byte();
        data[2] = 6; // SPC-4.
        data[3] = 0x12; // Hierarchical addressing; this format of data.
        data[4] = 31; // Bytes that follow.
        data[7] = 2; // Commands are queued.
        data[8..16].copy_from_slice(VENDOR);
        let product = match self.kind {
            TargetKind::Disk => b"DISK            ",
            TargetKind::Cdrom => b"CD-ROM          ",
        };
        data[16..32].copy_from_slice(product);
        data[32..36].copy_from_slice(b"1   ");
        if self.kind == TargetKind::Cdrom {
            data[1] = 0x80; // Removable.
        }
        data
    }

    /// A page of vital product data, or nothing if there is no such page.
    pub(super) fn vital(&self, page: u8) -> Option<Vec<u8>> {
        let body = match (page, self.kind) {
            (0x00, TargetKind::Disk) => vec![0x00, 0x80, 0x83, 0xb0, 0xb1, 0xb2],
            (0x00, TargetKind::Cdrom) => vec![0x00, 0x80, 0x83],
            (0x80, _) => self.serial.as_bytes().to_vec(),
            (0x83, _) => self.designation(),
            (0xb0, TargetKind::Disk) => self.block_limits(),
            (0xb1, TargetKind::Disk) => {
                let mut body = vec![0; 60];
                body[1] = 1; // Does not rotate.
                body
            }
            (0xb2, TargetKind::Disk) => self.provisioning(),
            _ => return None,
        };
        let length = u16::try_from(body.len())
            .expect("short pages")
            .to_be_bytes();
        let mut data = vec![self.type_byte(), page, length[0], length[1]];
        data.extend(body);
        Some(data)
    }

    /// One designator: ASCII, by vendor, of the unit. SPC-4 §7.8.6.
    fn designation(&self) -> Vec<u8> {
        let mut name = VENDOR.to_vec();
        name.extend(self.serial.bytes().take(64));
        let length = u8::try_from(name.len()).expect("at most 72");
        let mut body = vec![2, 1, 0, length];
        body.extend(name);
        body
    }

    /// SBC-3 §6.5.3, without the page's header.
    fn block_limits(&self) -> Vec<u8> {
        let mut body = vec![0; 60];
        let Some(medium) = self.medium else {
            return body;
        };
        // Longest transfer that is worth a command: 4 MiB.
        body[4..8].copy_from_slice(&((4 << 20) / medium.block_bytes).to_be_bytes());
        if let Some(unmap_blocks) = medium.unmap_blocks {
            body[16..20].copy_from_slice(&medium.range_blocks_max.to_be_bytes());
            body[20..24].copy_from_slice(&1_u32.to_be_bytes()); // Descriptors in one list.
            body[24..28].copy_from_slice(&unmap_blocks.to_be_bytes());
        }
        body[32..40].copy_from_slice(&u64::from(medium.range_blocks_max).to_be_bytes());
        body
    }

    /// SBC-3 §6.5.4, without the page's header.
    fn provisioning(&self) -> Vec<u8> {
        match self.medium.and_then(|medium| medium.unmap_blocks) {
            // UNMAP, WRITE SAME (16) and (10) free blocks; thin.
            Some(_) => vec![0, 0xe0, 2, 0],
            None => vec![0, 0, 0, 0],
        }
    }

    /// MODE SENSE data, or nothing if there is no such page. SPC-4 §7.5.
    pub(super) fn mode(&self, mode: ModeSense) -> Option<Vec<u8>> {
        let mut pages = Vec::new();
        let wanted = |page| mode.page == page || mode.page == 0x3f;
        let mut page = |number: u8, body: &[u8]| {
            pages.extend([number, u8::try_from(body.len()).expect("short pages")]);
            match mode.changeable {
                true => pages.extend(std::iter::repeat_n(0, body.len())),
                false => pages.extend(body),
            }
        };
        let disk = self.kind == TargetKind::Disk;
        if disk && wanted(0x08) {
            let mut caching = [0; 18];
            caching[0] = u8::from(self.write_cache) << 2;
            page(0x08, &caching);
        }
        if disk && wanted(0x0a) {
            page(0x0a, &[0; 10]);
        }
        if !disk && wanted(0x01) {
            page(0x01, &[0; 10]);
        }
        if !disk && wanted(0x2a) {
            // Reads CD-R and DVD; a tray that locks and ejects. MMC-3 §6.3.11.
            let mut abilities = [0; 18];
            abilities[0] = 0x3b;
            abilities[4] = 0x29;
            page(0x2a, &abilities);
        }
        if pages.is_empty() {
            return None;
        }
        let read_only = self.medium.is_some_and(|medium| medium.read_only);
        // Write protection; writes may ask to be durable at once.
        let parameter = u8::from(disk && read_only) << 7 | u8::from(disk) << 4;
        let total = pages.len();
        let mut data = match mode.long {
            true => {
                let length = u16::try_from(total + 6).expect("short pages").to_be_bytes();
                vec![length[0], length[1], 0, parameter, 0, 0, 0, 0]
            }
            false => {
                let length = u8::try_from(total + 3).expect("short pages");
                vec![length, 0, parameter, 0]
            }
        };
        data.extend(pages);
        Some(data)
    }

    /// One data track and the lead-out, or the one session. MMC-5 §6.26.
    pub(super) fn toc(&self, toc: ReadToc, medium: Medium) -> Option<Vec<u8>> {
        let address = |block: u64| {
            let block = u32::try_from(block).unwrap_or(u32::MAX);
            match toc.msf {
                false => block.to_be_bytes(),
                true => {
                    // 75 frames a second, of which the first two seconds come before block 0.
                    let frames = block.saturating_add(150);
                    let part = |value: u32| u8::try_from(value).unwrap_or(0xff);
                    let (minutes, seconds) = (frames / 75 / 60, frames / 75 % 60);
                    [0, part(minutes), part(seconds), part(frames % 75)]
                }
            }
        };
        let track = |number: u8, block: u64| {
            let mut bytes = vec![0, 0x14, number, 0]; // 0x14: a data track.
            bytes.extend(address(block));
            bytes
        };
        let mut data = vec![0, 0, 1, 1];
        match toc.format {
            0 if toc.first <= 1 => {
                data.extend(track(1, 0));
                data.extend(track(0xaa, medium.block_count));
            }
            0 if toc.first == 0xaa => data.extend(track(0xaa, medium.block_count)),
            1 => data.extend(track(1, 0)),
            _ => return None,
        }
        let length = u16::try_from(data.len() - 2).expect("two tracks");
        data[..2].copy_from_slice(&length.to_be_bytes());
        Some(data)
    }

    /// Profiles: CD-ROM and DVD-ROM. MMC-5 §6.5.
    pub(super) fn configuration(&self) -> Vec<u8> {
        // What does not fit on a CD is a DVD.
        let current: u16 = match self.medium {
            None => 0,
            Some(medium) if medium.block_count <= 400_000 => 0x08,
            Some(_) => 0x10,
        };
        let mut data = vec![0; 8];
        data[6..8].copy_from_slice(&current.to_be_bytes());
        data.extend([0, 0, 3, 8]); // The list of profiles: persistent, current.
        for profile in [0x10_u16, 0x08] {
            data.extend(profile.to_be_bytes());
            data.extend([u8::from(profile == current), 0]);
        }
        let length = u32::try_from(data.len() - 4).expect("short");
        data[..4].copy_from_slice(&length.to_be_bytes());
        data
    }

    /// SBC-3 §5.16.
    pub(super) fn capacity16(&self, medium: Medium) -> Vec<u8> {
        let mut data = vec![0; 32];
        data[..8].copy_from_slice(&(medium.block_count - 1).to_be_bytes());
        data[8..12].copy_from_slice(&medium.block_bytes.to_be_bytes());
        data[14] = u8::from(medium.unmap_blocks.is_some()) << 7;
        data
    }

    /// SBC-3 §5.15; what does not fit is told by the long form.
    pub(super) fn capacity10(&self, medium: Medium) -> Vec<u8> {
        let last = u32::try_from(medium.block_count - 1).unwrap_or(u32::MAX);
        let mut data = last.to_be_bytes().to_vec();
        data.extend(medium.block_bytes.to_be_bytes());
        data
    }
}

/// Media events of GET EVENT STATUS. MMC-5 §6.6.
pub(super) const EJECT_REQUEST: u8 = 1;
pub(super) const NEW_MEDIUM: u8 = 2;
pub(super) const MEDIUM_REMOVED: u8 = 3;

/// MMC-5 §6.6: the media class, if it was asked for.
pub(super) fn event_status(classes: u8, event: u8, has_medium: bool, tray_open: bool) -> Vec<u8> {
    const MEDIA: u8 = 1 << 4;
    if classes & MEDIA == 0 {
        return vec![0, 2, 0x80, MEDIA];
    }
    let status = u8::from(has_medium) << 1 | u8::from(tray_open);
    vec![0, 6, 4, MEDIA, event, status, 0, 0]
}
