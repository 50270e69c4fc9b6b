// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// What a guest is doing: state, use of CPU, memory and disk, charts, notes.
import { Group, SimpleGrid, Stack, Text } from '@mantine/core';
import { useMemo, useState } from 'react';

import { guestPath, useGuestConfig, useGuestStatus, useHistory } from '../api/queries';
import type { Guest, GuestStatus, SeriesRow } from '../api/types';
import { ErrorNote } from '../app/ErrorPage';
import { ChartPanel } from '../charts/LazyChart';
import { chartData, joinLive } from '../charts/series';
import { TimeframeControl } from '../charts/TimeframeControl';
import { bytes, duration, fraction, percent, rate } from '../lib/format';
import { KIND, healthText, imageFacts } from '../lib/guest';
import { Meter } from '../ui/Meter';
import { Facts, Panel } from '../ui/Panel';
import { StatusBadge } from '../ui/Status';
import { Notes } from './Notes';
import { useLive } from './useLive';

const SPANS = ['live', 'hour', 'day', 'week', 'month', 'year'] as const;
type Span = (typeof SPANS)[number];

const shortBytes = (value: number) => bytes(value, 1);

function Charts({ rows, status, sync }: { rows: SeriesRow[]; status: GuestStatus | undefined; sync: string }) {
  const charts = useMemo(
    () => ({
      cpu: chartData(rows, [['CPU', 'cpu']]),
      memory: chartData(rows, [['Memory', 'mem']]),
      network: chartData(rows, [['In', 'netin'], ['Out', 'netout']]),
      disk: chartData(rows, [['Read', 'diskread'], ['Written', 'diskwrite']]),
    }),
    [rows],
  );
  return (
    <SimpleGrid cols={{ base: 1, lg: 2 }} spacing="sm">
      <ChartPanel title="CPU" data={charts.cpu} format={percent} sync={sync} />
      <ChartPanel title="Memory" data={charts.memory} format={shortBytes} max={status?.maxmem} binary sync={sync} />
      <ChartPanel title="Network" data={charts.network} format={rate} binary sync={sync} />
      <ChartPanel title="Disk" data={charts.disk} format={rate} binary sync={sync} />
    </SimpleGrid>
  );
}

function DiskMeter({ guest, status }: { guest: Guest; status: GuestStatus | undefined }) {
  // What a VM has written into its disk is the guest's knowledge; only containers are measured.
  const used = guest.type === 'lxc' ? fraction(status?.disk, status?.maxdisk) : undefined;
  return <Meter label="Disk" fraction={used} detail={bytes(status?.maxdisk)} />;
}

export function GuestSummary({ guest }: { guest: Guest }) {
  const status = useGuestStatus(guest);
  const config = useGuestConfig(guest);
  const [span, setSpan] = useState<Span>('live');
  const history = useHistory(guestPath(guest), span === 'live' ? 'hour' : span);
  const live = useLive(guest, status.data, status.dataUpdatedAt);
  const rows = useMemo(
    () => (span === 'live' ? joinLive(history.data ?? [], live, status.dataUpdatedAt / 1000) : (history.data ?? [])),
    [span, history.data, live, status.dataUpdatedAt],
  );
  const now = status.data;
  return (
    <Stack gap="sm">
      <ErrorNote error={status.error} title="The state of this guest cannot be read" />
      <SimpleGrid cols={{ base: 1, lg: 2 }} spacing="sm">
        <Panel title="State">
          <Facts
            rows={[
              ['State', <StatusBadge key="s" status={now?.qmpstatus ?? now?.status ?? guest.status} lock={now?.lock ?? guest.lock} />],
              ['Kind', KIND[guest.type]],
              ['Node', guest.node],
              ['Uptime', duration(now?.uptime)],
              ...(now?.health ? ([['Health', healthText(now)]] as [string, string][]) : []),
              ...imageFacts(config.data?.['image']),
              ...(guest.type === 'lxc' && config.data ? ([['Unprivileged', config.data['unprivileged'] ? 'yes' : 'no']] as [string, string][]) : []),
            ]}
          />
        </Panel>
        <Panel title="Use">
          <Stack gap="sm">
            <Meter label="CPU" fraction={now?.status === 'running' ? now.cpu : undefined} detail={`${now?.cpus ?? guest.maxcpu ?? '–'} CPUs`} />
            <Meter label="Memory" fraction={fraction(now?.mem, now?.maxmem)} detail={bytes(now?.maxmem)} />
            <DiskMeter guest={guest} status={now} />
          </Stack>
        </Panel>
      </SimpleGrid>
      <Group justify="space-between">
        <Text size="sm" c="dimmed">
          {span === 'live' ? 'Read every two seconds while this page is open.' : 'Averages recorded by the node.'}
        </Text>
        <TimeframeControl choices={SPANS} value={span} onChange={setSpan} />
      </Group>
      {span !== 'live' && <ErrorNote error={history.error} title="The history cannot be read" />}
      <Charts rows={rows} status={now} sync={`guest-${guest.vmid}`} />
      <Notes guest={guest} config={config.data} />
    </Stack>
  );
}
