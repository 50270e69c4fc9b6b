// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// What the charts show: rows of numbers over time, from the recorded history or from polling. Pure.
import type { GuestStatus, SeriesRow } from '../api/types';

/** One line of a chart. */
export interface Line {
  label: string;
  /** Value at each time; null where nothing was measured. */
  values: (number | null)[];
}

export interface ChartData {
  /** Unix seconds, ascending. */
  times: number[];
  lines: Line[];
}

/** How long live samples are kept, in seconds. */
export const LIVE_SECONDS = 600;

/** Adds a status to the live samples. Traffic becomes a rate by the difference from the status before. */
export function appendSample(samples: SeriesRow[], before: { status: GuestStatus; at: number } | null, status: GuestStatus, at: number): SeriesRow[] {
  const seconds = before ? at - before.at : 0;
  const rateOf = (key: 'netin' | 'netout' | 'diskread' | 'diskwrite'): number | undefined => {
    const now = status[key];
    const then = before?.status[key];
    // A counter that went back belongs to a guest that was started anew.
    return now === undefined || then === undefined || seconds <= 0 || now < then ? undefined : (now - then) / seconds;
  };
  const row = {
    time: at,
    cpu: status.cpu,
    mem: status.mem,
    maxmem: status.maxmem,
    netin: rateOf('netin'),
    netout: rateOf('netout'),
    diskread: rateOf('diskread'),
    diskwrite: rateOf('diskwrite'),
  } as SeriesRow;
  return [...samples.filter((old) => old.time > at - LIVE_SECONDS), row];
}

/** Recorded rows first, then the live ones; only what belongs to the live window. */
export function joinLive(recorded: SeriesRow[], live: SeriesRow[], now: number): SeriesRow[] {
  const firstLive = live[0]?.time ?? Infinity;
  const old = recorded.filter((row) => row.time > now - LIVE_SECONDS && row.time < firstLive);
  return [...old, ...live];
}

/** Lines from rows: for each line its label and the row's key. */
export function chartData(rows: SeriesRow[], keys: [label: string, key: string][]): ChartData {
  return {
    times: rows.map((row) => row.time),
    lines: keys.map(([label, key]) => ({ label, values: rows.map((row) => finite(row[key])) })),
  };
}

function finite(value: number | undefined): number | null {
  return typeof value === 'number' && Number.isFinite(value) ? value : null;
}

/** What the legend says of a value: uPlot gives null where a line was not measured, and undefined while there is no time. */
export function legendValue(value: number | null | undefined, format: (value: number) => string): string {
  return value === null || value === undefined ? '–' : format(value);
}
