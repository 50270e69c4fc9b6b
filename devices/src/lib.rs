// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The hardware a guest sees: PCI, virtio, serial; knows no KVM.
