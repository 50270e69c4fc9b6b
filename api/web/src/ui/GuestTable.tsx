// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// A sortable table of guests.
import { useMantineTheme } from '@mantine/core';
import { useNavigate, Link } from '@tanstack/react-router';
import { DataTable, type DataTableColumn, type DataTableSortStatus } from 'mantine-datatable';
import { useMemo, useState } from 'react';

import type { Guest } from '../api/types';
import { bytes, duration, fraction, percent } from '../lib/format';
import { resourceLink, SHORT_KIND } from '../lib/guest';
import { StatusBadge } from './Status';

const PAGE_SIZE = 100;

const COLUMNS: DataTableColumn<Guest>[] = [
  { accessor: 'vmid', title: 'ID', width: 80, sortable: true },
  { accessor: 'type', title: 'Kind', width: 70, sortable: true, render: (guest) => SHORT_KIND[guest.type] },
  {
    accessor: 'name',
    title: 'Name',
    sortable: true,
    ellipsis: true,
    render: (guest) => (
      <Link to={resourceLink(guest)} className="atoll-link">
        {guest.name ?? guest.vmid}
      </Link>
    ),
  },
  { accessor: 'status', title: 'State', width: 120, sortable: true, render: (guest) => <StatusBadge status={guest.status} lock={guest.lock} /> },
  { accessor: 'node', title: 'Node', width: 130, sortable: true, ellipsis: true },
  { accessor: 'cpu', title: 'CPU', width: 110, sortable: true, textAlign: 'right', render: (guest) => (guest.status === 'running' ? `${percent(guest.cpu)} of ${guest.maxcpu ?? '–'}` : '–') },
  { accessor: 'mem', title: 'Memory', width: 170, sortable: true, textAlign: 'right', render: (guest) => (guest.status === 'running' ? `${percent(fraction(guest.mem, guest.maxmem))} of ${bytes(guest.maxmem, 1)}` : bytes(guest.maxmem, 1)) },
  { accessor: 'maxdisk', title: 'Disk', width: 100, sortable: true, textAlign: 'right', render: (guest) => bytes(guest.maxdisk, 1) },
  { accessor: 'uptime', title: 'Uptime', width: 120, sortable: true, textAlign: 'right', render: (guest) => duration(guest.uptime) },
];

function compare(a: unknown, b: unknown): number {
  return typeof a === 'number' && typeof b === 'number' ? a - b : String(a ?? '').localeCompare(String(b ?? ''), undefined, { numeric: true });
}

export function GuestTable({ guests }: { guests: Guest[] }) {
  const navigate = useNavigate();
  const { fontSizes } = useMantineTheme();
  const [sort, setSort] = useState<DataTableSortStatus<Guest>>({ columnAccessor: 'vmid', direction: 'asc' });
  const [page, setPage] = useState(1);
  const sorted = useMemo(() => {
    const key = sort.columnAccessor as keyof Guest;
    const sign = sort.direction === 'asc' ? 1 : -1;
    return [...guests].sort((a, b) => sign * compare(a[key], b[key]) || a.vmid - b.vmid);
  }, [guests, sort]);
  const from = Math.min((page - 1) * PAGE_SIZE, Math.max(0, sorted.length - 1));
  const paging =
    sorted.length > PAGE_SIZE
      ? { totalRecords: sorted.length, recordsPerPage: PAGE_SIZE, page, onPageChange: setPage, paginationSize: 'xs' as const }
      : {};
  return (
    <DataTable
      withTableBorder
      idAccessor="id"
      records={sorted.slice(from, from + PAGE_SIZE)}
      columns={COLUMNS}
      sortStatus={sort}
      onSortStatusChange={setSort}
      verticalSpacing={4}
      fz={fontSizes.sm}
      highlightOnHover
      minHeight={guests.length ? 0 : 120}
      noRecordsText="No guests yet. Create one with the button at the top."
      onRowClick={({ record }) => void navigate({ href: resourceLink(record) })}
      {...(paging as object)}
    />
  );
}
