// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Bytes in guest memory before the first instruction: ACPI, boot parameters, PVH.
