// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// A labelled bar of usage: "CPU 12.3 % of 4"; only the total when the use is not known.
import { Group, Progress, Text } from '@mantine/core';

import { percent } from '../lib/format';

interface MeterProps {
  label: string;
  fraction: number | undefined;
  detail: string;
}

export function Meter({ label, fraction, detail }: MeterProps) {
  const value = Math.min(100, Math.max(0, (fraction ?? 0) * 100));
  const color = value > 90 ? 'red' : value > 75 ? 'orange' : 'lagoon';
  return (
    <div>
      <Group justify="space-between" gap="xs" wrap="nowrap" mb={3}>
        <Text size="sm" fw={500}>
          {label}
        </Text>
        <Text size="sm" c="dimmed" className="atoll-numbers" truncate>
          {fraction === undefined ? detail : `${percent(fraction)} of ${detail}`}
        </Text>
      </Group>
      {fraction !== undefined && (
        <Progress.Root size={6}>
          <Progress.Section value={value} color={color} aria-label={`${label}: ${percent(fraction)} of ${detail}`} />
        </Progress.Root>
      )}
    </div>
  );
}
