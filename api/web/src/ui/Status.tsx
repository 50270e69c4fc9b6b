// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// State as an icon with a word: colour is never the only sign.
import { Loader } from '@mantine/core';
import { IconAlertTriangle, IconCheck, IconX } from '@tabler/icons-react';
import clsx from 'clsx';

import type { Resource } from '../api/types';
import { taskOutcome } from '../lib/guest';

type Tone = 'good' | 'idle' | 'bad' | 'busy';

const TONES: Record<string, Tone> = {
  running: 'good',
  online: 'good',
  up: 'good',
  available: 'good',
  stopped: 'idle',
  paused: 'busy',
  suspended: 'busy',
  offline: 'bad',
  unknown: 'bad',
};

export function tone(status: string | undefined): Tone {
  return TONES[status ?? 'unknown'] ?? 'idle';
}

/** A dot: filled for running, hollow for stopped, square for trouble. */
export function StatusDot({ status }: { status: string | undefined }) {
  return <span className={clsx('atoll-dot', `atoll-dot-${tone(status)}`)} title={status ?? 'unknown'} aria-hidden />;
}

export function StatusBadge({ status, lock }: Pick<Resource, 'status' | 'lock'>) {
  return (
    <span className={clsx('atoll-badge', `atoll-badge-${lock ? 'busy' : tone(status)}`)} data-status={status}>
      {status ?? 'unknown'}
      {lock ? ` (${lock})` : ''}
    </span>
  );
}

/** How a task of a list stands, in a word or its error. */
export function TaskOutcome({ status }: { status: string | undefined }) {
  const outcome = taskOutcome(status);
  if (outcome === 'running') return <span className="atoll-outcome"><Loader size={11} aria-hidden /> running</span>;
  if (outcome === 'ok') return <span className="atoll-outcome atoll-good"><IconCheck size={14} aria-hidden /> OK</span>;
  const Icon = outcome === 'warning' ? IconAlertTriangle : IconX;
  return (
    <span className={clsx('atoll-outcome', outcome === 'warning' ? 'atoll-warn' : 'atoll-bad')} title={status}>
      <Icon size={14} aria-hidden /> {status}
    </span>
  );
}
