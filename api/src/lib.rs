// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The outermost layer: atolld, the REST API, the web page and the atoll command.
