// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// The whole: nodes, guests, storages, tasks, options.
import { SimpleGrid, Stack, Text } from '@mantine/core';
import { IconServer2 } from '@tabler/icons-react';
import { Link, useParams } from '@tanstack/react-router';
import { DataTable } from 'mantine-datatable';
import { useMemo } from 'react';

import { useDatacenterOptions, useGuests, useNodes, useResources, useTasks, useVersion } from '../api/queries';
import type { Resource } from '../api/types';
import { bytes, duration, fraction, percent } from '../lib/format';
import { resourceLink } from '../lib/guest';
import { TaskTable } from '../tasks/TaskTable';
import { GuestTable } from '../ui/GuestTable';
import { Meter } from '../ui/Meter';
import { Page } from '../ui/Page';
import { Facts, Panel } from '../ui/Panel';
import { StatusBadge } from '../ui/Status';
import { ErrorNote } from './ErrorPage';

function sum(rows: Resource[], key: 'cpu' | 'maxcpu' | 'mem' | 'maxmem' | 'disk' | 'maxdisk'): number {
  return rows.reduce((total, row) => total + (row[key] ?? 0), 0);
}

/** Storages of all nodes; a shared one counts once. */
function distinctStorages(resources: Resource[]): Resource[] {
  const seen = new Map<string, Resource>();
  for (const row of resources) if (row.type === 'storage') seen.set(row.shared ? `${row.storage}` : row.id, row);
  return [...seen.values()];
}

function Totals({ nodes, storages }: { nodes: Resource[]; storages: Resource[] }) {
  const cores = sum(nodes, 'maxcpu');
  const busy = nodes.reduce((total, node) => total + (node.cpu ?? 0) * (node.maxcpu ?? 0), 0);
  return (
    <Panel title="Use">
      <Stack gap="sm">
        <Meter label="CPU" fraction={fraction(busy, cores)} detail={`${cores} CPUs`} />
        <Meter label="Memory" fraction={fraction(sum(nodes, 'mem'), sum(nodes, 'maxmem'))} detail={bytes(sum(nodes, 'maxmem'))} />
        <Meter label="Storage" fraction={fraction(sum(storages, 'disk'), sum(storages, 'maxdisk'))} detail={bytes(sum(storages, 'maxdisk'))} />
      </Stack>
    </Panel>
  );
}

function NodeTable({ nodes }: { nodes: Resource[] }) {
  return (
    <DataTable
      idAccessor="id"
      records={nodes}
      verticalSpacing={4}
      fz="sm"
      minHeight={nodes.length ? 0 : 80}
      columns={[
        { accessor: 'node', title: 'Node', render: (node) => <Link to={resourceLink(node)} className="atoll-link">{node.node}</Link> },
        { accessor: 'status', title: 'State', render: (node) => <StatusBadge status={node.status} /> },
        { accessor: 'cpu', title: 'CPU', textAlign: 'right', render: (node) => `${percent(node.cpu)} of ${node.maxcpu ?? '–'}` },
        { accessor: 'mem', title: 'Memory', textAlign: 'right', render: (node) => `${percent(fraction(node.mem, node.maxmem))} of ${bytes(node.maxmem, 1)}` },
        { accessor: 'uptime', title: 'Uptime', textAlign: 'right', render: (node) => duration(node.uptime) },
      ]}
    />
  );
}

function Summary() {
  const { data: resources = [] } = useResources();
  const nodes = useNodes();
  const guests = useGuests();
  const version = useVersion();
  const storages = useMemo(() => distinctStorages(resources), [resources]);
  const count = (type: string, status: string) => guests.filter((guest) => guest.type === type && (guest.status === status) === true).length;
  const total = (type: string) => guests.filter((guest) => guest.type === type).length;
  return (
    <Stack gap="sm">
      <SimpleGrid cols={{ base: 1, lg: 2 }} spacing="sm">
        <Panel title="Guests">
          <Facts
            rows={[
              ['Nodes', `${nodes.filter((node) => node.status === 'online').length} of ${nodes.length} online`],
              ['Virtual machines', `${count('qemu', 'running')} of ${total('qemu')} running`],
              ['Containers', `${count('lxc', 'running')} of ${total('lxc')} running`],
              ['Version', version.data?.atoll ?? version.data?.version ?? '–'],
              ['API of Proxmox VE', version.data?.atoll ? version.data.version : '–'],
            ]}
          />
        </Panel>
        <Totals nodes={nodes} storages={storages} />
      </SimpleGrid>
      <Panel title="Nodes">
        <NodeTable nodes={nodes} />
      </Panel>
    </Stack>
  );
}

function Guests() {
  return <GuestTable guests={useGuests()} />;
}

function Tasks() {
  const tasks = useTasks();
  return tasks.isError ? <ErrorNote error={tasks.error} /> : <TaskTable tasks={tasks.data} />;
}

function Options() {
  const options = useDatacenterOptions();
  if (options.isError) return <ErrorNote error={options.error} />;
  const rows = Object.entries(options.data ?? {}).map(([key, value]) => [key, typeof value === 'object' ? JSON.stringify(value) : String(value)] as [string, string]);
  return <Panel title="Options">{rows.length ? <Facts rows={rows} /> : <Text size="sm">Everything is at its default.</Text>}</Panel>;
}

export function DatacenterPage() {
  const { tab } = useParams({ strict: false }) as { tab?: string };
  return (
    <Page
      title="Datacenter"
      icon={<IconServer2 size={20} stroke={1.7} aria-hidden />}
      base="/"
      tab={tab}
      tabs={[
        { value: 'summary', label: 'Summary', content: <Summary /> },
        { value: 'guests', label: 'Guests', content: <Guests /> },
        { value: 'tasks', label: 'Tasks', content: <Tasks /> },
        { value: 'options', label: 'Options', content: <Options /> },
      ]}
    />
  );
}
