// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// The choice of how far back the charts go.
import { SegmentedControl } from '@mantine/core';

import type { Timeframe } from '../api/queries';

const LABELS: Record<Timeframe | 'live', string> = { live: 'Live', hour: 'Hour', day: 'Day', week: 'Week', month: 'Month', year: 'Year' };

interface TimeframeControlProps<T extends Timeframe | 'live'> {
  choices: readonly T[];
  value: T;
  onChange: (value: T) => void;
}

export function TimeframeControl<T extends Timeframe | 'live'>({ choices, value, onChange }: TimeframeControlProps<T>) {
  return (
    <SegmentedControl
      size="xs"
      aria-label="Time span of the charts"
      data={choices.map((choice) => ({ value: choice, label: LABELS[choice] }))}
      value={value}
      onChange={(chosen) => onChange(chosen as T)}
    />
  );
}
