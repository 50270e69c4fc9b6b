// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The container runtime: OCI command line and a monitor a container.
