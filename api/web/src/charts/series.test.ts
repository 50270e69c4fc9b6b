// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
import { expect, it } from 'vitest';

import type { GuestStatus } from '../api/types';
import { appendSample, joinLive, legendValue, LIVE_SECONDS } from './series';

const status = (netin: number): GuestStatus => ({ vmid: 100, status: 'running', cpu: 0.5, netin });

it('makes a rate of a counter, and none of a counter that went back', () => {
  const [first] = appendSample([], null, status(1000), 10);
  expect(first?.['netin']).toBeUndefined();
  const [, second] = appendSample([first!], { status: status(1000), at: 10 }, status(5000), 12);
  expect(second).toMatchObject({ time: 12, cpu: 0.5, netin: 2000 });
  const restarted = appendSample([], { status: status(5000), at: 12 }, status(10), 14);
  expect(restarted[0]?.['netin']).toBeUndefined();
});

it('forgets samples older than the window', () => {
  const old = [{ time: 1 }, { time: LIVE_SECONDS }];
  expect(appendSample(old, null, status(0), LIVE_SECONDS + 2).map((row) => row.time)).toEqual([LIVE_SECONDS, LIVE_SECONDS + 2]);
});

it('puts the recorded minutes before the live samples', () => {
  const recorded = [{ time: 1000 }, { time: 1960 }, { time: 2020 }];
  expect(joinLive(recorded, [{ time: 2001 }], 2003).map((row) => row.time)).toEqual([1960, 2001]);
});

it('says nothing of what was not measured, also while a chart has no data', () => {
  const load = (value: number) => value.toFixed(2);
  expect([0.5, null, undefined].map((value) => legendValue(value, load))).toEqual(['0.50', '–', '–']);
});
