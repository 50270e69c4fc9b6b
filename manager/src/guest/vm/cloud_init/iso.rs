// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A CD image of a few small files in its root directory: ISO 9660 (ECMA-119), one session, no extensions. Pure.
//!
//! ```text
//! sector  0   system area, 16 sectors of zeroes
//!        16   primary volume descriptor
//!        17   end of the descriptors
//!        18   path table, little-endian        19   the same, big-endian
//!        20   root directory
//!        21   files, each from the start of a sector
//! ```
//!
//! Names are written in capitals with `.;1` behind them, which is what readers without extensions undo: Linux shows
//! `USER-DATA.;1` as `user-data`.

/// Unit of everything on the disk, in bytes. ECMA-119 §6.1.2.
const SECTOR: usize = 2048;
const DESCRIPTOR: usize = 16;
const PATH_TABLE_LITTLE: u32 = 18;
const PATH_TABLE_BIG: u32 = 19;
const ROOT: u32 = 20;
const FILES: u32 = 21;
/// Bytes of a path table with the root alone: ECMA-119 §9.4.
const PATH_TABLE_BYTES: u32 = 10;
/// A date with the meaning "not specified": ECMA-119 §8.4.26.1.
const NO_DATE: &[u8; 17] = b"0000000000000000\0";
/// Flag of a directory's record. ECMA-119 §9.1.6.
const IS_DIRECTORY: u8 = 2;

/// The image of a volume with that label. Fails when the names do not fit into one sector.
pub fn image(label: &str, files: &[(&str, &[u8])]) -> Option<Vec<u8>> {
    let mut root = Vec::new();
    root.extend(record(
        b"\0",
        ROOT,
        u32::try_from(SECTOR).ok()?,
        IS_DIRECTORY,
    ));
    root.extend(record(
        b"\x01",
        ROOT,
        u32::try_from(SECTOR).ok()?,
        IS_DIRECTORY,
    ));
    let mut files: Vec<_> = files
        .iter()
        .map(|(name, data)| (format!("{}.;1", name.to_uppercase()), data))
        .collect();
    // Directories are sorted by name. ECMA-119 §9.3.
    files.sort();
    let mut next = FILES;
    let mut contents = Vec::new();
    for (name, data) in &files {
        root.extend(record(
            name.as_bytes(),
            next,
            u32::try_from(data.len()).ok()?,
            0,
        ));
        contents.extend_from_slice(data);
        contents.resize(contents.len().next_multiple_of(SECTOR), 0);
        next = FILES + u32::try_from(contents.len() / SECTOR).ok()?;
    }
    if root.len() > SECTOR {
        return None;
    }
    let mut image = vec![0; DESCRIPTOR * SECTOR];
    let mut sector = |bytes: Vec<u8>| {
        let end = image.len() + SECTOR;
        image.extend(bytes);
        image.resize(end, 0);
    };
    sector(descriptor(label, next));
    sector(b"\xffCD001\x01".to_vec());
    sector(path_table(ROOT.to_le_bytes(), 1_u16.to_le_bytes()));
    sector(path_table(ROOT.to_be_bytes(), 1_u16.to_be_bytes()));
    sector(root);
    image.extend(contents);
    Some(image)
}

/// A number in both byte orders. ECMA-119 §7.3.3.
fn both(number: u32) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&number.to_le_bytes());
    bytes[4..].copy_from_slice(&number.to_be_bytes());
    bytes
}

/// A short number in both byte orders. ECMA-119 §7.2.3.
fn both_short(number: u16) -> [u8; 4] {
    let ([a, b], [c, d]) = (number.to_le_bytes(), number.to_be_bytes());
    [a, b, c, d]
}

/// A text of a fixed length, filled up with blanks.
fn text(text: &str, length: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = text.bytes().take(length).collect();
    bytes.resize(length, b' ');
    bytes
}

/// Primary volume descriptor, ECMA-119 §8.4.
fn descriptor(label: &str, sectors: u32) -> Vec<u8> {
    let mut bytes = b"\x01CD001\x01\0".to_vec();
    bytes.extend(text("", 32)); // system
    bytes.extend(text(label, 32));
    bytes.extend([0; 8]);
    bytes.extend(both(sectors));
    bytes.extend([0; 32]);
    bytes.extend(both_short(1)); // volumes in the set
    bytes.extend(both_short(1)); // number of this one
    bytes.extend(both_short(2048));
    bytes.extend(both(PATH_TABLE_BYTES));
    bytes.extend(PATH_TABLE_LITTLE.to_le_bytes());
    bytes.extend([0; 4]); // no second path table
    bytes.extend(PATH_TABLE_BIG.to_be_bytes());
    bytes.extend([0; 4]);
    bytes.extend(record(b"\0", ROOT, 2048, IS_DIRECTORY));
    bytes.extend(text("", 128)); // set
    bytes.extend(text("", 128)); // publisher
    bytes.extend(text("", 128)); // preparer
    bytes.extend(text("ATOLL", 128)); // application
    bytes.extend(text("", 37 * 3)); // copyright, abstract, bibliography
    for _ in 0..4 {
        bytes.extend(NO_DATE);
    }
    bytes.push(1); // version of this structure
    bytes
}

/// Path table with the root alone, ECMA-119 §9.4.
fn path_table(root: [u8; 4], parent: [u8; 2]) -> Vec<u8> {
    let mut bytes = vec![1, 0];
    bytes.extend(root);
    bytes.extend(parent);
    bytes.extend([0, 0]);
    bytes
}

/// One entry of a directory, ECMA-119 §9.1.
fn record(name: &[u8], extent: u32, length: u32, flags: u8) -> Vec<u8> {
    let mut bytes = vec![0, 0];
    bytes.extend(both(extent));
    bytes.extend(both(length));
    // 1 January 1970: the image says the same whenever it is made.
    bytes.extend([70, 1, 1, 0, 0, 0, 0]);
    bytes.extend([flags, 0, 0]);
    bytes.extend(both_short(1));
    bytes.push(u8::try_from(name.len()).unwrap_or(0));
    bytes.extend(name);
    if !bytes.len().is_multiple_of(2) {
        bytes.push(0);
    }
    bytes[0] = u8::try_from(bytes.len()).unwrap_or(0);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_are_where_they_belong() {
        let image = image(
            "cidata",
            &[("user-data", b"#cloud-config\n"), ("meta-data", b"x")],
        )
        .unwrap();
        assert_eq!(image.len(), 23 * SECTOR);
        let at = |sector: usize| &image[sector * SECTOR..];
        assert_eq!(&at(16)[..6], b"\x01CD001");
        assert_eq!(&at(16)[40..48], b"cidata  ");
        assert_eq!(&at(16)[80..84], 23_u32.to_le_bytes());
        assert_eq!(at(16)[881], 1, "the version of the structure comes last");
        assert_eq!(&at(17)[..6], b"\xffCD001");
        assert_eq!(at(20)[0], 34, "the root's record of itself");
        assert_eq!(&at(20)[68 + 33..68 + 45], b"META-DATA.;1");
        assert_eq!(&at(21)[..1], b"x");
        assert_eq!(&at(22)[..14], b"#cloud-config\n");
    }
}
