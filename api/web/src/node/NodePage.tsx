// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// The page of one node.
import { Button, Group, SimpleGrid, Skeleton, Stack } from '@mantine/core';
import { IconPlus, IconServer } from '@tabler/icons-react';
import { Link, useParams } from '@tanstack/react-router';
import { DataTable } from 'mantine-datatable';
import { lazy, Suspense, useMemo, useState } from 'react';

import { path } from '../api/client';
import { useGuests, useHistory, useNodeNetwork, useNodes, useNodeStatus, useNodeStorages, useNodeTasks, type Timeframe } from '../api/queries';
import { ErrorNote } from '../app/ErrorPage';
import { usePageSearch } from '../app/navigation';
import { ChartPanel } from '../charts/LazyChart';
import { chartData } from '../charts/series';
import { TimeframeControl } from '../charts/TimeframeControl';
import { bytes, duration, fraction, percent, rate } from '../lib/format';
import { TaskTable } from '../tasks/TaskTable';
import { GuestTable } from '../ui/GuestTable';
import { Meter } from '../ui/Meter';
import { Page } from '../ui/Page';
import { Facts, Panel } from '../ui/Panel';
import { StatusBadge } from '../ui/Status';
import { BulkActions } from './BulkActions';

const NodeShell = lazy(() => import('../terminal/Console').then((module) => ({ default: module.NodeShell })));

const SPANS: readonly Timeframe[] = ['hour', 'day', 'week', 'month', 'year'];
const shortBytes = (value: number) => bytes(value, 1);
const load = (value: number) => value.toFixed(2);

function Charts({ node }: { node: string }) {
  const [span, setSpan] = useState<Timeframe>('hour');
  const history = useHistory(path`/nodes/${node}`, span);
  const rows = history.data;
  const charts = useMemo(
    () => ({
      cpu: chartData(rows ?? [], [['CPU', 'cpu'], ['Waiting for disks', 'iowait']]),
      load: chartData(rows ?? [], [['Load', 'loadavg']]),
      memory: chartData(rows ?? [], [['Used', 'memused']]),
      network: chartData(rows ?? [], [['In', 'netin'], ['Out', 'netout']]),
    }),
    [rows],
  );
  const memoryMax = rows?.findLast((row) => row['memtotal'] !== undefined)?.['memtotal'];
  return (
    <>
      <Group justify="flex-end">
        <TimeframeControl choices={SPANS} value={span} onChange={setSpan} />
      </Group>
      <ErrorNote error={history.error} title="The history cannot be read" />
      <SimpleGrid cols={{ base: 1, lg: 2 }} spacing="sm">
        <ChartPanel title="CPU" data={charts.cpu} format={percent} sync="node" />
        <ChartPanel title="Load" data={charts.load} format={load} sync="node" />
        <ChartPanel title="Memory" data={charts.memory} format={shortBytes} max={memoryMax} binary sync="node" />
        <ChartPanel title="Network" data={charts.network} format={rate} binary sync="node" />
      </SimpleGrid>
    </>
  );
}

function Summary({ node }: { node: string }) {
  const status = useNodeStatus(node);
  const now = status.data;
  const cpus = now?.cpuinfo?.cpus;
  return (
    <Stack gap="sm">
      <ErrorNote error={status.error} title="The state of this node cannot be read" />
      <SimpleGrid cols={{ base: 1, lg: 2 }} spacing="sm">
        <Panel title="Node">
          <Facts
            rows={[
              ['Uptime', duration(now?.uptime)],
              ['Load (1, 5, 15 min)', now?.loadavg?.join('  ') ?? '–'],
              ['CPU', now?.cpuinfo?.model ?? '–'],
              ['Kernel', now?.['current-kernel']?.release ?? now?.kversion ?? '–'],
              ['Version', now?.pveversion ?? '–'],
            ]}
          />
        </Panel>
        <Panel title="Use">
          <Stack gap="sm">
            <Meter label="CPU" fraction={now?.cpu} detail={`${cpus ?? '–'} CPUs`} />
            <Meter label="Memory" fraction={fraction(now?.memory?.used, now?.memory?.total)} detail={bytes(now?.memory?.total)} />
            <Meter label="Root file system" fraction={fraction(now?.rootfs?.used, now?.rootfs?.total)} detail={bytes(now?.rootfs?.total)} />
            {Boolean(now?.swap?.total) && <Meter label="Swap" fraction={fraction(now?.swap?.used, now?.swap?.total)} detail={bytes(now?.swap?.total)} />}
          </Stack>
        </Panel>
      </SimpleGrid>
      <Charts node={node} />
    </Stack>
  );
}

function Guests({ node }: { node: string }) {
  const guests = useGuests();
  return <GuestTable guests={useMemo(() => guests.filter((guest) => guest.node === node), [guests, node])} />;
}

function Storages({ node }: { node: string }) {
  const storages = useNodeStorages(node);
  if (storages.isError) return <ErrorNote error={storages.error} />;
  return (
    <DataTable
      withTableBorder
      idAccessor="storage"
      records={storages.data ?? []}
      fetching={storages.isLoading}
      minHeight={storages.data?.length ? 0 : 100}
      verticalSpacing={4}
      fz="sm"
      columns={[
        { accessor: 'storage', title: 'Storage', render: (row) => <Link to="/nodes/$node/storage/$storage" params={{ node, storage: row.storage }} className="atoll-link">{row.storage}</Link> },
        { accessor: 'type', title: 'Type' },
        { accessor: 'content', title: 'Content', render: (row) => row.content.split(',').join(', ') },
        { accessor: 'active', title: 'State', render: (row) => <StatusBadge status={row.active ? 'available' : 'offline'} /> },
        { accessor: 'used', title: 'Used', textAlign: 'right', render: (row) => `${percent(fraction(row.used, row.total))} of ${bytes(row.total, 1)}` },
      ]}
    />
  );
}

function Network({ node }: { node: string }) {
  const network = useNodeNetwork(node);
  if (network.isError) return <ErrorNote error={network.error} />;
  return (
    <DataTable
      withTableBorder
      idAccessor="iface"
      records={network.data ?? []}
      fetching={network.isLoading}
      minHeight={network.data?.length ? 0 : 100}
      verticalSpacing={4}
      fz="sm"
      columns={[
        { accessor: 'iface', title: 'Interface' },
        { accessor: 'type', title: 'Type' },
        { accessor: 'active', title: 'State', render: (row) => <StatusBadge status={row.active ? 'up' : 'down'} /> },
        { accessor: 'cidr', title: 'Address', render: (row) => row.cidr ?? row.address ?? '–' },
        { accessor: 'gateway', title: 'Gateway', render: (row) => row.gateway ?? '–' },
        { accessor: 'bridge_ports', title: 'Ports', render: (row) => row.bridge_ports || '–' },
        { accessor: 'bridge_vlan_aware', title: 'VLAN-aware', render: (row) => (row.type === 'bridge' ? (row.bridge_vlan_aware ? 'Yes' : 'No') : '–') },
        { accessor: 'comments', title: 'Comment', ellipsis: true },
      ]}
    />
  );
}

function Tasks({ node }: { node: string }) {
  const tasks = useNodeTasks(node);
  return tasks.isError ? <ErrorNote error={tasks.error} /> : <TaskTable tasks={tasks.data} />;
}

export function NodePage() {
  const { node, tab } = useParams({ strict: false }) as { node: string; tab?: string };
  const row = useNodes().find((other) => other.node === node);
  const [, change] = usePageSearch();
  const create = (kind: 'vm' | 'ct', label: string) => (
    <Button variant="default" leftSection={<IconPlus size={14} aria-hidden />} onClick={() => change({ create: kind, on: node })}>
      {label}
    </Button>
  );
  return (
    <Page
      key={node}
      title={`Node ${node}`}
      icon={<IconServer size={20} stroke={1.7} aria-hidden />}
      badge={row && <StatusBadge status={row.status} />}
      actions={<Group gap={6}>{create('vm', 'VM')}{create('ct', 'Container')}<BulkActions node={node} /></Group>}
      base={path`/nodes/${node}`}
      tab={tab}
      tabs={[
        { value: 'summary', label: 'Summary', content: <Summary node={node} /> },
        { value: 'guests', label: 'Guests', content: <Guests node={node} /> },
        { value: 'storages', label: 'Storages', content: <Storages node={node} /> },
        { value: 'network', label: 'Network', content: <Network node={node} /> },
        {
          value: 'shell',
          label: 'Shell',
          content: (
            <Suspense fallback={<Skeleton h={300} />}>
              <NodeShell node={node} />
            </Suspense>
          ),
        },
        { value: 'tasks', label: 'Tasks', content: <Tasks node={node} /> },
      ]}
    />
  );
}
