// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The built-in roles: PVE's names and what they allow.

use super::privilege::{Privilege, PrivilegeSet};

use Privilege::{
    DatastoreAllocate, DatastoreAllocateSpace, DatastoreAllocateTemplate, DatastoreAudit,
    GroupAllocate, MappingAudit, MappingModify, MappingUse, PermissionsModify, PoolAllocate,
    PoolAudit, RealmAllocate, RealmAllocateUser, SdnAllocate, SdnAudit, SdnUse, SysAccessNetwork,
    SysAudit, SysConsole, SysIncoming, SysModify, SysPowerMgmt, SysSyslog, UserModify, VmAllocate,
    VmAudit, VmBackup, VmClone, VmConfigCdrom, VmConfigCloudinit, VmConfigCpu, VmConfigDisk,
    VmConfigHwType, VmConfigMemory, VmConfigNetwork, VmConfigOptions, VmConsole, VmGuestAgentAudit,
    VmGuestAgentFileRead, VmGuestAgentFileSystemMgmt, VmGuestAgentFileWrite,
    VmGuestAgentUnrestricted, VmMigrate, VmPowerMgmt, VmReplicate, VmSnapshot, VmSnapshotRollback,
};

/// The role that takes everything away, and wins over other roles of the same rule level.
pub(super) const NO_ACCESS: &str = "NoAccess";

/// What only administrators of the whole may do.
const ROOT: PrivilegeSet = PrivilegeSet::of(&[
    MappingModify,
    PermissionsModify,
    RealmAllocate,
    SysAccessNetwork,
    SysIncoming,
    SysModify,
    SysPowerMgmt,
]);

const AUDIT: PrivilegeSet = PrivilegeSet::of(&[
    DatastoreAudit,
    MappingAudit,
    PoolAudit,
    SdnAudit,
    SysAudit,
    VmAudit,
    VmGuestAgentAudit,
]);

const VM_USER: PrivilegeSet = PrivilegeSet::of(&[
    VmAudit,
    VmBackup,
    VmConfigCdrom,
    VmConfigCloudinit,
    VmConsole,
    VmGuestAgentAudit,
    VmPowerMgmt,
]);

const VM_ADMIN: PrivilegeSet = VM_USER.union(PrivilegeSet::of(&[
    VmAllocate,
    VmClone,
    VmConfigCpu,
    VmConfigDisk,
    VmConfigHwType,
    VmConfigMemory,
    VmConfigNetwork,
    VmConfigOptions,
    VmGuestAgentFileRead,
    VmGuestAgentFileSystemMgmt,
    VmGuestAgentFileWrite,
    VmGuestAgentUnrestricted,
    VmMigrate,
    VmReplicate,
    VmSnapshot,
    VmSnapshotRollback,
]));

/// The built-in roles, by name.
pub const BUILT_IN: &[(&str, PrivilegeSet)] = &[
    ("Administrator", PrivilegeSet::FULL),
    (NO_ACCESS, PrivilegeSet::EMPTY),
    ("PVEAdmin", PrivilegeSet::FULL.without(ROOT)),
    ("PVEAuditor", AUDIT),
    (
        "PVEDatastoreAdmin",
        PrivilegeSet::of(&[
            DatastoreAllocate,
            DatastoreAllocateSpace,
            DatastoreAllocateTemplate,
            DatastoreAudit,
        ]),
    ),
    (
        "PVEDatastoreUser",
        PrivilegeSet::of(&[DatastoreAllocateSpace, DatastoreAudit]),
    ),
    (
        "PVEMappingAdmin",
        PrivilegeSet::of(&[MappingAudit, MappingModify, MappingUse]),
    ),
    (
        "PVEMappingUser",
        PrivilegeSet::of(&[MappingAudit, MappingUse]),
    ),
    ("PVEPoolAdmin", PrivilegeSet::of(&[PoolAllocate, PoolAudit])),
    ("PVEPoolUser", PrivilegeSet::of(&[PoolAudit])),
    (
        "PVESDNAdmin",
        PrivilegeSet::of(&[SdnAllocate, SdnAudit, SdnUse]),
    ),
    ("PVESDNUser", PrivilegeSet::of(&[SdnAudit, SdnUse])),
    (
        "PVESysAdmin",
        PrivilegeSet::of(&[SysAudit, SysConsole, SysSyslog]),
    ),
    ("PVETemplateUser", PrivilegeSet::of(&[VmAudit, VmClone])),
    (
        "PVEUserAdmin",
        PrivilegeSet::of(&[GroupAllocate, RealmAllocateUser, UserModify]),
    ),
    ("PVEVMAdmin", VM_ADMIN),
    ("PVEVMUser", VM_USER),
];

/// A built-in role's privileges.
pub fn built_in(name: &str) -> Option<PrivilegeSet> {
    let found = BUILT_IN.iter().find(|(role, _)| *role == name);
    found.map(|(_, privileges)| *privileges)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_roles_of_pve() {
        assert_eq!(BUILT_IN.len(), 17);
        assert!(BUILT_IN.is_sorted_by_key(|(name, _)| *name));
        let admin = built_in("PVEAdmin").unwrap();
        assert!(admin.contains(VmAllocate) && !admin.contains(SysModify));
        assert!(built_in(NO_ACCESS).unwrap().is_empty());
    }
}
