// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// A titled box of a summary page.
import { Group, Paper, Title } from '@mantine/core';
import type { ReactNode } from 'react';

interface PanelProps {
  title: string;
  actions?: ReactNode;
  children: ReactNode;
}

export function Panel({ title, actions, children }: PanelProps) {
  return (
    <Paper withBorder component="section" aria-label={title} className="atoll-panel">
      <Group justify="space-between" mb="sm" gap="xs">
        <Title order={2}>{title}</Title>
        {actions}
      </Group>
      {children}
    </Paper>
  );
}

/** Names and values, one pair a line. */
export function Facts({ rows }: { rows: [string, ReactNode][] }) {
  return (
    <dl className="atoll-facts">
      {rows.map(([name, value]) => (
        <div key={name}>
          <dt>{name}</dt>
          <dd>{value ?? '–'}</dd>
        </div>
      ))}
    </dl>
  );
}
