// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// Live samples of guests, collected while their page is open and kept while the page is loaded.
import { useEffect, useState } from 'react';

import type { Guest, GuestStatus, SeriesRow } from '../api/types';
import { appendSample } from '../charts/series';

interface Collected {
  samples: SeriesRow[];
  last: { status: GuestStatus; at: number } | null;
}

/** By guest id; bounded by LIVE_SECONDS of samples each and GUESTS_MAX guests. */
const collected = new Map<number, Collected>();
const GUESTS_MAX = 50;

function remember(vmid: number, next: Collected): void {
  collected.delete(vmid);
  collected.set(vmid, next);
  const oldest = collected.keys().next().value;
  if (collected.size > GUESTS_MAX && oldest !== undefined) collected.delete(oldest);
}

/** The guest's samples so far; `updatedAt` is when the status was read, in milliseconds. */
export function useLive(guest: Guest, status: GuestStatus | undefined, updatedAt: number): SeriesRow[] {
  const [samples, setSamples] = useState<SeriesRow[]>(collected.get(guest.vmid)?.samples ?? []);
  useEffect(() => {
    if (!status || updatedAt === 0) return;
    const at = updatedAt / 1000;
    const { samples: old, last } = collected.get(guest.vmid) ?? { samples: [], last: null };
    if (last && at <= last.at) return setSamples(old);
    const next = appendSample(old, last, status, at);
    remember(guest.vmid, { samples: next, last: { status, at } });
    setSamples(next);
  }, [guest.vmid, status, updatedAt]);
  return samples;
}
