// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Sense data: why a command ended in CHECK CONDITION. Codes are those of SPC-4, annex D.

use serde::{Deserialize, Serialize};

/// Sense data without its format: key, additional code and qualifier, by which a driver knows what to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sense {
    /// Sense key, 0 to 15, SPC-4 table 43: the class of what happened.
    pub key: u8,
    /// Additional sense code (ASC), SPC-4 annex D: what happened.
    pub code: u8,
    /// Its qualifier (ASCQ): more of it; 0 where there is no more to say.
    pub qualifier: u8,
}

impl Sense {
    /// Bytes of the fixed format that are used. SPC-4 §4.5.3.
    pub const BYTES: usize = 18;

    /// NO SENSE: nothing to tell, as REQUEST SENSE answers after a command that has succeeded.
    pub const NONE: Self = Self::new(0, 0, 0);
    /// NOT READY: no medium in the drive.
    pub const NO_MEDIUM: Self = Self::new(2, 0x3a, 0);
    /// MEDIUM ERROR: the host could not read, whatever its reason.
    pub const READ_ERROR: Self = Self::new(3, 0x11, 0);
    /// MEDIUM ERROR: the host could not write, whatever its reason.
    pub const WRITE_ERROR: Self = Self::new(3, 0x0c, 0);
    /// A parameter list shorter than the command says.
    pub const PARAMETER_LIST_LENGTH: Self = Self::new(5, 0x1a, 0);
    /// No such command for this kind of unit.
    pub const INVALID_OPCODE: Self = Self::new(5, 0x20, 0);
    /// ILLEGAL REQUEST: blocks beyond the end of the medium.
    pub const OUT_OF_RANGE: Self = Self::new(5, 0x21, 0);
    /// A field of the command that cannot be.
    pub const INVALID_FIELD: Self = Self::new(5, 0x24, 0);
    /// ILLEGAL REQUEST: there is no unit at this number.
    pub const NO_UNIT: Self = Self::new(5, 0x25, 0);
    /// A field of the parameter list that cannot be.
    pub const INVALID_PARAMETER: Self = Self::new(5, 0x26, 0);
    /// The initiator itself has locked the medium in.
    pub const REMOVAL_PREVENTED: Self = Self::new(5, 0x53, 2);
    /// Attention: another medium may be in the drive.
    pub const MEDIUM_CHANGED: Self = Self::new(6, 0x28, 0);
    /// UNIT ATTENTION: the unit was reset, by whomever.
    pub const RESET: Self = Self::new(6, 0x29, 0);
    /// UNIT ATTENTION: the disk has another size, which READ CAPACITY tells.
    pub const CAPACITY_CHANGED: Self = Self::new(6, 0x2a, 9);
    /// DATA PROTECT: the medium cannot be written.
    pub const WRITE_PROTECTED: Self = Self::new(7, 0x27, 0);

    const fn new(key: u8, code: u8, qualifier: u8) -> Self {
        Self {
            key,
            code,
            qualifier,
        }
    }

    /// The bytes that go to the guest: fixed format, response code 0x70 (a current error), SPC-4 §4.5.3.
    pub fn bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[0] = 0x70;
        bytes[2] = self.key;
        bytes[7] = 10; // Bytes that follow.
        bytes[12] = self.code;
        bytes[13] = self.qualifier;
        bytes
    }
}
