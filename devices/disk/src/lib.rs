// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Block backends: raw files and their decorators.
