// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// The ring of an atoll around its lagoon.
export function Logo({ size }: { size: number }) {
  return <img src="/icon.svg" width={size} height={size} alt="" style={{ display: 'block' }} />;
}
